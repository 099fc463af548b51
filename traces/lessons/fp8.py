"""Lesson: eight-bit operands, their error with and without block scales and rotation, and what they bring in time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...simulator.results import metrics
from . import numerics
from .course import EIGHT_BIT, Course
from .parts import Bars, Facts, Question, Reading, Section, count, exact, nbytes, say, seconds, share, times

TITLE = "FP8"
ABOUT = "half the bytes and twice the rate for eight-bit numbers; scales and a rotation keep the error down"
NEEDS = EIGHT_BIT
READING = Reading(
    code=(
        ("traces/lessons/numerics.py", "everything this lesson computes, in NumPy"),
        ("kernels/cuda/fp8/config.py", "the tiles of our FP8 kernel"),
    ),
    papers=("FlashAttention-3 (arXiv:2407.08608), section 3.3 and Table 3", "QuIP (arXiv:2307.13304), incoherence processing"),
)
ROWS, BLOCK, SEED = 1024, 64, 0
OUTLIERS, SIZE = 0.001, 10.0
"""FlashAttention-3's test of FP8: one in a thousand entries is drawn with ten times the spread on top."""


def example(course: Course) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Q, K and V with outliers, as in FlashAttention-3 section 4.3: N(0, 1) + N(0, 100) Bernoulli(0.001)."""
    draw, shape = np.random.default_rng(SEED), (ROWS, course.workload.head_dim)
    return tuple(draw.normal(size=shape) + SIZE * draw.normal(size=shape) * (draw.random(shape) < OUTLIERS) for _ in range(3))


def errors(course: Course) -> dict[str, tuple[float, float]]:
    """By how Q and K are quantised: the error of O, V being exact, and the largest error of a score before its scaling."""
    q, k, v = example(course)
    turn, f = numerics.rotation(q.shape[1]), numerics.quantised
    ways = {
        "one scale for each matrix": (f(q), f(k)),
        "one scale for each block": (f(q, BLOCK), f(k, BLOCK)),
        "block scales, Q and K rotated": (f(q @ turn, BLOCK), f(k @ turn, BLOCK)),
    }
    wanted, scores = numerics.attention(q, k, v), q @ k.T
    return {
        name: (numerics.error(numerics.attention(a, b, v), wanted), float(np.abs(a @ b.T - scores).max()))
        for name, (a, b) in ways.items()
    }


def sections(course: Course) -> tuple[Section, ...]:
    """The lesson on the course's device."""
    return (_values(course), _errors(course), _time(course))


def _values(course: Course) -> Section:
    row = np.array([0.1, 0.3, 1.0, 1.06, 3.14159, 100.0, 300.0, 1000.0])
    rounded = numerics.e4m3(row)
    rows = tuple((f"{x:g}", exact(r), share(abs(r - x) / x)) for x, r in zip(row, rounded, strict=True))
    draw = example(course)[0]
    top = float(np.abs(draw).max())
    return Section(
        "What e4m3 can say",
        (
            say("FP8 for attention is e4m3: a sign, four bits of exponent, three of fraction. Between a power of two and the next there are only {n} values, and none is larger than {most}.", n=count(2**numerics.BITS), most=exact(numerics.MOST)),
            Facts(("value", ">in e4m3", ">off by"), rows),
            say("So a matrix is divided by a scale that brings its largest value to {most}, and the result is multiplied back.", most=exact(numerics.MOST)),
            Question(
                say("Here is a matrix whose largest entry is {top}. By which scale must it be divided?", top=exact(round(top, 2))),
                answer=top / numerics.MOST, unit="", tolerance=0.02,
                hint=say("Divided by it, {top} must become {most}.", top=exact(round(top, 2)), most=exact(numerics.MOST)),
                why=say("One large entry decides the scale for all: small entries may then fall where e4m3 is coarse."),
            ),
        ),
    )  # fmt: skip


def _errors(course: Course) -> Section:
    found = errors(course)
    first, *_, last = found.values()
    q = example(course)[0]
    turned = q @ numerics.rotation(q.shape[1])
    top, after = (exact(round(float(np.abs(x).max()), 2)) for x in (q, turned))
    return Section(
        "Scales and a rotation",
        (
            say("Models have outliers, a few entries much larger than the rest. Take FlashAttention-3's test: normal numbers, and one in {rare} with {size} times the spread on top. Here are {rows} queries and keys, computed now in NumPy; Q and K go through e4m3, V is left alone, and O is held to double precision:", rare=count(round(1 / OUTLIERS)), size=count(SIZE), rows=count(ROWS)),
            Bars("error of O, root mean square", tuple((name, exact(round(each, 6))) for name, (each, _) in found.items())),
            Bars("largest error of a number of Q K^T", tuple((name, exact(round(each, 2))) for name, (_, each) in found.items())),
            say("A scale for each block of {block} rows confines an outlier to its block. The rotation goes further: multiply Q and K by the same orthogonal matrix (a Hadamard matrix with random signs). Q K^T does not change, but each outlier is spread over its whole row: the largest entry of Q falls from {before} to {after}.", block=count(BLOCK), before=top, after=after),
            say("A large entry is rounded in large steps, and it is the large scores that decide a softmax: so it pays to have no large entries."),
            Question(
                say("How many times smaller is the error of O with block scales and rotation than with one scale for each matrix?"),
                answer=first[0] / last[0], unit="times", tolerance=0.05,
                hint=say("Divide the first bar of O by the last."),
                why=say("`fasim accuracy` repeats the paper's whole table, with V and P in FP8 too. There, as in the paper, the rotation brings nearly all of it."),
            ),
        ),
    )  # fmt: skip


def _time(course: Course) -> Section:
    eight = replace(course.workload, dtype="e4m3")
    half, small = course.run("fa3"), course.run("fa3", workload=eight)
    return Section(
        "What it brings",
        (
            say("The tensor cores multiply e4m3 {ratio} as fast as fp16, and every tile of Q, K and V is half as large. MUFU is not faster, so softmax weighs double.", ratio=times(course.device.fp8_ratio)),
            Facts(
                ("fa3 with", ">time", ">Q, K and V", ">tensor cores busy", ">MUFU busy"),
                tuple((run.workload.dtype, seconds(metrics.time_s(run)), nbytes(sum(run.workload.tensor_bytes[n] for n in "QKV")), share(metrics.tensor_utilization(run)), share(metrics.mufu_utilization(run))) for run in (half, small)),
            ),
            say("One more obstacle: WGMMA takes eight-bit operands only with the summed dimension contiguous in memory. K is stored so, V is not, and must be transposed on its way, in shared memory."),
            Question(
                say("How many times faster is e4m3 than fp16, as predicted?"),
                answer=metrics.time_s(half) / metrics.time_s(small), unit="times", tolerance=0.03,
                hint=say("Divide the times in the table."),
                why=say("Less than {ratio}: look at how busy tensor cores and MUFU are.", ratio=times(course.device.fp8_ratio)),
            ),
        ),
    )  # fmt: skip
