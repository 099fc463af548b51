"""A right kernel of few queries in plain torch, its keys in parts, and planted faults: each breaks one step of it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..mutants import Mutant
from ..mutants.tiled import TILE
from ..subjects import Subject

BLOCK = 8
"""Keys that a part is a multiple of."""


class TiledParts:
    """Packed GQA and split-KV, every step a method of its own: rows of a K/V head, parts of its keys, a combine by LSE."""

    def __call__(self, q, k, v, *, causal=False, softmax_scale=None, num_splits=None):
        """O (B, Sq, H, D) and LSE (B, H, Sq)."""
        scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
        out, lse = torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=wide_of(q))
        group = q.shape[2] // max(1, k.shape[2])
        for kv_head in range(k.shape[2]):
            heads = slice(kv_head * group, (kv_head + 1) * group)
            rows = q[:, :, heads].flatten(1, 2).to(wide_of(q))  # row r: query r // group of head r % group
            pieces = [
                self.part(rows, k[:, keys, kv_head], v[:, keys, kv_head], keys, q.shape[1], k.shape[1], group, scale, causal)
                for keys in self.parts(k.shape[1], num_splits or 1)
            ]
            o, level = self.combine(pieces)
            out[:, :, heads] = self.unpack(o, q.shape[1], group).to(out.dtype)
            lse[:, heads] = self.unpack(level, q.shape[1], group).transpose(1, 2).to(lse.dtype)
        return out, lse

    def parts(self, keys, count):
        """Slices of keys, some of them empty."""
        blocks = -(-keys // BLOCK)
        ends = [min(keys, blocks * i // count * BLOCK) for i in range(count)] + [keys]
        return [slice(start, end) for start, end in pairwise(ends)]

    def query_of(self, row, group, queries):
        """The query of a packed row."""
        return row // group

    def unpack(self, x, queries, group):
        """(B, rows, ...) to (B, queries, heads of the group, ...)."""
        return x.unflatten(1, (queries, group))

    def part(self, rows, k, v, keys, queries, seqlen_k, group, scale, causal):
        """O, normalised, and LSE of one part; 0 and -inf for rows that see none of its keys."""
        s = rows @ k.to(rows.dtype).transpose(1, 2) * scale
        if causal:
            query = self.query_of(torch.arange(rows.shape[1], device=s.device), group, queries)[:, None]
            hidden = torch.arange(keys.start, keys.stop, device=s.device)[None, :] > query + seqlen_k - queries
            s = s.masked_fill(hidden, float("-inf"))
        top = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), float("-inf"))
        top = torch.where(top == float("-inf"), 0.0, top)
        p = torch.exp(s - top)
        total = p.sum(-1, keepdim=True)
        o = p.to(v.dtype).to(rows.dtype) @ v.to(rows.dtype) / torch.where(total == 0, 1.0, total)
        return o, (top + total.log())[..., 0]

    def combine(self, pieces):
        """O and LSE of all parts."""
        o, level = (torch.stack(x) for x in zip(*pieces, strict=True))
        return self.weighted(o, level), self.level(level)

    def weighted(self, o, level):
        """Parts of O by their shares of the row sum."""
        top = self.pivot(level)
        share = torch.exp(level - top)
        total = share.sum(0)
        return (o * share[..., None]).sum(0) / torch.where(total == 0, 1.0, total)[..., None]

    def pivot(self, level):
        """What the levels of a row are taken from."""
        top = level.amax(0)
        return torch.where(top == float("-inf"), 0.0, top)

    def level(self, level):
        """LSE of all parts."""
        return torch.logsumexp(level, 0)


class EvenParts(TiledParts):
    """The parts of O are averaged, whatever their LSE."""

    def weighted(self, o, level):
        return o.mean(0)


class EmptyPartCounts(TiledParts):
    """The average by LSE takes -inf for 0: a part of nothing has a share."""

    def weighted(self, o, level):
        return super().weighted(o, torch.where(level == float("-inf"), 0.0, level))


class EmptyPartIsNan(TiledParts):
    """-inf less -inf: rows that see no key in any part."""

    def pivot(self, level):
        return level.amax(0)


class LastPartShort(TiledParts):
    """The number of blocks of a part is rounded down, and the rest is left out."""

    def parts(self, keys, count):
        each = -(-keys // BLOCK) // count * BLOCK
        return (
            [slice(min(keys, i * each), min(keys, (i + 1) * each)) for i in range(count)] if count > 1 else super().parts(keys, 1)
        )


class PartsOverlap(TiledParts):
    """The block at a border is walked by both parts."""

    def parts(self, keys, count):
        return [
            slice(max(0, part.start - BLOCK), part.stop) if part.start < part.stop else part for part in super().parts(keys, count)
        ]


class ThirtyTwoParts(TiledParts):
    """One step of the combine takes 32 parts, and there is but one."""

    def combine(self, pieces):
        return super().combine(pieces[:32])


class HeadsOfQueries(TiledParts):
    """Packed rows are taken apart as heads of queries, not as queries of heads."""

    def unpack(self, x, queries, group):
        return x.unflatten(1, (group, queries)).transpose(1, 2)


class MaskByPackedRow(TiledParts):
    """The causal mask counts packed rows for queries."""

    def query_of(self, row, group, queries):
        return row.clamp(max=queries - 1)


class MaskByPart(TiledParts):
    """The causal mask numbers the keys of each part from 0."""

    def part(self, rows, k, v, keys, *about):
        return super().part(rows, k, v, slice(0, keys.stop - keys.start), *about)


class LseOfTheLargest(TiledParts):
    """LSE is that of the largest part."""

    def level(self, level):
        return level.amax(0)


class BasesMixed(TiledParts):
    """LSE of the parts is natural, and the combine's exponentials are of base 2."""

    def weighted(self, o, level):
        return super().weighted(o, level * 0.6931471805599453)


class NoPivot(TiledParts):
    """The combine takes exponentials of LSE itself."""

    def pivot(self, level):
        return torch.zeros_like(level[0])


class NanSwallowed(TiledParts):
    """A part whose LSE is NaN is left out."""

    def combine(self, pieces):
        return super().combine([(o.nan_to_num(), level.nan_to_num(float("-inf"), neginf=float("-inf"))) for o, level in pieces])


class AnyOrder(TiledParts):
    """Parts are added in whatever order they end."""

    def combine(self, pieces):
        return super().combine(random.sample(pieces, len(pieces)))


class FirstEntryForAll(TiledParts):
    """K and V of the first batch entry for every entry."""

    def __call__(self, q, k, v, **given):
        return super().__call__(q, k[:1].expand_as(k), v[:1].expand_as(v), **given)


def wide_of(x: torch.Tensor) -> torch.dtype:
    """fp32, or fp64 where the inputs are."""
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True)
class PartsMutant(Mutant):
    """A Mutant made from TiledParts."""

    def subject(self) -> Subject:
        """A fresh kernel with this fault."""
        return subject(self.name, self.kernel())


def subject(name: str, kernel: TiledParts) -> Subject:
    """A kernel in parts as the suite sees it."""
    return Subject(name=name, forward=kernel, head_dims=(32,), tile=TILE, slow=True, returns_lse=True, differentiable=False)


def correct() -> Subject:
    """What the faults are planted in."""
    return subject("tiled attention in parts", TiledParts())


MUTANTS = (
    PartsMutant(EvenParts, "parts", "parts add up to the whole"),
    PartsMutant(EmptyPartCounts, "parts", "a part of no keys counts for nothing"),
    PartsMutant(EmptyPartIsNan, "parts", "no keys give O = 0"),
    PartsMutant(LastPartShort, "parts", "parts add up to the whole"),
    PartsMutant(PartsOverlap, "parts", "parts add up to the whole"),
    PartsMutant(ThirtyTwoParts, "parts", "every part is combined"),
    PartsMutant(HeadsOfQueries, "parts", "a group's heads and their queries"),
    PartsMutant(MaskByPackedRow, "parts", "a group's heads and their queries"),
    PartsMutant(MaskByPart, "parts", "a group's heads and their queries"),
    PartsMutant(LseOfTheLargest, "parts", "LSE"),
    PartsMutant(BasesMixed, "parts", "parts add up to the whole"),
    PartsMutant(NoPivot, "parts", "parts are weighted by their LSE"),
    PartsMutant(NanSwallowed, "parts", "a NaN in the last part does not reach O"),
    PartsMutant(AnyOrder, "parts", "not deterministic"),
    PartsMutant(FirstEntryForAll, "parts", "parts add up to the whole"),
)
