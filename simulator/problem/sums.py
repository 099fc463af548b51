"""Sums: how our backward shares out tiles of keys, and of how many heads it has dQ's fp32 sums at a time.

They stay in L2: a ring of heads, each slot written out and cleared by the kernel itself for the head that has it next.
"""

from __future__ import annotations

import math

import numpy as np

from .order import SECTION_BYTES, SUM_BYTES
from .tile import Tile
from .workload import Workload

SECTIONS = 3
"""Sections of heads that have sums at a time: one that is added to, one that may be, one on its way out."""
LEAST_WORK = 1.25
"""Longest walks that a CTA finds to do among the heads that have sums."""
LEAST_GAIN = 4
"""Blocks that a split tile has to save a CTA."""
SHARE = 64 * 64
"""Elements of dQ that one warp writes out at a time."""

PART = np.dtype([("cta", "i4"), ("item", "i4"), ("begin", "i4"), ("blocks", "i4")])
"""What a CTA has of a tile: which of the items, from which block of its walk on, and how many."""


def ring_heads(workload: Workload, tile: Tile, ctas: int) -> int:
    """Query heads that have sums at a time: SECTIONS, or enough for LEAST_WORK, a tile for every CTA and a head on its way out."""
    walked = workload.seqlen_q * workload.head_dim * (2 * workload.element_bytes + SUM_BYTES) * workload.heads_per_kv
    section = 2 ** (max(1, SECTION_BYTES // walked).bit_length() - 1)
    keys, offset = np.arange(0, workload.seqlen_k, tile.block_n), workload.seqlen_k - workload.seqlen_q
    first = np.clip(keys - offset, 0, workload.seqlen_q - 1) // tile.block_m if workload.causal else np.zeros_like(keys)
    blocks = -(-workload.seqlen_q // tile.block_m) - first
    work = math.ceil(LEAST_WORK * int(blocks.max()) * ctas / int(blocks.sum()))
    heads = max(SECTIONS * section, work, -(-ctas // len(blocks)) + 1)
    return min(workload.batch * workload.heads, heads * workload.heads_per_kv)


def split_tiles(tiles: int, walk: int, ctas: int) -> int:
    """How many tiles of `walk` blocks all CTAs share, so that each has as many blocks, two to a tile at most; 0 where it would
    gain little."""
    left = tiles % ctas
    gain = walk - left * walk // ctas
    return left + ctas if left and tiles > ctas and gain >= LEAST_GAIN else 0


def split_parts(workload: Workload, tile: Tile, ctas: int) -> np.ndarray:
    """PARTs of the tiles that are shared, CTA by CTA: none under a causal mask, nor at head dim 256."""
    if workload.causal or workload.head_dim > 128:
        return np.zeros(0, PART)
    n_tiles, group = -(-workload.seqlen_k // tile.block_n), workload.heads_per_kv
    walk = -(-workload.seqlen_q // tile.block_m) * group
    split = split_tiles(workload.batch * workload.kv_heads * n_tiles, walk, ctas)
    # a head's sums would be waited for by those that have to add to it
    if -(-split // n_tiles) * group > ring_heads(workload, tile, ctas):
        return np.zeros(0, PART)
    parts = []
    for cta in range(ctas if split else 0):
        at, end = (split * walk * edge // ctas for edge in (cta, cta + 1))
        while at < end:
            number, begin = divmod(at, walk)
            blocks = min(end - at, walk - begin)
            parts.append((cta, number, begin, blocks))
            at += blocks
    return np.array(parts, PART)
