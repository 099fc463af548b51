"""Beside: the same blocks of several schedules on one axis, and what their softmax hides under.

Each schedule's window is cut from the first GEMM of its first block to the first GEMM of the block after its last, so it holds
whole blocks and the shares of its time are those of the steady state. All begin at 0: the one that is sooner done is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..simulator.errors import UsageError
from ..simulator.results.run import Run
from .figure import Figure, figure
from .window import GEMM, SOFTMAX, TENSOR_CORES, Span, Window, by_cycles, by_iterations, consumers, first_tile, held

USUAL = (3, 5)
"""Blocks drawn unless asked: past the pipeline's start, and few enough to read."""
EXPOSED = -1


@dataclass(frozen=True)
class Cover:
    """A stretch of a warpgroup's softmax, and whose GEMM the tensor cores execute meanwhile: a warpgroup, or EXPOSED."""

    start: int
    end: int
    group: int
    by: int


@dataclass(frozen=True)
class Panel:
    """One schedule's part of the picture: its window moved to 0, and how many whole blocks it holds (0: not whole ones)."""

    run: Run
    window: Window
    blocks: int

    @cached_property
    def figure(self) -> Figure:
        """The rows as drawn."""
        return figure(self.window)

    @cached_property
    def covers(self) -> tuple[Cover, ...]:
        """See `covers`."""
        return covers(self.window)

    @property
    def cycles_per_block(self) -> float | None:
        """SM cycles that one step of the loop takes, the mean over the blocks drawn; None where they are not whole."""
        return (self.window.end - self.window.start) / self.blocks if self.blocks else None

    @property
    def softmax(self) -> dict[str, float]:
        """Shares of the softmax's time: while the tensor cores execute the others' GEMMs, its own warpgroup's, none."""
        found = {"others": 0, "own": 0, "exposed": 0}
        for cover in self.covers:
            found["exposed" if cover.by == EXPOSED else "own" if cover.by == cover.group else "others"] += cover.end - cover.start
        whole = sum(found.values())
        return {name: cycles / whole for name, cycles in found.items()} if whole else {}

    @property
    def idle(self) -> dict[str, float]:
        """The share of the window in which each lane does nothing. A warpgroup does something while the tensor cores execute
        its GEMM, too; that it issues one or waits for it does not count."""
        length, names = self.window.end - self.window.start, {name: n for n, name in enumerate(self.window.warpgroups)}
        lanes = _by_lane(self.window)
        gemms = lanes.get(TENSOR_CORES, [])
        found = {}
        for lane, spans in lanes.items():
            if lane in names:
                spans = [*(s for s in spans if s.kind != GEMM), *(s for s in gemms if s.group == names[lane])]
            if lane != "barriers":
                found[lane] = 1 - sum(end - start for start, end in _union(spans)) / length
        return found

    def to_dict(self) -> dict:
        """As plain JSON values; shares are of the window, those of `softmax` of the softmax's own time."""
        return {
            "schedule": self.run.schedule,
            "tile": str(self.run.tile),
            "step": self.window.step,
            "blocks": self.blocks,
            "cycles": self.window.end - self.window.start,
            "cycles_per_block": self.cycles_per_block,
            "softmax": self.softmax,
            "idle": self.idle,
        }


def beside(runs: Sequence[Run], first: int | None = None, last: int | None = None) -> tuple[Panel, ...]:
    """The loop steps `first` to `last` of each run's first tile; by default steps 3 to 5, or what all of them have.

    Raises UsageError where one has no such step.
    """
    if first is None or last is None:
        most = min(len(held(run)) for run in runs) - 1
        first, last = (min(each, max(0, most - 1)) for each in USUAL)
    return tuple(_panel(run, first, last) for run in runs)


def whole_blocks(runs: Sequence[Run]) -> tuple[Panel, ...]:
    """All blocks but the first and the last that every run recorded: the pipeline's start and end are not in them."""
    most = min(len(held(run)) for run in runs) - 1
    return beside(runs, min(1, most), max(0, most - 1))


def by_clock(runs: Sequence[Run], start: int, end: int) -> tuple[Panel, ...]:
    """The same SM cycles of each run. Raises UsageError where one has nothing there."""
    return tuple(Panel(run, _moved(by_cycles(run, start, end), start), 0) for run in runs)


def longest(panels: Sequence[Panel]) -> int:
    """SM cycles that the common axis holds."""
    return max(panel.window.end for panel in panels)


def covers(window: Window) -> tuple[Cover, ...]:
    """Every warpgroup's softmax cut by whose GEMM the tensor cores execute, in order of warpgroup and time.

    Where the GEMMs of two warpgroups take turns k step by k step, each k step counts for its own.
    """
    busy = sorted(
        (span.start, span.end, span.group)
        for row in window.rows if row.name.partition(" (")[0] == TENSOR_CORES for span in row.spans if not span.wait
    )  # fmt: skip
    found: list[Cover] = []
    for group in range(len(window.warpgroups)):
        mine = [s for row in window.rows if row.kind == "warp" for s in row.spans if s.kind == SOFTMAX and s.group == group]
        for start, end in _union(mine):
            at = start
            for begin, until, by in busy:
                if until <= at or begin >= end:
                    continue
                if begin > at:
                    found.append(Cover(at, begin, group, EXPOSED))
                found.append(Cover(max(at, begin), min(until, end), group, by))
                at = min(until, end)
            if at < end:
                found.append(Cover(at, end, group, EXPOSED))
    return tuple(_joined(found))


def _joined(found: Sequence[Cover]) -> list[Cover]:
    """Covers that touch and say the same put together."""
    out: list[Cover] = []
    for cover in found:
        if out and out[-1].end == cover.start and (out[-1].group, out[-1].by) == (cover.group, cover.by):
            out[-1] = replace(out[-1], end=cover.end)
        else:
            out.append(cover)
    return out


def _panel(run: Run, first: int, last: int) -> Panel:
    begins = _begins(run)
    if first in begins and last + 1 in begins:
        start, end, blocks = begins[first], begins[last + 1], last + 1 - first
        return Panel(run, _moved(by_cycles(run, start, end), start), blocks)
    there = held(run)
    if len(there) and first not in there:
        raise UsageError(
            f"iterations {first} to {last} are not in the recorded window of {run.schedule!r} (it holds {there[0]} to {there[-1]})"
        )
    window = by_iterations(run, first, last) if len(there) else by_iterations(run)
    return Panel(run, _moved(window, window.start), 0)


def _begins(run: Run) -> dict[int, int]:
    """When the first tile's loop steps begin: the first consumer's first GEMM of each on the tensor cores or, in a kernel
    without GEMMs, its first work of it."""
    group, mine = consumers(run)[0], run.spans["tile"] == first_tile(run)
    cores = [number for number, lane in enumerate(run.lanes) if lane.name == TENSOR_CORES]
    of = mine & (run.spans["wait"] == 0) & (run.spans["step"] >= 0) & (run.spans["warp"] == group)
    on_cores = of & (run.spans["lane"] == (cores[0] if cores else -1))
    found: dict[int, int] = {}
    for span in run.spans[on_cores if on_cores.any() else of & (run.spans["lane"] == group)]:
        step, start = int(span["step"]), int(span["start"])
        found[step] = min(start, found.get(step, start))
    return found


def _moved(window: Window, by: int) -> Window:
    """The window with its time counted from `by`."""
    rows = tuple(
        replace(row, spans=tuple(replace(s, start=s.start - by, end=s.end - by) for s in row.spans)) for row in window.rows
    )
    return replace(window, start=window.start - by, end=window.end - by, rows=rows)


def _by_lane(window: Window) -> dict[str, list[Span]]:
    """What each lane works on, the layers of one whose spans overlap together."""
    found: dict[str, list[Span]] = {}
    for row in window.rows:
        found.setdefault(row.name.partition(" (")[0], []).extend(span for span in row.spans if not span.wait)
    return found


def _union(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """Stretches of time in which any of the spans is."""
    out: list[tuple[int, int]] = []
    for start, end in sorted((span.start, span.end) for span in spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out
