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

if TYPE_CHECKING:
    from ...fp8.plain import Part

OPERAND = struct.Struct("@PPPqqqiiiiiiii")
"""struct Operand of the kernel: addresses of x, values and descales; strides; heads, seqlen, block, blocks, tiles, end, flags."""
TAIL = struct.Struct("@Pfi")
ELEMENTS = {64: 32, 128: 64, 256: 64}
"""Of a thread, by head dim."""
RESIDENT_THREADS = {32: 768, 64: 512}
"""Of an SM, by the elements of one: 80 or 128 registers each."""
MOST_THREADS = {32: 1024, 64: 512}
"""Of a CTA."""
MOST = 3  # tensors of a launch
WARP = 32
MOST_BARRIERS = 15
LEAST_THREADS = 256  # of a CTA
ALIGNMENT = 16  # bytes of one load


def takes(parts: Sequence[Part]) -> bool:
    """Whether one launch does them: loads of 16 bytes along D, blocks of whole warps, and a CTA that whole blocks of each fill."""
    head_dim, blocks = parts[0].x.shape[3], [part.block for part in parts]
    if len(parts) > MOST or head_dim not in HEAD_DIMS or tile_rows(blocks, head_dim) is None:
        return False
    for part in parts:
        x = part.x
        steps = [x.stride(i) for i in range(3) if x.shape[i] > 1]
        if x.numel() == 0 or x.is_neg() or x.stride(3) != 1 or (x.data_ptr() | 2 * math.gcd(*steps)) % ALIGNMENT:
            return False
    return True


def tile_rows(blocks: Sequence[int], head_dim: int) -> int | None:
    """Rows of a CTA that are whole blocks of each of these sizes; None where it has no threads or barriers for them."""
    lanes, rows = lanes_of(head_dim), math.lcm(*blocks)
    rows *= max(1, LEAST_THREADS // (rows * lanes))
    barriers = sum(rows // block for block in blocks)
    fits = all(block * lanes % WARP == 0 for block in blocks) and rows * lanes <= MOST_THREADS[ELEMENTS[head_dim]]
    return rows if fits and barriers <= MOST_BARRIERS else None


def lanes_of(head_dim: int) -> int:
    """Threads that share a row."""
    return head_dim // ELEMENTS[head_dim]


def quantise(parts: Sequence[Part], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """e4m3 values and descales of up to three tensors of one head_dim, dtype and device, that `takes` has found fit."""
    first = parts[0].x
    head_dim = first.shape[3]
    rows = tile_rows([part.block for part in parts], head_dim)
    found, packed, end = [], [], 0
    for part in parts:
        x = part.x
        batch, seqlen, heads, _ = x.shape
        blocks, tiles = -(-seqlen // part.block), -(-seqlen // rows)
        values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
        descale = torch.empty(batch, heads, blocks, dtype=torch.float32, device=x.device)
        end += batch * heads * tiles
        pointers = (x.data_ptr(), values.data_ptr(), descale.data_ptr())
        sizes = (heads, seqlen, part.block, blocks, tiles, end, int(part.hadamard), int(part.powers))
        packed.append(OPERAND.pack(*pointers, *x.stride()[:3], *sizes))
        found.append((values, descale))
    packed += [packed[-1]] * (MOST - len(packed))
    device = first.get_device()
    flips = sign_bits(head_dim, seed, first.device)
    params = b"".join(packed) + TAIL.pack(flips.data_ptr(), normaliser(head_dim), end)
    kernel = kernel_for(head_dim, first.dtype == torch.bfloat16, rows, device)
    block = ctypes.create_string_buffer(params, len(params))
    grid = min(end, kernel.ctas * launch._sm_count(device))
    kernel.launch(grid, torch._C._cuda_getCurrentRawStream(device), (ctypes.c_void_p * 1)(ctypes.addressof(block)))
    return found


@lru_cache(maxsize=64)
def sign_bits(head_dim: int, seed: int, device: torch.device) -> Tensor:
    """(D / 2,) pairs of the sign bits of a 16-bit row, as int32."""
    negative = (signs(head_dim, seed) < 0).view(-1, 2).to(torch.int64)
    pairs = negative[:, 0] * 0x8000 + negative[:, 1] * 0x80000000
    return torch.where(pairs >= 1 << 31, pairs - (1 << 32), pairs).to(torch.int32).to(device)


def source(head_dim: int, bf16: bool, rows: int) -> build.Source:
    """The kernel's text with its macros."""
    text = (Path(__file__).parent / "quantise.cu").read_text(encoding="utf-8")
    defines = {"HEAD_DIM": head_dim, "BF16": int(bf16), "ELEMENTS": ELEMENTS[head_dim]}
    defines |= {"CTA_ROWS": rows, "CTAS": ctas_of(head_dim, rows)}
    return build.Source("fp8_quantise.cu", text, headers(), defines)


def ctas_of(head_dim: int, rows: int) -> int:
    """CTAs of an SM, which the kernel's registers are for."""
    return max(1, RESIDENT_THREADS[ELEMENTS[head_dim]] // (rows * lanes_of(head_dim)))


class Kernel:
    """The compiled kernel, loaded on one device."""

    def __init__(self, head_dim: int, bf16: bool, rows: int, device: int) -> None:
        self.ctas, self.threads = ctas_of(head_dim, rows), rows * lanes_of(head_dim)
        self.context = driver.primary_context(device)
        driver.call("cuCtxSetCurrent", self.context)
        self.function = driver.load_kernel(build.build(source(head_dim, bf16, rows)).cubin, build.ENTRY, 0)
        self.cu_launch = driver.library().cuLaunchKernel
        self.cu_launch.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]

    def launch(self, grid: int, stream: int, pointers: ctypes.Array) -> None:
        """Launch with the address of the kernel's argument; raises driver.DriverError."""
        given = (self.function, grid, 1, 1, self.threads, 1, 1, 0, stream, ctypes.addressof(pointers), None)
        code = self.cu_launch(*given)
        if code == driver.INVALID_CONTEXT:
            driver.call("cuCtxSetCurrent", self.context)
            code = self.cu_launch(*given)
        if code:
            raise driver.DriverError("cuLaunchKernel", code)


@cache
def kernel_for(head_dim: int, bf16: bool, rows: int, device: int) -> Kernel:
    """The kernel for a head_dim and a tile on a device, compiled and loaded once."""
    with torch.cuda.device(device):
        return Kernel(head_dim, bf16, rows, device)
