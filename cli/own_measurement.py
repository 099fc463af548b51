"""`fasim compare --ncu` and `--time-us`: a measurement of the user's own beside its prediction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import Group, Parameter

from ..simulator.errors import UsageError
from . import output
from .options import MachineOptions, WorkloadOptions

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..traces.answers.own_run import Verdict

_OWN = Group("Your own measurement", help="Beside a prediction of the workload that the options say.", sort_key=0)


@Parameter(name="*", group=_OWN)
@dataclass(frozen=True, kw_only=True)
class OwnOptions:
    """What was measured, and of what."""

    ncu: Path | None = None
    "What Nsight Compute exported as CSV: ncu --import report.ncu-rep --page raw --csv (or --page details)."
    time_us: float | None = None
    "The time of one call, in microseconds."
    clock: float | None = None
    "The SM clock it ran at, in MHz; with --time-us."
    kernel: str | None = None
    "A part of the kernel's name in the report. [default: the longest one]"
    tile: str | None = None
    "The kernel's tile, as 128x128. [default: the schedule's]"
    stages: int | None = None
    "The kernel's slots of K and V."
    cluster: int | None = None
    "The kernel's CTAs of a cluster."

    @property
    def given(self) -> bool:
        """Whether there is a measurement."""
        return self.ncu is not None or self.time_us is not None


def compare_own(own: OwnOptions, workload: WorkloadOptions, schedule: str | None, device: str | None, json: bool) -> int:
    """Predict the workload and set the measurement beside it."""
    from ..traces.answers import own_run

    if own.ncu is not None and (own.time_us is not None or own.clock is not None):
        raise UsageError("--ncu has time and clock in it: give it alone, or --time-us and --clock")
    if own.kernel is not None and own.ncu is None:
        raise UsageError("--kernel chooses a kernel of a report: give --ncu")
    places = {"device": device} if device else {}
    machine = MachineOptions(tile=own.tile, stages=own.stages, cluster=own.cluster, **places)
    question = machine.question(workload.build(), schedule or "fa3")
    with output.progress("predicting") as advance:
        if own.ncu is not None:
            measured, notes = own_run.of_report(question, own.ncu, own.kernel)
        else:
            clock_hz = None if own.clock is None else own.clock * 1e6
            measured, notes = own_run.of_time(question, own.time_us / 1e6, clock_hz)
        found = own_run.beside_prediction(question, measured, notes, advance)
    if json:
        output.emit_json(found.to_dict())
    else:
        output.stdout().print(_shown(found))
    return 0


def _shown(found: Verdict) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from ..simulator.units import percent
    from .quantities import quantities
    from .tables import house_table

    of = found.comparison
    title = Text.assemble((of.predicted.schedule, "bold"), f" on {of.predicted.device}, {of.predicted.workload}")
    parts: list[RenderableType] = [Text(found.sentence, "bold"), Text(""), title, quantities(of)]
    clock = of.measured.sm_clock_hz
    parts += [Text(""), Text(f"at this load the model expects {found.expected_hz / 1e6:,.0f} MHz, yours ran at {clock / 1e6:,.0f}")]
    if found.suspects:
        table = house_table("one thing gone wrong", ">time over yours")
        for name, off in found.suspects:
            table.add_row(name, percent(off, signed=True))
        parts += [Text(""), table]
    elif of.measured.measurement.counters:
        parts += [Text(""), Text(of.explanation)]
    return Group(*parts, *(Text(note, "yellow") for note in found.notes))
