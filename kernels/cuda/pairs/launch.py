"""Launches kernels whose CTAs share an SM: a plan of the kernels that have one alone, of as many CTAs as are resident."""

from __future__ import annotations

import ctypes

from torch import Tensor

from .. import driver, launch
from .config import PairConfig

CARVEOUT, ALL_SHARED = 9, 100
"""CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, and per cent: two CTAs' shared memory has to be there for both."""


def plan_for(config: PairConfig, q: Tensor, k: Tensor, v: Tensor) -> launch.Plan:
    """The plan of `config` on tensors like these (B, S, H, 64); call its `run(q, k, v, softmax_scale)`, with a scale above 0."""
    device = q.get_device()
    strides = q.stride(), k.stride(), v.stride()
    plan = launch.Plan(launch.kernel_for(config, device), tuple(q.shape), tuple(k.shape), strides, device)
    plan.grid = launch.grid_of(q.shape[0] * q.shape[2], plan.m_tiles, 1, config.tile.resident * launch.sm_count(device))
    driver.call("cuFuncSetAttribute", plan.function, CARVEOUT, ALL_SHARED)
    return plan


def resident(plan: launch.Plan) -> int:
    """CTAs of the plan's kernel that the driver would have on an SM at a time."""
    found = ctypes.c_int()
    about = (plan.function, plan.threads, ctypes.c_size_t(plan.smem_bytes))
    driver.call("cuOccupancyMaxActiveBlocksPerMultiprocessor", ctypes.byref(found), *about)
    return found.value
