"""Overlay: a predicted and a recorded timeline on one axis, and how long each phase of a block takes in both: of keys in a forward,
of queries in a backward."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from ..simulator.errors import UsageError
from ..simulator.results.run import SPAN, Lane, Run
from .compare import model_of
from .conformance import Conformance, conforms
from .predictions import Predict
from .stamped import BESIDE, Stamped, of, over, warp_of

MEASURED = "measured"
BLOCK = "whole block"
SETTLED = 2
"""Blocks at either end of a tile that are left out of the steady state, where a tile has more than twice as many and one."""


@dataclass(frozen=True)
class Phase:
    """Cycles of a warpgroup up to an event since the one before: means over the steady blocks of a tile, or once a tile.

    None where a side has no such event.
    """

    name: str
    predicted: float | None
    measured: float | None

    @property
    def difference(self) -> float | None:
        """Predicted less measured, in cycles."""
        return None if self.predicted is None or self.measured is None else self.predicted - self.measured

    def to_dict(self) -> dict:
        """As plain JSON values."""
        return {"phase": self.name, "predicted": self.predicted, "measured": self.measured, "difference": self.difference}


@dataclass(frozen=True)
class Pair:
    """A recorded timeline of one CTA, its prediction, and whether the kernel did what its schedule says."""

    name: str
    predicted: Run
    measured: Run
    conformance: Conformance

    @property
    def both(self) -> Run:
        """The two on one axis."""
        return overlay(self.predicted, self.measured)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """See `phases`."""
        return phases(self.predicted, self.measured)

    @property
    def stamp_cycles(self) -> float | None:
        """See `stamp_cycles`."""
        return stamp_cycles(self.measured)

    def to_dict(self) -> dict:
        """As plain JSON values."""
        return {
            "name": self.name,
            "workload": self.measured.workload.to_dict(),
            "schedule": self.measured.schedule,
            "trace_overhead": self.measured.measurement.trace_overhead,
            "stamp_cycles": self.stamp_cycles,
            "conformance": self.conformance.to_dict(),
            "phases": [phase.to_dict() for phase in self.phases],
        }


def pair(name: str, run: Run, cta: str | None = None, device: str | None = None, predict: Predict | None = None) -> Pair:
    """Predict what a recorded timeline ran, with its tile; `cta` is one of `ctas(run)`, by default the first.

    Raises UsageError where the run holds no in-kernel trace, no such CTA, or nothing can predict it.
    """
    conformance = conforms(run)
    model = model_of(name, run, device)
    if predict is None:
        from ..simulator.predict import predict
    predicted = predict(run.workload, schedule=run.schedule, device=model, tile=run.tile)
    return Pair(name, predicted, one_cta(run, cta or ctas(run)[0]), conformance)


def ctas(run: Run) -> tuple[str, ...]:
    """CTAs of a recorded timeline: CTA0, CTA65, .."""
    return tuple(dict.fromkeys(lane.name.partition(" ")[0] for lane in run.lanes))


def one_cta(run: Run, cta: str) -> Run:
    """The lanes of one CTA of a recorded timeline, named as a prediction's: producer, WG0, .. Raises UsageError."""
    mine = [n for n, lane in enumerate(run.lanes) if lane.name.startswith(f"{cta} ")]
    if not mine:
        raise UsageError(f"the timeline of {run.schedule!r} holds no {cta} ({', '.join(ctas(run))})")
    spans = run.spans[np.isin(run.spans["lane"], mine)].copy()
    for field in ("lane", "warp"):
        spans[field] = np.searchsorted(mine, spans[field])
    names = [warp_of(run.lanes[n].name.partition(" ")[2], run.tile) for n in mine]
    return replace(run, lanes=tuple(Lane(name, "warp") for name in names), spans=spans)


def overlay(predicted: Run, measured: Run) -> Run:
    """Both runs' lanes, each warp's measured one under its predicted one, aligned where the first GEMM has been issued.

    `measured` is of one CTA (`one_cta`). Raises UsageError where either has no such event.
    """
    labels = {name: number for number, name in enumerate(dict.fromkeys((*predicted.labels, *measured.labels)))}
    lanes, sources = [], []
    for lane in predicted.lanes:
        lanes.append(lane)
        sources.append((predicted, lane.name))
        if any(other.name == lane.name for other in measured.lanes):
            lanes.append(Lane(f"{lane.name} {MEASURED}", lane.kind))
            sources.append((measured, lane.name))
    names = [lane.name for lane in lanes]
    parts = []
    for number, (run, name) in enumerate(sources):
        own = run.spans[run.spans["lane"] == _lane(run, name)].copy()
        own["lane"] = number
        own["warp"] = [names.index(run.lanes[warp].name) for warp in own["warp"]]  # both sides of a warp in one colour
        own["label"] = [labels[run.labels[label]] for label in own["label"]]
        for field in ("start", "end"):
            own[field] -= _first_gemm(run)
        parts.append(own)
    spans = np.concatenate(parts).astype(SPAN)
    earliest = spans["start"].min()
    for field in ("start", "end"):
        spans[field] -= earliest
    name = f"{predicted.schedule}, predicted and measured"
    if predicted.sample is None or len(predicted.sample.kernels) == 1:  # of several a title goes on with the one drawn
        name += ","
    return replace(
        predicted, origin="predicted and measured", schedule=name,
        lanes=tuple(lanes), labels=tuple(labels), spans=spans,
    )  # fmt: skip


def phases(predicted: Run, measured: Run) -> tuple[Phase, ...]:
    """What a K/V block of the first tile takes in the steady state, phase by phase, then the block as a whole; the first
    block up to its softmax, and the epilogue. Measured phases are less what their stamps cost, where that is known."""
    ours, theirs = _without_stamps(predicted), _without_stamps(measured)
    names = [*(label for label in of(measured.workload).labels if label in ours or label in theirs), *_WHOLES]
    return tuple(Phase(name, ours.get(name), theirs.get(name)) for name in dict.fromkeys(names) if name in ours or name in theirs)


_WHOLES = (BLOCK, "first block", "epilogue")


def stamp_cycles(run: Run) -> float | None:
    """About what one stamp of a recorded timeline costs a warpgroup: the overhead of tracing shared by a block's events.

    None where the overhead was not measured or no block is in the steady state; 0 where tracing cost nothing.
    """
    overhead, found = run.measurement.trace_overhead if run.measurement else None, _durations(run)
    labels = of(run.workload).labels
    if overhead is None or BLOCK not in found:
        return None
    return found[BLOCK] * max(0.0, overhead) / (1 + overhead) / sum(label in found for label in labels)


def _lane(run: Run, name: str) -> int:
    return next(n for n, lane in enumerate(run.lanes) if lane.name == name)


def _events(run: Run, lane: int) -> list[tuple[str, int, int]]:
    """(label, step, when it was over) of one warp's first tile, in order."""
    words = of(run.workload)
    spans = run.spans[(run.spans["lane"] == lane) & (run.spans["tile"] == 0)]
    out: list[tuple[str, int, int]] = []
    for span in np.sort(spans, order=["end", "start"], kind="stable"):
        label = words.word(run.labels[span["label"]])
        if label not in words.labels:
            continue
        event = (label, int(span["step"]), int(span["end"]))
        if out and out[-1][:2] == event[:2]:
            out[-1] = event  # another chunk of the same
        else:
            out.append(event)
    if run.workload.backward:
        return over(out)
    return out


def _first_gemm(run: Run) -> int:
    first = of(run.workload).first
    for number, lane in enumerate(run.lanes):
        if lane.name == "WG0":
            for label, _, end in _events(run, number):
                if label == first:
                    return end
    raise UsageError(f"the timeline of {run.schedule!r} has no {first} of WG0 to align by")


def _without_stamps(run: Run) -> dict[str, float]:
    """Durations less what the stamps within them cost."""
    found, cost, labels = _durations(run), stamp_cycles(run) or 0.0, of(run.workload).labels
    stamps = dict.fromkeys(labels, 1) | {BLOCK: sum(label in found for label in labels), "first block": 2, "epilogue": 1}
    return {name: max(0.0, cycles - stamps[name] * cost) for name, cycles in found.items()}


def _durations(run: Run) -> dict[str, float]:
    """Mean over the consumer warpgroups; a phase that one of them does not have takes it no time. Then those of the one beside."""
    words = of(run.workload)
    each = [dict(_durations_of(_events(run, number), words)) for number, lane in enumerate(run.lanes) if lane.name.startswith("WG")]
    names = dict.fromkeys(name for found in each for name in found)
    found = {name: fmean(one.get(name, 0.0) for one in each) for name in names}
    for number, lane in enumerate(run.lanes):
        if lane.name == BESIDE:
            beside = dict(_durations_of(_events(run, number), replace(words, block=words.put)))
            found |= {name: cycles for name, cycles in beside.items() if name in words.labels and name not in found}
    return found


def _durations_of(events: list[tuple[str, int, int]], words: Stamped) -> Iterable[tuple[str, float]]:
    counted = [n for n, (label, _, _) in enumerate(events) if label == words.block]
    edge = SETTLED if len(counted) > 2 * SETTLED + 1 else 0
    if len(counted) > 1:
        first, last = counted[edge], counted[-1 - edge]
        blocks = len(counted) - 1 - 2 * edge
        spent: dict[str, int] = {}
        for before, (label, _, end) in zip(events[first:last], events[first + 1 : last + 1], strict=True):
            spent[label] = spent.get(label, 0) + end - before[2]
        yield from ((label, cycles / blocks) for label, cycles in spent.items())
        yield BLOCK, (events[last][2] - events[first][2]) / blocks
    if counted:
        begin = next((end for label, _, end in events if label == words.first), None)
        if begin is not None:
            yield "first block", events[counted[0]][2] - begin
    if len(events) > 1 and events[-1][0] == words.end:
        yield "epilogue", events[-1][2] - events[-2][2]
