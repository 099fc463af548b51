"""Order: which tile each CTA works on, and in which sequence tiles are handed out."""

from __future__ import annotations

import numpy as np

from ..errors import UsageError, did_you_mean
from .workload import Workload

ITEM = np.dtype(
    [
        ("q_head", "i4"),  # batch * heads + head
        ("kv_head", "i4"),  # batch * kv_heads + head // heads_per_kv
        ("m", "i4"),  # query tile, or the first that a loop over queries walks
        ("n", "i4"),  # key tile, where a CTA works on one (orders "tiles" and "columns"); else 0
        ("blocks", "i4"),  # K/V blocks the CTA loops over; in the order "columns" Q blocks, of all heads that share K and V
        ("masked", "i4"),  # how many of them cross the diagonal or the ragged end
    ]
)

ORDERS = ("grid", "persistent", "longest-first", "packed", "heads", "tiles", "columns")

SECTION_BYTES = 16 * 1024 * 1024
"""K and V of a section of heads at most, in the order "longest-first" of our kernels."""
SHIPPED_SECTION_BYTES = 32 * 1024 * 1024
"""FlashAttention-3's (hopper/tile_scheduler.hpp): with its neighbours' more than the 30 MiB that half of an H200's L2 holds."""

BUCKETS = 512
"""Packed sequences are ordered by their keys to one in so many of the longest's (kernels/cuda/varlen/prepare.cu)."""

SUM_BYTES = 4
"""An element of a sum in memory: fp32."""

MOST_SPLITS, NEARLY_BEST = 30, 0.95
"""FlashAttention-1 as shipped (1.0.9, fmha_fwd_launch_template.h): at most so many, and the fewest that fill so much."""


def splits_that_fill(items: int, slots: int, most: int) -> int:
    """Into how many shares FlashAttention-1 as shipped deals a head's Q blocks: `items` heads, room for `slots` CTAs.

    The fewest whose last wave leaves the slots within 5 % of as full as any number up to `most` (and MOST_SPLITS) would.
    """
    waves = np.arange(1, max(1, min(most, MOST_SPLITS)) + 1) * items / slots
    full = waves / np.ceil(waves)
    return int(np.argmax(full > NEARLY_BEST * full.max())) + 1


def work_items(
    workload: Workload, block_m: int, block_n: int, order: str, splits: int = 1, section_bytes: int = SECTION_BYTES
) -> np.ndarray:
    """Every work item of one kernel, in dispatch order, as an ITEM array.

    grid            query tile fastest, then batch, then head (FlashAttention-2's grid: x = tile, y = batch, z = head)
    persistent      query tile fastest, then head, then batch (FlashAttention-3's static persistent scheduler)
    longest-first   sections of heads whose K and V fit `section_bytes` together; in a section the last query tile of every
                    head first, heads fastest (FlashAttention-3's dynamic scheduler for causal attention)
    packed          packed sequences, those of most keys first (to one in BUCKETS of the longest); within one as longest-first
    heads           one item per batch and head, every K/V block (FlashAttention-1), or `splits` of them, which deal its query
                    tiles among themselves: item m has every splits-th from the m-th on
    columns         one item per K/V head and key tile, which walks the query tiles that see it, of every query head of the group
                    (a backward's dK and dV); key tile fastest, or, causal, by sections as longest-first: the first key tile, which
                    all queries see, of every head first
    tiles           one item per head, query tile and key tile, key tile fastest (a GEMM that writes all of S)
    """
    batch, heads = workload.batch, workload.heads
    m_tiles = -(-workload.seqlen_q // block_m)
    n_tiles = -(-workload.seqlen_k // block_n)
    n = None
    if order == "columns":
        return _columns(workload, block_m, block_n, section_bytes)
    if order == "grid":
        head, b, m = _grid(heads, batch, m_tiles)
        q_head = b * heads + head
    elif order == "persistent":
        q_head, m = _grid(batch * heads, m_tiles)
    elif order == "longest-first":
        together = _fit(section_bytes, 2 * workload.seqlen_k * workload.head_dim * workload.element_bytes)
        q_head, m = _sections(workload.batch * workload.heads, m_tiles, together * workload.heads_per_kv)
    elif order == "packed":
        q_head, m = _packed(workload, block_m, section_bytes)
    elif order == "heads":
        m, q_head = _grid(splits, batch * heads)
    elif order == "tiles":
        q_head, m, n = _grid(batch * heads, m_tiles, n_tiles)
    else:
        raise UsageError(f"order {order!r} is not known ({', '.join(ORDERS)}){did_you_mean(order, ORDERS)}")

    items = np.zeros(len(q_head), ITEM)
    items["q_head"] = q_head
    items["kv_head"] = q_head // heads * workload.kv_heads + q_head % heads // workload.heads_per_kv
    items["m"] = m
    if n is not None:
        items["n"] = n
        items["blocks"] = 1
        whole = _whole_blocks(workload, block_m, block_n, items)
        items["masked"] = items["n"] >= whole
    elif order == "heads":
        items["blocks"] = n_tiles
        items["masked"] = n_tiles if workload.causal else int(workload.seqlen_k % block_n > 0)
    else:
        items["blocks"] = _visible_blocks(workload, block_m, block_n, items)
        whole = _whole_blocks(workload, block_m, block_n, items)
        items["masked"] = items["blocks"] - np.minimum(items["blocks"], whole)
    return items


def _columns(workload: Workload, block_m: int, block_n: int, section_bytes: int) -> np.ndarray:
    """The items of order "columns"; `masked` are, of one head, the query tiles that the diagonal crosses."""
    m_tiles, n_tiles = -(-workload.seqlen_q // block_m), -(-workload.seqlen_k // block_n)
    group = workload.heads_per_kv
    if workload.causal:
        walked = workload.seqlen_q * workload.head_dim * (2 * workload.element_bytes + SUM_BYTES)  # Q, dO and dQ's sum
        kv_head, last = _sections(workload.batch * workload.kv_heads, n_tiles, _fit(section_bytes, walked * group))
        n = n_tiles - 1 - last
    else:
        kv_head, n = _grid(workload.batch * workload.kv_heads, n_tiles)
    items = np.zeros(len(n), ITEM)
    first = whole = np.zeros_like(n)
    if workload.causal:  # row i sees the keys up to i + seqlen_k - seqlen_q
        offset = workload.seqlen_k - workload.seqlen_q
        first = np.clip(n * block_n - offset, 0, workload.seqlen_q - 1) // block_m
        sees_all = np.minimum((n + 1) * block_n, workload.seqlen_k) - 1 - offset
        whole = np.clip(-(-sees_all // block_m), first, m_tiles)
    items["kv_head"] = kv_head
    items["q_head"] = kv_head * group
    items["m"], items["n"] = first, n
    items["blocks"] = (m_tiles - first) * group
    items["masked"] = whole - first
    return items


def _packed(workload: Workload, block_m: int, section_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Heads and query tiles of packed sequences, as kernels/cuda/varlen deals them out; one without queries has none."""
    scale = (BUCKETS - 1) / max(1, max(keys for _, keys in workload.sequences))
    lengths = list(workload.sequences) * workload.of_each
    places = sorted(range(workload.batch), key=lambda i: -int(lengths[i][1] * scale))
    q_head, m = [], []
    for i in places:
        queries, keys = lengths[i]
        together = _fit(section_bytes, max(1, 2 * keys * workload.head_dim * workload.element_bytes))
        heads, tiles = _sections(workload.heads, -(-queries // block_m), together * workload.heads_per_kv)
        q_head.append(i * workload.heads + heads)
        m.append(tiles)
    return np.concatenate(q_head), np.concatenate(m)


def _visible_blocks(workload: Workload, block_m: int, block_n: int, items: np.ndarray) -> np.ndarray:
    """K/V blocks, counted from the first, of which an item's query tile sees at least one key (bottom-right aligned mask)."""
    queries, keys = workload.lengths_of(items["q_head"])
    if workload.causal:
        rows_end = np.minimum((items["m"] + 1) * block_m, queries)
        keys = np.clip(rows_end + keys - queries, 0, keys)
    return -(-keys // block_n)


def _whole_blocks(workload: Workload, block_m: int, block_n: int, items: np.ndarray) -> np.ndarray:
    """K/V blocks, counted from the first, of which every query of an item's tile sees every key."""
    queries, keys = workload.lengths_of(items["q_head"])
    if workload.causal:
        keys = np.clip(items["m"] * block_m + keys - queries + 1, 0, keys)
    return keys // block_n


def _grid(*sizes: int) -> list[np.ndarray]:
    """Indices of a grid, the last one fastest."""
    return [axis.ravel() for axis in np.indices(sizes)]


def _fit(section_bytes: int, head_bytes: int) -> int:
    """How many heads make a section: a power of two."""
    return 2 ** (max(1, section_bytes // head_bytes).bit_length() - 1)


def _sections(total: int, m_tiles: int, section: int) -> tuple[np.ndarray, np.ndarray]:
    q_head, m = [], []
    for first in range(0, total, section):
        down, head = _grid(m_tiles, min(section, total - first))
        q_head.append(first + head)
        m.append(m_tiles - 1 - down)
    return np.concatenate(q_head), np.concatenate(m)
