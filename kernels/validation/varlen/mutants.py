"""A right kernel of packed sequences in plain torch, and planted faults of packing: each breaks one step of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from ..mutants import Mutant, TiledAttention
from ..mutants import forward as of_one_length
from ..mutants.tiled import TILE
from ..subjects import Subject
from .subjects import packed_subject


class TiledPacked:
    """Each sequence by TiledAttention, one after another; every step a method of its own."""

    def __init__(self) -> None:
        self.attend = self.kernel()()

    def kernel(self):
        """The class that attends within a sequence."""
        return TiledAttention

    def __call__(self, q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, softmax_scale=None):
        """O (total_q, H, D) and LSE (H, total_q), both differentiable."""
        rows, keys = self.bounds(cu_seqlens_q, cu_seqlens_k)
        pieces, levels = [], []
        for mine, theirs in zip(rows, keys, strict=True):
            o, lse = self.sequence(q, k, v, mine, theirs, causal, softmax_scale, max_seqlen_q, max_seqlen_k)
            pieces.append(o[0])
            levels.append(lse[0])
        return self.store(q, v, rows, pieces), self.levels(q, rows, levels)

    def bounds(self, cu_q, cu_k):
        """Rows of q and of k and v of every sequence."""
        return [self.slices(cu.tolist()) for cu in (cu_q, cu_k)]

    def slices(self, ends):
        """From ends to rows."""
        return [slice(start, end) for start, end in pairwise(ends)]

    def sequence(self, q, k, v, rows, keys, causal, scale, max_q, max_k):
        """O and LSE of one sequence."""
        return self.attend(q[None, rows], k[None, keys], v[None, keys], causal=causal, softmax_scale=scale)

    def store(self, q, v, rows, pieces):
        """O of all sequences; 0 in rows of none."""
        outside = self.outside(q, rows)
        zeros = [q.new_zeros(count, q.shape[1], v.shape[2]) for count in outside]
        return torch.cat([zeros[0], *pieces, zeros[1]])

    def levels(self, q, rows, levels):
        """LSE of all sequences."""
        outside = self.outside(q, rows)
        none = [torch.full((q.shape[1], count), float("-inf"), device=q.device) for count in outside]
        wide = torch.promote_types(q.dtype, torch.float32)
        return torch.cat([none[0].to(wide), *levels, none[1].to(wide)], 1)

    def outside(self, q, rows):
        """Rows before the first sequence and after the last."""
        return (rows[0].start, q.shape[0] - rows[-1].stop) if rows else (q.shape[0], 0)


class TailOfTheNext(TiledPacked):
    """The last tile of keys is not masked at the sequence's end: the next sequence's first keys are seen too."""

    def sequence(self, q, k, v, rows, keys, causal, scale, max_q, max_k):
        end = min(len(k), keys.start + -(-(keys.stop - keys.start) // TILE) * TILE)
        if causal:
            return super().sequence(q, k, v, rows, keys, causal, scale, max_q, max_k)
        return super().sequence(q, k, v, rows, slice(keys.start, end), causal, scale, max_q, max_k)


class QueryBoundsForKeys(TiledPacked):
    """K and V are cut by cu_seqlens_q."""

    def bounds(self, cu_q, cu_k):
        return super().bounds(cu_q, cu_q)


class EmptySequencesSkipped(TiledPacked):
    """Sequences without queries are left out of the list of queries, and not of the list of keys."""

    def __call__(self, q, k, v, *, cu_seqlens_q, cu_seqlens_k, **given):
        kept = torch.cat([cu_seqlens_q[:1], cu_seqlens_q[1:][cu_seqlens_q.diff() > 0]])
        return super().__call__(q, k, v, cu_seqlens_q=kept, cu_seqlens_k=cu_seqlens_k[: len(kept)], **given)


class MaskTopLeft(TiledPacked):
    """The causal mask of a sequence is aligned top left."""

    def kernel(self):
        return of_one_length.MaskTopLeft


class OffsetOfTheLongest(TiledPacked):
    """The causal mask is shifted by max_seqlen_k - max_seqlen_q in every sequence."""

    def sequence(self, q, k, v, rows, keys, causal, scale, max_q, max_k):
        if causal:
            count = min(keys.stop - keys.start, max(0, rows.stop - rows.start + max_k - max_q))
            keys = slice(keys.start, keys.start + count)
        return super().sequence(q, k, v, rows, keys, causal, scale, max_q, max_k)


class WholeTilesStored(TiledPacked):
    """O is stored in whole tiles, over the first rows of the sequence that follows."""

    def store(self, q, v, rows, pieces):
        out = super().store(q, v, rows, pieces)
        if out.requires_grad:
            return out
        for at in rows[:-1]:
            over = -(at.stop - at.start) % TILE
            out[at.stop : at.stop + over] = 0
        return out


class ZeroTimesNeighbour(TiledPacked):
    """Past the sequence's end weights are 0, and V is read there all the same: 0 times the neighbour's NaN."""

    def sequence(self, q, k, v, rows, keys, causal, scale, max_q, max_k):
        o, lse = super().sequence(q, k, v, rows, keys, causal, scale, max_q, max_k)
        over = v[keys.stop : keys.stop + -(keys.stop - keys.start) % TILE]
        return o + 0 * over.sum() if keys.stop > keys.start else o, lse


class NothingStoredWithoutKeys(TiledPacked):
    """A sequence without keys is passed over: O stays as it was found in memory."""

    def sequence(self, q, k, v, rows, keys, causal, scale, max_q, max_k):
        o, lse = super().sequence(q, k, v, rows, keys, causal, scale, max_q, max_k)
        return (o if keys.stop > keys.start else o + 1), lse


class BeginsAtZero(TiledPacked):
    """Sequences are taken to begin at row 0, whatever the first of cu_seqlens says."""

    def bounds(self, cu_q, cu_k):
        return super().bounds(cu_q, cu_k - cu_k[0])


class LseBySequence(TiledPacked):
    """LSE is written sequence by sequence, and read as (heads, rows)."""

    def levels(self, q, rows, levels):
        right = super().levels(q, rows, levels)
        outside = self.outside(q, rows)
        flat = torch.cat([x.flatten() for x in levels]) if levels else right
        return flat.view(q.shape[1], -1) if flat.numel() == right.numel() and not any(outside) else right


class BoundsKept(TiledPacked):
    """Where sequences begin is kept from the call before, where there were as many of as many rows."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = {}

    def bounds(self, cu_q, cu_k):
        key = (len(cu_q), int(cu_q[-1]), int(cu_k[-1]))
        return self.kept.setdefault(key, super().bounds(cu_q, cu_k))


class BoundsShifted(TiledPacked):
    """cu_seqlens are made to begin at 0, in place."""

    def __call__(self, q, k, v, *, cu_seqlens_q, cu_seqlens_k, **given):
        answer = super().__call__(q, k, v, cu_seqlens_q=cu_seqlens_q.clone(), cu_seqlens_k=cu_seqlens_k.clone(), **given)
        cu_seqlens_q -= cu_seqlens_q[0].item()
        return answer


class LengthsOfTheLongest(TiledPacked):
    """max_seqlen_k is taken for the number of keys of a batch of one sequence."""

    def sequence(self, q, k, v, rows, keys, causal, scale, max_q, max_k):
        if max_k > keys.stop - keys.start and max_q > rows.stop - rows.start and keys.start == 0:
            keys = slice(keys.start, min(len(k), keys.start + max_k))
        return super().sequence(q, k, v, rows, keys, causal, scale, max_q, max_k)


class GradientsOfTheFirstRows(TiledPacked):
    """Backward of a sequence with fewer keys than queries stops at as many queries as it has keys."""

    def sequence(self, q, k, v, rows, keys, causal, scale, max_q, max_k):
        o, lse = super().sequence(q, k, v, rows, keys, causal, scale, max_q, max_k)
        count = keys.stop - keys.start
        return torch.cat([o[:, :count], o[:, count:].detach()], 1), lse


class RandomOrder(TiledPacked):
    """K/V tiles of a sequence are added in whatever order they finish."""

    def kernel(self):
        return of_one_length.RandomOrder


class StridesIgnored(TiledPacked):
    """Rows are taken to lie H x D elements apart."""

    def __call__(self, q, k, v, **given):
        def flat(x):
            return x if x.is_contiguous() else x.as_strided(x.shape, (x.shape[1] * x.shape[2], x.shape[2], 1), x.storage_offset())

        return super().__call__(flat(q), flat(k), flat(v), **given)


@dataclass(frozen=True)
class PackedMutant(Mutant):
    """A Mutant made from TiledPacked."""

    def subject(self) -> Subject:
        """A fresh kernel with this fault."""
        return subject(self.name, self.kernel())


def subject(name: str, kernel: TiledPacked) -> Subject:
    """A tiled kernel as the suite sees it."""
    return packed_subject(name, kernel, head_dims=(32,), tile=TILE, slow=True, returns_lse=True, differentiable=True)


def correct() -> Subject:
    """What the faults are planted in."""
    return subject("tiled packed attention", TiledPacked())


MUTANTS = (
    PackedMutant(TailOfTheNext, "packing", "full"),
    PackedMutant(QueryBoundsForKeys, "packing", "unequal queries and keys"),
    PackedMutant(EmptySequencesSkipped, "packing", "an empty sequence takes no rows"),
    PackedMutant(MaskTopLeft, "packing", "aligned bottom right in each sequence"),
    PackedMutant(OffsetOfTheLongest, "packing", "aligned bottom right in each sequence"),
    PackedMutant(WholeTilesStored, "packing", "each sequence is a problem of its own"),
    PackedMutant(ZeroTimesNeighbour, "packing", "no sequence reads another's rows"),
    PackedMutant(NothingStoredWithoutKeys, "packing", "a sequence without keys has O = 0"),
    PackedMutant(BeginsAtZero, "packing", "cu_seqlens say where sequences begin and end"),
    PackedMutant(LseBySequence, "packing", "LSE"),
    PackedMutant(BoundsKept, "packing", "cu_seqlens are those of this call"),
    PackedMutant(BoundsShifted, "packing", "modifies cu_seqlens_q"),
    PackedMutant(LengthsOfTheLongest, "packing", "max_seqlen is a bound and no length"),
    PackedMutant(GradientsOfTheFirstRows, "packing", "each sequence has its own gradients"),
    PackedMutant(RandomOrder, "packing", "not deterministic"),
    PackedMutant(StridesIgnored, "packing", "strides are respected"),
)
