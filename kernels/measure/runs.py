"""Measure: run kernels on the GPU, each as a Run with origin "measured" (bench.py says how), with counters if asked."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from ...simulator.errors import UsageError, did_you_mean
from ...simulator.problem.workload import Workload
from ...simulator.results.run import Run
from ...traces import nsight
from ..validation.check import Fault, MissingTool
from . import counters as nsight_process
from . import peers
from .bench import Bench, calls_of, random_inputs
from .names import accept, subject_of
from .plan import Entry
from .timeline import record
from .trains import SUSTAINED_S

REGIMES = ("sustained", "burst")
L2_STATES = ("cold", "warm")
CHUNK = 64
"""Most entries counted by one process under Nsight Compute; other people's libraries have one each."""
Advance = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Refused:
    """A run that could not be taken, and why."""

    entry: Entry
    reason: str


def measure(
    kernel: str,
    workload: Workload,
    *,
    counters: bool = False,
    regime: str = "sustained",
    l2: str = "cold",
    seconds: float = SUSTAINED_S,
    timeline: bool = False,
) -> Run:
    """Run a kernel on the current GPU and measure it.

    `kernel` is a name that `kernels.validation.subjects` knows or the user's package.module:function. Time is the median
    of one call by CUDA events, energy and clock those of the same calls; cycles are time x clock, unless
    `counters` counts them, with everything else, in a second process under Nsight Compute. `timeline` measures the build
    that stamps what it does, and keeps the spans of a few CTAs (timeline.py). Raises UsageError for what the kernel does
    not take, MissingTool for a GPU, a library or a program that is not here, Fault for a wrong output.
    """
    how = {"counters": counters, "regime": regime, "l2": l2, "seconds": seconds, "timeline": timeline}
    (found,) = measure_all([Entry(kernel, workload)], **how)
    if isinstance(found, Refused):
        raise UsageError(found.reason)
    return found


def measure_all(
    plan: Sequence[Entry],
    *,
    counters: bool = False,
    regime: str = "sustained",
    l2: str = "cold",
    seconds: float = SUSTAINED_S,
    timeline: bool = False,
    advance: Advance | None = None,
) -> Iterator[Run | Refused]:
    """Measure every entry of a plan, one process under Nsight Compute counting for each of its `chunks`; see `measure`.

    Counters come first, so that a machine without them says so before it has worked for minutes. Where one of several
    processes fails, its runs lack counters and say so in their warnings.
    """
    if regime not in REGIMES:
        raise UsageError(f"regime {regime!r} is not known ({', '.join(REGIMES)}){did_you_mean(regime, REGIMES)}")
    if not 0.1 <= seconds <= 60:
        raise UsageError(f"seconds={seconds:g} is not possible: give the length of a sustained run, 0.1 to 60")
    if l2 not in L2_STATES:
        raise UsageError(f"l2 {l2!r} is not a state ({', '.join(L2_STATES)}){did_you_mean(l2, L2_STATES)}")
    if timeline and counters:
        raise UsageError("counters are of the plain build, a timeline is of the one that stamps: take them apart")
    require_gpu()
    if counters:
        nsight_process.require()
    first, stretches = 0, list(chunks(plan))
    bench = Bench(regime, l2, seconds)
    for chunk in stretches:
        counted: Sequence = [()] * len(chunk)
        missing = ""
        if counters:
            if advance:
                advance(first, len(plan), "counters, by Nsight Compute")
            try:
                counted = nsight_process.profile([entry.to_dict() for entry in chunk])
            except UsageError as error:
                if len(plan) == 1:
                    raise
                missing = f"no counters: {error}"
        for number, (entry, kernels) in enumerate(zip(chunk, counted, strict=True), start=first):
            if advance:
                advance(number, len(plan), f"{entry.kernel}, {entry.workload}")
            try:
                run = record(bench, entry) if timeline else bench.measure(entry)
            except Exception as error:  # out of memory, or whatever a user's kernel raises: the other runs go on
                if isinstance(error, (Fault, MissingTool)) and len(plan) == 1:
                    raise
                yield Refused(entry, _reason(error))
                continue
            if kernels:
                run = counted_run(run, kernels)
            elif counters:
                run = replace(run, warnings=(missing or "no counters: Nsight Compute saw no kernel of the call",))
            yield run
        first += len(chunk)


def counted_run(run: Run, kernels: Sequence[nsight.Profiled]) -> Run:
    """A measured run with the counters of one call's kernels."""
    return (peers if peers.is_peer(run.schedule) else nsight).with_counters(run, kernels)


def complete(runs: Sequence[Run]) -> Iterator[Run | Refused]:
    """Count for runs that were timed without: each with its counters, or why it has none. Raises MissingTool without ncu."""
    require_gpu()
    nsight_process.require()
    ordered = sorted(runs, key=lambda run: peers.library_of(run.schedule))
    waiting = iter(ordered)
    for chunk in chunks([Entry(run.schedule, run.workload) for run in ordered]):
        try:
            counted: Sequence = nsight_process.profile([entry.to_dict() for entry in chunk])
            reason = "Nsight Compute saw no kernel of the call"
        except UsageError as error:
            counted, reason = [()] * len(chunk), str(error)
        for entry, kernels in zip(chunk, counted, strict=True):
            run = next(waiting)
            yield replace(counted_run(run, kernels), warnings=()) if kernels else Refused(entry, reason)


def chunks(plan: Sequence[Entry]) -> Iterator[Sequence[Entry]]:
    """The plan in stretches that one process counts: a library that fails takes no other's counters with it."""
    for _, entries in groupby(plan, key=lambda entry: peers.library_of(entry.kernel)):
        stretch = list(entries)
        yield from (stretch[first : first + CHUNK] for first in range(0, len(stretch), CHUNK))


def require_gpu() -> None:
    """Raise MissingTool, one sentence, unless torch sees an NVIDIA GPU."""
    if importlib.util.find_spec("torch") is None:
        raise MissingTool("measuring needs torch, which is not installed: pip install 'fasim[kernels]'")
    import torch

    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else " (this torch is built without CUDA)"
        raise MissingTool(f"measuring needs an NVIDIA GPU, and torch sees none{built}; `fasim doctor` says what is missing")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, (UsageError, NotImplementedError, Fault, MissingTool)) else f"{type(error).__name__}: {text}"


def launch_for_profiler(plan: Sequence[Entry]) -> None:
    """Warm every entry up, then launch one call of each with the profiler on, a marker before it or in its place."""
    import torch

    marked = nsight_process.marked([entry.to_dict() for entry in plan])
    for entry in plan:
        call = None
        try:
            subject = subject_of(entry.kernel, direction=entry.workload.direction)
            accept(subject, entry.workload)
            (call,) = calls_of(subject, entry.workload, [random_inputs(entry.workload)])
            call()
        except Exception as error:  # whatever a library raises: the others are counted
            sys.stderr.write(f"{entry.kernel}, {entry.workload}: {_reason(error)}\n")
            call = None
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        if marked or not call:
            torch.cuda._sleep(1)
        if call:
            call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
        call = None


def summary(run: Run) -> str:
    """One line: what ran, how long, at which clock, and how many cycles were counted."""
    taken, report = run.measurement, run.to_dict()
    share = f", tensor {report['tensor_utilization']:.1%}" if report["tensor_utilization"] is not None else ""
    if taken.trace_overhead is not None:
        share += f", {len(run.spans):,} spans, tracing costs {taken.trace_overhead:+.1%} cycles"
    share += "".join(f" ({warning})" for warning in run.warnings)
    return (
        f"{run.schedule}, {run.workload}: {taken.time_s * 1e6:.1f} us "
        f"({taken.time_p10_s * 1e6:.1f} to {taken.time_p90_s * 1e6:.1f}), "
        f"{report['tflops']:.0f} TFLOP/s, {run.sm_clock_hz / 1e6:.0f} MHz, {run.cycles:,} cycles{share}"
    )
