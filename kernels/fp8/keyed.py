"""V as rows of keys, so that no kernel has to transpose it: the layout in plain torch. cuda/fp8/stream.cu writes it.

V of a head lies as (D, S): a row has one column of V for all keys, as WGMMA takes 8-bit operands. Of every sixteen keys position
4 i + {0, 1, 2, 3} holds key 2 i + {0, 1, 8, 9}, the order of a thread's accumulators of S (cuda/fp8/producer.cuh: Transposer);
behind the last key are zeros up to a multiple of sixteen.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 16
ORDER = tuple(2 * i + within for i in range(4) for within in (0, 1, 8, 9))
"""The key at each position of a group of sixteen."""


def as_rows_of_keys(v: Tensor) -> Tensor:
    """V (B, S, H, D) of one byte an element as (B, H, D, S16), S16 the next multiple of sixteen; contiguous."""
    batch, seqlen, heads, head_dim = v.shape
    across = v.view(torch.uint8).permute(0, 2, 3, 1)
    groups = -(-seqlen // GROUP)
    padded = torch.nn.functional.pad(across, (0, -seqlen % GROUP)).view(batch, heads, head_dim, groups, GROUP)
    return padded[..., list(ORDER)].reshape(batch, heads, head_dim, groups * GROUP).view(v.dtype)


def from_rows_of_keys(v: Tensor, seqlen: int) -> Tensor:
    """The V (B, S, H, D) whose rows of keys these are."""
    batch, heads, head_dim, keys = v.shape
    groups = v.view(torch.uint8).view(batch, heads, head_dim, keys // GROUP, GROUP)
    back = torch.empty_like(groups)
    back[..., list(ORDER)] = groups
    return back.view(batch, heads, head_dim, keys)[..., :seqlen].permute(0, 3, 1, 2).contiguous().view(v.dtype)
