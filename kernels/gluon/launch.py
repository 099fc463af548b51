"""Launches the Gluon kernels on PyTorch tensors past Triton's launcher: tensor maps and plan as of the CUDA kernels."""

from __future__ import annotations

import math
import threading
from functools import cache, lru_cache

import torch
from torch import Tensor

from ...simulator.errors import UsageError
from ..arguments import scale_of
from ..cuda import driver
from ..cuda.launch import BOX_COLUMNS, DTYPES, LOG2_E, Operand, queue_of, section_heads, sm_count
from ..launch.arguments import ArgumentBlock
from . import build
from .config import HEAD_DIMS, SCHEDULES, GluonConfig, config_for


def forward(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool = False, schedule: str = "fa3"
) -> tuple[Tensor, Tensor]:
    """O (B, S_q, H, D) and LSE (B, H, S_q) by the schedule's Gluon kernel, on q's device and its current stream.

    Tensors and errors as of cuda.launch.forward; compiled by the installed Triton on first use.
    """
    plan = plan_for(q.shape, k.shape, q.stride(), k.stride(), v.stride(), q.dtype, causal, schedule, q.get_device())
    return plan.run(q, k, v, scale_of(softmax_scale, q.shape[3]))


def forward_by(config: GluonConfig, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    """As `forward`, by one kernel of those there might be, which suits the tensors."""
    device = q.get_device()
    plan = Plan(kernel_for(config, device), tuple(q.shape), tuple(k.shape), (q.stride(), k.stride(), v.stride()), device)
    return plan.run(q, k, v, scale_of(softmax_scale, q.shape[3]))


class Kernel:
    """A compiled kernel, loaded on one device."""

    def __init__(self, config: GluonConfig, device: int, built: build.Built | None = None) -> None:
        self.config = config
        self.built = built or build.build(config)
        self.context = driver.primary_context(device)
        driver.call("cuCtxSetCurrent", self.context)
        self.function = driver.load_kernel(self.built.cubin, build.ENTRY, self.built.smem_bytes)


@cache
def kernel_for(config: GluonConfig, device: int) -> Kernel:
    """The kernel of `config` on a device, compiled and loaded once."""
    with torch.cuda.device(device):
        return Kernel(config, device)


class Plan:
    """Everything about a launch but the addresses."""

    def __init__(self, kernel: Kernel, q_shape: tuple, k_shape: tuple, strides: tuple[tuple, ...], device: int) -> None:
        config = kernel.config
        self.kernel, self.device = kernel, device
        batch, seqlen_q, heads, head_dim = q_shape
        _, seqlen_k, kv_heads, _ = k_shape
        self.lse_shape = (batch, heads, seqlen_q)
        self.empty = 0 in (batch, heads, seqlen_q)
        self.keyless = seqlen_k == 0
        m_tiles = -(-seqlen_q // config.block_m)
        sharing = heads // kv_heads if kv_heads else 1
        section = min(batch * heads, section_heads(seqlen_k, head_dim, sharing)) if seqlen_k else 1
        tiles = m_tiles * batch * heads
        self.local = threading.local()
        self.sizes = {
            "heads": heads, "sharing": sharing, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k,
            "m_tiles": m_tiles, "section": section, "tiles": tiles,
        }  # fmt: skip
        self.grid = tiles if config.one_partition else max(1, min(sm_count(device), tiles))
        contiguous = (seqlen_q * heads * head_dim, heads * head_dim, head_dim, 1)
        self.contiguous = strides[0] == contiguous
        self.q, self.k, self.v, self.o = (
            Operand(config.dtype, shape, stride, (BOX_COLUMNS, rows))
            for shape, stride, rows in (
                (q_shape, strides[0], config.q_rows),
                (k_shape, strides[1], config.block_n),
                (k_shape, strides[2], config.block_n),
                (q_shape, contiguous, config.q_rows),
            )
        )

    def run(self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        """Launch on the device's current stream, with a scale that scale_of gave; (O, LSE)."""
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                return self.run(q, k, v, softmax_scale)
        if softmax_scale <= 0:  # masked scores are -inf, -inf * 0 is NaN, and maxima are taken before the scale
            config, other = self.kernel.config, (-q, -softmax_scale) if softmax_scale else (q * 0, 1.0)
            return forward(other[0], k, v, other[1], config.causal, config.schedule)
        o = torch.empty_like(q) if self.contiguous else q.new_empty(q.shape)
        lse = q.new_empty(self.lse_shape, dtype=torch.float32)
        if self.empty or self.keyless:
            return o.zero_(), lse.fill_(-math.inf)
        q, k, v = self.q.readable(q), self.k.readable(k), self.v.readable(v)
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        block = self.block()
        maps = self.q.map(q), self.k.map(k), self.v.map(v), self.o.map(o)  # held until the driver has read them
        for name, each in zip("qkvo", maps, strict=True):
            block.pointers[block.maps[name]] = each.address
        block.values["lse"].value = lse.data_ptr()
        if "queue" in block.values:
            queue = queue_of(self.device, stream)
            block.values["queue"].value = queue.data_ptr()
        block.values["scale_log2"].value = softmax_scale * LOG2_E
        built = self.kernel.built
        block.launch(self.kernel.function, self.grid, built.threads, built.smem_bytes, stream, self.kernel.context)
        return o, lse

    def block(self) -> ArgumentBlock:
        """This thread's argument block, with the sizes in it."""
        try:
            return self.local.block
        except AttributeError:
            block = self.local.block = ArgumentBlock(self.kernel.built.signature)
            for name, size in self.sizes.items():
                block.values[name].value = size
            return block


@lru_cache(maxsize=512)
def plan_for(
    q_shape: tuple,
    k_shape: tuple,
    q_strides: tuple,
    k_strides: tuple,
    v_strides: tuple,
    dtype: torch.dtype,
    causal: bool,
    schedule: str,
    device: int,
) -> Plan:
    """The plan of a launch; UsageError where the device or the shapes cannot have one."""
    if device < 0:
        raise UsageError("the Gluon kernels run on an H100 or H200 and q is not on a CUDA device: move it with .cuda()")
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        raise UsageError(
            f"the Gluon kernels are for compute capability 9.0 (H100, H200) and {torch.cuda.get_device_name(device)}"
            f" has {capability[0]}.{capability[1]}; use schedule='fa2'"
        )
    if q_shape[3] not in HEAD_DIMS:
        raise UsageError(f"head_dim={q_shape[3]} is not supported by the Gluon kernels ({', '.join(map(str, HEAD_DIMS))})")
    if schedule not in SCHEDULES:
        raise UsageError(f"schedule={schedule!r} has no Gluon kernel ({', '.join(SCHEDULES)})")
    kernel = kernel_for(config_for(schedule, DTYPES[dtype], q_shape[3], causal, k_shape[1]), device)
    return Plan(kernel, tuple(q_shape), tuple(k_shape), (q_strides, k_strides, v_strides), device)
