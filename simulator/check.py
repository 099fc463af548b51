"""Legality before replay: can every warp reach its end, is every buffer freed and every turn given back?

Barriers only count upwards, so whether a program can finish does not depend on time: executing greedily, without
costs, reaches the same end in any order. What remains stuck is a deadlock, what remains held is a leak.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from .errors import UsageError
from .program import Program
from .verbs import BarrierKind, Op


class IllegalProgram(UsageError):
    """A schedule that would hang, leak or race on hardware; the message names warp, verb and buffer."""


class _Checker:
    def __init__(self, program: Program):
        self.program = program
        self.generation = [barrier.initial for barrier in program.barriers]
        self.arrivals = [0] * len(program.barriers)
        self.pc = [0] * len(program.warps)
        self.freed: dict[tuple[int, int, int], set[int]] = defaultdict(set)  # (tile, ring, index) -> warps
        self.held: dict[tuple[int, int], tuple[int, int]] = {}  # (ring, stage) -> (tile, index) loaded last
        self.pending: list[list[tuple[str, str]]] = [[] for _ in program.warps]  # WGMMA groups: (label, slot)
        self.readers: dict[int, set[int]] = defaultdict(set)
        for warp in range(len(program.warps)):
            code = program.stream(warp)
            waits = code[(code["op"] == Op.WAIT) & (code["ring"] >= 0)]
            for ring in np.unique(waits["ring"]):
                full = set(program.rings[ring].full)
                if any(int(b) in full for b in waits["barrier"][waits["ring"] == ring]):
                    self.readers[int(ring)].add(warp)

    def run(self) -> None:
        moving = True
        while moving:
            moving = False
            for warp in range(len(self.pc)):
                while self.pc[warp] < len(self.program.stream(warp)) and self._step(warp):
                    self.pc[warp] += 1
                    moving = True
        stuck = [w for w in range(len(self.pc)) if self.pc[w] < len(self.program.stream(w))]
        if stuck:
            raise IllegalProgram("deadlock: " + "; ".join(self._why(warp) for warp in stuck))
        self._leaks()

    def _step(self, warp: int) -> bool:
        """Execute one instruction; False where the warp has to wait."""
        ins = self.program.stream(warp)[self.pc[warp]]
        op, barrier = int(ins["op"]), int(ins["barrier"])
        if op == Op.WAIT:
            return self.generation[barrier] >= ins["target"]
        if op == Op.LOAD:
            self._load(warp, ins)
        if op in (Op.LOAD, Op.ARRIVE):
            if op == Op.ARRIVE and ins["ring"] >= 0:
                self._free(warp, ins)
            self._arrive(barrier)
        elif op == Op.WGMMA:
            self.pending[warp].append((self.program.labels[ins["label"]], self.program.slot_name(ins)))
        elif op == Op.WGMMA_WAIT:
            keep = int(ins["a"])
            self.pending[warp] = self.pending[warp][-keep:] if keep else []
        return True

    def _arrive(self, barrier: int) -> None:
        self.arrivals[barrier] += 1
        if self.arrivals[barrier] == self.program.barriers[barrier].expected:
            self.arrivals[barrier] = 0
            self.generation[barrier] += 1

    def _load(self, warp: int, ins: np.void) -> None:
        ring = self.program.rings[ins["ring"]]
        stage = ring.full.index(int(ins["barrier"]))
        behind = self.generation[ring.full[stage]] - self.generation[ring.empty[stage]]
        if behind > 0:
            _, old = self.held[int(ins["ring"]), stage]
            raise IllegalProgram(
                f"over-full ring: {self.program.warps[warp]} loads {self.program.slot_name(ins)} into a stage of ring "
                f"{ring.name} ({ring.stages} stage(s)) that still holds {ring.name}[{old}]"
            )
        self.held[int(ins["ring"]), stage] = (int(ins["tile"]), int(ins["index"]))

    def _free(self, warp: int, ins: np.void) -> None:
        slot, name = self.program.slot_name(ins), self.program.warps[warp]
        for label, reads in self.pending[warp]:
            if reads == slot:
                raise IllegalProgram(f"race: {name} frees {slot} while its '{label}' may still read it; wait for it first")
        self.freed[int(ins["tile"]), int(ins["ring"]), int(ins["index"])].add(warp)

    def _why(self, warp: int) -> str:
        program = self.program
        ins = program.stream(warp)[self.pc[warp]]
        name, barrier, slot = program.warps[warp], int(ins["barrier"]), program.slot_name(ins)
        kind = program.barriers[barrier].kind
        if kind == BarrierKind.NAMED:
            return f"{name} waits to take the turn, which no one gives"
        if kind == BarrierKind.CTA:
            return f"{name} waits for the CTA's other warps to exit"
        ring = program.rings[ins["ring"]]
        if barrier in ring.empty:
            stage = ring.empty.index(barrier)
            tile, index = self.held.get((int(ins["ring"]), stage), (0, -1))
            missing = self.readers[int(ins["ring"])] - self.freed[tile, int(ins["ring"]), index]
            who = ", ".join(program.warps[w] for w in sorted(missing)) or "no one"
            return (
                f"{name} waits to load {slot}, because {who} has not freed {ring.name}[{index}] "
                f"(ring {ring.name} has {ring.stages} stage(s))"
            )
        loads = [w for w in range(len(program.warps)) if self._loads(w, ins)]
        if not loads:
            return f"{name} waits for {slot}, which no one loads"
        return f"{name} waits for {slot}, which {program.warps[loads[0]]} has not loaded"

    def _loads(self, warp: int, ins: np.void) -> bool:
        code = self.program.stream(warp)
        same = (code["op"] == Op.LOAD) & (code["ring"] == ins["ring"]) & (code["index"] == ins["index"])
        return bool((same & (code["tile"] == ins["tile"])).any())

    def _leaks(self) -> None:
        program = self.program
        for (ring, _), (tile, index) in self.held.items():
            missing = self.readers[ring] - self.freed[tile, ring, index]
            slot = f"{program.rings[ring].name}[{index}]"
            if not self.readers[ring]:
                raise IllegalProgram(f"leak: {slot} is loaded and no warp waits for it")
            if missing:
                who = ", ".join(program.warps[w] for w in sorted(missing))
                raise IllegalProgram(f"leak: {who} never frees {slot}")
        for number, barrier in enumerate(program.barriers):
            if self.arrivals[number]:
                raise IllegalProgram(f"leak: {barrier.name} ends with {self.arrivals[number]} of {barrier.expected} arrivals")
        turns = [n for n, barrier in enumerate(program.barriers) if barrier.kind == BarrierKind.NAMED]
        for warp, name in enumerate(program.warps):
            if self.pending[warp]:
                raise IllegalProgram(f"race: {name} exits without waiting for its '{self.pending[warp][-1][0]}'")
            code = program.stream(warp)
            named = np.isin(code["barrier"], turns)
            takes = int((named & (code["op"] == Op.WAIT)).sum())
            gives = int((named & (code["op"] == Op.ARRIVE)).sum())
            if takes != gives:
                raise IllegalProgram(f"leak: {name} takes the turn {takes} times and gives it {gives} times")


def check(program: Program) -> None:
    """Raise IllegalProgram, naming warp, verb and buffer, if the program would deadlock, leak, race or overfill a ring."""
    _Checker(program).run()
