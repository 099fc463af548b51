"""The in-kernel trace: stamps that a kernel built with TRACE left in memory (kernels/cuda/trace.cuh) -> spans of a Run.

A stamp is the low 32 bits of the SM's clock counter. Where it lies says what had just happened: a CTA has four rows, one of
each warp role, a row BLOCKS blocks, counted over the kernel's life, and a block one slot for each label; 0 is no stamp. What
lies between two stamps of a row is the span of the later one; so spans fill a lane, and the stamps can be read back from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..simulator.errors import UsageError
from ..simulator.results.run import SPAN, Lane

ROWS, BLOCKS, SLOTS = 4, 1024, 16
"""Rows of a CTA (the producer, up to three consumer warpgroups), K/V blocks of a row, slots of a block; as in trace.cuh."""
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
    "OPEN": "take turn",
    "CLOSE": "give turn",
}
"""Names of trace.cuh's enum in its order, which are the slots -> what the simulator calls it."""
LABELS = tuple(dict.fromkeys(STAMPS.values()))
_NAMES = tuple(STAMPS)
_LABEL_OF = np.array([LABELS.index(name) for name in STAMPS.values()])
_LOAD_Q, _STORE = _NAMES.index("LOAD_Q"), _NAMES.index("STORE")
_WAITS = [LABELS.index(STAMPS[name]) for name in ("LOAD_Q", "LOAD_K", "LOAD_V", "SCORES_DONE", "VALUES_DONE", "TAKE")]
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
    """Spans of the chosen CTAs of a trace buffer, uint32 of (CTAs, ROWS, BLOCKS, SLOTS).

    Raises UsageError where the buffer has another shape, a chosen CTA has no stamp or an unknown one, or is not there.
    """
    if words.ndim != 4 or words.shape[1:] != (ROWS, BLOCKS, SLOTS):
        raise UsageError(f"a trace buffer is (CTAs, {ROWS}, {BLOCKS}, {SLOTS}) stamps, not {words.shape}")
    lanes, parts = [], []
    for cta in ctas:
        if not 0 <= cta < len(words):
            raise UsageError(f"the trace has {len(words)} CTAs, so none of number {cta}")
        rows = [_read(words[cta, row], cta, row) for row in range(1 + consumers)]
        rows = [_on_the_clock_of(rows[0], row) for row in rows]
        rows = _cut(rows, keep)
        origin = min(row.cycles[0] for row in rows)
        for number, row in enumerate(rows):
            parts.append(_spans(row, len(lanes), origin))
            lanes.append(Lane(f"CTA{cta} " + (f"WG{number - 1}" if number else "producer"), "warp"))
    return Recording(tuple(lanes), LABELS, np.concatenate(parts))


def _read(stamps: np.ndarray, cta: int, row: int) -> _Row:
    block, slot = np.nonzero(stamps)
    if not len(block):
        raise UsageError(
            f"CTA {cta} left no stamp in row {row}: was the kernel built with TRACE, had the CTA work,"
            f" and has its first tile at most {BLOCKS} K/V blocks?"
        )
    if slot.max() >= len(STAMPS):
        raise UsageError(f"CTA {cta} stamped {slot.max()}, which is no label of this fasim's trace.cuh")
    tile, first, whole = (_loaded if row == 0 else _consumed)(block, slot)
    clock = stamps[block, slot].astype(np.int64)
    steps = (np.diff(clock) + (1 << 31)) % (1 << 32) - (1 << 31)  # a wrapped counter, and slots not in order of time
    cycles = clock[0] + np.append(0, np.cumsum(steps))
    step = np.where(np.isin(slot, (_LOAD_Q, _STORE)), -1, block - first)
    order = np.argsort(cycles, kind="stable")
    return _Row(*(column[order] for column in (cycles, _LABEL_OF[slot], tile, step)), whole)


def _on_the_clock_of(first: _Row, row: _Row) -> _Row:
    """The row, where the counter wrapped between its first stamp and another row's."""
    wraps = (int(row.cycles[0]) - int(first.cycles[0]) + (1 << 31)) >> 32
    return replace(row, cycles=row.cycles - (wraps << 32))


def _consumed(block: np.ndarray, slot: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Each stamp's tile, the first block of that tile, and how many tiles end: a tile's last block has a STORE."""
    ends = block[slot == _STORE]
    tile = np.searchsorted(ends, block)
    return tile, np.append(0, ends + 1)[tile], len(ends)


def _loaded(block: np.ndarray, slot: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """The same for the producer: a tile's first block has a LOAD_Q."""
    begins = block[slot == _LOAD_Q]
    tile = np.searchsorted(begins, block, side="right") - 1
    return tile, np.append(begins, 0)[tile], len(begins)


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
