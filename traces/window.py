"""Window: the part of a run that a picture shows, its spans packed into rows in which nothing overlaps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..simulator.errors import UsageError
from ..simulator.results.run import Run

OUTSIDE = -1
"""Step of what happens outside the loop over K/V blocks (prologue, epilogue)."""
TENSOR_CORES = "tensor cores"
AHEAD = ("producer", "TMA", "cp.async")
"""Lanes that run ahead of the loop."""

GEMM, SOFTMAX, WORK = "gemm", "softmax", "work"
ON_COPY, ON_GEMM, ON_TURN = "on copy", "on gemm", "on turn"
"""What a span is: a GEMM, softmax, other work; a warp's wait for a copy (a load, a free buffer, a store), its GEMM, its turn."""
_SOFTMAX = {
    "softmax": "P", "rescale O": "R", "convert P": "P", "row max": "m", "row sum": "l", "row max and sum": "m",
    "probabilities": "P", "P": "P", "P^T": "P", "dS": "dS", "dS^T": "dS",
}  # fmt: skip
_TURNS = ("take turn", "give turn", "meet")


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
    def kind(self) -> str:
        """GEMM, SOFTMAX, WORK, ON_COPY, ON_GEMM or ON_TURN."""
        if self.wait:
            return ON_TURN if self.label in _TURNS else ON_GEMM if "=" in self.label else ON_COPY
        return GEMM if "=" in self.label else SOFTMAX if self.label in _SOFTMAX else WORK

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
    step: str = "K/V block"  # what a step of the loop is
    recorded: bool = False  # whether rows of a recorded timeline are among them

    @property
    def steps(self) -> tuple[int, ...]:
        """Loop steps that appear, in order."""
        return tuple(sorted({s.step for row in self.rows for s in row.spans if s.step >= 0}))

    def busy(self, row: Row) -> float:
        """The share of the window in which a row works."""
        return sum(span.end - span.start for span in row.spans if not span.wait) / (self.end - self.start)


def short_label(label: str, step: int) -> str:
    """A letter and the step: "S=QK^T" at step 3 is S3, softmax makes P and is P3, a load is named after its tensor; of a
    derivative two letters."""
    if label.startswith("stage "):
        return "store"
    letter = _SOFTMAX.get(label) or {"normalize O": "N", "give turn": "turn", "setup": "setup", "next tile": "next"}.get(label)
    first = label.removeprefix("load ").removeprefix("wait ").removeprefix("put ")
    letter = letter or first[: 2 if first[:1] == "d" and first[1:2].isupper() else 1]
    return f"{letter}{step}" if step >= 0 else letter


def held(run: Run) -> range:
    """Loop steps of the first tile that a run's spans show; empty where it has no loop. Raises UsageError without any span."""
    spans = run.spans[_work(run) & (run.spans["tile"] == first_tile(run))]
    return range(int(spans["step"].max()) + 1) if len(spans) else range(0)


def remarks(run: Run, last: int | None = None, end: int | None = None) -> list[str]:
    """What a predicted timeline leaves out, in sentences: kernels that are not drawn, the rest of a long loop; steps up to
    `last` and cycles up to `end` that were asked for and are not there."""
    found, out = run.sample, []
    there = held(run)
    if last is not None and last not in there:
        out.append(f"iterations beyond {there[-1]} are not in the recorded window (it holds {there[0]} to {there[-1]})")
    if end is not None and end > run.spans["end"].max():
        out.append(f"cycles beyond {run.spans['end'].max():,} were not recorded")
    if found is None:
        return out
    if len(found.kernels) > 1:
        each = ", ".join(f"{n} {name}" + " (drawn)" * (n == found.number) for n, name in enumerate(found.kernels, start=1))
        out.append(f"'{run.schedule}' has {len(found.kernels)} kernels: {each}; --kernel draws another")
    if found.steps < found.loop:
        out.append(f"recorded with {found.steps} of the {found.loop} steps of a tile's loop ({found.step})")
    return out


def by_iterations(run: Run, first: int | None = None, last: int | None = None) -> Window:
    """The window in which the consumers work on loop steps `first` to `last` of the first tile. By default steps 1 to 4, or
    what there is; of a loop of one step or none the whole tile.

    Raises UsageError where the run kept no step that far.
    """
    there = held(run)
    if first is None and len(there) < 2:
        mine = run.spans[run.spans["tile"] == first_tile(run)]
        return by_cycles(run, int(mine["start"].min()), int(mine["end"].max()))
    if first is None or last is None:
        first, last = (min(wanted, len(there) - 1) for wanted in _USUAL)
    elif first not in there:
        has = f"it holds {there[0]} to {there[-1]}" if there else "it holds none"
        raise UsageError(f"iterations {first} to {last} are not in the recorded window ({has})")
    inside = _work(run) & (run.spans["tile"] == first_tile(run)) & (run.spans["step"] >= first) & (run.spans["step"] <= last)
    return by_cycles(run, int(run.spans["start"][inside].min()), int(run.spans["end"][inside].max()))


_USUAL = (1, 4)


def first_tile(run: Run) -> int:
    """The number of the first tile that the spans are of. Raises UsageError without any span."""
    if not len(run.spans):
        raise UsageError(f"the run of {run.schedule!r} keeps no spans to draw")
    return int(run.spans["tile"].min())


def _work(run: Run) -> np.ndarray:
    """Which spans are work of a loop's steps, not ahead of it."""
    ahead = [i for i, lane in enumerate(run.lanes) if set(AHEAD) & set(lane.name.split())]
    return (run.spans["wait"] == 0) & ~np.isin(run.spans["lane"], ahead)


def by_cycles(run: Run, start: int, end: int) -> Window:
    """The window between two cycles, at most as long as the recording: spans clipped at its edges, no unit that is idle in it.

    Raises UsageError where it is empty.
    """
    if end <= start:
        raise UsageError(f"a window from cycle {start} to cycle {end} is empty")
    spans = run.spans[(run.spans["end"] > start) & (run.spans["start"] < end)]
    if not len(spans):
        reach = f"{run.spans['start'].min():,} to {run.spans['end'].max():,}" if len(run.spans) else "none"
        raise UsageError(f"nothing was recorded between cycles {start} and {end} (the recording holds {reach})")
    start, end = max(start, int(run.spans["start"].min())), min(end, int(run.spans["end"].max()))
    rows = [row for number in range(len(run.lanes)) for row in _rows(run, number, spans, start, end)]
    found, which = run.sample, ""
    if found and len(found.kernels) > 1:
        which = f", kernel {found.number} of {len(found.kernels)} ({found.kernels[found.number - 1]}),"
    title = f"{run.schedule}{which} on {run.device}, {run.workload}, tile {run.tile}"
    return Window(
        title, start, end, tuple(row for row in rows if row.spans or row.kind == "warp"),
        tuple(run.lanes[i].name for i in consumers(run)), found.step if found else "K/V block", run.origin != "predicted",
    )  # fmt: skip


def whole(run: Run) -> Window:
    """Everything the run recorded."""
    if not len(run.spans):
        raise UsageError(f"the run of {run.schedule!r} keeps no spans to draw")
    return by_cycles(run, int(run.spans["start"].min()), int(run.spans["end"].max()))


def _rows(run: Run, number: int, spans: np.ndarray, start: int, end: int) -> list[Row]:
    """Pack one lane's spans first-fit into as few rows as keep them apart; a lane without spans has one, empty.

    Spans that touch and say the same (chunks of one softmax, turns of one GEMM) become one.
    """
    lane, mine_of = run.lanes[number], consumers(run)
    layers: list[list[Span]] = []
    mine = spans[spans["lane"] == number]
    for record in np.sort(mine, order=["start", "end", "warp", "label", "step"]):
        span = Span(
            max(int(record["start"]), start),
            min(int(record["end"]), end),
            run.labels[record["label"]],
            int(record["step"]),
            int(record["tile"]),
            mine_of.index(record["warp"]) if record["warp"] in mine_of else -1,
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


def consumers(run: Run) -> list[int]:
    """Consumer warpgroups' lanes: WG0, WG1, or CTA0 WG0, CTA1 WG0 where two CTAs share the SM. Of an overlay those predicted."""
    return [i for i, lane in enumerate(run.lanes) if lane.kind == "warp" and "WG" in lane.name.split()[-1]]
