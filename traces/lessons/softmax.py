"""Lesson: softmax of one row, in one pass that overflows, in three passes, and online; then the bytes of each."""

from __future__ import annotations

import numpy as np

from .course import Course
from .parts import Facts, Question, Reading, Section, count, exact, nbytes, say, seconds

TITLE = "Softmax three ways"
ABOUT = "the row's largest score is needed first and known last; the online softmax corrects itself instead of waiting"
READING = Reading(
    code=(
        ("simulator/schedules/forward/standard.py", "the three passes over S in the second kernel"),
        ("simulator/schedules/forward/standard_online.py", "the same kernel with the online softmax"),
        ("kernels/triton/fa2.py", "the online softmax in a kernel that runs"),
    ),
    papers=("Online normalizer calculation for softmax (arXiv:1805.02867)", "FlashAttention (arXiv:2205.14135), section 3.1"),
)
SCORES = (1.0, 3.0, 9.0, 2.0, 0.0, 12.0, 4.0, 11.0)
"""The example's row; its first half lies below its second, so that the online softmax has something to correct."""


def sections(course: Course) -> tuple[Section, ...]:
    """The lesson on the course's device."""
    row = np.array(SCORES)
    return (_overflow(row), _three_passes(row), _online(row), _bytes(course))


def online(row: np.ndarray, block: int) -> list[tuple[float, float, float]]:
    """After each block: the largest score so far, the factor that corrects what was summed before, and the sum."""
    most, total, steps = -np.inf, 0.0, []
    for start in range(0, len(row), block):
        part = row[start : start + block]
        new = max(most, float(part.max()))
        factor = float(np.exp(most - new))
        total = total * factor + float(np.exp(part - new).sum())
        most = new
        steps.append((most, factor, total))
    return steps


def _overflow(row: np.ndarray) -> Section:
    with np.errstate(over="ignore", invalid="ignore"):
        naive = np.exp(row.astype(np.float16))
        weights = naive / naive.sum()
    largest = float(np.finfo(np.float16).max)
    rows = tuple((f"{x:g}", exact(e), exact(w)) for x, e, w in zip(row, naive, weights, strict=True))
    return Section(
        "As it stands in the textbook",
        (
            say("The weight of a score x in its row is exp(x) over the sum of exp of all scores in the row. Here is a row of {n}, computed just so by NumPy in fp16:", n=count(len(row))),
            Facts(("score", ">exp(score)", ">weight"), rows),
            say(
                """fp16 holds nothing above {largest}, and exp({top}) is {value}. One score too large, and the row is lost: inf divided
                by inf is not a number (nan).""",
                largest=exact(largest), top=exact(row.max()), value=exact(np.exp(row.max())),
            ),
            Question(
                say("From which score on does exp overflow fp16? (The natural logarithm of {largest}.)", largest=exact(largest)),
                answer=float(np.log(largest)), unit="", tolerance=0.01,
                hint=say("In Python: import math; math.log of that number."),
                why=say("Scores of trained models go higher than that, so no kernel computes exp of a score as it is."),
            ),
        ),
    )  # fmt: skip


def _three_passes(row: np.ndarray) -> Section:
    top = float(row.max())
    parts = np.exp(row - top)
    rows = tuple(
        (f"{x:g}", exact(x - top), exact(round(e, 6)), exact(round(e / parts.sum(), 6))) for x, e in zip(row, parts, strict=True)
    )
    return Section(
        "Three passes",
        (
            say(
                """Take the row's largest score m away first. exp(x - m) over its sum is the same weight, and no exp is larger than one.
                But now the row is needed three times: to find m, to sum exp(x - m), and to divide by that sum."""
            ),
            Facts(("score", ">score - m", ">exp(score - m)", ">weight"), rows),
            Question(
                say("What is l, the sum of exp(score - m) over the row?"),
                answer=float(parts.sum()), unit="", tolerance=0.01,
                hint=say("Add the third column; the two largest scores make nearly all of it."),
                why=say("m and l of each row are all that the backward pass needs to know: kernels store m + log(l), called LSE, here {lse}.", lse=exact(round(top + float(np.log(parts.sum())), 4))),
            ),
        ),
    )  # fmt: skip


def _online(row: np.ndarray) -> Section:
    block = len(row) // 2
    steps = online(row, block)
    rows = tuple(
        (", ".join(f"{x:g}" for x in row[n * block : (n + 1) * block]), exact(m), exact(round(factor, 6)), exact(round(total, 6)))
        for n, (m, factor, total) in enumerate(steps)
    )
    return Section(
        "Online, one block after another",
        (
            say(
                """What if the row comes in blocks, and each must be used up before the next is there? Keep the largest score so far, m,
                and the sum so far, l. When a block brings a larger m, all that was summed before is too large by the same factor,
                exp(m_new - m_old): multiply it by exp(m_old - m_new), and go on."""
            ),
            Facts(("block of scores", ">m", ">factor", ">l"), rows),
            say("The last l is that of three passes. The output O is corrected by the same factor, so P never needs to be whole: that is what lets FlashAttention walk over the keys block by block."),
            Question(
                say("The second block raises m from {before} to {after}. By which factor is the sum of the first block multiplied?", before=exact(steps[0][0]), after=exact(steps[1][0])),
                answer=steps[1][1], unit="", tolerance=0.02,
                hint=say("exp of the old m less the new one. It is smaller than one."),
                why=say("The first block counts for little once larger scores are known, and the factor says how little."),
            ),
        ),
    )  # fmt: skip


def _bytes(course: Course) -> Section:
    three, one = course.runs("standard", "standard-online")
    rows = tuple(
        (
            run.schedule,
            nbytes(run.traffic.by_tensor["S"].l2_read),
            nbytes(run.traffic.by_tensor["S"].hbm_read),
            seconds(run.cycles / run.sm_clock_hz),
        )
        for run in (three, one)
    )
    return Section(
        "What it costs to look three times",
        (
            say("In `standard`, the second kernel reads S three times; in `standard-online` it reads S twice, once for m and l together and once for the weights. The model counts what the SMs ask of L2, and what HBM has to deliver:"),
            Facts(("schedule", ">S read from L2", ">S read from HBM", ">time of all kernels"), rows),
            say("A row is still in L2 when it is read again, so HBM hardly notices. The way from L2 to the SMs does."),
            Question(
                say("How many GB less of S does the online softmax ask of L2?"),
                answer=(three.traffic.by_tensor["S"].l2_read - one.traffic.by_tensor["S"].l2_read) / 1e9, unit="GB", tolerance=0.03,
                hint=say("Take the second entry of the first column from the first."),
                why=say("That is one pass over S, all {size} of it.", size=nbytes(course.standard_bytes)),
            ),
        ),
    )  # fmt: skip
