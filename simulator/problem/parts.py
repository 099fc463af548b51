"""Parts: few queries against many keys. The query heads that share a K/V head are rows of one tile (packed GQA), and its keys are
walked in parts, a CTA each, which a second kernel combines (split-KV). The rule is the kernel's own: kernels/decode goes by it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .order import ITEM
from .tile import Tile
from .workload import Workload

MAX_PARTS = 256
MOST_ROWS = 64
"""Rows of a tile at most: the query rows of a K/V head's query heads. More of them are as many tiles as it takes."""
START_BLOCKS = 2
"""What a part costs beside its keys, in blocks of keys: launch, the first loads' latency and its share of the combine."""
SLACK = 1.02
"""Of the numbers of parts within 2 % of the least cost the smallest is taken: fewer rows to combine."""
WHOLE_WAVES_SLACK = 1.05
"""The same where only whole waves are counted."""

# Reasons and rejected choices; what was measured is in kernels/decode/NOTES.md. Not measured: 32 rows, and 64 at 64 and 256.
KEYS = {
    # head_dim, rows of the tile: keys of a block, stages
    (64, 16): (128, 4),
    (64, 32): (64, 4),  # 128 keys spill
    (64, 64): (64, 4),  # as 32 rows
    (128, 16): (64, 4),  # measured beside it: 3 stages, 32 and 128 keys, TMA
    (128, 32): (64, 4),
    (128, 64): (64, 3),  # 255 registers, and two CTAs an SM all the same; 2 stages: 15 % slower
    (256, 16): (64, 3),  # 32 keys: 2 % slower by pointers
    (256, 32): (64, 3),
    (256, 64): (32, 3),
}
SHARED = {(64, 16): (128, 3), (128, 16): (64, 3)}
"""In place of KEYS where three CTAs are to share an SM: fewer blocks on their way in each, so that they come forward alike however
unequal their numbers are on the SMs. 12 and 24 x 10,000 gain 17 %, 8 x 32k would lose 5 %."""
SHARING = 3
SHARED_COST = 1.03
"""What a block costs more where CTAs share an SM, and what a choice of it has to gain."""
SATURATED = 1.35
"""CTAs for an SM from which on those of SHARED take all that HBM gives."""
GAINED = 0.4
"""Of what other SMs leave of HBM, what a CTA of KEYS gains: a block takes 0.82 us where 96 SMs have one, 0.90 where 120 have."""
MANY_PARTS, LONG_PART = 4, 128
"""Where one part of every tile is more than the SMs and parts of LONG_PART blocks are left, MANY_PARTS parts of SHARED make the
last wave short: 64 x 32k and 64 x 128k gain 2 % and 1 %, 24 x 48k 15 %; 64 x 4k would lose 3 %."""

PAGED = {(128, 16): (64, 3)}
"""In place of KEYS where keys are looked up in pages or each entry has its own length: PAGED_SHARING CTAs on an SM, so that the
wait of one for a page lies under the copies of the other. 8 x 32k takes 247 us, not 286, in pages of 128; 252, not 356, of 16."""
PAGED_SHARING = 2


class Cut(NamedTuple):
    """How few queries are walked: rows of a tile, keys of a block, stages, tiles, and parts of the keys of each."""

    rows: int
    keys: int
    stages: int
    tiles: int
    parts: int


def height(rows: int) -> int:
    """Rows of the tile for so many packed query rows of a K/V head: 16, 32 or 64."""
    return 16 if rows <= 16 else 32 if rows <= 32 else MOST_ROWS


@lru_cache(maxsize=4096)
def parts_for(tiles: int, blocks: int, sms: int) -> int:
    """In how many parts the keys of each of `tiles` tiles are walked, where each of `sms` SMs runs one.

    With n parts there are ceil(tiles n / sms) waves of ceil(blocks / n) blocks each, and every wave costs START_BLOCKS
    besides. The fewest parts within WHOLE_WAVES_SLACK of the least such cost are taken, so none is without keys.
    """
    return _least(tiles, blocks, lambda n: -(-n // sms), slack=WHOLE_WAVES_SLACK)[1]


@lru_cache(maxsize=4096)
def parts_alone(tiles: int, blocks: int, sms: int, room: int) -> tuple[float, int]:
    """(cost in blocks of an SM, parts) of CTAs of KEYS, of which `room` fit an SM. They have one each as long as there are enough;
    of more, those that share one take as often as long, and what is left for a last wave does too: it goes to few SMs."""
    return _least(tiles, blocks, lambda n: 1 - GAINED * (1 - n / sms) if n <= sms else room * -(-n // (room * sms)))


@lru_cache(maxsize=4096)
def parts_shared(tiles: int, blocks: int, sms: int) -> tuple[float, int]:
    """The same of CTAs of SHARED, among all of which HBM is divided; no more of them than there is room for."""
    most = SHARING * sms // tiles
    if not most:
        return float("inf"), 1
    return _least(tiles, blocks, lambda n: SHARED_COST * max(SATURATED, n / sms), most)


def _least(
    tiles: int, blocks: int, waves: Callable[[int], float], most: int = MAX_PARTS, slack: float = SLACK
) -> tuple[float, int]:
    """(cost, parts): a part's blocks times `waves` of the number of CTAs, and the fewest parts within `slack` of the least."""
    costs = [waves(tiles * n) * (-(-blocks // n) + START_BLOCKS) for n in range(1, max(1, min(blocks, most, MAX_PARTS)) + 1)]
    least = min(costs)
    return next((cost, n) for n, cost in enumerate(costs, 1) if cost <= slack * least)


def cut(head_dim: int, rows: int, kv_heads: int, seqlen_k: int, sms: int, paged: bool = False) -> Cut:
    """The cut for `rows` packed query rows of each of `kv_heads` K/V heads, all batch entries', against seqlen_k keys; `paged`
    where they lie in pages or are of each entry's own number."""
    tall = height(rows)
    (keys, stages), other = KEYS[head_dim, tall], SHARED.get((head_dim, tall))
    tiles, blocks = kv_heads * -(-rows // tall), -(-seqlen_k // keys)
    if (head_dim, tall) in PAGED and paged and tiles < PAGED_SHARING * sms:
        keys, stages = PAGED[head_dim, tall]
        return Cut(tall, keys, stages, tiles, parts_for(tiles, -(-seqlen_k // keys), PAGED_SHARING * sms))
    if head_dim == 128 and other and tiles > sms and blocks >= MANY_PARTS * LONG_PART:
        return Cut(tall, *other, tiles, MANY_PARTS)
    if paged or not other:
        return Cut(tall, keys, stages, tiles, parts_for(tiles, blocks, sms))
    cost, count = parts_alone(tiles, blocks, sms, 1 if head_dim > 128 else 2)
    fewer = -(-seqlen_k // other[0])
    shared, of_shared = parts_shared(tiles, fewer, sms)
    if SHARED_COST * shared * other[0] < cost * keys:
        return Cut(tall, *other, tiles, of_shared)
    return Cut(tall, keys, stages, tiles, count)


def sharing(workload: Workload, packed: bool) -> int:
    """Query heads whose rows lie in one tile: those of a K/V head, or one."""
    return workload.heads_per_kv if packed else 1


def tile_for(workload: Workload, sms: int, packed: bool = True) -> Tile:
    """The tile and parts that the kernel takes for a workload on a GPU of `sms` SMs; not `packed`, by the same rule with a tile
    for each query head, which no kernel here has."""
    together = sharing(workload, packed)
    heads = workload.batch * workload.heads // together
    found = cut(workload.head_dim, workload.seqlen_q * together, heads, workload.seqlen_k, sms)
    return Tile(found.rows, found.keys, found.stages, 1, parts=found.parts, packed=packed)


def rows_of(workload: Workload, tile: Tile) -> int:
    """Query rows of a tile that exist, of the fullest one."""
    return min(tile.block_m, workload.seqlen_q * sharing(workload, tile.packed))


def tiles_of(workload: Workload, tile: Tile) -> int:
    """Tiles that hold the query rows of heads that are packed together."""
    return -(-workload.seqlen_q * sharing(workload, tile.packed) // tile.block_m)


def packed(workload: Workload, tile: Tile) -> Workload:
    """The problem that the walk's CTAs see: a query head for each tile's heads, those of a K/V head or, not packed, one. Its query
    tiles are its tiles' parts, one behind another, each of `rows_of` rows; K and V as they are. No mask: what it hides of a few
    queries' keys is walked all the same.
    """
    rows = tiles_of(workload, tile) * tile.parts * rows_of(workload, tile)
    heads = workload.heads // sharing(workload, tile.packed)
    return replace(workload, heads=heads, seqlen_q=rows, seqlen=None, causal=False)


def part_items(workload: Workload, tile: Tile) -> np.ndarray:
    """A CTA for each part of each tile of each K/V head, an ITEM array in order of dispatch: head fastest, then tile, part, batch.

    Of `packed`'s numbers: m is the part's query tile, n its first block; the first parts have a block more.
    """
    heads = workload.heads // sharing(workload, tile.packed)
    sizes = (workload.batch, tile.parts, tiles_of(workload, tile), heads)
    batch, part, of, head = (axis.ravel() for axis in np.indices(sizes))
    blocks = -(-workload.seqlen_k // tile.block_n)
    each, more = divmod(blocks, tile.parts)
    items = np.zeros(len(head), ITEM)
    items["q_head"] = batch * heads + head
    items["kv_head"] = items["q_head"] // (heads // workload.kv_heads)
    items["m"] = of * tile.parts + part
    items["n"] = part * each + np.minimum(part, more)
    items["blocks"] = items["masked"] = each + (part < more)
    return items


def combine_items(workload: Workload, tile: Tile) -> np.ndarray:
    """A CTA for each tile of each K/V head, which reads its parts in their order, as an ITEM array."""
    heads = workload.heads // sharing(workload, tile.packed)
    head, of = (axis.ravel() for axis in np.indices((workload.batch * heads, tiles_of(workload, tile))))
    items = np.zeros(len(head), ITEM)
    items["q_head"] = head
    items["kv_head"] = head // (heads // workload.kv_heads)
    items["m"] = of * tile.parts
    items["blocks"] = tile.parts
    return items
