"""Launches the CUDA backward on PyTorch tensors: two kernels, no synchronisation, any stream. Compiled on first use."""

from __future__ import annotations

import ctypes
import math
import struct
from functools import cache, lru_cache

import torch
from torch import Tensor

from ....simulator.errors import UsageError
from ....simulator.problem.order import SECTION_BYTES, SUM_BYTES
from ...arguments import check_gradients, check_inputs, scale_of
from ...compile import build
from .. import driver, launch
from .config import ENTRIES, WARPGROUP, BackwardConfig, config_for

PREPARE_THREADS = 2 * WARPGROUP
WARP_KEYS = 16
"""Rows of dK and dV in a box: each warp sends its own."""
SECTIONS = 3
"""Sections of heads that have fp32 sums of dQ at a time: one that is added to, one that may be, one on its way out."""
LEAST_WORK = 1.25
"""Of the longest tile's walk: what each CTA finds to do among the heads that have sums, or it would wait for that tile."""
SHARE_TILES = True
"""Two CTAs to a tile of keys where that evens out their blocks (`split_tiles`); `check` and `pace` can do without."""
LEAST_SCALE = 2.0**-80
"""Below it scores cannot begin with LSE over the scale (`across`)."""
LEAST_GAIN = 4
"""Blocks: a split tile's dK and dV cost about two on their way through memory."""
GIVEN = struct.Struct("@" + "Pqqq" * 4 + "P" * 9 + "iiiiif0P")
"""struct Given of prepare.cu; the scale is read where S begins with LSE."""
PARAMS = struct.Struct("@" + "P" * 11 + "i" * 13 + "ff0P")
"""struct Params of problem.cuh."""


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None = None,
    *,
    causal: bool,
    scale: float | None,
    schedule: str = "fa3",
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV) of a forward that gave o and lse, on q's device and its current stream.

    q, o and do are (B, S_q, H, D), k and v (B, S_k, H_kv, D), fp16 or bf16, D of config.HEAD_DIMS, H a multiple of H_kv, any
    strides; lse and dlse (B, H, S_q) in fp32, natural logarithm, -inf where a row sees no key. `scale` as softmax_scale of
    ops.flash_attn_func; a causal mask is bottom-right aligned. The results are contiguous, of q's dtype; dK and dV are summed over
    the query heads of a group. dK and dV have the same bits every time; dQ's fp32 sums are taken in the order in which
    CTAs come to them unless `deterministic` is set. Inputs that TMA or 16-byte loads cannot read are copied first.
    FlashAttention-2 (arXiv:2307.08691) section 2.3: dS = P (dP - delta), delta = rowsum(dO O) - dLSE.
    Raises UsageError for what is not supported, build.CompileError and build.MissingCompiler.
    """
    check_inputs(q, k, v, schedule)
    check_gradients(do, q, o, lse, dlse)
    scale = scale_of(scale, q.shape[3])
    if schedule in ("across", "late") and abs(scale) < LEAST_SCALE:
        schedule = "lagged"
    plan = plan_for(
        tuple(q.shape), tuple(k.shape), tuple(x.stride() for x in (q, k, v, o, do)), q.dtype, bool(causal), schedule,
        bool(deterministic), dlse is not None, q.get_device(),
    )  # fmt: skip
    return plan.run(q, k, v, o, lse, do, dlse, scale)


class Kernel:
    """A compiled kernel, loaded on one device."""

    def __init__(self, config: BackwardConfig, part: str, device: int) -> None:
        self.built = build.build(config.source(part))
        self.context = driver.primary_context(device)
        driver.call("cuCtxSetCurrent", self.context)
        self.smem_bytes = self.built.report.dynamic_smem_bytes
        self.function = driver.load_kernel(self.built.cubin, ENTRIES[part], self.smem_bytes)
        self.threads = config.threads if part == "main" else PREPARE_THREADS
        self.cu_launch = driver.library().cuLaunchKernel
        self.cu_launch.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]

    def launch(self, grid: int, stream: int, *arguments: int) -> None:
        """Launch with the addresses of the kernel's arguments; raises driver.DriverError."""
        pointers = (ctypes.c_void_p * len(arguments))(*arguments)
        given = (self.function, grid, 1, 1, self.threads, 1, 1, self.smem_bytes, stream, ctypes.addressof(pointers), None)
        code = self.cu_launch(*given)
        if code == driver.INVALID_CONTEXT:  # a thread that never touched CUDA has none yet: give it the device's
            driver.call("cuCtxSetCurrent", self.context)
            code = self.cu_launch(*given)
        if code:
            raise driver.DriverError("cuLaunchKernel", code)


@cache
def kernel_for(config: BackwardConfig, part: str, device: int) -> Kernel:
    """A part of `config` on a device, compiled and loaded once."""
    with torch.cuda.device(device):
        return Kernel(config, part, device)


class Plan:
    """Everything about a call but the addresses and the scale."""

    def __init__(self, config: BackwardConfig, q_shape: tuple, k_shape: tuple, strides: tuple, device: int) -> None:
        tile = config.tile
        self.config, self.device = config, device
        batch, seqlen_q, heads, head_dim = q_shape
        _, seqlen_k, kv_heads, _ = k_shape
        self.q_shape, self.k_shape = q_shape, k_shape
        self.empty = 0 in (batch, heads, seqlen_q, seqlen_k, kv_heads)
        if self.empty:
            return
        self.prepare, self.main = (kernel_for(config, part, device) for part in ENTRIES)
        m_tiles, n_tiles = -(-seqlen_q // tile.block_m), -(-seqlen_k // tile.block_n)
        self.rows = batch * heads * m_tiles * tile.block_m
        self.blocks = batch * heads * m_tiles
        sms = launch._sm_count(device)
        group = min(n_tiles, m_tiles, sms)
        if config.deterministic and not config.causal:
            sms = sms // group * group  # whole groups, all of whose tiles run at a time
        self.ctas = min(sms, batch * kv_heads * n_tiles)
        self.heads, sharing = batch * heads, heads // kv_heads
        section = section_heads(seqlen_q, head_dim, sharing)
        blocks = [m_tiles - first for first in first_blocks(config, seqlen_q, seqlen_k)]
        ring = min(batch * heads, ring_heads(section, blocks, self.ctas) * sharing)
        split = split_tiles(batch * kv_heads * n_tiles, m_tiles * sharing, self.ctas)
        # A wait for the sums of a head that a split tile adds to as well would never end.
        possible = not (config.causal or config.deterministic) and head_dim <= 128 and -(-split // n_tiles) * sharing <= ring
        self.split = split if possible and SHARE_TILES else 0
        self.statistic_maps: dict[int, driver.TensorMap] = {}
        self.sums = ring * m_tiles * tile.block_m * head_dim
        self.key_sums = self.split * 2 * tile.block_n * head_dim
        adds = adders(config) * sum(blocks)
        sections = min(batch * kv_heads, section)
        self.sizes = (
            batch, heads, kv_heads, sharing, seqlen_q, seqlen_k, m_tiles, n_tiles, sections, ring, group, adds, self.split,
        )  # fmt: skip
        self.query_sizes = (heads, seqlen_q, m_tiles, ring, self.split)
        contiguous = (seqlen_k * kv_heads * head_dim, kv_heads * head_dim, head_dim, 1)
        queries, keys = (launch.BOX_COLUMNS, tile.block_m), (launch.BOX_COLUMNS, tile.block_n)
        self.q, self.k, self.v, self.o, self.do, self.dk, self.dv = (
            launch.Operand(config.dtype, shape, stride, box)
            for shape, stride, box in (
                (q_shape, strides[0], queries),
                (k_shape, strides[1], keys),
                (k_shape, strides[2], keys),
                (q_shape, strides[3], queries),
                (q_shape, strides[4], queries),
                (k_shape, contiguous, (launch.BOX_COLUMNS, WARP_KEYS)),
                (k_shape, contiguous, (launch.BOX_COLUMNS, WARP_KEYS)),
            )
        )

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        do: Tensor,
        dlse: Tensor | None,
        scale: float,
        trace: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Launch on the device's current stream, with a scale that scale_of gave."""
        if torch.cuda.current_device() != self.device:
            with torch.cuda.device(self.device):
                return self.run(q, k, v, o, lse, do, dlse, scale, trace)
        dq = torch.empty(self.q_shape, dtype=q.dtype, device=q.device)
        dk, dv = (torch.empty(self.k_shape, dtype=q.dtype, device=q.device) for _ in range(2))
        if self.empty:
            return dq.zero_(), dk.zero_(), dv.zero_()
        q, k, v, o, do = (
            operand.readable(x) for operand, x in zip((self.q, self.k, self.v, self.o, self.do), (q, k, v, o, do), strict=True)
        )
        work, counters = self.workspace(q.device)
        sums = work.data_ptr()
        key_sums = sums + 4 * self.sums
        lse2 = key_sums + 4 * self.key_sums
        delta = lse2 + 4 * self.rows
        tickets = counters.data_ptr()
        added = tickets + 8
        finished = added + 4 * self.heads
        key_added = finished + 4 * self.heads
        turns = key_added if self.config.deterministic else 0
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        slopes = (0, 0, 0, 0) if dlse is None else _rows(dlse, 0, 1, 2)
        given = _block(
            GIVEN, *_rows(o, 0, 2, 1), *_rows(do, 0, 2, 1), *_rows(lse, 0, 1, 2), *slopes,
            lse2, delta, sums, key_sums, added, finished, key_added, tickets, turns, *self.query_sizes, scale,
        )  # fmt: skip
        self.prepare.launch(self.blocks, stream, ctypes.addressof(given))
        # Every map is named until the launch has read it.
        maps = [
            operand.map(x)
            for operand, x in zip((self.q, self.k, self.v, self.do, self.dk, self.dv), (q, k, v, do, dk, dv), strict=True)
        ]
        maps.append(self.statistics(lse2))
        params = _block(
            PARAMS, sums, key_sums, tickets, added, finished, key_added, turns,
            dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), 0 if trace is None else trace.data_ptr(), *self.sizes,
            scale, scale * launch.LOG2_E,
        )  # fmt: skip
        self.main.launch(self.ctas, stream, *(each.address for each in maps), ctypes.addressof(params))
        return dq, dk, dv

    def statistics(self, lse2: int) -> driver.TensorMap:
        """The tensor map of LSE and, behind it, delta: a row of each head, read a block of queries at a time."""
        found = self.statistic_maps.get(lse2)
        if found is None:
            if len(self.statistic_maps) >= launch.MAPS_KEPT:
                self.statistic_maps.clear()
            length, block = self.rows // self.heads, self.config.tile.block_m
            found = driver.TensorMap(lse2, "fp32", (length, 2 * self.heads), (4 * length,), (block, 1))
            self.statistic_maps[lse2] = found
        return found

    def workspace(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """fp32 sums, of dQ of some heads and of split tiles; LSE to base 2 and delta of each row; and counters."""
        more = adders(self.config) * self.blocks if self.config.deterministic else self.split
        return (
            torch.empty(self.sums + self.key_sums + 2 * self.rows, dtype=torch.float32, device=device),
            torch.empty(2 + 2 * self.heads + more, dtype=torch.int32, device=device),
        )


def _rows(x: Tensor, batch: int, head: int, row: int) -> tuple[int, int, int, int]:
    """struct Rows: address, and strides in elements."""
    return (x.data_ptr(), x.stride(batch), x.stride(head), x.stride(row))


def _block(layout: struct.Struct, *fields: float) -> ctypes.Array:
    """An argument of a kernel: a struct by value."""
    return ctypes.create_string_buffer(layout.pack(*fields), layout.size)


def adders(config: BackwardConfig) -> int:
    """Who adds to a block's dQ for one tile of keys: a warp for each warpgroup, or at head_dim 256 each warp of both."""
    return 8 if config.head_dim == 256 else config.tile.consumers


def first_blocks(config: BackwardConfig, seqlen_q: int, seqlen_k: int) -> list[int]:
    """Of every tile of keys the first query block that sees it."""
    tile, offset = config.tile, seqlen_k - seqlen_q
    keys = range(0, seqlen_k, tile.block_n)
    return [min(max(0, key - offset), seqlen_q - 1) // tile.block_m if config.causal else 0 for key in keys]


def split_tiles(tiles: int, walk: int, ctas: int) -> int:
    """How many tiles of `walk` blocks the CTAs share, so that each has as many blocks; 0 where it would gain little.

    A CTA's part is a tile at least, so that two share a tile at most: their two sums are the same bits in either order.
    """
    left = tiles % ctas
    gain = walk - left * walk // ctas
    return left + ctas if left and tiles > ctas and gain >= LEAST_GAIN else 0


def ring_heads(section: int, blocks: list[int], ctas: int) -> int:
    """K/V heads whose query heads have sums at a time, where a query head asks so many `blocks` of each tile of keys.

    SECTIONS of them, or as many as have LEAST_WORK, a tile for every CTA and a head more on its way out. As a causal tile walks
    half of the blocks, that is 2.5 tiles of sums for every CTA and query head of a group: at head_dim 128 21 MiB of fp32 for each,
    on 132, and never more than all of dQ.
    """
    work = math.ceil(LEAST_WORK * max(blocks) * ctas / sum(blocks))
    return max(SECTIONS * section, work, -(-ctas // len(blocks)) + 1)


def section_heads(seqlen_q: int, head_dim: int, sharing: int) -> int:
    """K/V heads walked together where the mask is causal (simulator/problem/order.py): Q, dO and dQ's sums fit SECTION_BYTES."""
    walked = seqlen_q * head_dim * (2 * launch.ELEMENT_BYTES + SUM_BYTES) * sharing
    return 2 ** (max(1, SECTION_BYTES // walked).bit_length() - 1)


@lru_cache(maxsize=512)
def plan_for(
    q_shape: tuple,
    k_shape: tuple,
    strides: tuple,
    dtype: torch.dtype,
    causal: bool,
    schedule: str,
    deterministic: bool,
    has_dlse: bool,
    device: int,
) -> Plan:
    """The plan of a call; UsageError where the device or the shapes cannot have one."""
    if device < 0:
        raise UsageError(f"the backward {schedule!r} runs on an H100 or H200 and q is not on a CUDA device: move it with .cuda()")
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        raise UsageError(
            f"the backward {schedule!r} is for compute capability 9.0 (H100, H200) and {torch.cuda.get_device_name(device)}"
            f" has {capability[0]}.{capability[1]}; use schedule='fa2'"
        )
    config = config_for(schedule, launch.DTYPES[dtype], q_shape[3], causal, deterministic, has_dlse)
    return Plan(config, q_shape, k_shape, strides, device)
