"""Launches the CUDA kernels on PyTorch tensors: a few microseconds on the host, no synchronisation, any stream.

What can be known before the tensors' addresses are, is kept in a Plan per (shapes, strides, dtype, mask, schedule, device):
kernel, grid, which inputs must be copied first. A tensor map is kept per address. Kernels are compiled on first use.
"""

from __future__ import annotations

import ctypes
import math
import struct
import threading
from functools import cache, lru_cache

import torch
from torch import Tensor

from ...simulator.errors import UsageError
from ...simulator.problem.order import SECTION_BYTES
from ..arguments import check_storage, scale_of
from ..compile import build
from . import driver
from .config import HEAD_DIMS, SCHEDULES, KernelConfig, config_for

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
ELEMENT_BYTES = 2
BOX_COLUMNS = 64
"""128 bytes, the widest row that the 128-byte swizzle takes (PTX ISA, tensor swizzling modes)."""
CONSUMER_ROWS = 64
"""Rows of Q in a box: one consumer warpgroup's."""
WARP_ROWS = 16
"""Rows of O in a box: each warp sends its own."""
TMA_ALIGNMENT = 16
LOG2_E = math.log2(math.e)
MAPS_KEPT = 64
"""Tensor maps kept per operand of a plan."""
PARAMS = struct.Struct("@PPPiiiiiiif")
"""struct Params of the kernels: lse, queue, trace, batch, heads, kv_heads, seqlen_q, seqlen_k, m_tiles, section, scale_log2."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool = False, schedule: str = "fa3"
) -> tuple[Tensor, Tensor]:
    """O (B, S_q, H, D) and LSE (B, H, S_q) by the schedule's kernel, on q's device and its current stream.

    q is (B, S_q, H, D), k and v (B, S_k, H_kv, D), fp16 or bf16, D of 64, 128 or 256, H a multiple of H_kv, any strides;
    softmax_scale as of ops.flash_attn_func. Inputs that TMA cannot describe are copied first. Raises UsageError for a device
    of another compute capability than 9.0, build.CompileError and build.MissingCompiler.
    """
    plan = plan_for(q.shape, k.shape, q.stride(), k.stride(), v.stride(), q.dtype, causal, schedule, q.get_device())
    return plan.run(q, k, v, scale_of(softmax_scale, q.shape[3]))


class Kernel:
    """A compiled kernel, loaded on one device."""

    def __init__(self, config: KernelConfig, device: int) -> None:
        self.config = config
        self.built = build.build(config.source)
        self.context = driver.primary_context(device)
        driver.call("cuCtxSetCurrent", self.context)
        self.smem_bytes = self.built.report.dynamic_smem_bytes
        self.function = driver.load_kernel(self.built.cubin, build.ENTRY, self.smem_bytes)


@cache
def kernel_for(config: KernelConfig, device: int) -> Kernel:
    """The kernel of `config` on a device, compiled and loaded once."""
    with torch.cuda.device(device):
        return Kernel(config, device)


class Plan:
    """Everything about a launch but the addresses."""

    def __init__(self, kernel: Kernel, q_shape: tuple, k_shape: tuple, strides: tuple[tuple, ...], device: int) -> None:
        config, tile = kernel.config, kernel.config.tile
        self.kernel = kernel
        self.device = device
        batch, seqlen_q, heads, head_dim = q_shape
        _, seqlen_k, kv_heads, _ = k_shape
        self.lse_shape = (batch, heads, seqlen_q)
        self.empty = 0 in (batch, heads, seqlen_q)
        self.keyless = seqlen_k == 0
        self.m_tiles = -(-seqlen_q // tile.block_m)
        sharing = heads // kv_heads if kv_heads else 1
        section = min(batch * heads, section_heads(seqlen_k, head_dim, sharing)) if seqlen_k else 1
        self.sizes = (batch, heads, kv_heads, seqlen_q, seqlen_k, self.m_tiles, section)
        self.grid = grid_of(batch * heads, self.m_tiles, tile.cluster, sm_count(device))
        self.threads = config.threads
        self.function = kernel.function
        self.smem_bytes = kernel.smem_bytes
        contiguous = (seqlen_q * heads * head_dim, heads * head_dim, head_dim, 1)
        self.contiguous = strides[0] == contiguous
        q_box, kv_box = (BOX_COLUMNS, CONSUMER_ROWS), (BOX_COLUMNS, config.kv_box_rows)
        self.q, self.k, self.v, self.o = (
            Operand(config.dtype, shape, stride, box)
            for shape, stride, box in (
                (q_shape, strides[0], q_box),
                (k_shape, strides[1], kv_box),
                (k_shape, strides[2], kv_box),
                (q_shape, contiguous, (BOX_COLUMNS, WARP_ROWS)),
            )
        )

    def run(self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, trace: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Launch on the device's current stream, with a scale that scale_of gave; (O, LSE)."""
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                return self.run(q, k, v, softmax_scale, trace)
        if softmax_scale <= 0:  # masked scores are -inf, -inf * 0 is NaN, and maxima are taken before the scale
            config, other = self.kernel.config, (-q, -softmax_scale) if softmax_scale else (q * 0, 1.0)
            return forward(other[0], k, v, other[1], config.causal, config.schedule)
        o = torch.empty_like(q) if self.contiguous else q.new_empty(q.shape)  # the first takes half as long
        lse = q.new_empty(self.lse_shape, dtype=torch.float32)
        if self.empty or self.keyless:
            return o.zero_(), lse.fill_(-math.inf)
        q, k, v = self.q.readable(q), self.k.readable(k), self.v.readable(v)
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        queue = queue_of(self.device, stream)
        local = _local
        try:
            params, pointers = local.params, local.pointers
        except AttributeError:
            driver.ensure_context(self.device)
            params, pointers = local.prepare()
        PARAMS.pack_into(
            params,
            0,
            lse.data_ptr(),
            queue.data_ptr(),
            trace.data_ptr() if trace is not None else 0,
            *self.sizes,
            softmax_scale * LOG2_E,
        )
        # The maps are named, so that no other thread's eviction frees one before the driver has read it.
        q_map, k_map, v_map, o_map = self.q.map(q), self.k.map(k), self.v.map(v), self.o.map(o)
        pointers[0], pointers[1], pointers[2], pointers[3] = q_map.address, k_map.address, v_map.address, o_map.address
        self.launch(stream)
        return o, lse

    def launch(self, stream: int) -> None:
        """Launch with the argument block that this thread filled last."""
        local = _local
        arguments = (
            self.function, self.grid, 1, 1, self.threads, 1, 1, self.smem_bytes, stream, local.pointers_address, None
        )  # fmt: skip
        code = local.launch(*arguments)
        if code == driver.INVALID_CONTEXT:  # a thread that never touched CUDA has none yet: give it the device's
            driver.call("cuCtxSetCurrent", self.kernel.context)
            code = local.launch(*arguments)
        if code:
            raise driver.DriverError("cuLaunchKernel", code)


class Operand:
    """One tensor of a plan: how TMA sees it, and its tensor maps by address."""

    def __init__(self, dtype: str, shape: tuple, strides: tuple, box: tuple[int, int]) -> None:
        self.dtype = dtype
        self.box = (box[0], box[1], 1, 1)
        batch, seqlen, heads, head_dim = shape
        self.sizes = (head_dim, seqlen, heads, batch)
        self.copied = not describable(shape, strides)
        if self.copied:
            strides = (seqlen * heads * head_dim, heads * head_dim, head_dim, 1)
        # A dimension of one element is never stepped along: any stride will do, and its own may be invalid.
        row = head_dim * ELEMENT_BYTES
        in_order = zip((seqlen, heads, batch), (strides[1], strides[2], strides[0]), strict=True)
        self.strides_bytes = tuple(stride * ELEMENT_BYTES if size > 1 else row for size, stride in in_order)
        self.maps: dict[int, driver.TensorMap] = {}

    def readable(self, x: Tensor) -> Tensor:
        """x, or a copy that TMA can read and `map` describes: contiguous where no map has x's strides, else of x's strides."""
        if self.copied:
            check_storage(x)
            return x.clone(memory_format=torch.contiguous_format)
        return x if x.data_ptr() % TMA_ALIGNMENT == 0 else aligned(x)

    def map(self, x: Tensor) -> driver.TensorMap:
        """The tensor map of x."""
        pointer = x.data_ptr()
        found = self.maps.get(pointer)
        if found is None:
            check_storage(x)
            if len(self.maps) >= MAPS_KEPT:
                self.maps.clear()
            found = self.maps[pointer] = driver.TensorMap(pointer, self.dtype, self.sizes, self.strides_bytes, self.box)
        return found


class _Local(threading.local):
    """A thread's own argument block, reused: the driver has copied it when cuLaunchKernel returns."""

    def prepare(self) -> tuple[bytearray, ctypes.Array]:
        self.params = bytearray(PARAMS.size)
        self.held = (ctypes.c_char * PARAMS.size).from_buffer(self.params)
        self.pointers = (ctypes.c_void_p * 5)()
        self.pointers[4] = ctypes.addressof(self.held)
        self.pointers_address = ctypes.addressof(self.pointers)
        launch = driver.library().cuLaunchKernel
        launch.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        self.launch = launch
        return self.params, self.pointers


_local = _Local()


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
    check_device(schedule, device)
    if q_shape[3] not in HEAD_DIMS:
        raise UsageError(f"head_dim={q_shape[3]} is not supported by {schedule!r} ({', '.join(map(str, HEAD_DIMS))})")
    if schedule not in SCHEDULES:
        raise UsageError(f"schedule={schedule!r} has no CUDA kernel ({', '.join(SCHEDULES)})")
    kernel = kernel_for(config_for(schedule, DTYPES[dtype], q_shape[3], causal), device)
    return Plan(kernel, tuple(q_shape), tuple(k_shape), (q_strides, k_strides, v_strides), device)


def check_device(schedule: str, device: int) -> None:
    """Raise UsageError, one sentence, unless the kernels are for the device of that number; below 0 it is none of CUDA's."""
    if device < 0:
        raise UsageError(f"the {schedule!r} kernel runs on an H100 or H200 and q is not on a CUDA device: move it with .cuda()")
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        raise UsageError(
            f"the {schedule!r} kernel is for compute capability 9.0 (H100, H200) and {torch.cuda.get_device_name(device)}"
            f" has {capability[0]}.{capability[1]}; use schedule='fa2'"
        )


def describable(shape: tuple, strides: tuple) -> bool:
    """Whether TMA can read a (B, S, H, D) tensor of these strides (CUDA driver API, cuTensorMapEncodeTiled)."""
    if strides[3] != 1:
        return False
    steps = [stride * ELEMENT_BYTES for size, stride in zip(shape[:3], strides[:3], strict=True) if size > 1]
    return all(step % TMA_ALIGNMENT == 0 and 0 <= step < 1 << 40 for step in steps)


def aligned(x: Tensor) -> Tensor:
    """A copy of x of its own strides (any, also 0) on an address that TMA takes; UsageError where x's storage ends early."""
    check_storage(x)
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((span,), (1,)).clone().as_strided(x.shape, x.stride(), 0)


def grid_of(heads: int, m_tiles: int, cluster: int, sm_count: int) -> int:
    """CTAs of a persistent launch over heads x m_tiles query tiles: a multiple of the cluster."""
    tiles = heads * -(-m_tiles // cluster) * cluster
    return max(cluster, min(sm_count // cluster * cluster, tiles))


def section_heads(seqlen_k: int, head_dim: int, sharing: int) -> int:
    """Query heads whose K and V are walked together, as in simulator/problem/order.py, "longest-first"."""
    fit = max(1, SECTION_BYTES // (2 * seqlen_k * head_dim * ELEMENT_BYTES))
    return 2 ** (fit.bit_length() - 1) * sharing


@cache
def sm_count(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_Operand, _sm_count = Operand, sm_count  # as backward/launch.py calls them


_queues: dict[tuple[int, int], Tensor] = {}


def queue_of(device: int, stream: int) -> Tensor:
    """Two zeros in device memory that no other running launch uses: next tile, CTAs done.

    Launches of one stream run one after another and leave the zeros they found, so a stream has one queue. A launch that
    is captured into a CUDA graph may be replayed on any stream, beside others: it has its own.
    """
    if torch._C._cuda_isCurrentStreamCapturing():
        return torch.zeros(2, dtype=torch.int32, device=f"cuda:{device}")
    queue = _queues.get((device, stream))
    if queue is None:
        queue = _queues[device, stream] = torch.zeros(2, dtype=torch.int32, device=f"cuda:{device}")
    return queue
