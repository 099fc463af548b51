"""Launches the quantiser's kernel: one launch for up to three tensors, whose blocks of rows have a descale each."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...compile import build
from ...fp8.rotation import normaliser, signs
from .. import driver, launch
from .config import HEAD_DIMS, headers
from .keyed import WIDTHS
from .launch import _Operand

if TYPE_CHECKING:
    from ...fp8.plain import Part

OPERAND = struct.Struct("@Piiiiiiiiixxxx")
"""struct Operand of the kernel: address of descales; heads, seqlen, block, blocks, tiles, end; flags."""
TAIL = struct.Struct("@Pfi")
ELEMENTS = {64: 64, 128: 64, 256: 64}
"""Of a thread, by head dim; the kernel takes 128 too (NOTES.md, "Next")."""
MOST_THREADS = {64: 768, 128: 384}
"""Of an SM, by the elements of one: 80 or 168 registers each."""
ENOUGH_THREADS = {64: 384, 128: 512, 256: 768}
"""Of an SM by head dim, where two CTAs have no more: registers are worth more than further warps (NOTES.md)."""
LEAST_ROWS = 64  # of a CTA
LEAST_THREADS = 128
SMEM_BYTES, RESERVED_BYTES = 228 * 1024, 1024
"""Shared memory of an SM, and what a CTA takes of it beside its own."""
OTHER_BYTES = 4096  # of a CTA at most: barriers, signs
MOST_SLOTS = 4
MOST = 3  # tensors of a launch
WARP = 32
PANEL = 64  # columns of 16 bits that TMA swizzles
OUT_PANEL = 128  # of e4m3
MOST_BARRIERS = 15
MOST_ROWS = 256  # of a box of TMA
GROUP = 32  # keys of a thread where V becomes rows of keys


def takes(parts: Sequence[Part]) -> bool:
    """Whether one launch does them: rows that TMA reads, blocks of whole warps, and a CTA that whole blocks of each fill."""
    head_dim, blocks = parts[0].x.shape[3], [part.block for part in parts]
    if len(parts) > MOST or head_dim not in HEAD_DIMS or tile_rows(blocks, head_dim) is None:
        return False
    if sum(part.keyed for part in parts) > 1 or any(part.keyed and part.block % GROUP for part in parts):
        return False
    for part in parts:
        x = part.x
        steps = [x.stride(i) for i in range(3) if x.shape[i] > 1]
        if x.numel() == 0 or x.is_neg() or x.stride(3) != 1 or (x.data_ptr() | 2 * math.gcd(*steps)) % launch.TMA_ALIGNMENT:
            return False
    return True


def tile_rows(blocks: Sequence[int], head_dim: int) -> int | None:
    """Rows of a CTA that are whole blocks of each of these sizes; None where it has no threads or barriers for them."""
    lanes, rows = lanes_of(head_dim), math.lcm(*blocks)
    rows *= max(1, LEAST_THREADS // (rows * lanes), LEAST_ROWS // rows)
    barriers = sum(rows // block for block in blocks)
    whole = all(block * lanes % WARP == 0 for block in blocks)
    fits = whole and rows <= MOST_ROWS and rows * lanes <= MOST_THREADS[ELEMENTS[head_dim]]
    return rows if fits and barriers <= MOST_BARRIERS else None


def lanes_of(head_dim: int) -> int:
    """Threads that share a row."""
    return head_dim // ELEMENTS[head_dim]


def shares_of(head_dim: int, rows: int) -> tuple[int, int]:
    """CTAs of an SM, which the kernel's registers are for, and the slots of each."""
    slot, threads = 2 * rows * head_dim, rows * lanes_of(head_dim)
    fits = min(MOST_THREADS[ELEMENTS[head_dim]] // threads, SMEM_BYTES // (2 * slot + OTHER_BYTES))
    ctas = min(fits, max(2, ENOUGH_THREADS[head_dim] // threads))
    return ctas, min(MOST_SLOTS, (SMEM_BYTES // ctas - OTHER_BYTES) // slot)


class Plan:
    """A launch but for its addresses."""

    def __init__(self, parts: Sequence[tuple], head_dim: int, bf16: bool, device: int) -> None:
        """Of each part its shape, strides, block, and whether hadamard, powers and keyed."""
        self.head_dim = head_dim
        self.rows = rows = tile_rows([block for _, _, block, *_ in parts], head_dim)
        self.sizes, self.shapes, self.inputs, self.outputs, end = [], [], [], [], 0
        key_panel = 0
        for shape, strides, block, hadamard, powers, keyed in parts:
            batch, seqlen, heads, _ = shape
            blocks, tiles = -(-seqlen // block), -(-seqlen // rows)
            end += batch * heads * tiles
            self.sizes.append((heads, seqlen, block, blocks, tiles, end, int(hadamard), int(powers), int(keyed)))
            self.inputs.append(_Operand("bf16" if bf16 else "fp16", shape, strides, (PANEL, rows)))
            columns = min(head_dim, OUT_PANEL)
            if keyed:
                keys = -(-seqlen // 16) * 16
                key_panel = next(width for width in WIDTHS if block % width == 0)
                values = (batch, heads, head_dim, keys)
                steps = (heads * head_dim * keys, keys, head_dim * keys, 1)
                self.outputs.append(_Operand("e4m3", (batch, head_dim, heads, keys), steps, (key_panel, columns)))
            else:
                values = shape
                contiguous = (seqlen * heads * head_dim, heads * head_dim, head_dim, 1)
                self.outputs.append(_Operand("e4m3", shape, contiguous, (columns, block)))
            self.shapes.append((values, (batch, heads, blocks)))
        self.tiles = end
        self.kernel = kernel_for(head_dim, bf16, rows, key_panel, device)
        self.grid = min(end, self.kernel.ctas * launch.sm_count(device))

    def run(self, given: Sequence[Tensor], flips: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Values and descales of each tensor, on the device's current stream."""
        found, packed, maps = [], [], []
        for x, sizes, (values_shape, descale_shape) in zip(given, self.sizes, self.shapes, strict=True):
            values = torch.empty(values_shape, dtype=torch.float8_e4m3fn, device=x.device)
            descale = torch.empty(descale_shape, dtype=torch.float32, device=x.device)
            found.append((values, descale))
            packed.append(OPERAND.pack(descale.data_ptr(), *sizes))
        unused = MOST - len(found)
        packed += [packed[-1]] * unused
        for operands, tensors in ((self.inputs, given), (self.outputs, [values for values, _ in found])):
            each = [operand.map(x) for operand, x in zip(operands, tensors, strict=True)]
            maps += each + [each[-1]] * unused
        params = b"".join(packed) + TAIL.pack(flips.data_ptr(), normaliser(self.head_dim), self.tiles)
        held = ctypes.create_string_buffer(params, len(params))
        described = b"".join(ctypes.string_at(each.address, driver.TENSOR_MAP_BYTES) for each in maps)
        boxes = ctypes.create_string_buffer(described, len(described))
        pointers = (ctypes.c_void_p * 2)(ctypes.addressof(boxes), ctypes.addressof(held))
        self.kernel.launch(self.grid, torch._C._cuda_getCurrentRawStream(given[0].get_device()), pointers)
        return found


@lru_cache(maxsize=512)
def plan_for(parts: tuple[tuple, ...], head_dim: int, bf16: bool, device: int) -> Plan:
    """The plan of a launch."""
    return Plan(parts, head_dim, bf16, device)


def quantise(parts: Sequence[Part], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """e4m3 values and descales of up to three tensors of one head_dim, dtype and device, that `takes` has found fit."""
    first = parts[0].x
    head_dim = first.shape[3]
    said = tuple(
        (tuple(part.x.shape), part.x.stride(), part.block, part.hadamard, part.powers, part.keyed) for part in parts
    )  # fmt: skip
    plan = plan_for(said, head_dim, first.dtype == torch.bfloat16, first.get_device())
    return plan.run([part.x for part in parts], sign_bits(head_dim, seed, first.device))


@lru_cache(maxsize=64)
def sign_bits(head_dim: int, seed: int, device: torch.device) -> Tensor:
    """(D / 2,) pairs of the sign bits of a 16-bit row, as int32."""
    negative = (signs(head_dim, seed) < 0).view(-1, 2).to(torch.int64)
    pairs = negative[:, 0] * 0x8000 + negative[:, 1] * 0x80000000
    return torch.where(pairs >= 1 << 31, pairs - (1 << 32), pairs).to(torch.int32).to(device)


def source(head_dim: int, bf16: bool, rows: int, key_panel: int = 0) -> build.Source:
    """The kernel's text with its macros."""
    text = (Path(__file__).parent / "quantise.cu").read_text(encoding="utf-8")
    ctas, slots = shares_of(head_dim, rows)
    defines = {"HEAD_DIM": head_dim, "BF16": int(bf16), "ELEMENTS": ELEMENTS[head_dim], "CTA_ROWS": rows}
    defines |= {"CTAS": ctas, "SLOTS": slots, "KEY_PANEL": key_panel}
    return build.Source("fp8_quantise.cu", text, headers(), defines)


class Kernel:
    """The compiled kernel, loaded on one device."""

    def __init__(self, head_dim: int, bf16: bool, rows: int, key_panel: int, device: int) -> None:
        self.ctas, self.threads = shares_of(head_dim, rows)[0], rows * lanes_of(head_dim)
        self.context = driver.primary_context(device)
        driver.call("cuCtxSetCurrent", self.context)
        built = build.build(source(head_dim, bf16, rows, key_panel))
        self.smem_bytes = built.report.dynamic_smem_bytes
        self.function = driver.load_kernel(built.cubin, build.ENTRY, self.smem_bytes)
        self.cu_launch = driver.library().cuLaunchKernel
        self.cu_launch.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]

    def launch(self, grid: int, stream: int, pointers: ctypes.Array) -> None:
        """Launch with the addresses of the kernel's arguments; raises driver.DriverError."""
        given = (self.function, grid, 1, 1, self.threads, 1, 1, self.smem_bytes, stream, ctypes.addressof(pointers), None)
        code = self.cu_launch(*given)
        if code == driver.INVALID_CONTEXT:
            driver.call("cuCtxSetCurrent", self.context)
            code = self.cu_launch(*given)
        if code:
            raise driver.DriverError("cuLaunchKernel", code)


@cache
def kernel_for(head_dim: int, bf16: bool, rows: int, key_panel: int, device: int) -> Kernel:
    """The kernel for a head_dim and a tile on a device, compiled and loaded once."""
    with torch.cuda.device(device):
        return Kernel(head_dim, bf16, rows, key_panel, device)
