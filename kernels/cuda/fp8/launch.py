"""Launches the FP8 kernels on PyTorch tensors: no synchronisation, any stream. Kernels are compiled on first use."""

from __future__ import annotations

import ctypes
import math
import struct
from functools import cache, lru_cache

import torch
from torch import Tensor

from ....simulator.errors import UsageError
from ...arguments import check_storage
from ...compile import build
from ...fp8.arguments import check
from .. import driver, launch
from .config import QUERY_ROWS, Fp8Config, config_for

OUTPUTS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
ROW_BYTES = 128
"""The widest row that TMA swizzles (PTX ISA, tensor swizzling modes)."""
PARAMS = launch.PARAMS
DESCALES = struct.Struct("@PiiPiiPiii")
"""struct Descales of the kernels: for q, k and v an address, 0 for scales of 1, and strides of batch and head; two_level."""


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    schedule: str = "fa3",
    block_scales: bool = False,
    two_level: int = 0,
    approximate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of FP8 tensors: O (B, S_q, H, D) of `dtype` and LSE (B, H, S_q), on q's device and its current stream.

    q is (B, S_q, H, D), k and v are (B, S_k, H_kv, D), torch.float8_e4m3fn, D of 64, 128 or 256, H a multiple of H_kv,
    any lengths and strides. A descale is (B, H_kv), fp32, not negative: what an element stands for is its own value times
    the descale of its batch entry and K/V head (q's is shared by the query heads of a group); None means 1. With
    `block_scales` they are (B, H, blocks): one for config.QUERY_ROWS rows of a head of q, one for the tile's block_n rows of a
    head of k or v. O is that of the values so scaled. P V of `two_level` blocks is added up apart and then to O in fp32; 0
    leaves it to the tensor cores, whose accumulator keeps 14 bits. `softmax_scale` > 0 defaults to 1/sqrt(D); a causal mask
    is bottom-right aligned; a row that sees no key gives O = 0, LSE = -inf. With `approximate` half of the exponentials are
    within 4 % (config.APPROXIMATE has the head dims). Weights are rounded to e4m3 for the second GEMM
    (FlashAttention-3 section 3.3).
    Raises UsageError for what is not supported, build.CompileError and build.MissingCompiler.
    """
    descales = (q_descale, k_descale, v_descale)
    if not block_scales:
        check(q, k, v, descales, softmax_scale, dtype)
    config = config_for(schedule, OUTPUTS[dtype], q.shape[-1], bool(causal), k.shape[1], block_scales, two_level > 0, approximate)
    if block_scales:
        rows = config.fit.tile.block_n
        check(q, k, v, descales, softmax_scale, dtype, (QUERY_ROWS, rows, rows))
        descales = tuple(None if x is None else x.contiguous() for x in descales)
    scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    plan = plan_for(config, tuple(q.shape), tuple(k.shape), (q.stride(), k.stride(), v.stride()), q.get_device())
    return plan.run(q, k, v, descales, scale, two_level)


class Plan:
    """Everything about a launch but the addresses and the scales."""

    def __init__(self, config: Fp8Config, q_shape: tuple, k_shape: tuple, strides: tuple, device: int) -> None:
        tile = config.fit.tile
        self.config, self.device = config, device
        batch, seqlen_q, heads, head_dim = q_shape
        _, seqlen_k, kv_heads, _ = k_shape
        self.o_shape, self.lse_shape = q_shape, (batch, heads, seqlen_q)
        self.dtype = next(dtype for dtype, name in OUTPUTS.items() if name == config.output)
        self.empty = 0 in (batch, heads, seqlen_q, seqlen_k)
        if self.empty:
            return
        self.kernel = kernel_for(config, device)
        m_tiles = -(-seqlen_q // tile.block_m)
        # Half the bytes of a 16-bit head: as many as one of half the width.
        section = min(batch * heads, launch.section_heads(seqlen_k, head_dim // 2, heads // kv_heads))
        self.sizes = (batch, heads, kv_heads, seqlen_q, seqlen_k, m_tiles, section)
        self.grid = launch.grid_of(batch * heads, m_tiles, 1, launch.sm_count(device))
        columns = min(head_dim, ROW_BYTES)
        contiguous = (seqlen_q * heads * head_dim, heads * head_dim, head_dim, 1)
        self.inputs = [
            _Operand("e4m3", shape, stride, (columns, rows))
            for shape, stride, rows in (
                (q_shape, strides[0], launch.CONSUMER_ROWS),
                (k_shape, strides[1], tile.block_n),
                (k_shape, strides[2], tile.block_n),
            )
        ]
        self.o = _Operand(config.output, q_shape, contiguous, (ROW_BYTES // 2, launch.WARP_ROWS))

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        descales: tuple[Tensor | None, ...],
        scale: float,
        two_level: int = 0,
        trace: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Launch on the device's current stream; (O, LSE)."""
        if torch.cuda.current_device() != self.device:
            with torch.cuda.device(self.device):
                return self.run(q, k, v, descales, scale, two_level, trace)
        o = torch.empty(self.o_shape, dtype=self.dtype, device=q.device)
        lse = torch.empty(self.lse_shape, dtype=torch.float32, device=q.device)
        if self.empty:
            return o.zero_(), lse.fill_(-math.inf)
        # Every tensor is named until the launch has read its address.
        held = [operand.readable(x) for operand, x in zip(self.inputs, (q, k, v), strict=True)]
        maps = [operand.map(x) for operand, x in zip((*self.inputs, self.o), (*held, o), strict=True)]
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        queue = launch.queue_of(self.device, stream)
        scale_log2 = scale * launch.LOG2_E
        params = PARAMS.pack(lse.data_ptr(), queue.data_ptr(), 0 if trace is None else trace.data_ptr(), *self.sizes, scale_log2)
        fields = ((0, 0, 0) if x is None else (x.data_ptr(), *x.stride()[:2]) for x in descales)
        scales = DESCALES.pack(*(field for each in fields for field in each), two_level)
        blocks = [ctypes.create_string_buffer(block, len(block)) for block in (params, scales)]
        pointers = (ctypes.c_void_p * 6)(*(each.address for each in maps), *map(ctypes.addressof, blocks))
        self.kernel.launch(self.grid, self.config.threads, stream, pointers)
        return o, lse


class Kernel:
    """A compiled kernel, loaded on one device."""

    def __init__(self, config: Fp8Config, device: int) -> None:
        self.built = build.build(config.source)
        self.context = driver.primary_context(device)
        driver.call("cuCtxSetCurrent", self.context)
        self.smem_bytes = self.built.report.dynamic_smem_bytes
        self.function = driver.load_kernel(self.built.cubin, build.ENTRY, self.smem_bytes)
        self.cu_launch = driver.library().cuLaunchKernel
        self.cu_launch.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]

    def launch(self, grid: int, threads: int, stream: int, pointers: ctypes.Array) -> None:
        """Launch with the addresses of the kernel's arguments; raises driver.DriverError."""
        given = (self.function, grid, 1, 1, threads, 1, 1, self.smem_bytes, stream, ctypes.addressof(pointers), None)
        code = self.cu_launch(*given)
        if code == driver.INVALID_CONTEXT:  # a thread that never touched CUDA has none yet: give it the device's
            driver.call("cuCtxSetCurrent", self.context)
            code = self.cu_launch(*given)
        if code:
            raise driver.DriverError("cuLaunchKernel", code)


@cache
def kernel_for(config: Fp8Config, device: int) -> Kernel:
    """The kernel of `config` on a device, compiled and loaded once."""
    with torch.cuda.device(device):
        return Kernel(config, device)


@lru_cache(maxsize=512)
def plan_for(config: Fp8Config, q_shape: tuple, k_shape: tuple, strides: tuple, device: int) -> Plan:
    """The plan of a launch; UsageError where the device cannot have one."""
    if device < 0:
        raise UsageError("the FP8 kernels run on an H100 or H200 and q is not on a CUDA device: move it with .cuda()")
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        name = torch.cuda.get_device_name(device)
        raise UsageError(f"the FP8 kernels are for compute capability 9.0 (H100, H200); {name} has {capability[0]}.{capability[1]}")
    return Plan(config, q_shape, k_shape, strides, device)


class _Operand:
    """One tensor of a plan: how TMA sees it, and its tensor maps by address."""

    def __init__(self, dtype: str, shape: tuple, strides: tuple, box: tuple[int, int]) -> None:
        self.dtype, self.box = dtype, (*box, 1, 1)
        batch, seqlen, heads, head_dim = shape
        self.sizes = (head_dim, seqlen, heads, batch)
        size = driver.ELEMENT_BYTES[dtype]
        in_order = [(seqlen, strides[1] * size), (heads, strides[2] * size), (batch, strides[0] * size)]
        aligned = all(step % launch.TMA_ALIGNMENT == 0 and 0 <= step < 1 << 40 for count, step in in_order if count > 1)
        self.copied = strides[3] != 1 or not aligned
        if self.copied:
            row = head_dim * size
            in_order = [(seqlen, heads * row), (heads, row), (batch, seqlen * heads * row)]
        # A dimension of one element is never stepped along: any stride will do, and its own may be invalid.
        self.strides_bytes = tuple(step if count > 1 else head_dim * size for count, step in in_order)
        self.maps: dict[int, driver.TensorMap] = {}

    def readable(self, x: Tensor) -> Tensor:
        """x, or a copy that TMA can read and `map` describes, as of launch.Operand."""
        if self.copied:
            check_storage(x)
            return x.clone(memory_format=torch.contiguous_format)
        return x if x.data_ptr() % launch.TMA_ALIGNMENT == 0 else launch.aligned(x)

    def map(self, x: Tensor) -> driver.TensorMap:
        """The tensor map of x."""
        pointer = x.data_ptr()
        found = self.maps.get(pointer)
        if found is None:
            if len(self.maps) >= launch.MAPS_KEPT:
                self.maps.clear()
            found = self.maps[pointer] = driver.TensorMap(pointer, self.dtype, self.sizes, self.strides_bytes, self.box)
        return found
