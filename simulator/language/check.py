"""Legality before replay: can every warp reach its end, is every buffer freed and every turn given back?

Barriers only count upwards, so whether a program can finish does not depend on time: executing greedily, without
costs, reaches the same end in any order. What remains stuck is a deadlock, what remains held is a leak. Races are
found in each warp's own order: what it touches it must have waited for, and must not have given away.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..errors import UsageError
from .ops import BarrierKind, Op
from .program import Program


class IllegalProgram(UsageError):
    """A schedule that would hang, leak or race on hardware; the message names warp, verb and buffer."""


class _Group(NamedTuple):
    """A WGMMA group not yet waited for."""

    label: str
    slots: tuple[str, ...]  # that it reads
    where: tuple[int, int]  # tile, step
    reads: int  # register tensors, as bits
    writes: int


class _Checker:
    def __init__(self, program: Program):
        self.program = program
        self.generation = [barrier.initial for barrier in program.barriers]
        self.arrivals = [0] * len(program.barriers)
        self.pc = [0] * len(program.warps)
        self.freed: dict[tuple[int, int, int], set[int]] = defaultdict(set)  # (tile, ring, index) -> warps
        self.held: dict[tuple[int, int], tuple[int, int]] = {}  # (ring, stage) -> (tile, index) loaded last
        self.pending: list[list[_Group]] = [[] for _ in program.warps]  # WGMMA groups
        self.waited: list[set[tuple]] = [set() for _ in program.warps]  # (tile, ring, index) this warp knows is loaded
        self.known: list[dict[int, int]] = [defaultdict(int) for _ in program.warps]  # generations it has waited for
        self.turns = [0] * len(program.warps)  # takes less gives
        self.met = [-1] * len(program.warps)  # the tile in which a warp has last met the other consumers
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
        for warp in range(len(self.pc)):
            self._exit(warp)
        self._leaks()

    def _step(self, warp: int) -> bool:
        """Execute one instruction; False where the warp has to wait."""
        ins = self.program.stream(warp)[self.pc[warp]]
        op, barrier = int(ins["op"]), int(ins["barrier"])
        if op == Op.WAIT:
            return self._wait(warp, ins)
        if op == Op.LOAD:
            self._load(warp, ins)
            self._arrive(barrier)
        elif op == Op.ARRIVE:
            if self.program.barriers[barrier].kind == BarrierKind.NAMED:
                self._give(warp)
            elif self.program.barriers[barrier].kind == BarrierKind.CTA:
                self._exit(warp)
            elif ins["ring"] >= 0 and barrier in self.program.rings[ins["ring"]].full:
                self._load(warp, ins)
            elif ins["ring"] >= 0:
                self._free(warp, ins)
            self._arrive(barrier)
        elif op in (Op.WGMMA, Op.MMA):
            self._read(warp, ins)
        elif op == Op.WGMMA_WAIT:
            keep = int(ins["target"])
            self.pending[warp] = self.pending[warp][-keep:] if keep else []
        elif op == Op.COMPUTE:
            self._compute(warp, ins)
        return True

    def _wait(self, warp: int, ins: np.void) -> bool:
        barrier, target = int(ins["barrier"]), int(ins["target"])
        if self.generation[barrier] < target:
            return False
        self.known[warp][barrier] = max(self.known[warp][barrier], target)
        if self.program.barriers[barrier].kind == BarrierKind.NAMED:
            self.turns[warp] += 1
        elif self.program.barriers[barrier].kind == BarrierKind.MEETING and ins["ring"] < 0:
            self.met[warp] = int(ins["tile"])
        elif ins["ring"] >= 0 and barrier in self.program.rings[ins["ring"]].full:
            self.waited[warp].add(_slot(ins))
        return True

    def _give(self, warp: int) -> None:
        self.turns[warp] -= 1
        if self.turns[warp] < 0:
            raise IllegalProgram(
                f"race: {self.program.warps[warp]} gives the turn, which it does not hold; take it first"
            )

    def _exit(self, warp: int) -> None:
        for group in self.pending[warp]:
            raise IllegalProgram(
                f"race: {self.program.warps[warp]} exits without waiting for its '{group.label}' on {group.slots[0]}"
            )

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
                f"over-full ring: {self.program.warps[warp]} {_verb(ins)}s {self.program.slot_name(ins)} into a stage of "
                f"ring {ring.name} ({ring.stages} stage(s)) that still holds {ring.name}[{old}]"
            )
        self._reclaimed(warp, ins)
        self.held[int(ins["ring"]), stage] = (int(ins["tile"]), int(ins["index"]))

    def _reclaimed(self, warp: int, ins: np.void) -> None:
        """A stage that shares its memory with a staged result may be loaded once that result of earlier tiles has left."""
        program, number = self.program, int(ins["ring"])
        for over in program.rings:
            if over.alias != program.rings[number].name or any(b.kind == BarrierKind.CTA for b in program.barriers):
                continue
            freed = program.code[(program.code["op"] == Op.ARRIVE) & np.isin(program.code["barrier"], over.empty)]
            staged = np.unique(freed["tile"][freed["tile"] < ins["tile"]])
            if len(staged) > self.known[warp][over.empty[0]]:
                raise IllegalProgram(
                    f"race: {program.warps[warp]} loads {program.slot_name(ins)} over {over.name}[0], which may not have "
                    f"left shared memory; reclaim {over.name}[0] first"
                )

    def _read(self, warp: int, ins: np.void) -> None:
        program, label = self.program, self.program.labels[ins["label"]]
        read = [_slot(ins)]
        if ins["left"] >= 0:
            read.append((int(ins["tile"]), int(ins["left"]), int(ins["left_index"])))
        names = tuple(f"{program.rings[ring].name}[{index}]" for _, ring, index in read)
        for each, slot in zip(read, names, strict=True):
            if warp in self.freed[each]:
                raise IllegalProgram(f"race: {program.warps[warp]} issues '{label}' on {slot} after it has freed {slot}")
            if program.rings[each[1]].full and each not in self.waited[warp]:
                raise IllegalProgram(f"race: {program.warps[warp]} issues '{label}' on {slot} before it has waited for it")
        if ins["op"] == Op.WGMMA:
            where = int(ins["tile"]), int(ins["step"])
            self.pending[warp].append(_Group(label, names, where, int(ins["reads"]), int(ins["writes"])))

    def _compute(self, warp: int, ins: np.void) -> None:
        """Registers: what a GEMM in flight writes is not touched, what it reads is not written, until it has been waited for."""
        label, name = self.program.labels[ins["label"]], self.program.warps[warp]
        reads, writes = int(ins["reads"]), int(ins["writes"])
        for result in self._names(reads):
            self._stage(warp, ins, result)
        for group in self.pending[warp]:
            shared = self._names((reads | writes) & group.writes | writes & group.reads)
            if any(self._same_registers(tensor, group, ins) for tensor in shared):
                raise IllegalProgram(
                    f"race: {name} does '{label}' while its '{group.label}' on {group.slots[0]} may still run; "
                    "wait for it first"
                )

    def _names(self, bits: int) -> list[str]:
        return [name for number, name in enumerate(self.program.registers) if bits >> number & 1]

    def _same_registers(self, tensor: str, group: _Group, ins: np.void) -> bool:
        """Each block has scores of its own, P alternates between its sets from block to block, and there is one of the rest."""
        if tensor == "S":
            return group.where == (ins["tile"], ins["step"])
        return tensor != "P" or (group.where[1] - ins["step"]) % self.program.operand_sets == 0

    def _stage(self, warp: int, ins: np.void, result: str) -> None:
        """A result staged over another ring's memory: first all consumers must have met, so that none reads it any more."""
        program, tile = self.program, int(ins["tile"])
        under = next((ring.alias for ring in program.rings if ring.name == result and ring.alias), None)
        for (ring, _), (loaded, index) in self.held.items():
            read_by_others = self.readers[ring] - {warp}
            if program.rings[ring].name == under and loaded == tile and read_by_others and self.met[warp] != tile:
                raise IllegalProgram(
                    f"race: {program.warps[warp]} stages {result} over {under}[{index}], which "
                    f"{program.warps[min(read_by_others)]} may still read; let the consumers meet first"
                )

    def _free(self, warp: int, ins: np.void) -> None:
        slot, name = self.program.slot_name(ins), self.program.warps[warp]
        for group in self.pending[warp]:
            if slot in group.slots:
                raise IllegalProgram(
                    f"race: {name} frees {slot} while its '{group.label}' may still read it; wait for it first"
                )
        if warp in self.freed[_slot(ins)]:
            raise IllegalProgram(f"race: {name} frees {slot} twice")
        if int(ins["ring"]) in self.readers and _slot(ins) not in self.waited[warp]:
            raise IllegalProgram(f"race: {name} frees {slot} before it has waited for it")
        self.freed[_slot(ins)].add(warp)

    def _why(self, warp: int) -> str:
        program = self.program
        ins = program.stream(warp)[self.pc[warp]]
        name, barrier, slot = program.warps[warp], int(ins["barrier"]), program.slot_name(ins)
        kind = program.barriers[barrier].kind
        if kind == BarrierKind.NAMED:
            return f"{name} waits to take the turn, which no one gives"
        if kind == BarrierKind.CTA:
            return f"{name} waits for the CTA's other warps to exit"
        if kind == BarrierKind.MEETING and ins["ring"] < 0:
            return f"{name} waits to meet the other consumers, of whom one never comes"
        ring = program.rings[ins["ring"]]
        if barrier in ring.empty:
            stage = ring.empty.index(barrier)
            tile, index = self.held.get((int(ins["ring"]), stage), (0, -1))
            missing = self.readers[int(ins["ring"])] - self.freed[tile, int(ins["ring"]), index]
            who = " and ".join(program.warps[w] for w in sorted(missing)) or "no one"
            have = "have" if len(missing) > 1 else "has"
            verb = "fill" if kind == BarrierKind.MEETING else "load"
            return (
                f"{name} waits to {verb} {slot}, because {who} {have} not freed {ring.name}[{index}] "
                f"(ring {ring.name} has {ring.stages} stage(s))"
            )
        loads = [w for w in range(len(program.warps)) if self._loads(w, ins)]
        if not loads:
            return f"{name} waits for {slot}, which no one loads"
        return f"{name} waits for {slot}, which {program.warps[loads[0]]} has not loaded"

    def _loads(self, warp: int, ins: np.void) -> bool:
        code = self.program.stream(warp)
        fills = (code["op"] == Op.ARRIVE) & np.isin(code["barrier"], self.program.rings[ins["ring"]].full)
        same = ((code["op"] == Op.LOAD) | fills) & (code["ring"] == ins["ring"]) & (code["index"] == ins["index"])
        return bool((same & (code["tile"] == ins["tile"])).any())

    def _leaks(self) -> None:
        program = self.program
        for (ring, _), (tile, index) in self.held.items():
            missing = self.readers[ring] - self.freed[tile, ring, index]
            slot = f"{program.rings[ring].name}[{index}]"
            if not self.readers[ring]:
                raise IllegalProgram(f"leak: {slot} is loaded and no warp waits for it")
            if missing:
                who = " and ".join(program.warps[w] for w in sorted(missing))
                raise IllegalProgram(f"leak: {who} never {'free' if len(missing) > 1 else 'frees'} {slot}")
        for number, barrier in enumerate(program.barriers):
            if self.arrivals[number]:
                raise IllegalProgram(
                    f"leak: {barrier.name} ends with {self.arrivals[number]} of {barrier.expected} arrivals"
                )
        turns = [n for n, barrier in enumerate(program.barriers) if barrier.kind == BarrierKind.NAMED]
        for warp, name in enumerate(program.warps):
            code = program.stream(warp)
            named = np.isin(code["barrier"], turns)
            takes = int((named & (code["op"] == Op.WAIT)).sum())
            gives = int((named & (code["op"] == Op.ARRIVE)).sum())
            if takes != gives:
                raise IllegalProgram(f"leak: {name} takes the turn {takes} times and gives it {gives} times")


def _verb(ins: np.void) -> str:
    return "load" if ins["op"] == Op.LOAD else "fill"


def _slot(ins: np.void) -> tuple[int, int, int]:
    return int(ins["tile"]), int(ins["ring"]), int(ins["index"])


@lru_cache(maxsize=128)
def check(program: Program) -> None:
    """Raise IllegalProgram, naming warp, verb and buffer, if the program would deadlock, leak, race or overfill a ring."""
    _Checker(program).run()
