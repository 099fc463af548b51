"""Compare: predictions beside measurements, number by number, in three tables that are kept apart.

Kernels of ours beside which the model was made say how well it fits what it was shown; those recorded after it was
finished, and compared once, whether it holds elsewhere; other people's kernels what a user who brings one will get. Each of
these is set beside the schedule that stands for it, with the tile that its name tells; one that no schedule stands for is
listed without a prediction.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean

from ..simulator.devices.device import DEVICE_NAMES
from ..simulator.errors import UsageError
from ..simulator.problem.tile import Tile
from ..simulator.results import metrics
from ..simulator.results.run import Run
from ..simulator.schedules import BACKWARD, SCHEDULES
from .comparison import QUANTITIES, SETS, Comparison, Quantity, Row
from .explanation import explain
from .predictions import Advance, Predict, Question, predict_all

STANDS_FOR = {"peer:fa3": "fa3-published", "peer:fa2": "fa2-pytorch", "torch-fa2": "fa2-pytorch"}
"""Kernels that are not ours -> the schedule they are set beside."""
STANDS_FOR_BACKWARD = {"peer:fa4": "fa3", "peer:fa2": "fa2", "torch-fa2": "fa2", "peer:cudnn": "cudnn", "torch-cudnn": "cudnn"}
WIDE = {"fa3": "narrow"}
"""Schedules of the backward -> those that take their place at a head dim which they do not have."""
SPLITS = "splitkv"
"""In the name of a FlashAttention-2 kernel that deals the keys of a row to several CTAs, which no schedule here does."""
LIBRARIES = ("peer", "pytorch")
GLUON = "gluon-"
"""Before the schedule in the name of a kernel in Gluon."""
ORDER_OF = {"persistent": "fa3"}
"""Of a rung whose name is no schedule's."""
"""Implementations whose kernels are listed even where no schedule stands for them."""
DISTINCT = 0.02
"""Two schedules whose measured times differ by more than this must rank as on the hardware."""
TIMER_S = 0.5e-6
"""Resolution of the CUDA events that times are read from (CUDA driver API, cuEventElapsedTime): a difference below it is none."""


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

    def of(self, which: str) -> tuple[Comparison, ...]:
        """Those of one of the SETS."""
        return tuple(each for each in self.comparisons if each.belongs == which)

    def columns(self, which: str, kernel: str | None = None) -> tuple[Column, ...]:
        """Errors over one of the SETS, or over one kernel of it."""
        chosen = [each for each in self.of(which) if kernel in (None, each.kernel)]
        return tuple(_column(quantity, chosen) for quantity in QUANTITIES)

    def kernels(self, which: str) -> dict[str, tuple[Comparison, ...]]:
        """The comparisons of one of the SETS, by kernel."""
        chosen = self.of(which)
        return {name: tuple(each for each in chosen if each.kernel == name) for name in sorted({each.kernel for each in chosen})}

    @property
    def ranking(self) -> Ranking:
        """Whether our schedules rank in the prediction as on the hardware."""
        return rank(self.of("beside") + self.of("after"))

    @property
    def worst(self) -> Comparison:
        """The run with the largest disagreement, of our kernels if there is any."""
        chosen = self.of("beside") + self.of("after") or self.comparisons
        return max(chosen, key=lambda each: abs(each.largest.error) if each.largest else 0.0)

    def to_dict(self) -> dict:
        """As plain JSON values."""
        ranking = self.ranking
        return {
            "runs": [each.to_dict() for each in self.comparisons],
            "columns": {which: [column.to_dict() for column in self.columns(which)] for which in SETS},
            "kernels": {
                which: {name: [column.to_dict() for column in self.columns(which, name)] for name in self.kernels(which)}
                for which in SETS
            },
            "ranking": {"pairs": ranking.pairs, "reversed": list(ranking.reversed)},
            "worst": {"name": self.worst.name, "explanation": self.worst.explanation},
        }


# -- comparing --------------------------------------------------------------------------------------------------------


def compare(predicted: Run | None, measured: Run, name: str = "", note: str = "", after: bool = False) -> Comparison:
    """Set two runs of one workload side by side; `predicted` is None where no schedule stands for what was measured.

    `after` says that the run was recorded when the model was finished. Raises UsageError where they are not a prediction
    and its measurement.
    """
    if measured.origin != "measured" or (predicted and predicted.origin != "predicted"):
        origins = f"a {predicted.origin if predicted else 'missing'} and a {measured.origin} one"
        raise UsageError(f"compare takes a predicted and a measured run, not {origins}")
    if predicted and predicted.workload != measured.workload:
        raise UsageError(f"the prediction is of {predicted.workload}, the measurement of {measured.workload}")
    rows = tuple(Row(quantity, quantity.of(predicted) if predicted else None, quantity.of(measured)) for quantity in QUANTITIES)
    name = name or f"{measured.schedule}, {measured.workload}"
    found = Comparison(name, predicted, measured, rows, _set(predicted, measured, after), note)
    return replace(found, explanation=explain(found))


def _set(predicted: Run | None, measured: Run, after: bool) -> str:
    taken = measured.measurement
    if taken.l2 != "cold" or taken.regime != "sustained":
        return "aside"
    if taken.implementation == "cuda" and predicted and measured.schedule == predicted.schedule:
        return "after" if after else "beside"
    return "aside" if taken.implementation in ("cuda", "gluon", "triton") else "others"


def compare_all(
    runs: Mapping[str, Run],
    *,
    schedule: str | None = None,
    device: str | None = None,
    after: Collection[str] = (),
    predict: Predict | None = None,
    advance: Advance | None = None,
    processes: int = 1,
) -> Report:
    """Predict what every measured run ran, and compare.

    `schedule` is what a kernel that is not ours is set beside, `device` the model of a GPU that has none by its name, `after`
    the names of those recorded when the model was finished.
    Raises UsageError, one sentence, where a run is not measured or nothing of ours can predict it.
    """
    questions, notes = {}, {}
    for name, run in runs.items():
        if run.origin != "measured":
            raise UsageError(f"run {name} is predicted; compare takes measured runs and predicts them itself")
        chosen, notes[name] = counterpart(name, run, schedule)
        questions[name] = chosen and Question(run.workload, chosen, model_of(name, run, device), tile_of(run))
    predicted = {None: None} | predict_all(filter(None, questions.values()), predict, advance, processes)
    return Report(tuple(compare(predicted[questions[name]], run, name, notes[name], name in after) for name, run in runs.items()))


def model_of(name: str, run: Run, device: str | None = None) -> str:
    """The device model to predict a run with: the one asked for, or its GPU's. Raises UsageError where it has none."""
    if device is None and run.device not in DEVICE_NAMES:  # a file names a device and never a path
        raise UsageError(f"run {name} was taken on {run.device}, which has no device model; give one with --device")
    return device or run.device


def counterpart(name: str, run: Run, schedule: str | None) -> tuple[str | None, str]:
    """The schedule to predict, None where none stands for a library's kernel, and a remark where it is not that kernel's own."""
    implementation = run.measurement.implementation
    known, stands_for = (BACKWARD, STANDS_FOR_BACKWARD) if run.workload.backward else (SCHEDULES, STANDS_FOR)
    if implementation == "cuda" and run.schedule in known:
        return run.schedule, ""
    rung = run.schedule.removeprefix(GLUON)
    rung = ORDER_OF.get(rung, rung)
    if implementation == "gluon" and schedule is None and rung in known:
        return rung, f"{run.schedule} has the order of {rung}, whose code is another compiler's"
    nearest = schedule or (run.schedule if run.schedule in known else stands_for.get(run.schedule))
    if nearest in WIDE and run.workload.backward and run.workload.head_dim not in known[nearest].head_dims:
        nearest = WIDE[nearest]
    if (
        schedule is None
        and nearest in known
        and implementation in LIBRARIES
        and run.workload.head_dim not in known[nearest].head_dims
    ):
        where = f"at head_dim {run.workload.head_dim}"
        return None, f"{nearest} does not stand for {run.schedule} {where}: listed without a prediction"
    if schedule is None and any(SPLITS in kernel for kernel, _ in run.measurement.kernels):
        return None, f"{run.schedule} splits the keys of short rows, which no schedule here does: listed without a prediction"
    if nearest is None and implementation in LIBRARIES:
        return None, f"no schedule stands for {run.schedule}: its numbers are listed without a prediction"
    if nearest is None:
        raise UsageError(f"run {name} is of {run.schedule}, which no schedule stands for; give one with --schedule")
    whose = {"triton": "a Triton kernel, which its compiler schedules"}.get(implementation, "not ours")
    return nearest, f"{run.schedule} is {whose}: set beside the schedule {nearest}"


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
