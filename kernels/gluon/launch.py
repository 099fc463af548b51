"""Launches the Gluon kernels on PyTorch tensors past Triton's launcher: tensor maps and plan as of the CUDA kernels."""

from __future__ import annotations

import ctypes
import math
import threading
from functools import cache, lru_cache

import torch
from torch import Tensor

from ...simulator.errors import UsageError
from ..arguments import scale_of
from ..cuda import driver
from ..cuda.launch import BOX_COLUMNS, DTYPES, LOG2_E, Operand, section_heads, sm_count
from . import build
from .config import BLOCK_M, HEAD_DIMS, SCHEDULES, GluonConfig, config_for

MAP_ARGUMENTS = 9
"""Of a tensor map in Triton's signature: the map, four sizes and four strides, which the kernels do not read."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool = False, schedule: str = "fa3"
) -> tuple[Tensor, Tensor]:
    """O (B, S_q, H, D) and LSE (B, H, S_q) by the schedule's Gluon kernel, on q's device and its current stream.

    Tensors and errors as of cuda.launch.forward; compiled by the installed Triton on first use.
    """
    plan = plan_for(q.shape, k.shape, q.stride(), k.stride(), v.stride(), q.dtype, causal, schedule, q.get_device())
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
        m_tiles = -(-seqlen_q // BLOCK_M)
        sharing = heads // kv_heads if kv_heads else 1
        section = min(batch * heads, section_heads(seqlen_k, head_dim, sharing)) if seqlen_k else 1
        tiles = m_tiles * batch * heads
        self.sizes = (heads, sharing, seqlen_q, seqlen_k, m_tiles, section, tiles)
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
        block = _block()
        maps = self.q.map(q), self.k.map(k), self.v.map(v), self.o.map(o)  # held until the driver has read them
        for place, each in enumerate(maps):
            block.pointers[place * MAP_ARGUMENTS] = each.address
        block.lse.value = lse.data_ptr()
        block.sizes[:] = self.sizes
        block.scale.value = softmax_scale * LOG2_E
        built = self.kernel.built
        arguments = (self.kernel.function, self.grid, 1, 1, built.threads, 1, 1, built.smem_bytes, stream, block.address, None)
        code = block.launch(*arguments)
        if code == driver.INVALID_CONTEXT:  # a thread that never touched CUDA has none yet: give it the device's
            driver.call("cuCtxSetCurrent", self.kernel.context)
            code = block.launch(*arguments)
        if code:
            raise driver.DriverError("cuLaunchKernel", code)
        return o, lse


class _Block:
    """A thread's argument block, reused: the driver has copied it when cuLaunchKernel returns.

    Behind the kernel's own arguments Triton passes two pointers to scratch memory, which these kernels do not use.
    """

    SIZES = 7

    def __init__(self) -> None:
        self.lse, self.scale, self.nothing = ctypes.c_void_p(), ctypes.c_float(), ctypes.c_uint64(0)
        self.sizes = (ctypes.c_int32 * self.SIZES)()
        nothing = ctypes.addressof(self.nothing)
        sizes = [ctypes.addressof(self.sizes) + 4 * place for place in range(self.SIZES)]
        addresses = [nothing] * (4 * MAP_ARGUMENTS) + [ctypes.addressof(self.lse), *sizes, ctypes.addressof(self.scale)]
        addresses += [nothing, nothing]
        self.pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        self.address = ctypes.addressof(self.pointers)
        self.launch = driver.library().cuLaunchKernel
        self.launch.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]


_local = threading.local()


def _block() -> _Block:
    try:
        return _local.block
    except AttributeError:
        _local.block = _Block()
        return _local.block


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
    kernel = kernel_for(config_for(schedule, DTYPES[dtype], q_shape[3], causal), device)
    return Plan(kernel, tuple(q_shape), tuple(k_shape), (q_strides, k_strides, v_strides), device)
