"""The quantiser in one pass over memory, by Triton: 16 bits are read once, e4m3 and one fp32 descale a block are written.

`plain.quantise` defines what it gives. A program holds a block of rows of one head in registers. One descale for a whole head
takes a pass that only measures, and then one that is given the descale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton.arithmetic import INTERPRETED
from ..triton.loads import load_tile, store_tile
from .plain import E4M3, LARGEST, SMALLEST_DESCALE, Quantised, descale_of, shared
from .rotation import normaliser, signs

MEASURED_ROWS = 128
"""Rows of a program where no block says how many."""
ELEMENTS_OF_A_WARP = 2048
"""64 fp32 registers a thread; half of it with the Hadamard transform, whose shuffles want more warps in flight."""


@triton.jit
def _quantise(
    x, sign, values, descale, heads, seqlen, blocks, group, stride_b, stride_s, stride_h, stride_d, scale_b, scale_h, normaliser,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTATED: tl.constexpr, MODE: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr, POWERS: tl.constexpr,
):  # fmt: skip
    """One block of one head. MODE: "block" does all of it, "measure" writes its largest magnitude, "given" reads the descale."""
    index = tl.program_id(0)
    head, block, batch = index % heads, index // heads % blocks, index // heads // blocks  # heads lie side by side in memory
    row = block * BLOCK
    end = tl.minimum(row + BLOCK, seqlen)
    wide = _wide(load_tile(x, batch, head, row, end, stride_b, stride_s, stride_h, stride_d, ROWS, HEAD_DIM, False, True))
    if ROTATED:
        wide = _rotated(wide * tl.load(sign + tl.arange(0, HEAD_DIM))[None, :], ROWS, HEAD_DIM) * normaliser
    size = tl.abs(wide)
    if INTERPRETED:  # whose maximum is NaN where any is
        size = tl.where(size < float("inf"), size, 0.0)
    at = descale + tl.cast(batch, tl.int64) * scale_b + head // group * scale_h + block
    if MODE == "given":
        step = tl.load(at - block)
    else:
        largest = tl.max(tl.max(size, 1), 0)
        if largest == float("inf"):
            largest = tl.max(tl.max(tl.where(size < float("inf"), size, 0.0), 1), 0)
        step = tl.maximum(tl.div_rn(largest, LARGEST), SMALLEST)
        if POWERS:
            step = ((step.to(tl.int32, bitcast=True) + 0x7FFFFF) & -0x800000).to(tl.float32, bitcast=True)
        tl.store(at, largest if MODE == "measure" else step)
    if MODE != "measure":
        scaled = tl.fma(wide, tl.full(wide.shape, 0.0, tl.float32), wide * tl.div_rn(1.0, step))  # infinity times 0 is NaN
        across = tl.cast(heads, tl.int64) * HEAD_DIM
        store_tile(values, _e4m3(scaled), batch, head, row, end, seqlen * across, across, HEAD_DIM, 1, ROWS, HEAD_DIM)


@triton.jit
def _wide(x):
    """16 bits as fp32. The interpreter's own conversion of denormal bf16 is another number."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _rotated(x, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """x H, Sylvester's, the pairs one apart first; products with 1 and -1 are exact, so a fused multiply-add rounds the same."""
    for bit in tl.static_range(8):
        if 1 << bit < HEAD_DIM:
            pairs = tl.reshape(x, (ROWS, HEAD_DIM >> (bit + 1), 2, 1 << bit))
            sign = 1.0 - 2.0 * tl.arange(0, 2).to(tl.float32)
            x = tl.reshape(_others(pairs) + pairs * sign[None, None, :, None], (ROWS, HEAD_DIM))
    return x


@triton.jit
def _others(pairs):
    """Each element's partner in dimension 2, by exclusive or in place: in a thread's registers, or a shuffle. The interpreter would
    walk such a reduction element by element."""
    if INTERPRETED:
        low, high = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        return tl.permute(tl.join(high, low), (0, 1, 3, 2))
    bits = pairs.to(tl.int32, bitcast=True)
    return (bits ^ tl.xor_sum(bits, 2, keep_dims=True)).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(x):
    """The bits of fp32 in e4m3: nearest, ties to even, at most 448. The interpreter's own conversion rounds otherwise."""
    if not INTERPRETED:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    x = tl.where(x == x, tl.minimum(tl.maximum(x, -448.0), 448.0), x)
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) & 0x7FFFFF  # the sum's last bit is 2^-9
    found = tl.where(size < (121 << 23), small, normal)
    found = tl.where(size > 0x7F800000, 0x7F, found | ((bits >> 24) & 0x80))
    return found.to(tl.uint8)


def quantise(
    x: Tensor,
    block: int | None = 128,
    *,
    per: str = "head",
    group: int = 1,
    hadamard: bool = False,
    seed: int = 0,
    powers: bool = False,
) -> Quantised:
    """x (B, S, H, D) in e4m3; arguments as of `quantise.quantise`, D a power of two from 16 to 256."""
    x = x.resolve_neg()  # Triton reads memory, whatever PyTorch has put off
    batch, seqlen, heads, head_dim = x.shape
    rows = block or MEASURED_ROWS
    blocks = -(-seqlen // rows)
    values = torch.empty(x.shape, dtype=E4M3, device=x.device)
    largest = torch.zeros(batch, heads, blocks, dtype=torch.float32, device=x.device)
    sign = signs(head_dim, seed, x.device) if hadamard else largest
    tile = triton.next_power_of_2(rows)
    warps = min(16, max(1, tile * head_dim // (ELEMENTS_OF_A_WARP >> hadamard)))

    def launch(mode: str, descale: Tensor, group: int) -> None:
        if x.numel() == 0:
            return
        _quantise[(batch * heads * blocks,)](
            x, sign, values.view(torch.uint8), descale, heads, seqlen, blocks, group, *x.stride(), *descale.stride()[:2],
            normaliser(head_dim), BLOCK=rows, ROWS=tile, HEAD_DIM=head_dim, ROTATED=hadamard, MODE=mode,
            LARGEST=LARGEST, SMALLEST=SMALLEST_DESCALE, POWERS=powers, num_warps=warps,
        )  # fmt: skip

    if block is not None:
        launch("block", largest, 1)
        return Quantised(values, largest, block)
    launch("measure", largest, 1)
    heads_largest = largest.amax(2) if blocks else largest.new_zeros(batch, heads)
    descale = descale_of(shared(heads_largest, per, group), powers)
    launch("given", descale, group)
    return Quantised(values, descale)
