"""Lesson: the backward pass needs P again; computing it anew is faster than having kept it."""

from __future__ import annotations

from dataclasses import replace

from ...simulator.results import metrics
from ...simulator.results.run import Run
from .course import Course, hbm_bytes
from .parts import Bars, Facts, Number, Question, Reading, Section, count, nbytes, say, seconds, share, times

TITLE = "Recomputation"
ABOUT = "the backward pass needs P, which nobody kept; computing it again beats fetching it"
READING = Reading(
    code=(
        ("simulator/schedules/backward/fa2.py", "the order of a backward that recomputes P"),
        ("kernels/triton/fa2_backward.py", "the kernel that does it"),
        ("kernels/reference.py", "the formulas it is held to"),
    ),
    papers=("FlashAttention (arXiv:2205.14135), section 3.1 and appendix B", "FlashAttention-2 (arXiv:2307.08691), Algorithm 2"),
)
LAYERS = 32
"""Of a model that is trained, an example."""
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
"""S and O; S again, and the gradients dV, dP, dQ, dK."""
SCHEDULES = ("standard", "fa2", "warp-specialized", "fa3")
"""Of the backward, from P through HBM to recomputation on Hopper's machines."""


def sections(course: Course) -> tuple[Section, ...]:
    """The lesson on the course's device."""
    return (_kept(course), _again(course), _predicted(course))


def _kept(course: Course) -> Section:
    work, gpu = course.workload, course.device
    lse = work.tensor_bytes["LSE"]
    return Section(
        "What would have to be kept",
        (
            say("Training goes through the network twice: forward, and then backward to find how each number should change. The backward pass of attention needs P. Standard attention keeps it in HBM from one pass to the other, for every layer of the network."),
            Facts(
                ("kept for the backward pass", ">one layer", ">all layers"),
                (
                    ("P", nbytes(course.standard_bytes), nbytes(LAYERS * course.standard_bytes)),
                    ("LSE, one number for each query", nbytes(lse), nbytes(LAYERS * lse)),
                ),
                say("All layers are {layers}, as an example. {name} has {memory} of HBM for everything.", layers=count(LAYERS), name=gpu.name, memory=nbytes(gpu.memory_bytes)),
            ),
            say("FlashAttention keeps only m + log(l) of each row, called LSE. With it any tile of P is one product and one exp away: P = exp(Q K^T - LSE)."),
            Question(
                say("How many times smaller is LSE than P?"),
                answer=course.standard_bytes / lse, unit="times", tolerance=0.02,
                hint=say("P has {tokens} numbers of {e} bytes for each query, LSE one of four bytes.", tokens=count(work.seqlen), e=count(work.element_bytes)),
                why=say("And the longer the sequence, the larger that ratio: P grows with its square, LSE only with its length."),
            ),
        ),
    )  # fmt: skip


def _again(course: Course) -> Section:
    work, gpu = course.workload, course.device
    peak = gpu.sms * gpu.tensor_rate(work.element_bytes) * gpu.max_clock_hz
    product = work.flops / FORWARD_PRODUCTS
    fetch, compute = course.standard_bytes / gpu.hbm_bytes_per_s, product / peak
    return Section(
        "Fetch it, or compute it again",
        (
            say(
                """Q K^T is {flops} for all heads. At the tensor cores' peak and at HBM's rate, for this course's workload:""",
                flops=Number(product, "FLOP"),
            ),
            Bars("to have P in the backward pass", (("write it in forward, read it back", seconds(2 * fetch)), ("compute Q K^T again", seconds(compute)))),
            say("More arithmetic, and less time: that is what IO-aware means. The backward pass has {more} products instead of {kept}, for it takes S again.", more=count(BACKWARD_PRODUCTS), kept=count(BACKWARD_PRODUCTS - 1)),
            Question(
                say("How many milliseconds does it take to read P once from HBM, at {hbm}?", hbm=Number(gpu.hbm_bytes_per_s, "B/s")),
                answer=fetch * 1e3, unit="ms", tolerance=0.03,
                hint=say("P is {size}.", size=nbytes(course.standard_bytes)),
                why=say("Computing it again takes {compute} at the peak: {ratio} less.", compute=seconds(compute), ratio=times(fetch / compute)),
            ),
            Question(
                say("Forward has {f} products, backward with recomputation {b}, all of one size. How many times the work of forward is backward?", f=count(FORWARD_PRODUCTS), b=count(BACKWARD_PRODUCTS)),
                answer=BACKWARD_PRODUCTS / FORWARD_PRODUCTS, unit="times", tolerance=0.01,
                hint=say("Divide."),
                why=say("Papers count backward passes so, whether or not a kernel recomputes."),
            ),
        ),
    )  # fmt: skip


def _predicted(course: Course) -> Section:
    backward = replace(course.workload, direction="backward")
    runs = course.runs(*course.able(*SCHEDULES), workload=backward)
    first, second, last = runs[0], runs[1], runs[-1]
    forward = course.run(last.schedule)
    longer = metrics.time_s(last) / metrics.time_s(forward)
    return Section(
        "What the model says",
        (
            say("The backward of `standard` reads P, and writes and reads two more matrices of its size, dP and dS. That of `{name}` goes over S tile by tile as its forward does, with keys outside, and computes P anew in each tile.", name=second.schedule),
            Facts(("schedule", ">HBM", ">time", ">tensor cores busy"), tuple(_row(run) for run in runs)),
            say("Fewer bytes alone do not make a fast kernel: `{name}` moves {fewer} fewer than `standard` and takes {part} of its time, for now its products wait for its arithmetic. The later lessons hide one under the other.", name=second.schedule, fewer=times(hbm_bytes(first) / hbm_bytes(second)), part=share(metrics.time_s(second) / metrics.time_s(first))),
            Question(
                say("The forward of `{name}` takes {forward}. How many times longer does its backward take?", name=last.schedule, forward=seconds(metrics.time_s(forward))),
                answer=longer, unit="times", tolerance=0.02,
                hint=say("Its backward takes {time}.", time=seconds(metrics.time_s(last))),
                why=say("By products alone it would be {products}. The rest has a name: {why}.", products=times(BACKWARD_PRODUCTS / FORWARD_PRODUCTS), why=last.bottleneck.why.rstrip(".")),
            ),
        ),
    )  # fmt: skip


def _row(run: Run) -> tuple:
    return (run.schedule, nbytes(hbm_bytes(run)), seconds(metrics.time_s(run)), share(metrics.tensor_utilization(run)))
