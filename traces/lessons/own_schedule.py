"""Lesson: write a schedule, have it checked, predicted and drawn."""

from __future__ import annotations

import inspect

from ...simulator.results import metrics
from ...simulator.schedules import template
from .course import HOPPER, Course
from .parts import Facts, Listing, Question, Reading, Section, count, say, seconds, share

TITLE = "Write your own schedule"
ABOUT = "twenty lines of verbs in a file of your own; the model checks them, times them and draws them"
NEEDS = HOPPER
READING = Reading(
    code=(
        ("simulator/schedules/template.py", "what --new writes"),
        ("simulator/language/verbs.py", "all verbs"),
        ("simulator/language/check.py", "what is checked before anything is replayed"),
    ),
    papers=("FlashAttention-3 (arXiv:2407.08608), Algorithms 1 and 2",),
)


def sections(course: Course) -> tuple[Section, ...]:
    """The lesson on the course's device. The template is warp specialisation, whose prediction is the template's."""
    start, turns, overlap = course.runs("warp-specialized", "pingpong", "overlap-2stage")
    work, tile = course.workload, start.tile
    shape = f"--device {course.device.name} --seqlen {work.seqlen}"  # the other sizes are the commands' own
    return (
        Section(
            "Start from what works",
            (
                say("A schedule is a Python function of `cta` and `tile`. This writes one to a file of yours, which nobody overwrites; and then whatever takes a schedule takes yours:"),
                Listing(f"fasim schedules --new mine.py\nfasim predict ./mine.py:my_schedule {shape}\nfasim timeline ./mine.py:my_schedule {shape}", "in a shell"),
                Listing(inspect.getsource(template.my_schedule), "mine.py"),
                say("The file is your own code and is run as such. It only records: who loads, waits, multiplies and hands over, and in which order. `disasm` prints what was recorded."),
                Question(
                    say("What does `predict` say for the template, in microseconds? (Run the first two commands.)"),
                    answer=metrics.time_s(start) * 1e6, unit="µs", tolerance=0.03,
                    hint=say("Look for `time` in what `predict` prints, and for its unit."),
                    why=say("It is `warp-specialized` by another name, until you change it."),
                ),
            ),
        ),
        Section(
            "Make a mistake",
            (
                say("Before anything is replayed, the recording is checked. Take out a line `wg.free(...)`, and the producer waits for ever for a place that nobody frees: a deadlock, said with the file, the line, and who waits for whom. A result read before it was waited for is a race; a load nobody waits for is a leak; a verb that is not there, a loop without end, an error in your Python: each is one sentence."),
                Question(
                    say("K has {stages} places, and no consumer frees any. How many blocks of K can the producer load before it waits for ever?", stages=count(tile.stages)),
                    answer=tile.stages, unit="", tolerance=0.001,
                    hint=say("Each load needs a place that is free."),
                    why=say("Try it: the message names the load that waits, and the one in its place."),
                ),
            ),
        ),
        Section(
            "Make it faster",
            (
                say("Two ideas from this course fit into the template with a few lines each. Turns: `turn = cta.baton(first=0)`, `wg.take(turn)` before products, `wg.give(turn)` after S. Overlap: issue S of the next block before the softmax of this one, and wait for O one block later."),
                Facts(
                    ("schedule", ">time", ">tensor cores busy"),
                    tuple((run.schedule, seconds(metrics.time_s(run)), share(metrics.tensor_utilization(run))) for run in (start, turns, overlap)),
                ),
                say("Then look at `timeline`: where the tensor cores' row is blank, ask who holds the turn, and what it waits for."),
                Question(
                    say("From the template to overlap: how many percent less time?"),
                    answer=100 * (1 - metrics.time_s(overlap) / metrics.time_s(start)), unit="%", tolerance=0.05,
                    hint=say("One less new over old."),
                    why=say("That is the course: know what a kernel waits for, and move it under something else."),
                ),
            ),
        ),
    )  # fmt: skip
