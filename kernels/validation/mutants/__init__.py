"""Planted faults: wrappers around `TiledAttention`, each of which breaks one step of it.

The suite must reject each, and `expects` holds what its rejection must say.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..check import FAIL, Check
from ..subjects import Subject
from . import autograd, backward, forward, memory, process
from .tiled import TILE, TiledAttention


@dataclass(frozen=True)
class Mutant:
    """A planted fault, the group that must reject it, and words that the rejection must hold."""

    kernel: type[TiledAttention]
    group: str
    expects: str

    @property
    def name(self) -> str:
        """ "DroppedRescale" -> "dropped rescale"."""
        return "".join(f" {c.lower()}" if c.isupper() else c for c in self.kernel.__name__).strip()

    @property
    def fault(self) -> str:
        """What is wrong with it."""
        return " ".join(self.kernel.__doc__.split())

    def caught(self, check: Check) -> bool:
        """Whether `check` rejects it, and in words that say what is wrong where it is of the group that must."""
        return check.verdict == FAIL and (check.group != self.group or self.expects in f"{check.case}: {check.message}")

    def subject(self) -> Subject:
        """A fresh kernel with this fault, to be held to the suite."""
        return subject(self.name, self.kernel())


def subject(name: str, kernel: TiledAttention) -> Subject:
    """A tiled kernel as the suite sees it."""
    return Subject(name=name, forward=kernel, head_dims=(32,), tile=TILE, slow=True, returns_lse=True, differentiable=True)


MUTANTS = (
    Mutant(forward.DroppedRescale, "inputs", "rising logits"),
    Mutant(forward.MaskOffByOne, "accuracy", "causal mask one key too far"),
    Mutant(forward.MaskTopLeft, "shapes", "causal mask aligned top left"),
    Mutant(forward.MissingLastTile, "shapes", "without the last, partial tile"),
    Mutant(forward.UnmaskedTail, "shapes", "keys of zeros, not masked"),
    Mutant(forward.WrongScale, "accuracy", "softmax_scale 1/d"),
    Mutant(forward.ScaleIgnored, "shapes", "not the one given"),
    Mutant(memory.StaleBuffer, "memory", "no result of an earlier call may come back"),
    Mutant(memory.SharedOutput, "memory", "they share a buffer"),
    Mutant(forward.SwappedKTile, "accuracy", "K tiles of 16 swapped"),
    Mutant(forward.LseWithoutMax, "accuracy", "without the row's maximum"),
    Mutant(forward.LseInBase2, "accuracy", "in base 2, not natural"),
    Mutant(forward.NoRunningMax, "inputs", "large logits"),
    Mutant(forward.ScoresInHalf, "inputs", "scores beyond fp16"),
    Mutant(forward.EmptyRowsDivide, "inputs", "a row that sees no key"),
    Mutant(forward.NanSwallowed, "inputs", "swallows NaN"),
    Mutant(forward.HalfAccumulator, "accuracy", "V around 1"),
    Mutant(forward.CoarseWeights, "accuracy", "O drifts"),
    Mutant(memory.WritesPastEnd, "memory", "writes out of bounds"),
    Mutant(memory.UnwrittenRows, "memory", "every element of O and LSE is written"),
    Mutant(memory.ModifiesInput, "memory", "the call modifies q"),
    Mutant(forward.RandomOrder, "determinism", "not deterministic"),
    Mutant(forward.GqaInterleaved, "shapes", "key head h mod Hkv"),
    Mutant(forward.StridesIgnored, "shapes", "as if it were contiguous"),
    Mutant(backward.WrongDqScale, "gradients", "times what it should be"),
    Mutant(backward.MissingDelta, "gradients", "dQ"),
    Mutant(backward.OneHeadOfTheGroup, "gradients", "sum over the query heads of a group"),
    Mutant(forward.ScaleSignLost, "shapes", "without its sign"),
    Mutant(forward.ZeroScaleIsDefault, "shapes", "not the one given"),
    Mutant(forward.MaskTimesScale, "shapes", "softmax_scale is the one given"),
    Mutant(forward.SmallGroupsOnly, "shapes", "key head 0 for every query head"),
    Mutant(forward.InferenceGroups, "shapes", "key head 0 for every query head"),
    Mutant(forward.PositionsIn16Bits, "shapes", "wrapped at 32768"),
    Mutant(forward.KeyStridesForValues, "shapes", "K and V read with K's strides"),
    Mutant(forward.LazyBitIgnored, "shapes", "where the negation is lazy"),
    Mutant(forward.PaddedHeadDimScale, "shapes", "as of head dim 64"),
    Mutant(memory.SampledCache, "memory", "changed places between two calls"),
    Mutant(memory.OutputIsValue, "memory", "O shares memory with v"),
    Mutant(memory.UnwrittenGradients, "memory", "every element of dQ, dK and dV is written"),
    Mutant(backward.LaterBatchesScaled, "gradients", "batches 1, 2 are 1.5 times what it should be, the others are right"),
    Mutant(backward.BackwardStridesIgnored, "gradients", "backward pass on memory read as if it were contiguous"),
    Mutant(backward.DoutStridesIgnored, "gradients", "dO read as if it were contiguous"),
    Mutant(backward.LseGradientDropped, "gradients", "lacks the gradient of LSE"),
    Mutant(backward.GroupsSummedToEight, "gradients", "16 query heads on 1 key head"),
    Mutant(backward.BackwardPositionsIn16Bits, "gradients", "wrapped at 32768"),
    Mutant(backward.EmptyGradients, "gradients", "gradients of an empty problem are empty or 0"),
    Mutant(backward.BackwardDefaultScale, "gradients", "1/sqrt(d), not the one given"),
    Mutant(backward.BackwardRandomOrder, "determinism", "dQ is not deterministic"),
    Mutant(backward.DqTileLost, "gradients", "more tiles than a ring has stages"),
    Mutant(backward.StaleDqSums, "autograd", "2 times what it should be"),
    Mutant(backward.UnscaledKeyGradient, "gradients", "5.66 times what it should be"),
    Mutant(backward.DkTransposed, "gradients", "dK[batch"),
    Mutant(backward.BackwardMaskTopLeft, "gradients", "causal mask aligned top left"),
    Mutant(autograd.LseEaten, "autograd", "as it was for a second backward"),
    Mutant(autograd.OutputEaten, "autograd", "backward modifies O"),
    Mutant(autograd.DoutScaled, "autograd", "backward modifies dO"),
    Mutant(autograd.LastCallKept, "autograd", "as of the other call's q, k and v"),
    Mutant(autograd.SharedGradients, "autograd", "they share a buffer"),
    Mutant(autograd.DqOrNothing, "autograd", "q requires no gradient"),
    Mutant(autograd.ValueGradientIsDout, "autograd", "dV shares memory with dO"),
    Mutant(process.SwitchesDeterminismOn, "process", "changes deterministic algorithms"),
    Mutant(process.DrawsRandomNumbers, "process", "changes PyTorch's random numbers"),
    Mutant(process.ResetsPrecision, "process", "backward changes the precision of fp32 matrix products"),
    Mutant(process.LseInDefaultDtype, "process", "LSE has dtype torch.float64, expected torch.float32"),
)


__all__ = ["MUTANTS", "Mutant", "TiledAttention", "subject"]
