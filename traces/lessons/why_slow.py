"""Lesson: the bytes that standard attention moves, and the order of the schedules that stop moving them."""

from __future__ import annotations

from ...simulator.results import metrics
from ...simulator.results.run import Run
from ..published import beside
from .course import Course, hbm_bytes
from .parts import (
    Bars,
    Cell,
    Facts,
    Hierarchy,
    Level,
    Number,
    Question,
    Reading,
    Say,
    Section,
    count,
    cycles,
    nbytes,
    rate,
    say,
    seconds,
    share,
    times,
)  # fmt: skip

TITLE = "Why attention is slow"
ABOUT = "a GPU computes faster than it can fetch; standard attention fetches a matrix nobody asked for"
READING = Reading(
    code=(
        ("simulator/schedules/forward/standard.py", "the three kernels of standard attention"),
        ("simulator/devices/h200.toml", "every size, rate and latency used here, with its source"),
    ),
    papers=("FlashAttention (arXiv:2205.14135), section 2 and Figure 2", "FlashAttention-3 (arXiv:2407.08608), section 2.2"),
)
LADDER = ("standard", "fa1-published", "fa2", "fa3")
"""The schedules in the order in which they were found, each faster than the one before."""
AS_SHIPPED = {"fa2": "fa2-pytorch"}
"""Schedules of the ladder of which somebody else's program was measured, and the schedule that stands for that program."""


def sections(course: Course) -> tuple[Section, ...]:
    """The lesson on the course's device."""
    runs = course.runs(*course.able(*LADDER))
    return (_attention(course), _memory(course), _standard(course, runs[0]), _ladder(course, runs))


def _attention(course: Course) -> Section:
    work = course.workload
    return Section(
        "Two matrix products and a softmax",
        (
            say(
                """Attention takes three matrices for each head: queries Q, keys K and values V. It computes the scores
                S = Q K^T, turns each row of S into weights P = softmax(S), and returns O = P V. In NumPy that is three lines."""
            ),
            say(
                """This course uses one workload: {batch} sequences of {seqlen} tokens, {heads} heads each, every query, key and
                value a vector of {dim} numbers in fp16, {element} bytes each. So every head has a Q, K, V and O of {seqlen} x {dim}, and
                an S and a P of {seqlen} x {seqlen}.""",
                batch=count(work.batch), seqlen=count(work.seqlen), heads=count(work.heads), dim=count(work.head_dim),
                element=count(work.element_bytes),
            ),
            Facts(
                ("matrix", ">numbers in each head", ">bytes, all heads"),
                (
                    *((name, count(work.seqlen * work.head_dim), nbytes(work.tensor_bytes[name])) for name in "QKVO"),
                    *((name, count(work.seqlen**2), nbytes(course.standard_bytes)) for name in "SP"),
                ),
                say("What is asked for is O. S and P are far larger than all that goes in and comes out."),
            ),
            Question(
                say(
                    """Twice as many tokens, {longer}: how many GB is S then? (A GB is a thousand million bytes.)
                    Work out heads x queries x keys x bytes.""",
                    longer=count(2 * work.seqlen),
                ),
                answer=4 * course.standard_bytes / 1e9,
                unit="GB",
                tolerance=0.02,
                hint=say("There are {heads} heads in all, and S has a number for every pair of a query and a key.", heads=count(work.heads * work.batch)),
                why=say("S grows with the square of the length, so twice the tokens need four times the bytes; Q, K, V and O only double."),
            ),
        ),
    )  # fmt: skip


def _memory(course: Course) -> Section:
    gpu = course.device
    per_chip = gpu.sms * gpu.max_clock_hz
    peak = gpu.sms * gpu.tensor_rate(course.workload.element_bytes) * gpu.max_clock_hz
    each = peak / gpu.hbm_bytes_per_s
    levels = (
        Level("registers", "in each SM", nbytes(4 * gpu.registers_per_sm * gpu.sms), None, None),
        Level("shared memory", "in each SM", nbytes(gpu.smem_bytes_per_sm * gpu.sms), rate(gpu.smem_bytes_per_cycle * per_chip, "B"),
              cycles(gpu.smem_latency_cycles)),
        Level("L2 cache", "one for the chip", nbytes(gpu.l2_bytes), rate(gpu.l2_bytes_per_cycle * gpu.max_clock_hz, "B"),
              cycles(gpu.l2_hit_latency_cycles)),
        Level("HBM", "beside the chip", nbytes(gpu.memory_bytes), rate(gpu.hbm_bytes_per_s, "B"), cycles(gpu.hbm_latency_cycles)),
    )  # fmt: skip
    return Section(
        "Where numbers live",
        (
            say(
                """A GPU is many small processors, called streaming multiprocessors or SMs ({name} has {sms}), and one large memory,
                HBM. What an SM computes with must be in its own registers or shared memory (SMEM). In between is a cache, L2, that
                all SMs share. Each level further out answers later and delivers less. A cycle, in which these delays are counted,
                is one tick of the SMs' clock: {cycle} at {clock}.""",
                name=gpu.name, sms=count(gpu.sms), cycle=seconds(1 / gpu.max_clock_hz), clock=Number(gpu.max_clock_hz, "Hz"),
            ),
            Hierarchy(levels),
            say(
                """Matrix products run on tensor cores, which together can do {peak}. HBM delivers {hbm}. So for each byte that comes
                from HBM the tensor cores must find about {each} operations to do, or they wait.""",
                peak=rate(peak, "FLOP"), hbm=rate(gpu.hbm_bytes_per_s, "B"), each=count(each),
            ),
            Question(
                say(
                    """Adding two fp16 vectors reads two numbers of {element} bytes and writes one, for one operation. At {hbm}, how many
                    TFLOP/s can that reach at most, however fast the SMs are?""",
                    element=count(course.workload.element_bytes), hbm=rate(gpu.hbm_bytes_per_s, "B"),
                ),
                answer=gpu.hbm_bytes_per_s / (3 * course.workload.element_bytes) / 1e12,
                unit="TFLOP/s",
                tolerance=0.02,
                hint=say("Three numbers cross HBM for each operation. Divide bytes per second by bytes per operation."),
                why=say(
                    """That is {part} of what the tensor cores could do: the addition is bound by memory. A good kernel does much work on
                    each byte while it is near.""",
                    part=share(gpu.hbm_bytes_per_s / (3 * course.workload.element_bytes) / peak),
                ),
            ),
        ),
    )  # fmt: skip


def _standard(course: Course, run: Run) -> Section:
    gpu, work, traffic = course.device, course.workload, run.traffic
    scores = 4 * course.standard_bytes
    moved = hbm_bytes(run)
    rows = tuple(
        (name, nbytes(each.hbm_read), nbytes(each.hbm_write))
        for name, each in traffic.by_tensor.items()
        if each.hbm_read or each.hbm_write
    )
    return Section(
        "What standard attention does",
        (
            say(
                """The three lines become three programs for the GPU (kernels), one after the other. The first writes S to HBM. The
                second reads it and writes P. The third reads P. Neither S nor P fits into L2, so they really make the trip. Here is
                what the model counts for `standard`:"""
            ),
            Facts(("matrix", ">read from HBM", ">written to HBM"), rows),
            say(
                """Of {moved} in all, S and P are {part}. The two products need {flops}, which the tensor cores could do in {compute};
                the bytes alone take {memory}. The model predicts {time} for the whole.""",
                moved=nbytes(moved), part=share(hbm_bytes(run, "S", "P") / moved), flops=Number(work.flops, "FLOP"),
                compute=seconds(work.flops / (gpu.sms * gpu.tensor_rate(work.element_bytes) * gpu.max_clock_hz)),
                memory=seconds(moved / gpu.hbm_bytes_per_s), time=seconds(metrics.time_s(run)),
            ),
            Question(
                say(
                    """S is {size}. It is written and read once, and so is P. How many milliseconds is HBM busy with S and P alone, at
                    {hbm}?""",
                    size=nbytes(course.standard_bytes), hbm=rate(gpu.hbm_bytes_per_s, "B"),
                ),
                answer=scores / gpu.hbm_bytes_per_s * 1e3,
                unit="ms",
                tolerance=0.03,
                hint=say("Four times that size crosses HBM. Divide by the rate, then seconds to milliseconds."),
                why=say(
                    """All of {scores} moves only because S and P exist between kernels. No product needs it: computed a piece at a time,
                    S never has to leave the SM. That is the idea of FlashAttention.""",
                    scores=nbytes(scores),
                ),
            ),
        ),
    )  # fmt: skip


def _ladder(course: Course, runs: tuple[Run, ...]) -> Section:
    first, last = runs[0], runs[-1]
    fa2 = next(run for run in runs if run.schedule == "fa2")
    fa3 = (say("`fa3` has the bytes of `fa2` and keeps the tensor cores busy while it computes the softmax."),) if last is not fa2 else ()
    rows = tuple(
        (run.schedule, nbytes(hbm_bytes(run)), seconds(metrics.time_s(run)), Number(metrics.tflops(run) * 1e12, "FLOP/s"),
         share(metrics.tensor_utilization(run)))
        for run in runs
    )  # fmt: skip
    return Section(
        "The same arithmetic in several orders",
        (
            say(
                """All of these compute the same O with the same products. What differs is the order, and with it what must travel.
                `fa1` keeps S on the chip, but reads and writes O again and again (`fa1-published` is FlashAttention-1 as it was shipped);
                `fa2` leaves O in registers."""
            ),
            *fa3,
            Bars("time, predicted", tuple((run.schedule, seconds(metrics.time_s(run))) for run in runs)),
            Bars("bytes over HBM, predicted", tuple((run.schedule, nbytes(hbm_bytes(run))) for run in runs)),
            Facts(("schedule", ">HBM", ">time", ">throughput", ">tensor cores busy"), rows),
            *_measured(course, runs),
            Question(
                say("How many times fewer bytes does `fa2` move over HBM than `standard`?"),
                answer=hbm_bytes(first) / hbm_bytes(fa2),
                unit="times",
                tolerance=0.05,
                hint=say("Divide the two entries in the column HBM."),
                why=say(
                    """And `{last}` is {faster} faster than `standard`, with {fewer} fewer bytes: once bytes no longer bind, something else
                    does. The later lessons are about that something.""",
                    last=last.schedule, faster=times(metrics.time_s(first) / metrics.time_s(last)), fewer=times(hbm_bytes(first) / hbm_bytes(last)),
                ),
            ),
        ),
    )  # fmt: skip


def _measured(course: Course, runs: tuple[Run, ...]) -> tuple[Say | Facts, ...]:
    """What hardware took at this very workload: our own recordings, and published figures with the prediction at their clock."""
    rows: list[tuple[Cell, ...]] = []
    shipped = [course.run(AS_SHIPPED[run.schedule]) for run in runs if run.schedule in AS_SHIPPED]
    for run in (*runs, *shipped):
        ours = course.measured(run.schedule)
        if ours:
            gpu = f"our kernel on an {ours.measurement.gpu}"
            rows.append((run.schedule, seconds(metrics.time_s(ours)), seconds(metrics.time_s(run)), gpu))
        for each in beside(run, course.device):
            flops = run.workload.paper_flops
            theirs = f"{each.bar.implementation}, {each.bar.gpu}"
            rows.append(
                (run.schedule, seconds(flops / each.bar.tflops / 1e12), seconds(flops / each.predicted_tflops / 1e12), theirs)
            )
    known = {row[0] for row in rows}
    missing = [run.schedule for run in runs if not known & {run.schedule, AS_SHIPPED.get(run.schedule)}]
    unknown = say("Nobody's measurement of {names} at this workload on {device} is among the recordings.",
                  names=", ".join(missing), device=course.device.name)  # fmt: skip
    if not rows:
        return (unknown,)
    return (
        say("And on hardware, where somebody measured this very workload, with the prediction at the clock it ran at:"),
        Facts(("schedule", ">measured", ">predicted", "what was measured"), tuple(rows), unknown if missing else None),
    )
