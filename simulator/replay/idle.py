"""Idle: what kept the tensor cores of an SM waiting, read off the spans of a replay.

A gap between two GEMMs ends when a warpgroup's next k step starts. What that warpgroup did during the gap is why the gap
was there: whoever else was busy or waiting, no one came sooner. Before a tile's first GEMM the gap is prologue, back to
the tile before, whose epilogue it is; behind the last GEMM of all it is epilogue.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..language.ops import BarrierKind, Op
from ..language.program import Program
from ..results.breakdown import REASONS
from .engine import U_TENSOR, UNITS, Replay

SOFTMAX, MEMORY, LATENCY, PROLOGUE, EPILOGUE = range(len(REASONS))


class Pieces:
    """The idle stretches of the tensor cores of SM 0, each with its reason, and how much k steps were stretched."""

    def __init__(self, program: Program, replayed: Replay, busy_cycles: int):
        """`replayed` has the spans of copies of one `program`; `busy_cycles` of its k steps at their own rate."""
        spans = replayed.spans
        unit = [lane.name for lane in replayed.lanes].index(UNITS[U_TENSOR])
        gemms = np.sort(spans[spans["lane"] == unit], order="start")
        self._kinds = _kinds(program)
        self._lanes = {
            n: np.sort(spans[spans["lane"] == n], order="start") for n, lane in enumerate(replayed.lanes) if lane.kind == "warp"
        }
        # A kernel of arithmetic alone: its first warp stands for all.
        whole = np.array([0]), np.array([replayed.cycles])
        table = self._between(gemms, replayed.cycles) if len(gemms) else self._laid_out(self._lanes[0], np.array([0]), *whole)
        self._reason, self._start, self._end = table[1], table[2].astype(float), table[3].astype(float)
        self._gemms = gemms
        executed = float((gemms["end"] - gemms["start"]).sum())
        self._stretched = max(0.0, 1.0 - busy_cycles / executed) if executed else 0.0

    def within(self, start: float, end: float) -> np.ndarray:
        """Idle cycles by reason between two times; k steps that softmax beside them stretches count as softmax."""
        length = np.clip(np.minimum(self._end, end) - np.maximum(self._start, start), 0.0, None)
        found = np.bincount(self._reason, weights=length, minlength=len(REASONS))
        busy = np.clip(np.minimum(self._gemms["end"], end) - np.maximum(self._gemms["start"], start), 0.0, None).sum()
        found[SOFTMAX] += busy * self._stretched
        return found

    def _between(self, gemms: np.ndarray, cycles: int) -> np.ndarray:
        """(gap, reason, start, end) of every gap before a k step, and of what is left behind the last, in order."""
        ends = np.maximum.accumulate(gemms["end"])
        free = np.append(0, ends[:-1])
        parts = []
        for warp in np.unique(gemms["warp"]):
            own = np.flatnonzero(gemms["warp"] == warp)
            first = np.diff(gemms["tile"][own], prepend=-1) > 0  # of its tile, of those of this warp
            gap = gemms["start"][own] > free[own]
            parts += self._around(self._lanes[warp], own[first & gap], gemms, free)
            amid = own[~first & gap]
            parts.append(self._laid_out(self._lanes[warp], amid, free[amid], gemms["start"][amid]))
        parts.append(np.array([[len(gemms)], [EPILOGUE], [ends[-1]], [max(cycles, ends[-1])]]))
        table = np.concatenate(parts, axis=1)
        return table[:, np.argsort(table[0], kind="stable")]

    def _around(self, lane: np.ndarray, gaps: np.ndarray, gemms: np.ndarray, free: np.ndarray) -> list[np.ndarray]:
        """The gaps before a warp's first GEMM of a tile: the end of the tile before, and what comes before the GEMM."""
        start, end, tile = free[gaps], gemms["start"][gaps], gemms["tile"][gaps]
        of_tile = np.where(tile > 0, lane["start"][np.searchsorted(lane["tile"], tile)], 0)
        enters = np.minimum(np.maximum(start, of_tile), end)
        reasons = (np.full(len(gaps), reason) for reason in (EPILOGUE, PROLOGUE))
        return [np.stack([gaps, reason, *of]) for reason, of in zip(reasons, ((start, enters), (enters, end)), strict=True)]

    def _laid_out(self, lane: np.ndarray, gaps: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """What a warp did in each gap from start to end, (gap, reason, start, end); where it has no span it went from one
        instruction to the next."""
        begin = np.searchsorted(lane["end"], start, side="right")
        count = np.maximum(np.searchsorted(lane["start"], end) - begin, 0)
        offset = np.cumsum(count) - count
        of = np.repeat(np.arange(len(gaps)), count)  # the gap that each span is in
        spans = lane[begin[of] + np.arange(len(of)) - offset[of]]
        since, until = np.maximum(start[of], spans["start"]), np.minimum(end[of], spans["end"])
        # Before each span, and behind the last, what is between them: most of these are empty.
        slot = 2 * np.arange(len(of)) + of
        table = np.empty((4, 2 * len(of) + len(gaps)), np.int64)
        table[0] = np.repeat(gaps, 2 * count + 1)
        table[1], table[1, slot + 1] = LATENCY, self._kinds[spans["label"], spans["wait"]]
        table[2, slot + 1], table[3, slot + 1] = since, until
        table[3, slot], table[2, slot + 2] = since, until
        heads, tails = 2 * offset + np.arange(len(gaps)), 2 * (offset + count) + np.arange(len(gaps))
        table[2, heads], table[3, tails] = start, end
        return table


@lru_cache(maxsize=128)
def _kinds(program: Program) -> np.ndarray:
    """[label, waits] of a span: the reason that it stands for amid a tile, by the instructions of that label."""
    code = program.code
    loaded = set(code["barrier"][code["op"] == Op.LOAD].tolist())
    memory = (BarrierKind.MBARRIER, BarrierKind.CLUSTER)
    found = np.full((len(program.labels), 2), LATENCY)
    shape = (len(Op), len(program.labels), len(program.barriers) + 1)  # one number a row: records are slow to sort
    distinct = np.unique(np.ravel_multi_index((code["op"], code["label"], code["barrier"] + 1), shape))
    for op, label, behind in np.stack(np.unravel_index(distinct, shape), axis=1).tolist():
        barrier = behind - 1
        if op == Op.COMPUTE:
            found[label, 0] = SOFTMAX
        elif op == Op.SETUP:
            found[label, 0] = PROLOGUE
        elif op == Op.STORE_WAIT:
            found[label, 1] = MEMORY
        elif op == Op.WAIT:
            found[label, 1] = MEMORY if barrier in loaded or program.barriers[barrier].kind in memory else LATENCY
    return found
