"""Lesson: a producer warp that only loads, consumers that only compute."""

from __future__ import annotations

from ...simulator.results import metrics
from .course import HOPPER, Course, source
from .parts import Question, Reading, Section, Shares, Timeline, count, say, seconds, share

TITLE = "Warp specialisation"
ABOUT = "one warp loads, warpgroups compute; nobody waits for memory, and softmax is left standing in the way"
NEEDS = HOPPER
READING = Reading(
    code=(
        ("simulator/schedules/forward/warp_specialized.py", "the schedule"),
        ("simulator/schedules/forward/fa2.py", "the same idea of tiles, every warp doing everything"),
    ),
    papers=("FlashAttention-3 (arXiv:2407.08608), section 3.1 and Algorithm 1",),
)


def sections(course: Course) -> tuple[Section, ...]:
    """The lesson on the course's device."""
    from ...simulator.schedules.forward import warp_specialized as module

    fa2, run = course.runs("fa2", "warp-specialized")
    faster = metrics.time_s(fa2) / metrics.time_s(run)
    exposed = run.breakdown.softmax
    return (
        Section(
            "Divide the work by kind",
            (
                say("In `fa2` every warp does everything: it asks for a load, waits, multiplies, takes the softmax. In `warp-specialized` one warp, the producer, only loads. It runs ahead as far as there is room in shared memory, here {stages} blocks of K and of V. Warpgroups, the consumers, find their blocks ready.", stages=count(run.tile.stages)),
                source(module.warp_specialized),
                say("The loop of the producer has no wait in it: `tma` itself waits until the place is free. `gemm` returns at once; `wait` is where a warpgroup stops for the result."),
                Question(
                    say("How many times faster is `warp-specialized` ({new}) than `fa2` ({old})?", new=seconds(metrics.time_s(run)), old=seconds(metrics.time_s(fa2))),
                    answer=faster, unit="times", tolerance=0.02,
                    hint=say("Divide the times."),
                    why=say("Part of it is WGMMA itself, which reads its operands from shared memory at the full rate; `fa2` brings them through registers with the older instruction mma.sync."),
                ),
            ),
        ),
        Section(
            "See it run",
            (
                say("Time goes to the right. WG0 and WG1 are the two warpgroups; below are the machines. S and O with a number are the products of a block, P its softmax."),
                Timeline(course.timeline("warp-specialized"), 1, 3, say("The producer is far ahead. Where the row of the tensor cores is blank, both warpgroups are in their softmax at once: nothing keeps them apart.")),
                Shares((fa2, run)),
                say("That is where the tensor cores' time goes, over the whole run. Slow GEMMs are the price of the older instruction mma.sync, the last wave is SMs that have run out of tiles, and exposed softmax is time in which they wait for someone to finish a softmax."),
                Question(
                    say("The whole run takes {time}. How many microseconds of it do the tensor cores wait for softmax?", time=seconds(metrics.time_s(run))),
                    answer=exposed * metrics.time_s(run) * 1e6, unit="µs", tolerance=0.03,
                    hint=say("Take the share of exposed softmax, column B, of the time."),
                    why=say("The next two lessons get most of these {part} back, each in its own way.", part=share(exposed)),
                ),
            ),
        ),
    )  # fmt: skip
