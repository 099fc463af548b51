"""Tiles of the decode kernel and in how many parts its keys are walked: the rule of `simulator/problem/parts.py`, in Triton."""

from __future__ import annotations

from typing import NamedTuple

from ...simulator.problem import parts
from ..triton.tiles import SMALL, TritonTile

MAX_SPLITS = parts.MAX_PARTS
"""Parts at most, chosen or given: each costs a row of O in fp32, written and read again."""
MOST_ROWS = parts.MOST_ROWS
splits_for = parts.parts_for

_WARPS = {64: 4, 128: 4, 256: 8}
"""By head_dim. At 128 and 64 rows 8 warps are 60 to 75 % slower, at 256 and 32 rows 4 spill (NOTES.md)."""


class Choice(NamedTuple):
    """How few queries are walked: the tile, how many of them there are, and the parts of their keys."""

    tile: TritonTile
    tiles: int
    parts: int


def decode_tile(head_dim: int, rows: int, interpreted: bool) -> TritonTile:
    """The tile for `rows` packed query rows: 16, 32 or 64 of them, and keys enough that one CTA an SM keeps 96 KiB in flight."""
    if interpreted:
        return SMALL
    height = parts.height(rows)
    keys, stages = parts.KEYS[head_dim, height]
    return TritonTile(height, keys, _WARPS[head_dim], stages, tensor_descriptors=False)


def choose(
    head_dim: int, rows: int, kv_heads: int, seqlen_k: int, sms: int, interpreted: bool = False, paged: bool = False
) -> Choice:
    """Tile and parts for `rows` packed query rows of each of `kv_heads` K/V heads, all batch entries', against seqlen_k keys, which
    lie in pages where `paged` says so."""
    if interpreted:
        tiles = kv_heads * -(-rows // SMALL.block_m)
        return Choice(SMALL, tiles, splits_for(tiles, -(-seqlen_k // SMALL.block_n), sms))
    found = parts.cut(head_dim, rows, kv_heads, seqlen_k, sms, paged)
    tile = TritonTile(found.rows, found.keys, _WARPS[head_dim], found.stages, tensor_descriptors=False)
    return Choice(tile, found.tiles, found.parts)
