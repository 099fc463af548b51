"""The backward's in-kernel trace: what its consumer warpgroups stamped, as spans of a Run, and how long a block's phases take.

As kernel_trace.py has it for the forward: a stamp is the clock, where it lies says of which block and what (`Stamp` of
kernels/cuda/backward/gradients.cuh, counted over the kernel's life). The producer and the draining warps stamp nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

import numpy as np

from ..simulator.errors import UsageError
from ..simulator.results.run import SPAN, Lane
from .kernel_trace import BLOCKS, KEPT, ROWS, SLOTS, Recording

STAMPS = {
    "SCORES": "S^T=KQ^T",
    "SCORES_DONE": "wait S^T=KQ^T",
    "PROBABILITIES": "P^T",
    "PRODUCTS": "dP^T=VdO^T",
    "PRODUCTS_DONE": "wait dP^T=VdO^T",
    "GRADIENT": "dS^T",
    "PUT_GRADIENT": "put dS^T",
    "VALUES": "dV+=P^TdO",
    "VALUES_DONE": "wait dV+=P^TdO",
    "QUERIES": "dQ=dSK",
    "QUERIES_DONE": "wait dQ=dSK",
    "PUT_QUERIES": "put dQ",
    "KEYS": "dK+=dS^TQ",
    "KEYS_DONE": "wait dK+=dS^TQ",
    "STORE": "store dK",
}
"""Names of the enum in its order, which are the slots -> what the simulator calls it."""
LABELS = tuple(STAMPS.values())
_STORE = LABELS.index("store dK")
_WAITS = [number for number, label in enumerate(LABELS) if label.startswith("wait")]
SETTLED = 3
"""Blocks at either end of a tile that are no steady state."""


def recording(words: np.ndarray, ctas: Sequence[int], consumers: int, keep: int = KEPT) -> Recording:
    """Spans of the chosen CTAs of a trace buffer, uint32 of (CTAs, ROWS, BLOCKS, SLOTS): of each warpgroup the first `keep`.

    Raises UsageError where the buffer has another shape, or a chosen CTA no stamp.
    """
    if words.ndim != 4 or words.shape[1:] != (ROWS, BLOCKS, SLOTS):
        raise UsageError(f"a trace buffer is (CTAs, {ROWS}, {BLOCKS}, {SLOTS}) stamps, not {words.shape}")
    lanes, parts = [], []
    for cta in ctas:
        rows = [_spans(words[cta, 1 + rank], f"CTA {cta} left no stamp of warpgroup {rank}", keep) for rank in range(consumers)]
        origin = min(int(row["end"][0]) for row in rows)
        for rank, row in enumerate(rows):
            row["lane"] = row["warp"] = len(lanes)
            row["end"] -= origin
            row["start"] = np.append(row["end"][:1], row["end"][:-1])
            lanes.append(Lane(f"CTA{cta} WG{rank}", "warp"))
            parts.append(row)
    return Recording(tuple(lanes), LABELS, np.concatenate(parts))


def _spans(stamps: np.ndarray, otherwise: str, keep: int) -> np.ndarray:
    """A row's stamps in order of time, `end` in cycles of its own clock."""
    block, slot = np.nonzero(stamps)
    if not len(block):
        raise UsageError(f"{otherwise}: was the kernel built with TRACE, and has its first tile at most {BLOCKS} blocks?")
    if slot.max() >= len(LABELS):
        raise UsageError(f"slot {slot.max()} is stamped, which is none of this fasim's gradients.cuh")
    clock = stamps[block, slot].astype(np.int64)
    steps = (np.diff(clock) + (1 << 31)) % (1 << 32) - (1 << 31)  # a wrapped counter, and slots not in order of time
    cycles = clock[0] + np.append(0, np.cumsum(steps))
    ends = block[slot == _STORE]
    tile = np.searchsorted(ends, block)
    spans = np.zeros(len(block), SPAN)
    spans["label"], spans["tile"], spans["end"] = slot, tile, cycles
    spans["step"] = np.where(slot == _STORE, -1, block - np.append(0, ends + 1)[tile])
    spans["wait"] = np.isin(slot, _WAITS)
    return spans[np.argsort(cycles, kind="stable")][:keep]


def phases(found: Recording) -> dict[str, list[tuple[str, float]]]:
    """Of each warpgroup what it stamps in a block, in its order, and the cycles since the stamp before, as means over the steady
    blocks of its first tile; last the whole block. Nothing where the tile is too short.
    """
    table = {}
    for number, lane in enumerate(found.lanes):
        mine = found.spans[(found.spans["lane"] == number) & (found.spans["tile"] == 0) & (found.spans["step"] >= 0)]
        begins = np.flatnonzero(mine["label"] == mine["label"][:1])[SETTLED:-SETTLED]
        turns = [mine[a:b] for a, b in pairwise(begins)]
        same = [turn for turn in turns if list(turn["label"]) == list(turns[0]["label"])]
        if same:
            means = [fmean(float(turn["end"][k] - turn["start"][k]) for turn in same) for k in range(len(same[0]))]
            rows = [(found.labels[label], mean) for label, mean in zip(same[0]["label"], means, strict=True)]
            table[lane.name] = [*rows, ("whole block", sum(means))]
    return table
