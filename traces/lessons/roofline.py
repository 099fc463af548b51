"""Lesson: what each resource alone would allow, and where schedules stand under it."""

from __future__ import annotations

from ...simulator.results.roofline import roofline
from ...simulator.results.run import Run
from ..standing import RESOURCES, standing
from .course import Course
from .parts import Facts, Number, Question, Reading, Roofs, Section, count, rate, say, seconds, share

TITLE = "A roofline with four roofs"
ABOUT = "four resources, each with a least time of its own; the longest of them is what no schedule can beat"
READING = Reading(
    code=(
        ("simulator/results/roofline.py", "the four bounds, each a line"),
        ("simulator/results/bottleneck.py", "what keeps a run below its bound"),
    ),
    papers=(
        "Roofline: an insightful visual performance model (Williams, Waterman, Patterson, 2009)",
        "FlashAttention-3 (arXiv:2407.08608), section 2.2",
    ),
)
SHORT = 512


def sections(course: Course) -> tuple[Section, ...]:
    """The lesson on the course's device."""
    runs = course.runs(*course.able("standard", "fa2", "fa3"))
    return (_bounds(course), _plot(course, runs))


def _bounds(course: Course) -> Section:
    work, gpu = course.workload, course.device
    roof = roofline(work, gpu, gpu.max_clock_hz)
    alone = {name: getattr(roof, f"{name}_cycles") / roof.clock_hz for name in RESOURCES}
    what = {
        "tensor": "both products",
        "mufu": "one exp for each number of S",
        "hbm": "Q, K and V in, O and LSE out, once",
        "l2": "the same bytes through L2",
    }
    by_name = {ceiling.name: ceiling for ceiling in roof.ceilings}
    peaks = {"tensor": rate(by_name["tensor"].flops_per_s, "FLOP"), "mufu": Number(by_name["mufu"].flops_per_s / 4 / work.head_dim / 1e12, "T exp/s"),
             "hbm": rate(gpu.hbm_bytes_per_s, "B"), "l2": rate(by_name["l2"].bytes_per_s, "B")}  # fmt: skip
    exps = work.pairs * work.batch * work.heads
    return Section(
        "Four resources, four least times",
        (
            say("Suppose one resource were all that mattered, and it never waited. How long would it take? Nothing can be faster than the longest of these:"),
            Facts(("resource", "what it must do", ">at most", ">least time"), tuple((RESOURCES[name], what[name], peaks[name], seconds(alone[name])) for name in RESOURCES)),
            say("MUFU is the unit of each SM that computes exp (and other special functions). It is slow: {d} numbers wide, a score costs the tensor cores {flops} operations and MUFU one, and still MUFU needs {part} of the tensor cores' time.",
                d=count(work.head_dim), flops=count(4 * work.head_dim), part=share(alone["mufu"] / alone["tensor"])),
            Question(
                say("How many exp does this workload need, in thousand millions (G)? One for each query and key of each head."),
                answer=exps / 1e9, unit="G", tolerance=0.02,
                hint=say("{heads} heads, {tokens} queries, as many keys.", heads=count(work.heads * work.batch), tokens=count(work.seqlen)),
                why=say("At {rate} that is {time}. While MUFU does this, tensor cores should be doing something: that is what FlashAttention-3 is about.", rate=peaks["mufu"], time=seconds(alone["mufu"])),
            ),
        ),
    )  # fmt: skip


def _plot(course: Course, runs: tuple[Run, ...]) -> Section:
    work, gpu = course.workload, course.device
    found = standing(runs, gpu)
    short = roofline(type(work)(work.batch, work.heads, SHORT, work.head_dim), gpu, gpu.max_clock_hz)
    last = found.marks[-1]
    return Section(
        "Where schedules stand",
        (
            say("Draw FLOP/s upwards and FLOP for each byte of HBM to the right. A resource that computes is a flat roof; a memory is a roof that rises with the work done on each byte. Each letter is a schedule, predicted."),
            Roofs(found, say("A schedule can be low for two reasons: it stands under the sloping roof (it moves too many bytes), or under a flat one that it does not reach (it waits). `standard` is the first kind, `fa2` the second.")),
            Question(
                say("The tensor cores reach {peak}, HBM {hbm}. From how many FLOP for each byte on is HBM no longer the lower roof?", peak=rate(found.roofline.ceilings[0].flops_per_s, "FLOP"), hbm=rate(gpu.hbm_bytes_per_s, "B")),
                answer=found.roofline.ridge_flops_per_byte, unit="FLOP/B", tolerance=0.03,
                hint=say("Where both roofs are of one height: divide the one by the other."),
                why=say("This workload has {intensity} FLOP for each byte that must move, far to the right. At {short} tokens it would be {less}.", intensity=count(found.roofline.arithmetic_intensity), short=count(SHORT), less=count(short.arithmetic_intensity)),
            ),
            Question(
                say("At its own clock, what share of its bound does `{name}` reach, in percent?", name=last.schedule),
                answer=100 * last.share_of_bound, unit="%", tolerance=0.03,
                hint=say("It stands in the table, in the row `of the bound`."),
                why=say("What is missing has a name: {why}.", why=last.bottleneck.why.rstrip(".")),
            ),
        ),
    )  # fmt: skip
