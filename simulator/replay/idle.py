"""Idle: what kept the tensor cores of an SM waiting, read off the spans of a replay.

A gap between two GEMMs ends when a warpgroup's next k step starts. What that warpgroup did during the gap is why the gap
was there: whoever else was busy or waiting, no one came sooner. Before a tile's first GEMM the gap is prologue, back to
the tile before, whose epilogue it is; behind the last GEMM of all it is epilogue.
"""

from __future__ import annotations

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
        self._kinds = _kinds(program)
        self._pieces: list[tuple[int, float, float]] = []
        spans = replayed.spans
        unit = [lane.name for lane in replayed.lanes].index(UNITS[U_TENSOR])
        gemms = np.sort(spans[spans["lane"] == unit], order="start")
        warps = [n for n, lane in enumerate(replayed.lanes) if lane.kind == "warp"]
        self._lanes = {n: np.sort(spans[spans["lane"] == n], order="start") for n in warps}
        if len(gemms):
            self._between(gemms, replayed.cycles)
        else:
            self._without_gemms(replayed.cycles)
        table = np.array(self._pieces or [(LATENCY, 0.0, 0.0)])
        self._reason, self._start, self._end = table[:, 0].astype(int), table[:, 1], table[:, 2]
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

    def _between(self, gemms: np.ndarray, cycles: int) -> None:
        """Every gap before a k step, and what is left behind the last."""
        begun: dict[int, int] = {}  # warp -> the last tile of which it had a GEMM
        free = 0
        for warp, tile, start, end in gemms[["warp", "tile", "start", "end"]].tolist():
            if start > free:
                self._gap(free, start, warp, tile, begun.get(warp, -1) < tile)
            begun[warp] = tile
            free = max(free, end)
        if cycles > free:
            self._pieces.append((EPILOGUE, free, cycles))

    def _gap(self, start: int, end: int, warp: int, tile: int, first: bool) -> None:
        """One gap, ended by a warp's GEMM of a tile, its first or another."""
        lane = self._lanes[warp]
        if first:
            of_tile = lane["start"][np.searchsorted(lane["tile"], tile)] if tile else 0
            enters = min(max(start, int(of_tile)), end)
            self._pieces += [(EPILOGUE, start, enters), (PROLOGUE, enters, end)]
            return
        self._lay_out(lane, start, end)

    def _lay_out(self, lane: np.ndarray, start: int, end: int) -> None:
        """What a warp did from start to end; where it has no span it went from one instruction to the next."""
        at = start
        for number in range(np.searchsorted(lane["end"], start, side="right"), len(lane)):
            span = lane[number]
            if span["start"] >= end:
                break
            since, until = max(start, int(span["start"])), min(end, int(span["end"]))
            if since > at:
                self._pieces.append((LATENCY, at, since))
            kind = self._kinds.get((int(span["label"]), int(span["wait"])), LATENCY)
            self._pieces.append((kind, since, until))
            at = until
        if end > at:
            self._pieces.append((LATENCY, at, end))

    def _without_gemms(self, cycles: int) -> None:
        """A kernel of arithmetic alone: its first warp stands for all."""
        self._lay_out(self._lanes[0], 0, cycles)


def _kinds(program: Program) -> dict[tuple[int, int], int]:
    """(label, waits) of a span -> the reason that it stands for amid a tile, by the instructions of that label."""
    code = program.code
    loaded = set(code["barrier"][code["op"] == Op.LOAD].tolist())
    memory = (BarrierKind.MBARRIER, BarrierKind.CLUSTER)
    found: dict[tuple[int, int], int] = {}
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
