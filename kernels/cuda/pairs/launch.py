"""Launches kernels whose CTAs share an SM: a plan of the kernels that have one alone, of as many CTAs as are resident."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from .. import driver, launch
from .config import config_for

CARVEOUT, ALL_SHARED = 9, 100
"""CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, and per cent: two CTAs' shared memory has to be there for both."""


@lru_cache(maxsize=512)
def plan_for(
    q_shape: tuple, k_shape: tuple, q_strides: tuple, k_strides: tuple, v_strides: tuple,
    dtype: torch.dtype, causal: bool, name: str, device: int,
) -> launch.Plan:  # fmt: skip
    """The plan of a launch, as of kernels that have an SM alone; UsageError where the device or the shapes cannot have one."""
    launch.check_device(name, device)
    config = config_for(name, launch.DTYPES[dtype], q_shape[3], causal)
    plan = launch.Plan(launch.kernel_for(config, device), tuple(q_shape), tuple(k_shape), (q_strides, k_strides, v_strides), device)
    plan.grid = launch.grid_of(q_shape[0] * q_shape[2], plan.m_tiles, 1, config.tile.resident * launch.sm_count(device))
    driver.call("cuFuncSetAttribute", plan.function, CARVEOUT, ALL_SHARED)
    return plan


def resident(plan: launch.Plan) -> int:
    """CTAs of the plan's kernel that the driver would have on an SM at a time."""
    found = ctypes.c_int()
    about = (plan.function, plan.threads, ctypes.c_size_t(plan.smem_bytes))
    driver.call("cuOccupancyMaxActiveBlocksPerMultiprocessor", ctypes.byref(found), *about)
    return found.value
