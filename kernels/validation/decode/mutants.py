"""Faults planted in a right kernel of few queries (tiled.py): each breaks one step of it."""

from __future__ import annotations

import random

import torch

from .page_mutants import PAGE_MUTANTS
from .tiled import BLOCK, PartsMutant, TiledParts, correct

__all__ = ["MUTANTS", "correct"]


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
    *PAGE_MUTANTS,
)
