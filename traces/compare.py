"""Compare: a prediction and a measurement side by side, number by number, and what their largest disagreement comes from.

A third of the runs is held out, chosen by a hash of schedule and workload: whoever improves the model looks at the other
two, and the errors of both are reported apart. Only kernels of ours that run a schedule of the simulator count; others
are set beside the schedule that is nearest to them, and said to be.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean

from ..simulator.devices.device import DEVICE_NAMES
from ..simulator.errors import UsageError
from ..simulator.problem.tile import Tile
from ..simulator.results import metrics
from ..simulator.results.run import Run
from ..simulator.schedules import SCHEDULES
from .predictions import Advance, Predict, Question, predict_all

STANDS_FOR = {"torch-cudnn": "fa3-published", "torch-fa2": "fa2"}
"""Kernels that are not ours -> the schedule they are set beside."""
DISTINCT = 0.02
"""Two schedules whose measured times differ by more than this must rank as on the hardware."""
TIMER_S = 0.5e-6
"""Resolution of the CUDA events that times are read from (CUDA driver API, cuEventElapsedTime): a difference below it is none."""


@dataclass(frozen=True)
class Quantity:
    """A number that prediction and measurement share; its error is relative, or the difference where it is a share."""

    name: str
    unit: str
    of: Callable[[Run], float | None]

    @property
    def is_share(self) -> bool:
        """Between 0 and 1, so that errors are differences in percentage points."""
        return self.unit == ""


def _written(run: Run) -> float | None:
    """HBM writes up to the end of the last kernel, which is as far as counters see: what is dirty in L2 then comes later."""
    written = run.traffic.total("hbm_write")
    return None if written is None else written - (run.traffic.dirty_bytes or 0)


QUANTITIES = (
    Quantity("cycles", "cycles", lambda run: run.cycles),
    Quantity("SM clock", "Hz", lambda run: run.sm_clock_hz),
    Quantity("time", "s", metrics.time_s),
    Quantity("throughput", "FLOP/s", lambda run: metrics.tflops(run) * 1e12),
    Quantity("HBM read", "B", lambda run: run.traffic.total("hbm_read")),
    Quantity("HBM written", "B", _written),
    Quantity("L2 read", "B", lambda run: run.traffic.total("l2_read")),
    Quantity("L2 lookups", "B", lambda run: run.traffic.l2_lookup_bytes),
    Quantity("L2 written", "B", lambda run: run.traffic.total("l2_write")),
    Quantity("L2 hit rate", "", lambda run: run.traffic.l2_hit_rate),
    Quantity("tensor cores", "", metrics.tensor_utilization),
    Quantity("MUFU", "", metrics.mufu_utilization),
    Quantity("issue slots", "", metrics.issue_utilization),
    Quantity("power", "W", lambda run: run.power_w),
)
_CAUSES = ("cycles", "SM clock", "HBM read", "L2 read", "L2 hit rate", "tensor cores", "MUFU", "issue slots")
"""What an explanation starts from; time, throughput and power follow from these, and writes are few."""


@dataclass(frozen=True)
class Row:
    """One quantity of both runs; None was not measured."""

    quantity: Quantity
    predicted: float | None
    measured: float | None

    @property
    def error(self) -> float | None:
        """Predicted over measured, less one; for a share predicted less measured. None where either is missing."""
        if self.predicted is None or self.measured is None:
            return None
        if self.quantity.is_share:
            return self.predicted - self.measured
        if self.measured == 0:
            return 0.0 if self.predicted == 0 else None
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Comparison:
    """Two runs of one workload. `counts` says whether the measured kernel is ours and runs the predicted schedule."""

    name: str
    predicted: Run
    measured: Run
    rows: tuple[Row, ...]
    counts: bool
    unseen: bool
    note: str = ""

    def row(self, name: str) -> Row:
        """The row of a quantity."""
        return next(row for row in self.rows if row.quantity.name == name)

    @property
    def largest(self) -> Row | None:
        """The row with the largest error among those that others follow from; None where nothing was measured."""
        found = [row for row in self.rows if row.quantity.name in _CAUSES and row.error is not None]
        return max(found, key=lambda row: abs(row.error), default=None)

    @property
    def explanation(self) -> str:
        """One or two sentences on the largest disagreement, from the numbers of both runs."""
        return explain(self)

    def to_dict(self) -> dict:
        """As plain JSON values."""
        return {
            "name": self.name,
            "workload": self.measured.workload.to_dict(),
            "kernel": self.measured.schedule,
            "schedule": self.predicted.schedule,
            "counts": self.counts,
            "unseen": self.unseen,
            "note": self.note,
            "rows": [
                {"quantity": row.quantity.name, "unit": row.quantity.unit, "predicted": row.predicted,
                 "measured": row.measured, "error": row.error}
                for row in self.rows
            ],
            "explanation": self.explanation,
        }  # fmt: skip


@dataclass(frozen=True)
class Column:
    """The error of one quantity over several runs: mean absolute, the worst with its run, and how many runs had it."""

    quantity: Quantity
    count: int
    mape: float | None
    worst: float | None
    worst_run: str

    def to_dict(self) -> dict:
        """As plain JSON values; for shares, errors are differences."""
        return {
            "quantity": self.quantity.name, "runs": self.count, "mape": self.mape, "worst": self.worst,
            "worst_run": self.worst_run, "in_points": self.quantity.is_share,
        }  # fmt: skip


@dataclass(frozen=True)
class Ranking:
    """Pairs of schedules on a workload whose measured times differ by more than DISTINCT and TIMER_S, and those reversed."""

    pairs: int
    reversed: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """Every comparison of a folder, and the errors per column."""

    comparisons: tuple[Comparison, ...]

    def columns(self, which: str = "all") -> tuple[Column, ...]:
        """Errors over the runs that count: "all" of them, those "seen", those "unseen"; or over the "others"."""
        chosen = [each for each in self.comparisons if _belongs(each, which)]
        return tuple(_column(quantity, chosen) for quantity in QUANTITIES)

    def count(self, which: str) -> int:
        """How many runs `columns` takes."""
        return sum(_belongs(each, which) for each in self.comparisons)

    @property
    def ranking(self) -> Ranking:
        """Whether schedules rank in the prediction as on the hardware."""
        return rank([each for each in self.comparisons if each.counts])

    @property
    def worst(self) -> Comparison:
        """The run with the largest disagreement, of those that count if any does."""
        chosen = [each for each in self.comparisons if each.counts] or list(self.comparisons)
        return max(chosen, key=lambda each: abs(each.largest.error) if each.largest else 0.0)

    def to_dict(self) -> dict:
        """As plain JSON values."""
        ranking = self.ranking
        return {
            "runs": [each.to_dict() for each in self.comparisons],
            "columns": {which: [column.to_dict() for column in self.columns(which)] for which in _SELECTIONS},
            "ranking": {"pairs": ranking.pairs, "reversed": list(ranking.reversed)},
            "worst": {"name": self.worst.name, "explanation": self.worst.explanation},
        }


_SELECTIONS: Mapping[str, Callable[[Comparison], bool]] = {
    "all": lambda each: each.counts,
    "seen": lambda each: each.counts and not each.unseen,
    "unseen": lambda each: each.counts and each.unseen,
    "others": lambda each: not each.counts,
}


def _belongs(each: Comparison, which: str) -> bool:
    return _SELECTIONS[which](each)


# -- comparing --------------------------------------------------------------------------------------------------------


def compare(predicted: Run, measured: Run, name: str = "", note: str = "") -> Comparison:
    """Set two runs of one workload side by side. Raises UsageError where they are not a prediction and its measurement."""
    if (predicted.origin, measured.origin) != ("predicted", "measured"):
        raise UsageError(f"compare takes a predicted and a measured run, not a {predicted.origin} and a {measured.origin} one")
    if predicted.workload != measured.workload:
        raise UsageError(f"the prediction is of {predicted.workload}, the measurement of {measured.workload}")
    rows = tuple(Row(quantity, quantity.of(predicted), quantity.of(measured)) for quantity in QUANTITIES)
    taken = measured.measurement
    ours = taken.implementation == "cuda" and measured.schedule == predicted.schedule
    return Comparison(
        name=name or f"{measured.schedule}, {measured.workload}",
        predicted=predicted,
        measured=measured,
        rows=rows,
        counts=ours and taken.l2 == "cold" and taken.regime == "sustained",
        unseen=held_out(measured),
        note=note,
    )


def held_out(run: Run) -> bool:
    """Whether a run belongs to the third that is scored but not looked at: by the SHA-256 of its schedule and workload."""
    key = json.dumps([run.schedule, run.workload.to_dict()], sort_keys=True)
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 3 == 0


def compare_all(
    runs: Mapping[str, Run],
    *,
    schedule: str | None = None,
    device: str | None = None,
    predict: Predict | None = None,
    advance: Advance | None = None,
    processes: int = 1,
) -> Report:
    """Predict what every measured run ran, and compare.

    `schedule` is what a kernel that is not ours is set beside, `device` the model of a GPU that has none by its name.
    Raises UsageError, one sentence, where a run is not measured or nothing of ours can predict it.
    """
    questions, notes = {}, {}
    for name, run in runs.items():
        if run.origin != "measured":
            raise UsageError(f"run {name} is predicted; compare takes measured runs and predicts them itself")
        chosen, notes[name] = _counterpart(name, run, schedule)
        questions[name] = Question(run.workload, chosen, model_of(name, run, device), tile_of(run))
    predicted = predict_all(questions.values(), predict, advance, processes)
    return Report(tuple(compare(predicted[questions[name]], run, name, notes[name]) for name, run in runs.items()))


def model_of(name: str, run: Run, device: str | None = None) -> str:
    """The device model to predict a run with: the one asked for, or its GPU's. Raises UsageError where it has none."""
    if device is None and run.device not in DEVICE_NAMES:  # a file names a device and never a path
        raise UsageError(f"run {name} was taken on {run.device}, which has no device model; give one with --device")
    return device or run.device


def _counterpart(name: str, run: Run, schedule: str | None) -> tuple[str, str]:
    """The schedule to predict, and a remark where the kernel is not that schedule's."""
    implementation = run.measurement.implementation
    if implementation == "cuda" and run.schedule in SCHEDULES:
        return run.schedule, ""
    nearest = schedule or (run.schedule if run.schedule in SCHEDULES else STANDS_FOR.get(run.schedule))
    if nearest is None:
        raise UsageError(f"run {name} is of {run.schedule}, which no schedule stands for; give one with --schedule")
    whose = {"triton": "a Triton kernel, which its compiler schedules", "pytorch": "PyTorch's"}.get(implementation, "not ours")
    return nearest, f"{run.schedule} is {whose}: set beside the schedule {nearest}, and not counted"


def tile_of(run: Run) -> Tile | None:
    """The kernel's tile as the simulator takes it: a cluster only where the Q tiles pair up."""
    tile = run.tile
    if tile and tile.cluster > 1 and -(-run.workload.seqlen_q // tile.block_m) % tile.cluster:
        return replace(tile, cluster=1)
    return tile


def _column(quantity: Quantity, chosen: Sequence[Comparison]) -> Column:
    errors = {each.name: each.row(quantity.name).error for each in chosen}
    errors = {name: error for name, error in errors.items() if error is not None}
    if not errors:
        return Column(quantity, 0, None, None, "")
    name = max(errors, key=lambda each: abs(errors[each]))
    return Column(quantity, len(errors), fmean(map(abs, errors.values())), errors[name], name)


def rank(chosen: Iterable[Comparison]) -> Ranking:
    """Hold the order of the schedules of each workload to that of the hardware."""
    groups: dict = {}
    for each in chosen:
        groups.setdefault(each.measured.workload, []).append(each)
    pairs, wrong = 0, []
    for workload, members in groups.items():
        for a, b in combinations(members, 2):
            times = metrics.time_s(a.measured), metrics.time_s(b.measured)
            seen = times[0] / times[1]
            if max(seen, 1 / seen) - 1 <= DISTINCT or abs(times[0] - times[1]) <= TIMER_S:
                continue
            pairs += 1
            if (metrics.time_s(a.predicted) < metrics.time_s(b.predicted)) != (seen < 1):
                fast, slow = (a, b) if seen < 1 else (b, a)
                wrong.append(
                    f"{workload}: {fast.measured.schedule} is {max(seen, 1 / seen) - 1:.1%} faster than {slow.measured.schedule},"
                    " predicted the other way"
                )
    return Ranking(pairs, tuple(wrong))


# -- explaining -------------------------------------------------------------------------------------------------------


def explain(found: Comparison) -> str:
    """What the largest disagreement is, and what of the two runs it goes with. Says so where the numbers do not tell."""
    row = found.largest
    if row is None:
        return "nothing to explain: no counter was read"
    head = f"{row.quantity.name} {_signed(row)}"
    return f"{head}: {_REASONS[row.quantity.name](found)}. {_of_time(found)}"


def _signed(row: Row) -> str:
    return f"{row.error * 100:+.1f} points" if row.quantity.is_share else f"{row.error:+.1%}"


def _of_time(found: Comparison) -> str:
    """How cycles and clock share the error in time."""
    time, clock = found.row("time").error, found.row("SM clock").error
    of_cycles = (1 + time) * (1 + clock) - 1
    return f"Time is {time:+.1%} off: cycles {of_cycles:+.1%}, clock {clock:+.1%} (which counts the other way)."


def _per_sm(run: Run, busy: float | None) -> float | None:
    return None if busy is None else busy / run.activity.sms


def _cycles(found: Comparison) -> str:
    predicted, measured = found.predicted, found.measured
    ours, theirs = _per_sm(predicted, predicted.activity.tensor), _per_sm(measured, measured.activity.tensor)
    if ours is None or theirs is None:
        return "without counters nothing says where they go"
    gap = predicted.cycles - measured.cycles
    work = ours - theirs
    if abs(work) > abs(gap) / 2:
        return (
            f"most of it is tensor-core work, {ours:,.0f} busy cycles per SM predicted and {theirs:,.0f} measured, so the kernel"
            " executes other GEMMs than its tile would (padding, masked blocks)"
        )
    idle_p, idle_m = predicted.cycles - ours, measured.cycles - theirs
    return (
        f"the tensor cores have the same work ({ours:,.0f} and {theirs:,.0f} busy cycles per SM), but wait {idle_p:,.0f} cycles in"
        f" the model and {idle_m:,.0f} on the hardware{_issued(found)}"
    )


def _issued(found: Comparison) -> str:
    """Where the kernel issues other than the model's number of instructions."""
    ours, theirs = found.predicted.activity.issue, found.measured.activity.issue
    if ours is None or not theirs or abs(ours / theirs - 1) < 0.05:
        return ""
    return f"; the kernel issues {theirs / ours - 1:+.0%} instructions against the model's count"


def _clock(found: Comparison) -> str:
    predicted, measured = found.predicted, found.measured
    tensor = found.row("tensor cores")
    shares = "" if tensor.error is None else f", with the tensor cores at {tensor.predicted:.0%} and {tensor.measured:.0%}"
    if measured.power_w is None:
        return f"power was not read{shares}"
    return f"the model draws {predicted.power_w:.0f} W there, the board {measured.power_w:.0f} W{shares}"


def _hbm_read(found: Comparison) -> str:
    compulsory = found.measured.workload.compulsory_read_bytes
    row = found.row("HBM read")
    return (
        f"{row.predicted / compulsory:.2f} times the compulsory bytes predicted, {row.measured / compulsory:.2f} times measured:"
        " what of K and V survives in L2 between the CTAs that share it is judged differently"
    )


def _l2(found: Comparison) -> str:
    row, work = found.row("L2 read"), found.measured.workload
    size = work.tensor_bytes
    share = (size["K"] + size["V"]) * work.heads_per_kv * work.pairs / (work.seqlen_q * work.seqlen_k)
    over = row.measured - size["Q"]
    if over <= 0:
        return "fewer bytes than Q, K and V were asked for"
    tile = found.predicted.tile
    return (
        f"K and V were read once for {share * work.seqlen_q / over:,.0f} queries, in the model once for"
        f" {tile.block_m * tile.cluster:,} ({tile}, cluster {tile.cluster})"
    )


def _share(name: str, unit: str) -> Callable[[Comparison], str]:
    def reason(found: Comparison) -> str:
        ours, theirs = (getattr(run.activity, unit) for run in (found.predicted, found.measured))
        cycles = found.row("cycles").error
        return (
            f"the {name} is busy for {ours / theirs - 1:+.1%} cycles and the kernel lasts {cycles:+.1%} cycles in the model,"
            f" so {'the work' if abs(ours / theirs - 1) > abs(cycles) else 'the duration'} is what differs more"
        )

    return reason


_REASONS: Mapping[str, Callable[[Comparison], str]] = {
    "cycles": _cycles,
    "SM clock": _clock,
    "HBM read": _hbm_read,
    "L2 read": _l2,
    "L2 hit rate": _hbm_read,
    "tensor cores": _share("tensor pipe", "tensor"),
    "MUFU": _share("MUFU", "mufu"),
    "issue slots": _share("scheduler", "issue"),
}
