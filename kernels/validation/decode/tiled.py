"""A right kernel of few queries in plain torch, its keys in parts and, where it is given a page table, in pages."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from ..mutants import Mutant
from ..mutants.tiled import TILE
from .subjects import PartsSubject

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
            hidden = torch.arange(keys.start, keys.stop, device=s.device)[None, :] > query + self.end(seqlen_k) - queries
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

    room = 0
    """Keys that the pages of an entry hold, where there are pages."""

    def end(self, seqlen_k):
        """Where the keys end that a causal mask is aligned with."""
        return seqlen_k

    def pages(self, q, k, v, *, cache_seqlens, page_table, causal=False, softmax_scale=None, num_splits=None):
        """O and LSE of entries whose keys lie in pages (pages, page size, Hkv, D)."""
        page_size, self.room = k.shape[1], k.shape[1] * page_table.shape[1]
        answers = []
        for i, (table, length) in enumerate(
            zip(self.rows(page_table), self.lengths(cache_seqlens, page_table, page_size), strict=True)
        ):
            keys, values = (self.gather(x, table, self.keys_of(length, page_size))[None] for x in (k, v))
            answers.append(self(q[i : i + 1], keys, values, causal=causal, softmax_scale=softmax_scale, num_splits=num_splits))
        return tuple(torch.cat(each) for each in zip(*answers, strict=True))

    def rows(self, table):
        """The table's row of each entry."""
        return table

    def lengths(self, cache_seqlens, table, page_size):
        """Keys of each entry."""
        return cache_seqlens.tolist()

    def keys_of(self, length, page_size):
        """Keys that are read of an entry."""
        return length

    def gather(self, cache, table, length):
        """(length, Hkv, D): an entry's keys in a row."""
        table = table[: -(-length // cache.shape[1])]
        found = [cache[self.page(table, i, cache.shape[0])] for i in range(len(table))]
        return torch.cat(found)[:length] if found else cache.new_empty((0, *cache.shape[2:]))

    def page(self, table, i, pages):
        """The page of an entry's i-th page_size keys, of so many that there are."""
        return table[i]


def wide_of(x: torch.Tensor) -> torch.dtype:
    """fp32, or fp64 where the inputs are."""
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True)
class PartsMutant(Mutant):
    """A Mutant made from TiledParts."""

    def subject(self) -> PartsSubject:
        """A fresh kernel with this fault."""
        return subject(self.name, self.kernel())


def subject(name: str, kernel: TiledParts) -> PartsSubject:
    """A kernel in parts as the suite sees it."""
    promises = {"head_dims": (32,), "tile": TILE, "slow": True, "returns_lse": True, "differentiable": False}
    return PartsSubject(name=name, forward=kernel, pages=kernel.pages, **promises)


def correct() -> PartsSubject:
    """What the faults are planted in."""
    return subject("tiled attention in parts", TiledParts())
