"""Planted faults of FP8's own: each breaks one step of `TiledFp8`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...fp8.plain import LARGEST
from ..mutants import Mutant
from .tiled import TiledFp8, subject


class NotTransposed(TiledFp8):
    """A block of V goes to the tensor cores as it lies: its rows for its columns."""

    def transposed(self, v):
        return self.reordered(v)


class PermutationNotUndone(TiledFp8):
    """P's keys are in the order of the accumulators, V's in their own."""

    def transposed(self, v):
        return v.transpose(2, 3)


class ShiftNotTakenBack(TiledFp8):
    """LSE is of the weights as they are packed, 2^4 too large."""

    def lse(self, top, total):
        return (top + total.log2()) * math.log(2)


class QueryDescaleDropped(TiledFp8):
    """q_descale is not read."""

    def score_scale(self, q_descale, k_descale, m, j):
        return super().score_scale(torch.ones_like(q_descale), k_descale, m, j)


class KeyDescaleDropped(TiledFp8):
    """k_descale is not read."""

    def score_scale(self, q_descale, k_descale, m, j):
        return super().score_scale(q_descale, torch.ones_like(k_descale), m, j)


class ValueDescaleDropped(TiledFp8):
    """v_descale is not read."""

    def v_scale(self, v_descale, j):
        return super().v_scale(torch.ones_like(v_descale), j)


class NextKeyDescale(TiledFp8):
    """A block of K is taken with the descale of the block after it, as where a ring's slot is overwritten too early."""

    def score_scale(self, q_descale, k_descale, m, j):
        return super().score_scale(q_descale, k_descale.roll(-1, 2), m, j)


class PreviousValueDescale(TiledFp8):
    """A block of V is taken with the descale of the block before it."""

    def v_scale(self, v_descale, j):
        return super().v_scale(v_descale.roll(1, 2), j)


class NextQueryDescale(TiledFp8):
    """Rows of Q are taken with the descale of the rows after them."""

    def score_scale(self, q_descale, k_descale, m, j):
        return super().score_scale(q_descale.roll(-1, 2), k_descale, m, j)


class SaturatedWeights(TiledFp8):
    """Weights are taken from the first block's maximum for good: past 448 they are all 448."""

    def pivot(self, top, high, first):
        return high if first else torch.where(top == -math.inf, high, top)


class NanSaturates(TiledFp8):
    """A weight that is NaN becomes the largest e4m3 number."""

    def weights(self, s, pivot):
        return super().weights(s, pivot).nan_to_num(LARGEST)


class ZeroTimesMask(TiledFp8):
    """A descale of 0 meets the mask's -inf."""

    def above_zero(self, scale):
        return scale


@dataclass(frozen=True)
class Fp8Mutant(Mutant):
    """A Mutant made from TiledFp8."""

    def subject(self):
        """A fresh kernel with this fault."""
        return subject(self.name, self.kernel())


MUTANTS = (
    Fp8Mutant(NotTransposed, "accuracy", "O"),
    Fp8Mutant(PermutationNotUndone, "accuracy", "the accumulators and V's are not"),
    Fp8Mutant(ShiftNotTakenBack, "accuracy", "+4 in base 2 everywhere"),
    Fp8Mutant(QueryDescaleDropped, "accuracy", "without q_descale"),
    Fp8Mutant(KeyDescaleDropped, "accuracy", "without k_descale"),
    Fp8Mutant(ValueDescaleDropped, "accuracy", "without v_descale"),
    Fp8Mutant(NextKeyDescale, "scales", "the block after in k"),
    Fp8Mutant(PreviousValueDescale, "scales", "the block before in v"),
    Fp8Mutant(NextQueryDescale, "scales", "the block after in q"),
    Fp8Mutant(SaturatedWeights, "inputs", "logits"),
    Fp8Mutant(NanSaturates, "inputs", "swallows NaN"),
    Fp8Mutant(ZeroTimesMask, "scales", "q_descale of 0"),
)
