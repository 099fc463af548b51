"""Conformance: is the order of events that a kernel recorded the order that the schedule of its name says?

Both sides become the same list per warp: GEMMs issued and waited for, softmaxes, turns, loads and stores, each with its
tile and K/V block. Times do not matter there, the order does. Where a stage is handed back no stamp says, but times show it: a
load that overwrites it comes behind every consumer's wait for the GEMM that has read it, or there was a race.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..simulator.errors import UsageError
from ..simulator.language.ops import Op
from ..simulator.language.program import Program, trace
from ..simulator.problem.order import work_items
from ..simulator.results.run import Run
from ..simulator.schedules import find_schedule
from .stamped import BACKWARD, BESIDE, FORWARD, Stamped, warp_of
from .stamped import of as words_of

TURNS = ("take turn", "give turn")


class Event(NamedTuple):
    """One thing a warp did; `step` is the K/V block within the tile, -1 outside the loop and for turns, which have none."""

    tile: int
    label: str
    step: int

    def __str__(self) -> str:
        return f"'{self.label}'" + (f" of block {self.step}" if self.step >= 0 else "") + f" in tile {self.tile}"


@dataclass(frozen=True)
class Conformance:
    """How many events of how many warps were compared, and the first difference of each warp that has one."""

    warps: int
    events: int
    frees: int  # stages handed back, by as many consumers as read them, before they were loaded anew
    differences: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether every warp did what the schedule says, in its order."""
        return not self.differences

    def to_dict(self) -> dict:
        """As plain JSON values."""
        return vars(self) | {"holds": self.holds, "differences": list(self.differences)}


def said(program: Program, words: Stamped = FORWARD) -> dict[str, list[Event]]:
    """What a recorded schedule says, by warp, as events."""
    say = _said_of_gradients if words is BACKWARD else _said
    return {name: say(program, program.stream(warp)) for warp, name in enumerate(program.warps)}


def _said(program: Program, stream: np.ndarray) -> list[Event]:
    out: list[Event] = []
    for event in _events(program, stream):
        if isinstance(event, Event):
            found: Event | None = event
        else:
            op, label, tile, step = event
            found = None
            if op == Op.STORE:  # the last of a tile is LSE's, from registers
                found = Event(tile, FORWARD.end, -1) if label == "store LSE" else None
            elif op == Op.LOAD or label == FORWARD.block or label in TURNS:
                found = Event(tile, label, step)
        if found is not None and out[-1:] != [found]:  # chunks of one softmax, parts of one Q
            out.append(found)
    return out


def _said_of_gradients(program: Program, stream: np.ndarray) -> list[Event]:
    """Of a backward's consumer: what it multiplies, waits for and computes, once each, when all of it is over."""
    out: list[Event] = []
    for event in _events(program, stream):
        if isinstance(event, Event):
            out.append(event._replace(label=BACKWARD.word(event.label)))
            continue
        op, label, tile, step = event
        if op == Op.STORE and label == BACKWARD.end:
            out.append(Event(tile, label, -1))
        elif op == Op.COMPUTE and (word := BACKWARD.word(label)) in BACKWARD.labels:
            out.append(Event(tile, word, step))
    return list(dict.fromkeys(reversed(out)))[::-1]


def _events(program: Program, stream: np.ndarray) -> Iterator[Event | tuple[Op, str, int, int]]:
    """Of each instruction the event, of a GEMM's issue or the wait for it, or what it is: op, label, tile and step."""
    groups: list[Event] = []
    for row in stream:
        op, label, tile, step = Op(int(row["op"])), program.labels[row["label"]], int(row["tile"]), int(row["step"])
        if op == Op.WGMMA:
            groups.append(Event(tile, label, step))
            yield groups[-1]
        elif op == Op.WGMMA_WAIT:
            done = groups[len(groups) - 1 - int(row["target"])]
            yield Event(done.tile, f"wait {done.label}", done.step)
        else:
            yield op, label, tile, step


def recorded(run: Run) -> dict[str, dict[str, list[Event]]]:
    """CTA -> warp -> events, of a measured run that holds an in-kernel trace. Raises UsageError where it holds none."""
    if not len(run.spans) or not set(run.labels) <= set(words_of(run.workload).labels):
        raise UsageError(f"the run of {run.schedule!r} holds no in-kernel trace; `fasim measure --timeline` records one")
    found: dict[str, dict[str, list[Event]]] = {}
    for number, lane in enumerate(run.lanes):
        cta, _, warp = lane.name.partition(" ")
        warp = warp_of(warp, run.tile)
        spans = run.spans[run.spans["lane"] == number]
        found.setdefault(cta, {})[warp] = [
            Event(int(s["tile"]), run.labels[s["label"]], -1 if run.labels[s["label"]] in TURNS else int(s["step"])) for s in spans
        ]
        if warp == BESIDE:
            found[cta][warp] = _in_tiles(found[cta][warp], found[cta]["WG0"])
        elif run.workload.backward:
            found[cta][warp] = _parted(found[cta][warp])
    return found


def _in_tiles(did: list[Event], beside: list[Event]) -> list[Event]:
    """Events of a warp that stamps no tile's end, whose blocks are counted on, in the tiles of one beside it, as far as they go."""
    lengths: dict[int, int] = {}
    for event in beside:
        lengths[event.tile] = max(lengths.get(event.tile, 0), event.step + 1)
    ends = np.cumsum([lengths[tile] for tile in sorted(lengths)])
    did = [event for event in did if event.step < ends[-1]]
    tiles = np.searchsorted(ends, [event.step for event in did], side="right")
    begins = np.append(0, ends)[tiles]
    return [Event(int(tile), event.label, event.step - int(begin)) for event, tile, begin in zip(did, tiles, begins, strict=True)]


def _parted(did: list[Event]) -> list[Event]:
    """Events of a warp with a tile that two CTAs share, whose end leaves no stamp, apart from the tile behind it, its end put in.

    In a kernel that has dQ a block behind, it ends where dQ of a block has been put before the next scores; others stay.
    """
    ends = [
        before for before, event in pairwise(did)
        if before.label == "put dQ" and event == before._replace(label=BACKWARD.first, step=before.step + 1)
    ]  # fmt: skip
    if 2 * len(ends) > sum(event.label == BACKWARD.first for event in did):
        return did
    out: list[Event] = []
    tiles = first = at = 0
    for event in did:
        first = first if event.tile == at else 0
        at = event.tile
        out.append(event._replace(tile=at + tiles, step=event.step - first if event.step >= 0 else event.step))
        if event in ends:
            out.append(Event(at + tiles, BACKWARD.end, -1))
            tiles, first = tiles + 1, event.step + 1
    return out


def conforms(run: Run) -> Conformance:
    """Hold the in-kernel trace of a measured run to the schedule of its name, over the tiles that each CTA worked on.

    A tile whose end was not kept is held to the schedule as far as it goes. Raises UsageError where the run holds no
    trace or its kernel has no schedule.
    """
    words, backward = words_of(run.workload), run.workload.backward
    kernels = find_schedule(run.schedule, run.workload.direction).kernels
    kernel = next(each for each in kernels if (each.grid == "columns") == backward)
    order = "columns" if backward else _order(run)
    possible = {int(n) for n in work_items(run.workload, run.tile.block_m, run.tile.block_n, order)["blocks"]}
    if backward:
        possible = set(range(1, 2 * max(possible) + 1))  # two CTAs may share a tile, whose end not every kernel shows
    warps = events = frees = 0
    differences = []
    for cta, by_warp in recorded(run).items():
        warps, events = warps + len(by_warp), events + sum(map(len, by_warp.values()))
        loops, ended = _loops(by_warp, words.end)
        unknown = len(loops) > ended  # the last tile was cut off: it may be any that is as long as was seen
        lengths = sorted(n for n in possible if n >= loops[-1]) if unknown else loops[-1:]
        if wrong := [n for n in loops[:ended] if n not in possible] or ([] if lengths else loops[-1:]):
            which = f"{wrong[0]} {'Q' if backward else 'K/V'} blocks"
            differences.append(f"{cta}: a tile of {which}, which {run.workload} does not have in tile {run.tile}")
            continue
        for last in lengths:
            expected = said(trace(kernel, run.workload, run.tile, [(n, 0) for n in (*loops[:-1], last)]), words)
            found = [(warp, _differs(did, expected.get(warp, []), ended)) for warp, did in by_warp.items()]
            if not any(difference for _, difference in found):
                break
        differences += [f"{cta} {warp}: {difference}" for warp, difference in found if difference]
        if not backward and not any(difference for _, difference in found):
            counted, early = _frees(run, cta)
            frees += counted
            differences += early
    return Conformance(warps, events, frees, tuple(differences))


READERS = {"load K": "wait S=QK^T", "load V": "wait O+=PV"}
"""The wait behind which a consumer may hand back what a load has brought."""


def _frees(run: Run, cta: str) -> tuple[int, list[str]]:
    """(stages that each consumer handed back before they were loaded anew; of each ring and consumer the first that was not)."""
    names = [lane.name.partition(" ") for lane in run.lanes]
    lanes = {warp: number for number, (of, _, warp) in enumerate(names) if of == cta}

    def ends(warp: str, label: str) -> np.ndarray:
        if label not in run.labels:
            return run.spans["end"][:0]
        found = run.spans[(run.spans["lane"] == lanes[warp]) & (run.spans["label"] == run.labels.index(label))]
        return np.sort(found["end"])

    counted, early = 0, []
    for load, wait in READERS.items():
        if load == "load V" and run.workload.dtype == "e4m3":
            continue  # its readers are warps that transpose it, and leave no stamp
        again = ends("producer", load)[run.tile.stages :]
        for warp in lanes.keys() - {"producer"}:
            over = ends(warp, wait)[: len(again)]
            counted += len(over)
            raced = np.flatnonzero(again[: len(over)] < over)
            if len(raced):
                cycles = int(over[raced[0]] - again[raced[0]])
                early.append(
                    f"{cta} producer: '{load}' number {int(raced[0]) + run.tile.stages + 1} is issued {cycles} cycles before "
                    f"{warp} has waited for the GEMM that reads what it overwrites"
                )
    return counted, sorted(early)


def _order(run: Run) -> str:
    return "longest-first" if run.workload.causal else "persistent"


def _loops(by_warp: dict[str, list[Event]], end: str) -> tuple[list[int], int]:
    """Blocks of each tile as WG0 has gone through it, and how many it ended; of one that was cut off, as any warp has come."""
    ended = sum(event.label == end for event in by_warp["WG0"])
    blocks = [0] * (max(event.tile for event in by_warp["WG0"]) + 1)
    for warp, did in by_warp.items():
        for event in did:
            if warp == "WG0" or event.tile in range(ended, len(blocks)):
                blocks[event.tile] = max(blocks[event.tile], event.step + 1)
    return blocks, ended


def _differs(did: Sequence[Event], should: Sequence[Event], ended: int) -> str:
    """The first difference as a sentence, empty if there is none."""
    for number, (event, wanted) in enumerate(zip(did, should, strict=False), start=1):
        if event != wanted:
            return f"event {number} is {event}, where the schedule says {wanted}"
    if len(did) > len(should):
        return f"event {len(should) + 1} is {did[len(should)]}, where the schedule ends"
    missing = [event for event in should[len(did) :] if event.tile < ended]
    return f"it ends after {len(did)} events, where the schedule says {missing[0]}" if missing else ""
