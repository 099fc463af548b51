"""Window: the part of a run that a picture shows, its spans packed into rows in which nothing overlaps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..simulator.errors import UsageError
from ..simulator.run import Run

OUTSIDE = -1
"""Step of what happens outside the loop over K/V blocks (prologue, epilogue)."""


@dataclass(frozen=True)
class Span:
    """One stretch of a row, in SM cycles."""

    start: int
    end: int
    label: str
    step: int
    tile: int
    group: int  # index into Window.warpgroups of the one on whose behalf the lane worked, -1 for none
    wait: bool

    @property
    def short(self) -> str:
        """What fits inside a drawn span, as in the papers' figures: S3, P3, O3."""
        return short_label(self.label, self.step)


@dataclass(frozen=True)
class Row:
    """One line of a picture: a lane, or one layer of a lane whose spans overlap (loads in flight)."""

    name: str
    kind: str  # "warp" or "unit"
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Window:
    """The rows between two SM cycles."""

    title: str
    start: int
    end: int
    rows: tuple[Row, ...]
    warpgroups: tuple[str, ...]  # lane names of the consumers, in order

    @property
    def steps(self) -> tuple[int, ...]:
        """Loop steps that appear, in order."""
        return tuple(sorted({s.step for row in self.rows for s in row.spans if s.step >= 0}))

    @property
    def groups(self) -> tuple[int, ...]:
        """Warpgroups that appear, in order."""
        return tuple(sorted({s.group for row in self.rows for s in row.spans if s.group >= 0}))


def short_label(label: str, step: int) -> str:
    """A letter and the step: "S=QK^T" at step 3 is S3, softmax makes P and is P3, a load is named after its tensor."""
    known = {"softmax": "P", "rescale O": "R", "normalize O": "N", "give turn": "turn"}
    letter = known.get(label) or label.removeprefix("load ").removeprefix("wait ")[:1]
    return f"{letter}{step}" if step >= 0 else letter


def by_iterations(run: Run, first: int, last: int) -> Window:
    """The window in which the consumers work on loop steps `first` to `last` of the first tile.

    Raises UsageError where the run kept no such step.
    """
    spans = run.spans
    if not len(spans):
        raise UsageError(f"the run of {run.schedule!r} keeps no spans to draw")
    ahead = [i for i, lane in enumerate(run.lanes) if {"producer", "TMA"} & set(lane.name.split())]  # they run ahead of the loop
    work = (spans["wait"] == 0) & ~np.isin(spans["lane"], ahead)
    inside = work & (spans["tile"] == spans["tile"].min()) & (spans["step"] >= first) & (spans["step"] <= last)
    if not inside.any():
        steps = spans["step"][work]
        reach = f"0 to {steps.max()}" if len(steps) and steps.max() >= 0 else "none"
        raise UsageError(f"iterations {first} to {last} are not in the recorded window (it holds {reach})")
    return by_cycles(run, int(spans["start"][inside].min()), int(spans["end"][inside].max()))


def by_cycles(run: Run, start: int, end: int) -> Window:
    """The window between two cycles, spans clipped at its edges. Raises UsageError where it is empty."""
    if end <= start:
        raise UsageError(f"a window from cycle {start} to cycle {end} is empty")
    spans = run.spans[(run.spans["end"] > start) & (run.spans["start"] < end)]
    if not len(spans):
        raise UsageError(f"nothing was recorded between cycles {start} and {end}")
    rows = [row for number in range(len(run.lanes)) for row in _rows(run, number, spans, start, end)]
    title = f"{run.schedule} on {run.device}, {run.workload}, tile {run.tile}"
    return Window(title, start, end, tuple(rows), tuple(run.lanes[i].name for i in _consumers(run)))


def whole(run: Run) -> Window:
    """Everything the run recorded."""
    if not len(run.spans):
        raise UsageError(f"the run of {run.schedule!r} keeps no spans to draw")
    return by_cycles(run, int(run.spans["start"].min()), int(run.spans["end"].max()))


def _rows(run: Run, number: int, spans: np.ndarray, start: int, end: int) -> list[Row]:
    """Pack one lane's spans first-fit into as few rows as keep them apart; a lane without spans stays, empty.

    Spans that touch and say the same (chunks of one softmax, turns of one GEMM) become one.
    """
    lane, consumers = run.lanes[number], _consumers(run)
    layers: list[list[Span]] = []
    mine = spans[spans["lane"] == number]
    for record in np.sort(mine, order=["start", "end", "warp", "label", "step"]):
        span = Span(
            max(int(record["start"]), start),
            min(int(record["end"]), end),
            run.labels[record["label"]],
            int(record["step"]),
            int(record["tile"]),
            consumers.index(record["warp"]) if record["warp"] in consumers else -1,
            bool(record["wait"]),
        )
        if span.end <= span.start:
            continue
        for layer in layers:
            if span == replace(layer[-1], start=span.start, end=span.end) and layer[-1].end == span.start:
                layer[-1] = replace(layer[-1], end=span.end)
                break
            if layer[-1].end <= span.start:
                layer.append(span)
                break
        else:
            layers.append([span])
    names = [lane.name] + [f"{lane.name} ({depth})" for depth in range(2, len(layers) + 1)]
    return [Row(name, lane.kind, tuple(layer)) for name, layer in zip(names, layers or [[]], strict=True)]


def _consumers(run: Run) -> list[int]:
    """Consumer warpgroups' lanes: WG0, WG1, or CTA0 WG0, CTA1 WG0 where two CTAs share the SM. Of an overlay those predicted."""
    return [i for i, lane in enumerate(run.lanes) if lane.kind == "warp" and "WG" in lane.name.split()[-1]]
