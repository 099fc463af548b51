"""Limits: what a prediction may cost, worked out before any of it is spent.

A prediction records the schedule's loop in Python, lists every work item and every tile of every tensor, and replays every tile
load. Each is bounded here by what it takes on one core of a laptop. A program that asks for more gets a sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import UsageError
from .problem.tile import Tile
from .problem.workload import Workload
from .schedules import Kernel

MAX_LOOP = 30_000
"""K/V blocks of a loop that is recorded: 0.4 ms and 20 kB each with three consumers, so 12 s and 600 MB."""
MAX_QUERY_TILES = 3_000
"""The same where each K/V block is a loop over Q of its own, which is recorded some fifty times over: about a minute."""
MAX_ACCESSES = 400_000_000
"""Tile loads and stores that are replayed: five to ten million a second, so about a minute."""
MAX_MEMORY_BYTES = 1_400_000_000
"""Of the tables below; with Python, numpy and numba a process stays under 2 GB."""
ITEM_BYTES = 160
"""A work item: its record, its columns for the replay, and the grid it was cut from."""
ACCESS_BYTES = 180
"""A load or store of one CTA, listed, as a record, and as columns."""
TILE_BYTES = 48
"""A tile of a tensor: who read it last and when HBM delivered it; and on top, for each partition of L2 that may hold it .. """
LINK_BYTES = 20
""".. for each other: its place in the order of use."""


@dataclass(frozen=True)
class Cost:
    """What a prediction takes."""

    accesses: int  # tile loads and stores that are replayed
    items: int  # CTAs, or tiles of persistent ones
    listed: int  # loads and stores of the longest CTA
    tiles: int  # of all tensors
    nbytes: int


def cost(kernels: Sequence[Kernel], workload: Workload, tile: Tile, partitions: int) -> Cost:
    """The cost of predicting these kernels, one after another, on a device whose L2 is in so many partitions."""
    heads = workload.batch * workload.heads
    m_tiles, n_tiles = -(-workload.seqlen_q // tile.block_m), -(-workload.seqlen_k // tile.block_n)
    whole_head = any(kernel.grid == "heads" for kernel in kernels)
    materialised = any(kernel.grid == "tiles" for kernel in kernels)
    columns = any(kernel.grid == "columns" for kernel in kernels)
    per_pair = 7 if whole_head else 2  # FlashAttention-1 loads and stores O, l and m at every step
    per_pair = 9 if columns else per_pair  # standard attention's backward: 2 in each GEMM, and 5 in the softmax's derivative
    items = heads * (1 if whole_head else m_tiles * (n_tiles if materialised else 1))
    walked = heads * m_tiles * n_tiles
    if workload.lengths:
        cut = [(-(-queries // tile.block_m), -(-keys // tile.block_n)) for queries, keys in workload.lengths]
        items = workload.heads * sum(m for m, _ in cut)
        walked = workload.heads * sum(m * n for m, n in cut)
    listed = per_pair * max(n_tiles * (m_tiles if whole_head else 1), m_tiles * workload.heads_per_kv if columns else 0)
    tiles = (8 if columns else 4) * heads * m_tiles + (4 if columns else 2) * workload.batch * workload.kv_heads * n_tiles
    tiles += (3 if columns else 2) * heads * m_tiles * n_tiles if materialised else 0
    nbytes = items * ITEM_BYTES + listed * ACCESS_BYTES + tiles * (TILE_BYTES + partitions**2 * LINK_BYTES)
    return Cost(per_pair * walked, items, listed, tiles, nbytes)


def affordable(kernels: Sequence[Kernel], workload: Workload, tile: Tile, partitions: int) -> None:
    """Raise UsageError, one sentence with what it would take, where a prediction costs more than is allowed."""
    found = cost(kernels, workload, tile, partitions)
    if found.accesses > MAX_ACCESSES:
        raise UsageError(
            f"{workload} takes {found.accesses:.2g} tile loads, more than the {MAX_ACCESSES:.0e} that are replayed; "
            "predict a smaller batch or fewer heads, time grows in proportion"
        )
    for kernel in kernels:
        recordable(kernel, workload, tile, _steps(kernel, workload, tile))
    if found.nbytes > MAX_MEMORY_BYTES:
        raise UsageError(
            f"{workload} takes {found.nbytes / 1e9:,.1f} GB to predict ({found.items:,} CTAs, {found.tiles:,} tiles, "
            f"{found.listed:,} loads of a CTA), more than the {MAX_MEMORY_BYTES / 1e9:g} GB that it may; "
            "predict a smaller batch, fewer heads or a shorter sequence"
        )


def _steps(kernel: Kernel, workload: Workload, tile: Tile) -> int:
    """Steps of a CTA's loop, but for those over queries under one K/V block."""
    if kernel.grid == "columns":
        return -(-workload.seqlen_q // tile.block_m) * workload.heads_per_kv
    return 1 if kernel.grid == "heads" else -(-workload.seqlen_k // tile.block_n)


def recordable(kernel: Kernel, workload: Workload, tile: Tile, kv_blocks: int) -> None:
    """Raise UsageError where one CTA's loop of `kv_blocks` is too long to be recorded."""
    m_tiles = -(-workload.seqlen_q // tile.block_m) if kernel.grid == "heads" else 1
    if kernel.grid == "heads" and m_tiles * kv_blocks > MAX_QUERY_TILES:
        raise UsageError(
            f"'{kernel.name}' walks {m_tiles:,} tiles of Q under each K/V block, {m_tiles * kv_blocks:,} in all, more than the "
            f"{MAX_QUERY_TILES:,} that are recorded; give fewer queries or a taller tile"
        )
    if kv_blocks > MAX_LOOP:
        if kernel.grid == "columns":
            raise UsageError(
                f"a loop of {kv_blocks:,} blocks of {tile.block_m} queries is longer than the {MAX_LOOP:,} that are recorded; "
                "give fewer queries, more K/V heads or a taller tile"
            )
        raise UsageError(
            f"a loop of {kv_blocks:,} K/V blocks of {tile.block_n} keys is longer than the {MAX_LOOP:,} that are recorded; "
            "give fewer keys or a wider tile"
        )
