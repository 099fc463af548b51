"""V as rows of keys, so that no kernel has to transpose it: the layout in plain torch, and a quantiser that writes it.

V of a head lies as (D, S): a row has one column of V for all keys, as WGMMA takes 8-bit operands. Of every sixteen keys position
4 i + {0, 1, 2, 3} holds key 2 i + {0, 1, 8, 9}, the order of a thread's accumulators of S (cuda/fp8/producer.cuh: Transposer);
behind the last key are zeros up to a multiple of sixteen. Not run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...simulator.errors import UsageError
from ..triton.arithmetic import INTERPRETED
from ..triton.loads import load_tile
from .fused import _e4m3, _wide
from .plain import E4M3, LARGEST, SMALLEST_DESCALE

GROUP = 16
ORDER = tuple(2 * i + within for i in range(4) for within in (0, 1, 8, 9))
"""The key at each position of a group of sixteen."""
ELEMENTS_OF_A_WARP = 2048


def as_rows_of_keys(v: Tensor) -> Tensor:
    """V (B, S, H, D) of one byte an element as (B, H, D, S16), S16 the next multiple of sixteen; contiguous."""
    batch, seqlen, heads, head_dim = v.shape
    across = v.view(torch.uint8).permute(0, 2, 3, 1)
    padded = torch.nn.functional.pad(across, (0, -seqlen % GROUP)).view(batch, heads, head_dim, -1, GROUP)
    return padded[..., list(ORDER)].reshape(batch, heads, head_dim, -1).view(v.dtype)


@triton.jit
def _quantise_keyed(
    x, values, descale, heads, seqlen, keys, blocks, stride_b, stride_s, stride_h, stride_d,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """One block of one head: fused._quantise with descales that are powers of two, and the block across."""
    index = tl.program_id(0)
    head, block, batch = index % heads, index // heads % blocks, index // heads // blocks
    row = block * BLOCK
    end = tl.minimum(row + BLOCK, seqlen)
    wide = _wide(load_tile(x, batch, head, row, end, stride_b, stride_s, stride_h, stride_d, ROWS, HEAD_DIM, False, True))
    size = tl.abs(wide)
    if INTERPRETED:  # whose maximum is NaN where any is
        size = tl.where(size < float("inf"), size, 0.0)
    largest = tl.max(tl.max(size, 1), 0)
    if largest == float("inf"):
        largest = tl.max(tl.max(tl.where(size < float("inf"), size, 0.0), 1), 0)
    step = tl.maximum(tl.div_rn(largest, LARGEST), SMALLEST)
    step = ((step.to(tl.int32, bitcast=True) + 0x7FFFFF) & -0x800000).to(tl.float32, bitcast=True)
    of_head = tl.cast(batch, tl.int64) * heads + head
    tl.store(descale + of_head * blocks + block, step)
    found = _e4m3(tl.fma(wide, tl.full(wide.shape, 0.0, tl.float32), wide * tl.div_rn(1.0, step)))  # infinity times 0 is NaN
    # A key of a group is 8 upper + 2 i + lower, its position 4 i + 2 upper + lower.
    groups = tl.reshape(found, (ROWS // 16, 2, 4, 2, HEAD_DIM))
    across = tl.reshape(tl.permute(groups, (4, 0, 2, 1, 3)), (HEAD_DIM, ROWS))
    column, position = tl.arange(0, HEAD_DIM), tl.arange(0, ROWS)
    to = values + (of_head * HEAD_DIM + column[:, None]) * keys + row + position[None, :]
    inside = (position < BLOCK) & (row + position < keys)
    tl.store(to, across, mask=inside[None, :] & (column[:, None] < HEAD_DIM))


def quantise_keyed(v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """V (B, S, H, D) in e4m3 as rows of keys (B, H, D, S16), and descales (B, H, blocks), powers of two, of `block` keys.

    The values are `as_rows_of_keys` of `quantise(v, block, powers=True)`. Raises UsageError for a block that is no multiple of 16.
    """
    if block % GROUP:
        raise UsageError(f"block={block} is no multiple of {GROUP}, as rows of keys need it")
    v = v.resolve_neg()
    batch, seqlen, heads, head_dim = v.shape
    blocks, keys = -(-seqlen // block), -(-seqlen // GROUP) * GROUP
    values = torch.empty(batch, heads, head_dim, keys, dtype=E4M3, device=v.device)
    descale = torch.empty(batch, heads, blocks, dtype=torch.float32, device=v.device)
    tile = triton.next_power_of_2(block)
    if v.numel():
        _quantise_keyed[(batch * heads * blocks,)](
            v, values.view(torch.uint8), descale, heads, seqlen, keys, blocks, *v.stride(),
            BLOCK=block, ROWS=tile, HEAD_DIM=head_dim, LARGEST=LARGEST, SMALLEST=SMALLEST_DESCALE,
            num_warps=min(16, max(1, tile * head_dim // ELEMENTS_OF_A_WARP)),
        )  # fmt: skip
    return values, descale
