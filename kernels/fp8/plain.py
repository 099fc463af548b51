"""What quantising means here, in plain torch: the definition that the fused kernels give bit for bit.

An e4m3 value stands for itself times its descale. A descale is the largest finite magnitude of its rows over 448, in fp32, and

- at least 2^-126, the smallest normal number, which rows of zeros have too: what is smaller keeps fewer bits, and its inverse
  never overflows. A block of zeros in V so takes nothing of P's range from the others (cuda/fp8);
- with `powers` the next power of two: e4m3 keeps as many bits, and what is multiplied with it keeps all.

Values are rounded to nearest, ties to even. NaN stays NaN. Infinity becomes NaN, since e4m3 has none and 448 would hide it; neither
moves the descale. Rotation mixes a row of a head: one that holds NaN or infinity, or whose sums pass fp32, is NaN as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .rotation import rotate, signs

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_DESCALE = 2.0**-126


class Quantised(NamedTuple):
    """e4m3 values (B, S, H, D), contiguous, and their descales in fp32; rows of `block` share one where it is not None.

    descale is (B, H, blocks) with `block`, else (B, H / group).
    """

    values: Tensor
    descale: Tensor
    block: int | None = None

    def expanded(self) -> Tensor:
        """The descale of every row, (B, S, H, 1)."""
        _, seqlen, heads, _ = self.values.shape
        if self.block is None:
            each = self.descale.repeat_interleave(heads // max(1, self.descale.shape[1]), 1)[:, None]
            return each.expand(-1, seqlen, -1).unsqueeze(-1)
        return self.descale.repeat_interleave(self.block, 2)[:, :, :seqlen].transpose(1, 2).unsqueeze(-1)

    def says(self) -> Tensor:
        """What the values stand for, in fp64."""
        return self.values.double() * self.expanded().double()


@dataclass(frozen=True)
class Part:
    """A tensor (B, S, H, D) whose rows of `block` share a descale, and what `quantise` calls hadamard and powers.

    `keyed`: its values are wanted as rows of keys (keyed.py), as V of the kernels that transpose nothing.
    """

    x: Tensor
    block: int
    hadamard: bool = False
    powers: bool = False
    keyed: bool = False


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
    """x (B, S, H, D) in e4m3; arguments as of `quantise.quantise`."""
    wide = rotate(x, signs(x.shape[-1], seed, x.device)) if hadamard else x.float()
    finite = wide.isfinite()
    size = torch.where(finite, wide.abs(), 0.0)
    batch, seqlen, heads, head_dim = x.shape
    if block is None:
        rows = size.amax((1, 3)) if size.numel() else size.new_zeros(batch, heads)
        descale = descale_of(shared(rows, per, group), powers)
    else:
        blocks = -(-seqlen // block)
        padded = torch.nn.functional.pad(size, (0, 0, 0, 0, 0, blocks * block - seqlen))
        rows = padded.view(batch, blocks, block, heads, head_dim)
        largest = rows.amax((2, 4)) if size.numel() else size.new_zeros(batch, blocks, heads)
        descale = descale_of(largest.transpose(1, 2).contiguous(), powers)
    found = Quantised(torch.empty(x.shape, dtype=E4M3, device=x.device), descale, block)
    scaled = wide * (1.0 / found.expanded())
    found.values.copy_(to_e4m3(torch.where(finite, scaled, torch.nan)))
    return found


def to_e4m3(x: Tensor) -> Tensor:
    """fp32 in e4m3 as Hopper converts it: nearest, ties to even, what is above 448 becomes 448, NaN stays."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3)


def shared(largest: Tensor, per: str, group: int) -> Tensor:
    """The largest magnitude of each head (B, H) as those that share a descale have it, (B, H / group)."""
    if per == "tensor":
        return largest.max().expand(largest.shape[0], largest.shape[1] // group).contiguous() if largest.numel() else largest
    return largest.unflatten(1, (-1, group)).amax(2) if largest.numel() else largest[:, : largest.shape[1] // group]


def descale_of(largest: Tensor, powers: bool) -> Tensor:
    """The descale of rows whose largest finite magnitude is this."""
    # By a tensor: on a GPU PyTorch divides by a number as it multiplies with its inverse, which may be the next number.
    exact = (largest / torch.full_like(largest, LARGEST)).clamp(min=SMALLEST_DESCALE)
    return ((exact.view(torch.int32) + 0x7FFFFF) & -0x800000).view(torch.float32) if powers else exact
