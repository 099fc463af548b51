"""Lesson: two warpgroups take turns on the tensor cores."""

from __future__ import annotations

from ...simulator.results import metrics
from .course import HOPPER, Course, source
from .parts import Bars, Question, Reading, Section, Shares, Timeline, say, seconds, share

TITLE = "Pingpong"
ABOUT = "while one warpgroup has the tensor cores, the other takes its softmax; a barrier makes sure of it"
NEEDS = HOPPER
READING = Reading(
    code=(
        ("simulator/schedules/forward/pingpong.py", "the schedule: look for take and give"),
        ("kernels/cuda/pingpong.cu", "the kernel that runs it"),
    ),
    papers=("FlashAttention-3 (arXiv:2407.08608), section 3.1 and Figure 1",),
)


def sections(course: Course) -> tuple[Section, ...]:
    """The lesson on the course's device."""
    from ...simulator.schedules.forward import pingpong as module

    before, run = course.runs("warp-specialized", "pingpong")
    saved = 1 - metrics.time_s(run) / metrics.time_s(before)
    return (
        Section(
            "A turn that is handed over",
            (
                say("Nothing in `warp-specialized` says when a warpgroup may use the tensor cores. `pingpong` adds a turn. Who holds it issues its products, O of one block and S of the next; then gives the turn away and takes its softmax while the other multiplies."),
                source(module.pingpong),
                say("Compare with the last lesson's schedule: it is the same but for the lines with `turn`."),
                Timeline(course.timeline("pingpong"), 1, 3, say("The rows of WG0 and WG1 alternate: where one has a product (S, O), the other has its softmax (P). And so it goes on, block after block.")),
            ),
        ),
        Section(
            "What it brings",
            (
                Bars("time, predicted", tuple((each.schedule, seconds(metrics.time_s(each))) for each in (before, run))),
                Shares((before, run)),
                say("Softmax is hidden under the other's products. In exchange there is more time between products: each hand-over is a barrier, and it costs."),
                Question(
                    say("By how many percent does the time fall from `warp-specialized` to `pingpong`?"),
                    answer=100 * saved, unit="%", tolerance=0.1,
                    hint=say("One less new over old, in percent; take the times from the bars."),
                    why=say("Of exposed softmax {before} were there before, and {after} are left.", before=share(before.breakdown.softmax), after=share(run.breakdown.softmax)),
                ),
                Question(
                    say("Tensor cores do useful work for {part} of `pingpong`. If they did for all of it, at the same clock, how many microseconds would it take?", part=share(run.breakdown.useful)),
                    answer=run.breakdown.useful * metrics.time_s(run) * 1e6, unit="µs", tolerance=0.02,
                    hint=say("The time now is {time}; keep only the useful share of it.", time=seconds(metrics.time_s(run))),
                    why=say("And then the clock would fall, for busy tensor cores draw power: that is a later lesson."),
                ),
            ),
        ),
    )  # fmt: skip
