"""The in-kernel trace: stamps that a kernel built with TRACE left in memory (kernels/cuda/trace.cuh) -> spans of a Run.

A stamp is 64 bits: the SM's clock counter (low 32), what has just happened (8), and the K/V block (24), counted over the
kernel's life. A row holds the stamps of one warp role, a CTA four rows. What lies between two stamps of a row is the span
of the later one; so spans fill a lane, and the stamps can be read back from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..simulator.errors import UsageError
from ..simulator.run import SPAN, Lane

ROWS, CAPACITY = 4, 4096
"""Rows of a CTA (the producer, up to three consumer warpgroups), stamps of a row; as in trace.cuh."""
STAMPS = {
    "LOAD_Q": "load Q",
    "LOAD_K": "load K",
    "LOAD_V": "load V",
    "SCORES": "S=QK^T",
    "SCORES_DONE": "wait S=QK^T",
    "VALUES": "O+=PV",
    "VALUES_DONE": "wait O+=PV",
    "SOFTMAX": "softmax",
    "STORE": "store O",
    "TAKE": "take turn",
    "GIVE": "give turn",
}
"""Names of trace.cuh's enum in its order -> what the simulator calls it."""
LABELS = tuple(STAMPS.values())
_NAMES = tuple(STAMPS)
_LOAD_Q, _STORE = _NAMES.index("LOAD_Q"), _NAMES.index("STORE")
_WAITS = [_NAMES.index(name) for name in ("LOAD_Q", "LOAD_K", "LOAD_V", "SCORES_DONE", "VALUES_DONE", "TAKE")]
"""Stamps behind a wait: what a warp did before them was mostly waiting (a load: for its buffer to be free)."""
KEPT = 1000
"""Stamps of a row that are kept, in whole tiles; of the first tile at least its beginning."""


@dataclass(frozen=True)
class Recording:
    """Spans of some CTAs, each in cycles from its first stamp, and the lanes and labels they index."""

    lanes: tuple[Lane, ...]
    labels: tuple[str, ...]
    spans: np.ndarray  # SPAN


@dataclass(frozen=True)
class _Row:
    """Stamps of one warp role in order of time; `step` counts within its tile, -1 for what is outside the loop."""

    cycles: np.ndarray  # i8
    label: np.ndarray
    tile: np.ndarray
    step: np.ndarray
    whole: int  # tiles that are there from end to end


def recording(words: np.ndarray, ctas: Sequence[int], consumers: int, keep: int = KEPT) -> Recording:
    """Spans of the chosen CTAs of a trace buffer, uint64 of (CTAs, ROWS, CAPACITY).

    Raises UsageError where the buffer has another shape, a chosen CTA has no stamp or an unknown one, or is not there.
    """
    if words.ndim != 3 or words.shape[1:] != (ROWS, CAPACITY):
        raise UsageError(f"a trace buffer is (CTAs, {ROWS}, {CAPACITY}) stamps, not {words.shape}")
    lanes, parts = [], []
    for cta in ctas:
        if not 0 <= cta < len(words):
            raise UsageError(f"the trace has {len(words)} CTAs, so none of number {cta}")
        rows = [_read(words[cta, row], cta, row) for row in range(1 + consumers)]
        rows = _cut(rows, keep)
        origin = min(row.cycles[0] for row in rows)
        for number, row in enumerate(rows):
            parts.append(_spans(row, len(lanes), origin))
            lanes.append(Lane(f"CTA{cta} " + (f"WG{number - 1}" if number else "producer"), "warp"))
    return Recording(tuple(lanes), LABELS, np.concatenate(parts))


def _read(words: np.ndarray, cta: int, row: int) -> _Row:
    used = words.astype(np.uint64)
    if (used == 0).any():
        used = used[: int(np.argmax(used == 0))]
    if not len(used):
        raise UsageError(f"CTA {cta} left no stamp in row {row}: was the kernel built with TRACE, and had it work?")
    clock = (used & np.uint64(0xFFFFFFFF)).astype(np.int64)
    label = ((used >> np.uint64(32)) & np.uint64(0xFF)).astype(np.int64)
    block = (used >> np.uint64(40)).astype(np.int64)
    if label.max() >= len(LABELS):
        raise UsageError(f"CTA {cta} stamped {label.max()}, which is no label of this fasim's trace.cuh")
    cycles = clock[0] + np.append(0, np.cumsum(np.diff(clock) % (1 << 32)))  # the counter wraps every few seconds
    tile, first, whole = (_loaded if row == 0 else _consumed)(label, block)
    outside = np.isin(label, (_LOAD_Q, _STORE))
    kept = tile >= 0
    return _Row(cycles[kept], label[kept], tile[kept], np.where(outside, -1, block - first)[kept], whole)


def _consumed(label: np.ndarray, block: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Each stamp's tile, the first block of that tile, and how many tiles end: with a STORE of their last block."""
    ends = label == _STORE
    tile = np.cumsum(ends) - ends
    first = np.append(0, block[ends] + 1)
    return tile, first[tile], int(ends.sum())


def _loaded(label: np.ndarray, block: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """The same for the producer, whose tiles begin with LOAD_Q; one that loads no block belongs to none (-1)."""
    begins = label == _LOAD_Q
    empty = begins & np.append(begins[1:], True)
    kept = begins & ~empty
    tile = np.where(empty, -1, np.cumsum(kept) - 1)
    first = np.append(block[kept], 0)
    return tile, first[tile], int(kept.sum())


def _cut(rows: list[_Row], keep: int) -> list[_Row]:
    """As many whole tiles as every consumer has within `keep` stamps; else the beginning of the first."""
    whole = min(min(row.whole, int(row.tile[min(keep, len(row.tile) - 1)]) + (len(row.tile) <= keep)) for row in rows[1:])
    if whole:
        return [_take(row, row.tile < whole) for row in rows]
    return [_take(row, (row.tile == 0) & (np.arange(len(row.tile)) < keep)) for row in rows]


def _take(row: _Row, chosen: np.ndarray) -> _Row:
    return _Row(row.cycles[chosen], row.label[chosen], row.tile[chosen], row.step[chosen], row.whole)


def _spans(row: _Row, lane: int, origin: int) -> np.ndarray:
    spans = np.zeros(len(row.cycles), SPAN)
    spans["lane"] = spans["warp"] = lane
    spans["label"], spans["step"], spans["tile"] = row.label, row.step, row.tile
    spans["wait"] = np.isin(row.label, _WAITS)
    spans["end"] = row.cycles - origin
    spans["start"] = np.append(spans["end"][:1], spans["end"][:-1])
    return spans
