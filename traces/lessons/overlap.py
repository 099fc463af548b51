"""Lesson: a warpgroup's own softmax under its own product of the block before."""

from __future__ import annotations

from ...simulator.results import metrics
from .course import HOPPER, Course, source
from .parts import Bars, Beside, Facts, Question, Reading, Section, Shares, Timeline, count, say, seconds, share

TITLE = "Overlap within a warpgroup"
ABOUT = "issue the next product before the softmax, and let it run underneath: two stages, three stages, and fa3"
NEEDS = HOPPER
READING = Reading(
    code=(
        ("simulator/schedules/forward/overlap_2stage.py", "two stages"),
        ("simulator/schedules/forward/overlap_3stage.py", "three stages"),
        ("simulator/schedules/forward/fa3.py", "two stages and pingpong together"),
    ),
    papers=("FlashAttention-3 (arXiv:2407.08608), section 3.2, Algorithm 2, and appendix B.3",),
)
_THREADS = 128
"""Of a warpgroup."""


def sections(course: Course) -> tuple[Section, ...]:
    """The lesson on the course's device."""
    from ...simulator.schedules.forward import overlap_2stage as module

    plain, two, three, both = course.runs("warp-specialized", "overlap-2stage", "overlap-3stage", "fa3")
    tile = two.tile
    rows = tile.block_m // tile.consumers
    registers = rows * tile.block_n / _THREADS
    blocks = {run.schedule: -(-course.workload.seqlen_k // run.tile.block_n) for run in (two, three)}
    return (
        Section(
            "Two stages",
            (
                say("A product is issued, and runs on its own. So issue S of the next block, and O of this one; and while they run, take the softmax of the next block as soon as its S is there, under O of this one. No second warpgroup is needed for that."),
                source(module.overlap_2stage),
                Timeline(course.timeline("overlap-2stage"), 1, 3, say("Each warpgroup has two rows now, for it does two things at once: above, what the tensor cores execute for it; below, what it does itself. Its softmax P begins as soon as S of that block is there, and O of the block before may still be running. The warpgroups have fallen into turns by themselves, and tensor cores and MUFU are busy at the same time.")),
                Question(
                    say("By how many percent does the time fall from `warp-specialized` ({old}) to `overlap-2stage` ({new})?", old=seconds(metrics.time_s(plain)), new=seconds(metrics.time_s(two))),
                    answer=100 * (1 - metrics.time_s(two) / metrics.time_s(plain)), unit="%", tolerance=0.05,
                    hint=say("One less new over old."),
                    why=say("Exposed softmax went from {old} to {new}.", old=share(plain.breakdown.softmax), new=share(two.breakdown.softmax)),
                ),
            ),
        ),
        Section(
            "What it costs: registers",
            (
                say("While a softmax runs under a product, two blocks are alive: S of the next in fp32, and P of this one. With three stages a second S is alive as well. A thread has at most {most} registers of four bytes, and O takes {o} of them here.", most=count(course.device.max_registers_per_thread), o=count(rows * course.workload.head_dim / _THREADS)),
                Facts(
                    ("schedule", ">keys in a block", ">blocks", ">time"),
                    tuple((run.schedule, count(run.tile.block_n), count(blocks[run.schedule]), seconds(metrics.time_s(run))) for run in (two, three)),
                ),
                Question(
                    say("S of a block is {m} x {n} numbers in fp32, spread over the {t} threads of a warpgroup. How many registers does it take in each thread?", m=count(rows), n=count(tile.block_n), t=count(_THREADS)),
                    answer=registers, unit="registers", tolerance=0.01,
                    hint=say("One register holds one number: divide."),
                    why=say("A second S would take as many again, beside O and P. So three stages must take narrower blocks, {n} keys, and that costs more than it brings.", n=count(three.tile.block_n)),
                ),
            ),
        ),
        Section(
            "Both at once",
            (
                say("`fa3` has the two stages and the turns of pingpong. The shares say what is left over:"),
                Beside((course.timeline("warp-specialized"), course.timeline("fa3")), 3, 4, say("The same two blocks, from where this lesson began to where it ends, to one scale. The row of the tensor cores has hardly a gap left, and under each softmax stands whose product hides it.")),
                Shares((plain, two, both)),
                Bars("time, predicted", tuple((run.schedule, seconds(metrics.time_s(run))) for run in (plain, two, three, both))),
                Question(
                    say("For which share of the time do the tensor cores do useful work in `fa3`, in percent?"),
                    answer=100 * both.breakdown.useful, unit="%", tolerance=0.02,
                    hint=say("It is the first row of the shares, column C."),
                    why=say("On this workload overlap alone comes as far: once tensor cores are this busy, it is the clock that decides, and that is lesson `clock`."),
                ),
            ),
        ),
    )  # fmt: skip
