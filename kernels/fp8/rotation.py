"""Incoherent processing: random signs, then the Hadamard transform of each head (FlashAttention-3, arXiv:2407.08608, section 3.3).

Both are orthogonal and Q and K share them, so Q K^T keeps its value while an outlier is spread over the whole head.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def signs(head_dim: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """(D,) of +1 and -1 in fp32: the same for one head_dim and seed on every device."""
    drawn = torch.randint(2, (head_dim,), generator=torch.Generator().manual_seed(seed))
    return (2.0 * drawn - 1.0).to(device)


def rotate(x: Tensor, sign: Tensor) -> Tensor:
    """x (..., D) times `sign` and the Hadamard matrix over sqrt(D), in fp32 with D log2 D additions; D a power of two.

    Sylvester's order: entry (i, j) is -1 where i & j has an odd number of ones. Pairs are added one apart first, then two, four
    and so on, and 1/sqrt(D) comes last: `fused.py` does the same, so both give the same bits.
    """
    y = x.float() * sign
    head_dim = y.shape[-1]
    for bit in range(head_dim.bit_length() - 1):
        low, high = y.unflatten(-1, (-1, 2, 1 << bit)).unbind(-2)
        y = torch.stack((low + high, low - high), -2).flatten(-3)
    return y * normaliser(head_dim)


def normaliser(head_dim: int) -> float:
    """1/sqrt(D)."""
    return 1.0 / math.sqrt(head_dim)
