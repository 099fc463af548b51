"""Lesson: predictions beside what an H200 did, and what the model does not know."""

from __future__ import annotations

from ...simulator.devices.device import load_device
from ...simulator.results import metrics
from .course import DEVICE, Course
from .parts import Facts, Question, Reading, Section, Timeline, count, nbytes, say, seconds, share

TITLE = "Does the hardware agree?"
ABOUT = "the same schedules as kernels on an H200: times, and each warp's own account of when it did what"
READING = Reading(
    code=(
        ("traces/overlay.py", "how a recorded timeline is laid over a predicted one"),
        ("traces/compare.py", "errors by quantity"),
        ("kernels/measure/runs.py", "how a run is recorded"),
    ),
    papers=("FlashAttention-3 (arXiv:2407.08608), section 4.1",),
)
KERNELS = ("warp-specialized", "pingpong", "overlap-2stage", "overlap-3stage", "fa3")
RECORDED = "fa3"


def sections(course: Course) -> tuple[Section, ...]:
    """The lesson; recordings are of an H200, so predictions are for it too, whatever the course's device."""
    where = course if course.device.name == DEVICE else Course(load_device(DEVICE), course.advance)
    return (_times(where, course.device.name), _inside(where))


def _times(course: Course, asked: str) -> Section:
    pairs = [(run, kept) for run, kept in zip(course.runs(*KERNELS), map(course.measured, KERNELS), strict=True) if kept]
    errors = {run.schedule: metrics.time_s(run) / metrics.time_s(kept) - 1 for run, kept in pairs}
    rows = tuple(
        (run.schedule, seconds(metrics.time_s(kept)), seconds(metrics.time_s(run)), share(errors[run.schedule]))
        for run, kept in pairs
    )
    by_cycles = tuple(
        (run.schedule, count(kept.cycles), count(run.cycles), share(run.cycles / kept.cycles - 1)) for run, kept in pairs
    )
    traffic = tuple(
        (run.schedule, nbytes(kept.traffic.total("hbm_read")), nbytes(run.traffic.total("hbm_read")))
        for run, kept in pairs
        if kept.traffic.total("hbm_read")
    )
    name = max(errors, key=lambda each: abs(errors[each]))
    run, kept = next(each for each in pairs if each[0].schedule == name)
    other = (
        (say("(The recordings are of an H200; this lesson shows that device, not {asked}.)", asked=asked),)
        if asked != DEVICE
        else ()
    )
    return Section(
        "Time, cycles and bytes",
        (
            say("Each of these schedules is also a kernel in this project, and was run on an {gpu}, at this course's workload, for seconds, with its clock free.", gpu=pairs[0][1].measurement.gpu),
            *other,
            Facts(("schedule", ">measured", ">predicted", ">error"), rows),
            Facts(("schedule", ">cycles measured", ">predicted", ">error"), by_cycles),
            Facts(("schedule", ">HBM read, measured", ">predicted"), traffic),
            Question(
                say("For `{name}` the model says {predicted}, the clock on the wall {measured}. What is the error in percent, predicted over measured? (Too fast is negative.)", name=name, predicted=seconds(metrics.time_s(run)), measured=seconds(metrics.time_s(kept))),
                answer=100 * errors[name], unit="%", tolerance=0.1,
                hint=say("Predicted over measured, less one."),
                why=say("It is the largest error of the table. `fasim compare` has every recorded run, and errors of cycles, clock, bytes and power apart."),
            ),
        ),
    )  # fmt: skip


def _inside(course: Course) -> Section:
    found = course.recorded_timeline(RECORDED)
    phases = [phase for phase in found.phases if phase.predicted is not None and phase.measured is not None]
    block = next(phase for phase in phases if phase.name == "whole block")
    return Section(
        "What each warp did when",
        (
            say("The kernel can write down, with the SM's own cycle counter, when each warp finished what. Below each predicted row is the recorded one, both aligned where the first product is issued."),
            Timeline(found.both, 2, 3, say("The order is the same. Where a block ends agrees better than where a phase within it ends: see the table.")),
            Facts(("cycles up to the end of", ">predicted", ">measured"), tuple((phase.name, count(round(phase.predicted)), count(round(phase.measured))) for phase in phases), say("Mean over both warpgroups, without what writing the times down costs the kernel.")),
            say("What the model does not know: which SM drifts ahead of which, what the compiler does with each instruction of a kernel that nobody has inspected, and the mood of a board's power supply. Its errors are printed, not hidden: `fasim compare`, and the README's tables."),
            Question(
                say("For a whole block of keys the model predicts {p}, the kernel took {m}. What is the error in percent?", p=count(round(block.predicted)), m=count(round(block.measured))),
                answer=100 * (round(block.predicted) / round(block.measured) - 1), unit="%", tolerance=0.1,
                hint=say("Predicted over measured, less one; negative where the model is too fast."),
                why=say("It was not fitted: every constant comes from a datasheet, a paper or a microbenchmark, none from attention kernels."),
            ),
        ),
    )  # fmt: skip
