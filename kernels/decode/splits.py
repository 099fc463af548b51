"""Tiles of the decode kernel and in how many parts its keys are walked. Plain Python: the rule is testable without a GPU."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ..triton.tiles import SMALL, TritonTile

MAX_SPLITS = 256
"""Parts at most, chosen or given: each costs a row of O in fp32, written and read again."""
MOST_ROWS = 64
"""Rows of a tile at most: the query rows of a K/V head's query heads. More of them are as many tiles as it takes."""
START_BLOCKS = 2
"""What a part costs beside its keys, in blocks of keys: launch, the first loads' latency and its share of the combine."""
SLACK = 1.05
"""Of the numbers of parts within 5 % of the least cost the smallest is taken: fewer rows to combine."""

# Reasons and rejected choices; what was measured is in NOTES.md beside this file. Not measured: 32 rows, and 64 at 64 and 256.
_KEYS = {
    # head_dim, rows of the tile: keys per step, warps, stages
    (64, 16): (128, 4, 4),
    (64, 32): (64, 4, 4),  # 128 keys spill
    (64, 64): (64, 4, 4),  # as 32 rows
    (128, 16): (64, 4, 4),  # measured beside it: 3 stages, 32 and 128 keys, 2 and 8 warps, TMA (NOTES.md)
    (128, 32): (64, 4, 4),
    (128, 64): (64, 4, 3),  # 255 registers, and two CTAs an SM all the same; 8 warps: 60 to 75 % slower; 2 stages: 15 %
    (256, 16): (64, 8, 3),  # 32 keys: 2 % slower by pointers
    (256, 32): (64, 8, 3),  # 4 warps spill
    (256, 64): (32, 8, 3),
}

MANY_TILES = {(128, 16): (64, 4, 3)}
"""In place of _KEYS where one part of every tile fills the SMs twice over and parts of LONG_PART blocks are left: three CTAs share
an SM, and MANY_PARTS parts make the last wave short. 64 x 32k and 64 x 128k gain 2 % and 1 % by it, 64 x 4k loses 3 %."""
MANY_PARTS = 4
LONG_PART = 128


def decode_tile(head_dim: int, rows: int, interpreted: bool) -> TritonTile:
    """The tile for `rows` packed query rows: 16, 32 or 64 of them, and keys enough that one CTA an SM keeps 96 KiB in flight."""
    if interpreted:
        return SMALL
    height = 16 if rows <= 16 else 32 if rows <= 32 else MOST_ROWS
    return TritonTile(height, *_KEYS[head_dim, height], tensor_descriptors=False)


@lru_cache(maxsize=4096)
def splits_for(tiles: int, blocks: int, sms: int) -> int:
    """In how many parts the keys of each of `tiles` tiles are walked, where each of `sms` SMs runs one.

    With n parts there are ceil(tiles n / sms) waves of ceil(blocks / n) blocks each, and every wave costs START_BLOCKS
    besides. The fewest parts within SLACK of the least such cost are taken, so none is without keys.
    """
    most = max(1, min(blocks, MAX_SPLITS))
    costs = [-(-tiles * n // sms) * (-(-blocks // n) + START_BLOCKS) for n in range(1, most + 1)]
    least = min(costs)
    return next(n for n, cost in enumerate(costs, 1) if cost <= SLACK * least)


class Choice(NamedTuple):
    """How few queries are walked: the tile, how many of them there are, and the parts of their keys."""

    tile: TritonTile
    tiles: int
    parts: int


def choose(head_dim: int, rows: int, kv_heads: int, seqlen_k: int, sms: int, interpreted: bool = False) -> Choice:
    """Tile and parts for `rows` packed query rows of each of `kv_heads` K/V heads, all batch entries', against seqlen_k keys."""
    tile = decode_tile(head_dim, rows, interpreted)
    tiles, blocks = kv_heads * -(-rows // tile.block_m), -(-seqlen_k // tile.block_n)
    if (head_dim, tile.block_m) in MANY_TILES and tiles >= 2 * sms and blocks >= MANY_PARTS * LONG_PART and not interpreted:
        return Choice(TritonTile(tile.block_m, *MANY_TILES[head_dim, tile.block_m], tensor_descriptors=False), tiles, MANY_PARTS)
    return Choice(tile, tiles, splits_for(tiles, blocks, sms))
