"""How a kernel reaches a (B, S, H, D) tensor of any strides: by tensor descriptor (TMA) or by pointers.

Both give the same tile: rows before the sequence or past its end read as zero, and are not written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def tile_pointers(base, batch, head, row, stride_b, stride_s, stride_h, stride_d, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Addresses of rows row .. row + ROWS of one head. Every product is of 64 bits: a stride that fits 32 may yet overflow."""
    corner = base + tl.cast(batch, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h
    corner += tl.cast(row, tl.int64) * stride_s
    down = tl.arange(0, ROWS).to(tl.int64) * stride_s
    across = tl.arange(0, COLUMNS).to(tl.int64) * stride_d
    return corner + down[:, None] + across[None, :]


@triton.jit
def row_pointers(base, batch, head, rows, stride_b, stride_h, stride_s):
    """Addresses of one number a row, of a (B, H, S) tensor, as LSE is; 64-bit, as in tile_pointers."""
    corner = base + tl.cast(batch, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h
    return corner + tl.cast(rows, tl.int64) * stride_s


@triton.jit
def load_tile(
    source,
    batch,
    head,
    row,
    end,
    stride_b,
    stride_s,
    stride_h,
    stride_d,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """A (ROWS, COLUMNS) tile; RAGGED where some of its rows may lie at or past `end`, or before 0."""
    if TMA:
        tile = source.load([batch, head, row, 0]).reshape(ROWS, COLUMNS)
    else:
        pointers = tile_pointers(source, batch, head, row, stride_b, stride_s, stride_h, stride_d, ROWS, COLUMNS)
        rows = row + tl.arange(0, ROWS)
        inside = ((rows >= 0) & (rows < end))[:, None]
        tile = tl.load(pointers, mask=inside, other=0.0) if RAGGED else tl.load(pointers)
    return tile


@triton.jit
def store_tile(
    target,
    tile,
    batch,
    head,
    row,
    end,
    stride_b,
    stride_s,
    stride_h,
    stride_d,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the rows of `tile` that lie before `end`, in the target's dtype."""
    pointers = tile_pointers(target, batch, head, row, stride_b, stride_s, stride_h, stride_d, ROWS, COLUMNS)
    tl.store(pointers, tile.to(target.dtype.element_ty), mask=(row + tl.arange(0, ROWS) < end)[:, None])


@triton.jit
def place(program, tiles, heads, TOGETHER: tl.constexpr, HEAVY_LAST: tl.constexpr):
    """(tile, batch-and-head) of a program: TOGETHER heads at a time, and in them the heaviest tile of each head first.

    A few heads at a time keeps their K and V in L2; heaviest first keeps the last wave short.
    """
    group = program // (tiles * TOGETHER)
    first = group * TOGETHER
    width = tl.minimum(TOGETHER, heads - first)
    inside = program - first * tiles
    tile = inside // width
    if HEAVY_LAST:
        tile = tiles - 1 - tile
    return tile, first + inside % width


def can_describe(*tensors: torch.Tensor) -> bool:
    """Whether TMA can address the tensors: Hopper, D contiguous, other strides and the address multiples of 16 bytes."""
    return all(
        x.is_cuda
        and torch.cuda.get_device_capability(x.device) >= (9, 0)
        and x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(size > 0 for size in x.shape)
        and all(0 < stride * x.element_size() < 1 << 40 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
        and max(x.shape) < 1 << 31
        for x in tensors
    )


def describe(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of (B, S, H, D) as [B, H, S, D], in boxes of `rows` of one head."""
    batch, seqlen, heads, head_dim = x.shape
    stride_b, stride_s, stride_h, stride_d = x.stride()
    return TensorDescriptor(x, [batch, heads, seqlen, head_dim], [stride_b, stride_h, stride_s, stride_d], [1, 1, rows, head_dim])


def heads_together(seqlen_k: int, head_dim: int, element_bytes: int, heads: int, sharing: int, causal: bool) -> int:
    """How many query heads are walked side by side: as many as keep their K and V in about half of L2 (32 MB)."""
    if not causal:
        return 1
    per_head = 2 * seqlen_k * head_dim * element_bytes
    fitting = max(1, (32 << 20) // max(1, per_head)) * sharing
    return 1 << (min(fitting, max(1, heads)).bit_length() - 1)
