"""Own run: a measurement that somebody else took, with a stopwatch or Nsight Compute, as a Run beside its prediction.

A time alone says how far off a kernel is, not where; so the same workload is also predicted as it would be with one thing gone
wrong at a time (`SUSPECTS`), and those that would take as long are named. Counters say more: work, waiting, bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...simulator.devices.changes import change
from ...simulator.devices.device import Device, load_device
from ...simulator.errors import UsageError, did_you_mean
from ...simulator.predict import default_tile
from ...simulator.reading import read_text
from ...simulator.results import metrics
from ...simulator.results.roofline import roofline
from ...simulator.results.run import Activity, Bottleneck, Bytes, Measurement, Run, Traffic
from ...simulator.schedules import find_schedule
from ...simulator.units import scaled
from .. import nsight
from ..compare import compare
from ..comparison import Comparison
from ..predictions import Advance, Question, predict_all

NEAR = 0.03
"""A suspect within this of the measured time would explain it."""
BESIDE = 0.1
"""And one within this, where none is nearer, is worth a word."""
ON_PAR = 0.03
"""A kernel within this of its prediction is as predicted: the model is no better."""
FAR = 2
"""So many times as many cycles are said as a factor, and may be another workload's."""
ROUNDED = 0.01
"""By so much a time or a clock that was noted by hand may be off."""
SUSPECTS = {
    "exponentials at half the rate": ("set", "mufu=x0.5"),
    "half of HBM's bandwidth": ("set", "hbm=x0.5"),
    "half of L2's bandwidth": ("set", "l2=x0.5"),
    "GEMMs at half the rate": ("set", "tensor=x0.5"),
    "a single stage of K and V": ("stages", 1),
    "the order of 'warp-specialized', no turns and no overlap": ("schedule", "warp-specialized"),
    "the order of 'pingpong', no overlap within a warpgroup": ("schedule", "pingpong"),
    "the order of 'overlap-2stage', no turns": ("schedule", "overlap-2stage"),
    "mma.sync in place of WGMMA, 'fa2'": ("schedule", "fa2"),
}
"""What may have gone wrong -> how it is predicted."""


@dataclass(frozen=True)
class Verdict:
    """A measurement beside its prediction at the same clock, what would take as long, and the clock that the model expects."""

    comparison: Comparison
    suspects: tuple[tuple[str, float], ...]  # with the time each would take over the measured one, less one
    expected_hz: float
    least_cycles: float  # below which no kernel can be, by the roofline
    notes: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """By how much the kernel is off, and what would explain it; or that no kernel can be as fast."""
        found = self.comparison
        measured, predicted = found.measured, found.predicted
        gap = measured.cycles / predicted.cycles - 1
        took = f"{measured.cycles:,} cycles ({scaled(metrics.time_s(measured), 's')} at {measured.sm_clock_hz / 1e6:,.0f} MHz)"
        way = f"{abs(gap):.1%} {'more' if gap > 0 else 'fewer'} than" if gap < FAR - 1 else f"{gap + 1:.1f} times as many as"
        head = f"Your kernel takes {took}, {way} {predicted.schedule} is predicted to, {predicted.cycles:,}"
        if measured.cycles < self.least_cycles * (1 - ROUNDED):
            least = f"fewer than any kernel needs for {predicted.workload}, {self.least_cycles:,.0f}"
            return f"Your kernel would take {took}, {least}: it ran at a higher clock, or on a smaller workload."
        if abs(gap) <= ON_PAR:
            return f"{head}: as predicted, within what the model can tell."
        return f"{head}{self._part()}."

    def _part(self) -> str:
        """What would explain it. A factor is no fault of a kernel as a rule, but of what it is compared with."""
        if self.comparison.measured.cycles > FAR * self.comparison.predicted.cycles:
            asked = self.comparison.predicted.workload
            return f"; was it on {asked}? The workload is given as for predict" + self._cause()
        return self._cause()

    def _cause(self) -> str:
        if self.comparison.measured.measurement.counters:
            said = self.comparison.explanation.partition(". Time is")[0]
            more = " (--page raw has it)" if self.comparison.measured.activity.tensor is None else ""
            return f"; {said.partition(': ')[2] if said.startswith('cycles ') else said}{more}"
        named = [f"{name} ({off:+.1%})" for name, off in self.suspects if abs(off) <= NEAR]
        if named:
            return f"; as long would take {' or '.join(named)}"
        said = "; a time alone does not say where, and no single fault that was tried takes as long"
        if self.suspects and abs(self.suspects[0][1]) <= BESIDE:
            said += f" ({self.suspects[0][0]} comes nearest, {self.suspects[0][1]:+.1%})"
        return f"{said}: counters would (--ncu)"

    def to_dict(self) -> dict:
        """As plain JSON values."""
        suspects = [{"what": name, "time_over_measured": off} for name, off in self.suspects]
        return {
            "sentence": self.sentence,
            "suspects": suspects,
            "expected_sm_clock_hz": self.expected_hz,
            "least_cycles_by_roofline": self.least_cycles,
            "notes": list(self.notes),
            "comparison": self.comparison.to_dict(),
        }


def beside_prediction(question: Question, measured: Run, notes: Sequence[str] = (), advance: Advance | None = None) -> Verdict:
    """Set a run of somebody's beside the prediction at its own clock, and look for what would take as long.

    Raises UsageError where nothing can be predicted.
    """
    gpu = _device(question.device)
    pinned = replace(question, clock_hz=min(measured.sm_clock_hz, gpu.max_clock_hz))
    free = replace(question, clock_hz=None)
    wrong = {} if measured.measurement.counters else dict(_suspects(pinned, gpu))
    found = predict_all([pinned, free], advance=advance)
    took, expected = metrics.time_s(measured), found[free].sm_clock_hz
    suspects = []
    for name, other in wrong.items():
        try:
            suspects.append((name, metrics.time_s(predict_all([other], advance=advance)[other]) / took - 1))
        except UsageError:
            continue
    suspects.sort(key=lambda each: abs(each[1]))
    least = roofline(question.workload, gpu, measured.sm_clock_hz).bound_cycles
    return Verdict(compare(found[pinned], measured), tuple(suspects), expected, least, tuple(notes))


def of_time(question: Question, time_s: float, clock_hz: float | None) -> tuple[Run, list[str]]:
    """A run from a time in seconds and an SM clock in Hz; without a clock the predicted one is taken, and a note says so."""
    gpu = _device(question.device)
    notes = []
    if not 1e-9 < time_s < 1e4:
        raise UsageError(f"a call of {time_s * 1e6:g} µs is not possible: give microseconds above zero")
    if clock_hz is None:
        asked = replace(question, clock_hz=None)
        clock_hz = predict_all([asked])[asked].sm_clock_hz
        notes.append(
            f"no clock was given: {clock_hz / 1e6:,.0f} MHz, as predicted, is taken, so a lower one looks like more cycles; "
            "give --clock with what the SMs ran at"
        )
    elif not 1e8 <= clock_hz <= gpu.max_clock_hz:
        raise UsageError(f"a clock of {clock_hz / 1e6:g} MHz is not possible on {gpu.name}: give 100 to {gpu.max_clock_hz / 1e6:g}")
    return _run(question, gpu, time_s, clock_hz, "your stopwatch", "given"), notes


def of_report(question: Question, path: Path, kernel: str | None = None) -> tuple[Run, list[str]]:
    """A run from what Nsight Compute exported (`--csv`, page raw or details), and remarks on what was taken.

    `kernel` is a part of the kernel's name; without it the one that takes most cycles. Of several launches the middle one.
    Raises UsageError where the file holds none, no cycles and no time, or several kernels of that name.
    """
    gpu = _device(question.device)
    if path.suffix == ".ncu-rep":
        how = f"ncu --import {path.name} --page raw --csv > report.csv"
        raise UsageError(f"{path} is Nsight Compute's own format; export it: {how}")
    launches = nsight.parse(read_text(path, "report"))
    name, chosen, notes = _chosen(launches, kernel, path)
    one = sorted(chosen, key=_cycles)[len(chosen) // 2]
    cycles, seconds = one.metrics.get(nsight.CYCLES), one.metrics.get(nsight.DURATION)
    if cycles is None and seconds is None:
        how = f"profile with --set full, or --metrics {nsight.CYCLES},{nsight.DURATION}"
        raise UsageError(f"report {path} has neither cycles nor a time of {name}; {how}")
    if seconds is None or cycles is None:
        missing = "duration" if seconds is None else "cycles"
        notes.append(f"the report has no {missing}: the predicted clock is taken")
        asked = replace(question, clock_hz=None)
        clock = predict_all([asked])[asked].sm_clock_hz
        seconds = seconds or cycles / clock
    else:
        clock = cycles / seconds
    if not 1e8 <= clock <= 1e10:
        raise UsageError(f"report {path}: {cycles:,.0f} cycles in {scaled(seconds, 's')} is no clock: do both belong to {name}?")
    absent = [each for each in nsight.NEEDED if each not in one.metrics]
    if absent:
        notes.append(f"not in the report, so not compared: {', '.join(absent)}")
    run = _run(question, gpu, seconds, clock, name, "cycles over duration")
    return nsight.with_counters(run, [one]), notes


def _chosen(
    launches: Sequence[nsight.Profiled], kernel: str | None, path: Path
) -> tuple[str, list[nsight.Profiled], list[str]]:
    """The launches of one kernel, and a remark where there are others."""
    names = list(dict.fromkeys(each.name for each in launches))
    if not names:
        raise UsageError(f"report {path} holds no kernel")
    wanted = names if kernel is None else [name for name in names if kernel in name]
    if not wanted:
        raise UsageError(f"report {path} has no kernel {kernel!r} (it has {_listed(names)}){did_you_mean(kernel, names)}")
    longest = max((each for each in launches if each.name in wanted), key=_cycles).name
    if kernel is not None and len(wanted) > 1:
        raise UsageError(f"report {path} has several kernels {kernel!r}: {_listed(wanted)}; give more of the name with --kernel")
    chosen = [each for each in launches if each.name == longest]
    notes = [f"kernel {longest[:80]}, the {'one' if kernel else 'longest'} of {len(names)} in the report; --kernel chooses another"]
    if len(chosen) > 1:
        notes.append(f"the middle one by cycles of its {len(chosen)} launches")
    return longest, chosen, notes if len(names) > 1 else notes[1:]


def _cycles(launch: nsight.Profiled) -> float:
    return launch.metrics.get(nsight.CYCLES, launch.metrics.get(nsight.DURATION, 0.0))


def _listed(names: Iterable[str]) -> str:
    short = [name[:60] for name in names]
    return ", ".join(short[:5]) + (f" and {len(short) - 5} more" if len(short) > 5 else "")


def _run(question: Question, gpu: Device, time_s: float, clock_hz: float, name: str, clock_from: str) -> Run:
    nothing = Bytes(None, None, None, None, None, None)
    taken = Measurement(
        kernel=name, implementation="callable", gpu=gpu.name, driver="", cuda="", date="", regime=question.regime, l2="cold",
        buffers=1, launch="stream", calls=1, time_s=time_s, time_p10_s=time_s, time_p90_s=time_s, clock_from=clock_from,
    )  # fmt: skip
    return Run(
        origin="measured", workload=question.workload, schedule=name, tile=question.tile or _usual(question), device=gpu.name,
        cycles=max(1, round(time_s * clock_hz)), sm_clock_hz=clock_hz, power_w=None,
        activity=Activity(gpu.sms, None, None, None, None, None), traffic=Traffic({"all": nothing}, None, None, None, None),
        bottleneck=Bottleneck("unknown", "a measured run is explained beside its prediction"), measurement=taken,
    )  # fmt: skip


def _usual(question: Question):
    return default_tile(question.workload, question.schedule, question.device)


def _device(device: str | Device) -> Device:
    return device if isinstance(device, Device) else load_device(device)


def _suspects(question: Question, gpu: Device) -> Iterable[tuple[str, Question]]:
    """The same question with one thing gone wrong at a time; what does not apply is left out."""
    own = find_schedule(question.schedule, question.workload.direction)
    for name, (kind, value) in SUSPECTS.items():
        if kind == "set":
            yield name, replace(question, device=change(gpu, [value]).device)
        elif kind == "stages":
            tile = question.tile or _usual(question)
            if tile.stages > value:
                yield name, replace(question, tile=replace(tile, stages=value))
        elif value != question.schedule and own.hopper and not question.workload.backward:
            other = find_schedule(value)
            if question.workload.dtype in other.dtypes:
                yield name, replace(question, schedule=value, tile=question.tile if other.family == own.family else None)
