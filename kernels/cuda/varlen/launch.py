"""Launches the kernels of packed sequences on PyTorch tensors: two launches, no synchronisation, any stream.

The lengths stay on the GPU: prepare.cu reads them there, and the second kernel draws its tiles from the list that it leaves.
"""

from __future__ import annotations

import ctypes
import math
import struct
import threading
from functools import cache, lru_cache

import torch
from torch import Tensor

from ....simulator.errors import UsageError
from ....simulator.problem.order import SECTION_BYTES
from ...arguments import scale_of
from ...compile import build
from .. import driver, launch
from .config import PREPARE, SCHEDULES, VarlenConfig, prepare

MAP_BYTES, SEQUENCE_BYTES = 128, 32
BATCH = struct.Struct("@PP8QPPPPP8i")
"""struct Batch of prepare.cu: cu_q, cu_k, addresses and row bytes of q, k, v, o, maps, sequences, tiles, queue, lse, batch, heads,
sharing, block_m, columns, total_q, total_k, section_keys."""
PARAMS = struct.Struct("@PPPPPPiiiif")
"""struct Params: lse, queue, trace, maps, sequences, tiles, batch, heads, kv_heads, total_q, scale_log2."""
PREPARE_THREADS = 512
MOST_TILES = 1 << 30


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    causal: bool = False,
    schedule: str = "fa3",
) -> tuple[Tensor, Tensor]:
    """O (total_q, H, D) and LSE (H, total_q) of packed sequences, on q's device and its current stream.

    q is (total_q, H, D), k and v (total_k, H_kv, D), fp16 or bf16, D of 64, 128 or 256, any strides; both cu_seqlens int32 of
    (batch + 1,), contiguous, on q's device. What lies outside the tensors is not read whatever they hold. Inputs that TMA cannot
    describe are copied first. Raises UsageError for a device of another compute capability than 9.0 and for more than 2^30 tiles,
    build.CompileError and build.MissingCompiler.
    """
    aligned = tuple(x.data_ptr() % launch.TMA_ALIGNMENT == 0 for x in (q, k, v))
    plan = plan_for(
        q.shape,
        k.shape,
        q.stride(),
        k.stride(),
        v.stride(),
        aligned,
        q.dtype,
        len(cu_seqlens_q) - 1,
        causal,
        schedule,
        q.get_device(),
    )
    return plan.run(q, k, v, cu_seqlens_q, cu_seqlens_k, scale_of(softmax_scale, q.shape[2]))


class Plan:
    """Everything about the two launches but the addresses."""

    def __init__(
        self, config: VarlenConfig, q_shape: tuple, k_shape: tuple, strides: tuple, aligned: tuple, batch: int, device: int
    ) -> None:
        self.config, self.device, self.batch = config, device, batch
        total_q, heads, head_dim = q_shape
        total_k, kv_heads, _ = k_shape
        self.lse_shape = (heads, total_q)
        self.nothing = 0 in (batch, heads, total_q, total_k)
        if self.nothing:
            return
        tile = config.tile
        tiles = heads * (total_q // tile.block_m + batch)
        if tiles > MOST_TILES:
            raise UsageError(f"{tiles:,} tiles of {tile.block_m} queries are more than {MOST_TILES:,}: split the batch")
        self.function, self.smem_bytes = kernel_for(config, device)
        self.prepare = preparing(device)
        self.grid = min(launch.sm_count(device), tiles)
        contiguous = (heads * head_dim, head_dim, 1)
        q_box, kv_box = (launch.BOX_COLUMNS, launch.CONSUMER_ROWS), (launch.BOX_COLUMNS, config.fixed.kv_box_rows)
        self.copied = [not whole for whole in aligned]
        self.operands = []
        for i, (shape, stride, box) in enumerate(
            (
                (q_shape, strides[0], q_box),
                (k_shape, strides[1], kv_box),
                (k_shape, strides[2], kv_box),
                (q_shape, contiguous, (launch.BOX_COLUMNS, launch.WARP_ROWS)),
            )
        ):
            if i < 3 and self.copied[i]:
                stride = (shape[1] * shape[2], shape[2], 1)
            self.operands.append(launch.Operand(config.dtype, (1, *shape), (0, *stride), box))
        self.row_bytes = [operand.strides_bytes[0] for operand in self.operands]
        section_keys = SECTION_BYTES // (2 * head_dim * launch.ELEMENT_BYTES)
        self.lengths = (batch, heads, heads // kv_heads, tile.block_m, heads * head_dim, total_q, total_k, section_keys)
        self.sizes = (batch, heads, kv_heads, total_q)

    def run(self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        """Launch on the device's current stream, with a scale that scale_of gave; (O, LSE)."""
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                return self.run(q, k, v, cu_q, cu_k, softmax_scale)
        if softmax_scale <= 0:  # as of the fixed-length kernels
            q, scale = (-q, -softmax_scale) if softmax_scale else (q * 0, 1.0)
            return forward(q, k, v, cu_q, cu_k, scale, self.config.causal, self.config.schedule)
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = q.new_empty(self.lse_shape, dtype=torch.float32)
        if self.nothing:
            return o.zero_(), lse.fill_(-math.inf)
        tensors = [
            operand.readable(x.clone(memory_format=torch.contiguous_format) if copied else x)
            for x, copied, operand in zip((q, k, v), self.copied, self.operands[:3], strict=True)
        ]
        tensors.append(o)
        maps_bytes, sequences_bytes = 4 * self.batch * MAP_BYTES, self.batch * SEQUENCE_BYTES
        space = torch.empty(maps_bytes + sequences_bytes + 16, dtype=torch.uint8, device=q.device)
        maps = space.data_ptr()
        sequences, counters = maps + maps_bytes, maps + maps_bytes + sequences_bytes
        tiles, queue = counters, counters + 8
        local = _local
        local.prepare()
        BATCH.pack_into(
            local.batch,
            0,
            cu_q.data_ptr(),
            cu_k.data_ptr(),
            *(x.data_ptr() for x in tensors),
            *self.row_bytes,
            maps,
            sequences,
            tiles,
            queue,
            lse.data_ptr(),
            *self.lengths,
        )
        scale_log2 = softmax_scale * launch.LOG2_E
        PARAMS.pack_into(local.params, 0, lse.data_ptr(), queue, 0, maps, sequences, tiles, *self.sizes, scale_log2)
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        # The maps are named, so that no other thread's eviction frees one before the driver has read it.
        wholes = [operand.map(x) for operand, x in zip(self.operands, tensors, strict=True)]
        for i, whole in enumerate(wholes):
            local.preparing[i] = whole.address
        writers = min(2 * launch.sm_count(self.device), -(-self.batch // (PREPARE_THREADS // 32)))
        self._launch(self.prepare, 1 + writers, PREPARE_THREADS, 0, stream, local.preparing_address)
        self._launch(self.function, self.grid, self.config.threads, self.smem_bytes, stream, local.walking_address)
        return o, lse

    def _launch(self, function: ctypes.c_void_p, grid: int, threads: int, smem_bytes: int, stream: int, arguments: int) -> None:
        given = (function, grid, 1, 1, threads, 1, 1, smem_bytes, stream, arguments, None)
        code = _local.launch(*given)
        if code == driver.INVALID_CONTEXT:  # a thread that never touched CUDA has none yet: give it the device's
            driver.call("cuCtxSetCurrent", driver.primary_context(self.device))
            code = _local.launch(*given)
        if code:
            raise driver.DriverError("cuLaunchKernel", code)


class _Local(threading.local):
    """A thread's own argument blocks, reused: the driver has copied them when cuLaunchKernel returns."""

    launch = None

    def prepare(self) -> None:
        """Make them, once."""
        if self.launch is not None:
            return
        driver.ensure_context(torch.cuda.current_device())
        self.batch, self.params = bytearray(BATCH.size), bytearray(PARAMS.size)
        self.held = [(ctypes.c_char * len(block)).from_buffer(block) for block in (self.batch, self.params)]
        self.preparing = (ctypes.c_void_p * 5)()
        self.preparing[4] = ctypes.addressof(self.held[0])
        self.walking = (ctypes.c_void_p * 1)(ctypes.addressof(self.held[1]))
        self.preparing_address, self.walking_address = ctypes.addressof(self.preparing), ctypes.addressof(self.walking)
        call = driver.library().cuLaunchKernel
        call.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        self.launch = call


_local = _Local()


@cache
def kernel_for(config: VarlenConfig, device: int) -> tuple[ctypes.c_void_p, int]:
    """The kernel of `config` on a device, compiled and loaded once, and its shared memory in bytes."""
    return _loaded(config.source, build.ENTRY, device)


@cache
def preparing(device: int) -> ctypes.c_void_p:
    """The kernel of prepare.cu on a device."""
    return _loaded(prepare(), PREPARE, device)[0]


def _loaded(source: build.Source, name: str, device: int) -> tuple[ctypes.c_void_p, int]:
    with torch.cuda.device(device):
        built = build.build(source)
        driver.call("cuCtxSetCurrent", driver.primary_context(device))
        smem_bytes = built.report.dynamic_smem_bytes
        return driver.load_kernel(built.cubin, name, smem_bytes), smem_bytes


@lru_cache(maxsize=512)
def plan_for(
    q_shape: tuple,
    k_shape: tuple,
    q_strides: tuple,
    k_strides: tuple,
    v_strides: tuple,
    aligned: tuple[bool, bool, bool],
    dtype: torch.dtype,
    batch: int,
    causal: bool,
    schedule: str,
    device: int,
) -> Plan:
    """The plan of a launch; UsageError where the device or the shapes cannot have one."""
    if device < 0 or torch.cuda.get_device_capability(device) != (9, 0):
        raise UsageError(f"the {schedule!r} kernel is for compute capability 9.0 (H100, H200): use schedule='fa2'")
    if schedule not in SCHEDULES:
        raise UsageError(f"schedule={schedule!r} has no CUDA kernel ({', '.join(SCHEDULES)})")
    config = VarlenConfig(schedule, launch.DTYPES[dtype], q_shape[2], causal)
    return Plan(config, tuple(q_shape), tuple(k_shape), (q_strides, k_strides, v_strides), aligned, batch, device)
