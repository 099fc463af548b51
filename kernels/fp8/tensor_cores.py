"""Hopper's FP8 tensor cores bit by bit: how WGMMA adds e4m3 products.

One instruction adds `depth` products and the accumulator at once: each is aligned to the largest exponent among them, cut off
below `fraction_bits` bits, and the sum, normalised, is cut off below `fraction_bits` again. So an fp32 accumulator holds 14 bits.
The exponent of a product is the sum of its factors' exponents, before normalisation; a denormal's is that of the smallest normal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Accumulation:
    """How products are added; `source` says who found it."""

    fraction_bits: int
    depth: int
    source: str


HOPPER = Accumulation(
    fraction_bits=13,
    depth=32,
    source="MMA-Sim, arXiv:2511.10909 (wgmma, e4m3 to fp32); traces/recorded/calibration/fp8_accumulation.json, H200: all bits",
)
FP32_BITS = 23
SMALLEST_EXPONENT = -126


def multiply(a: Tensor, b: Tensor, c: Tensor | None = None, how: Accumulation | None = HOPPER) -> Tensor:
    """c + a b^T in fp32 as a chain of instructions adds it; a (M, K) and b (N, K) of e4m3 values, c (M, N).

    K beyond a multiple of `how.depth` counts as zeros. With how=None products are added in fp32. NaN makes NaN, as in hardware.
    """
    a, b = a.float(), b.float()
    if c is None:
        c = torch.zeros(len(a), len(b), device=a.device)
    if how is None:
        return c + a @ b.T
    short = -a.shape[1] % how.depth
    a, b = (torch.nn.functional.pad(x, (0, short)).T.contiguous() for x in (a, b))
    exponents = exponent(a, -6), exponent(b, -6)
    for start in range(0, len(a), how.depth):
        part = slice(start, start + how.depth)
        products = a[part, :, None] * b[part, None, :]
        largest = (exponents[0][part, :, None] + exponents[1][part, None, :]).amax(0)
        c = _add(c, products, largest, how.fraction_bits)
    return c


def _add(c: Tensor, products: Tensor, largest: Tensor, fraction_bits: int) -> Tensor:
    """c (M, N) and products (depth, M, N) in one addition, in units of the last bit kept: whole numbers below 2^22."""
    unit = (torch.maximum(largest, exponent(c, SMALLEST_EXPONENT)) - fraction_bits).clamp(min=SMALLEST_EXPONENT)
    up, down = power_of_two(-unit), power_of_two(unit)
    total = products.mul_(up).trunc_().sum(0) + (c * up).trunc()
    return truncate(total, fraction_bits) * down


def exponent(x: Tensor, smallest: int) -> Tensor:
    """floor(log2 |x|) of fp32, at least `smallest`, which a denormal has; of 0 so little that it never is the largest."""
    found = ((x.contiguous().view(torch.int32) >> FP32_BITS) & 0xFF) - 127
    return torch.where(x == 0, 2 * SMALLEST_EXPONENT, found.clamp(min=smallest)).to(torch.int16)


def power_of_two(n: Tensor) -> Tensor:
    """2^n in fp32, exact, for n of int32 from -126 to 127."""
    return ((n.to(torch.int32) + 127) << FP32_BITS).view(torch.float32)


def truncate(x: Tensor, fraction_bits: int) -> Tensor:
    """x in fp32 cut off, toward zero, below `fraction_bits` bits after its leading one; NaN stays."""
    kept = (x.view(torch.int32) & -(1 << (FP32_BITS - fraction_bits))).view(torch.float32)
    return torch.where(x.isnan(), x, kept)
