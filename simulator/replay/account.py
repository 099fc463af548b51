"""Account: how one kernel spends the cycles of its SMs' tensor cores, part by part (breakdown.py says what each part is)."""

from __future__ import annotations

import numpy as np

from ..language.view import TileView
from ..problem.tile import Tile
from ..problem.workload import Workload
from ..results.breakdown import REASONS
from .chip import Durations
from .engine import U_TENSOR


def of_kernel(
    durations: Durations, items: np.ndarray, ends: np.ndarray, workload: Workload, tile: Tile, grid: str, flops_per_cycle: float
) -> dict[str, float]:
    """Cycles by part, summed over SMs, of a kernel whose SMs are done at `ends`; `flops_per_cycle` is the dense peak of one.

    What its GEMMs execute is told apart by (query, key) pairs; the useful ones are counted as executed FLOPs too, so they
    need not be exact where a GEMM rounds its last k step up.
    """
    lengths = np.searchsorted(durations.lengths, items["blocks"].astype(np.int64))
    counts = np.bincount(lengths, minlength=len(durations.lengths))
    busy = float(counts @ durations.busy[:, U_TENSOR])
    ideal = float(counts @ durations.gemm_flops) / flops_per_cycle
    executed, inside = pairs(items, workload, tile, grid)
    unmasked = workload.all_pairs
    parts = {
        "useful": ideal * unmasked / executed if executed else 0.0,
        "masked": ideal * (inside - unmasked) / executed if executed else 0.0,
        "padding": ideal * (executed - inside) / executed if executed else 0.0,
        "slow_gemms": busy - ideal,
        "tail": float((ends.max() - ends[ends > 0]).sum()),
        "no_cta": float(ends.max() * (ends == 0).sum()),
    }
    return parts | _idle(durations, counts, lengths, ends, max(0.0, float(ends.sum()) - busy))


def _idle(durations: Durations, counts: np.ndarray, lengths: np.ndarray, ends: np.ndarray, cycles: float) -> dict[str, float]:
    """Idle cycles of the SMs that have a CTA, in the proportions in which the replays of one SM had them."""
    shares = counts @ durations.idle
    if durations.first.shape[1] == 1:  # one CTA at a time: the first has its whole prologue
        started = lengths[: int((ends > 0).sum())]
        shares = shares + durations.idle_first[started].sum(axis=0)
    shares = np.clip(shares, 0.0, None)
    if shares.sum() <= 0.0:
        shares = np.array([float(reason == "latency") for reason in REASONS])
    return dict(zip(REASONS, (shares / shares.sum() * cycles).tolist(), strict=True))


def pairs(items: np.ndarray, workload: Workload, tile: Tile, grid: str) -> tuple[int, int]:
    """(query, key) pairs that a kernel's tiles execute, and those of them within the lengths."""
    queries, of_keys = workload.lengths_of(items["q_head"])
    rows = np.clip(queries - items["m"].astype(np.int64) * tile.block_m, 0, tile.block_m)
    blocks = items["blocks"].astype(np.int64)
    if grid == "combine":
        return 0, 0
    if grid == "parts":
        whole = workload.batch * workload.heads * workload.seqlen_q * workload.seqlen_k
        return int(blocks.sum()) * tile.block_m * tile.block_n, whole
    if grid == "tiles":
        keys = np.clip(workload.seqlen_k - items["n"].astype(np.int64) * tile.block_n, 0, tile.block_n)
        return len(items) * tile.block_m * tile.block_n, int((rows * keys).sum())
    if grid == "heads":  # however many CTAs share one
        view, heads = TileView(tile, workload, int(blocks[0])), int((items["m"] == 0).sum())
        executed = inside = 0
        for j in view.kv_blocks:
            under = view.q_blocks(j)
            executed += len(under) * tile.block_m * tile.block_n
            keys = min(tile.block_n, workload.seqlen_k - j * tile.block_n)
            inside += max(0, workload.seqlen_q - under.start * tile.block_m) * keys
        return executed * heads, inside * heads
    if grid == "columns":
        of_head = blocks // workload.heads_per_kv
        keys = np.clip(workload.seqlen_k - items["n"].astype(np.int64) * tile.block_n, 0, tile.block_n)
        first = items["m"].astype(np.int64) * tile.block_m
        rows = np.minimum(first + of_head * tile.block_m, workload.seqlen_q) - first
        return int((blocks * tile.block_m * tile.block_n).sum()), int((rows * keys).sum()) * workload.heads_per_kv
    keys = np.minimum(blocks * tile.block_n, of_keys)
    return int((blocks * tile.block_m * tile.block_n).sum()), int((rows * keys).sum())
