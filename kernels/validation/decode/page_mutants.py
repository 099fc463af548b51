"""Faults planted in how a right kernel of few queries finds its keys in pages."""

from __future__ import annotations

import torch

from .tiled import PartsMutant, TiledParts


class WrongPage(TiledParts):
    """The page after the one in the table, where there is one."""

    def page(self, table, i, pages):
        return (table[i] + 1) % pages


class PagesInPlace(TiledParts):
    """Pages are taken as they lie, from the entry's first on: the table is not looked at again."""

    def page(self, table, i, pages):
        return (table[0] + i) % pages


class PageOrder(TiledParts):
    """Pages are walked in the order of their numbers."""

    def page(self, table, i, pages):
        return table.sort().values[i]


class StalePage(TiledParts):
    """The whole of the last page is read, whatever it held before."""

    def keys_of(self, length, page_size):
        return -(-length // page_size) * page_size


class WeightlessNan(TiledParts):
    """Keys past the end get no weight, and V is multiplied by it all the same."""

    def gather(self, cache, table, length):
        found = super().gather(cache, table, -(-length // cache.shape[1]) * cache.shape[1])
        spoilt = found[:, length:].isnan().any() if length % cache.shape[1] else False
        return found[:, :length] * (float("nan") if spoilt else 1.0)


class LastPageLeftOut(TiledParts):
    """The number of pages is rounded down."""

    def keys_of(self, length, page_size):
        return length // page_size * page_size or length


class OneLengthForAll(TiledParts):
    """The first entry's length for every entry."""

    def lengths(self, cache_seqlens, table, page_size):
        return [min(int(cache_seqlens[0]), int((row >= 0).sum()) * page_size) for row in table]


class OneTableForAll(TiledParts):
    """The first entry's pages for every entry."""

    def rows(self, table):
        return table[:1].expand_as(table)


class MaskByRoom(TiledParts):
    """The causal mask ends where the pages do, not where the keys do."""

    def end(self, seqlen_k):
        return max(seqlen_k, self.room)


class OldTable(TiledParts):
    """The table of the first call is kept for all that follow."""

    def __init__(self) -> None:
        self.kept: dict[tuple, torch.Tensor] = {}

    def rows(self, table):
        return self.kept.setdefault(tuple(table.shape), table.clone())


PAGE_MUTANTS = (
    PartsMutant(WrongPage, "pages", "in the table's order"),
    PartsMutant(PagesInPlace, "pages", "in the table's order"),
    PartsMutant(PageOrder, "pages", "in the table's order"),
    PartsMutant(StalePage, "pages", "keys past an entry's end are not read"),
    PartsMutant(WeightlessNan, "pages", "keys past an entry's end are not read"),
    PartsMutant(LastPageLeftOut, "pages", "pages of 16 keys"),
    PartsMutant(OneLengthForAll, "pages", "keys past an entry's end are not read"),
    PartsMutant(OneTableForAll, "pages", "in the table's order"),
    PartsMutant(MaskByRoom, "pages", "in the table's order"),
    PartsMutant(OldTable, "pages", "lengths and table are those of this call"),
)
