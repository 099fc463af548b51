"""Lesson: the machines of a Hopper SM that work by themselves, and what each needs for one tile."""

from __future__ import annotations

from ...simulator.language.view import K_PER_STEP_BYTES
from ...simulator.results.roofline import SUB_PARTITIONS, WARP_LANES
from .course import HOPPER, Course
from .parts import Bars, Facts, Listing, Question, Reading, Section, count, cycles, nbytes, say, times

TITLE = "Hopper's machines"
ABOUT = "copies and matrix products run without the warp that asked for them; barriers say when they are done"
NEEDS = HOPPER
READING = Reading(
    code=(
        ("simulator/language/verbs.py", "what a schedule may ask of these machines, verb by verb"),
        ("simulator/devices/h200.toml", "their rates and latencies, each with its source"),
    ),
    papers=("FlashAttention-3 (arXiv:2407.08608), section 2.2", "PTX ISA, asynchronous warpgroup instructions and mbarrier"),
)


def sections(course: Course) -> tuple[Section, ...]:
    """The lesson on the course's device."""
    return (_machines(course), _one_tile(course), _loads(course))


def _machines(course: Course) -> Section:
    gpu = course.device
    return Section(
        "Who does what",
        (
            say("A warp is {lanes} threads that go in step; four warps make a warpgroup. An SM has {parts} quarters, each of which starts one warp instruction in a cycle. If a warp waits for a result, another may take its turn; that is how a GPU hides delays.", lanes=count(WARP_LANES), parts=count(SUB_PARTITIONS)),
            say("Hopper goes further: its two busiest machines need no warp at all while they work."),
            Facts(
                ("machine", "what it does", "who waits"),
                (
                    ("TMA", "copies a whole tile between HBM and shared memory", "nobody: one thread asks, a barrier counts the bytes"),
                    ("WGMMA", "a matrix product from shared memory on the tensor cores", "nobody, until its result is asked for"),
                    ("MUFU", "exp, one number for each lane", "the warp that needs the number"),
                    ("FMA, ALU", "the rest of softmax: max, sums, scaling", "the warp"),
                    ("barriers", "say that a tile is there, or may be overwritten", "whoever asks too early"),
                ),
            ),
            Facts(
                ("after asking", ">cycles"),
                (
                    ("a copy by TMA arrives from L2", count(gpu.l2_hit_latency_cycles + gpu.tma_latency_cycles)),
                    ("and from HBM", count(gpu.hbm_latency_cycles + gpu.tma_latency_cycles)),
                    ("a product's result is there, behind its last step", count(gpu.wgmma_latency_cycles)),
                    ("a barrier's arrival is seen", count(gpu.mbarrier_arrive_cycles)),
                ),
            ),
            Question(
                say("The first byte from HBM takes {late}, and TMA adds {tma}. At a clock of {clock} MHz, how many nanoseconds are that together?", late=cycles(gpu.hbm_latency_cycles), tma=cycles(gpu.tma_latency_cycles), clock=count(gpu.max_clock_hz / 1e6)),
                answer=(gpu.hbm_latency_cycles + gpu.tma_latency_cycles) / gpu.max_clock_hz * 1e9, unit="ns", tolerance=0.03,
                hint=say("Add the cycles; a cycle is a thousand over MHz, in nanoseconds."),
                why=say("In that time the tensor cores of one SM could do {flops} operations. So loads must be asked for long before they are needed.", flops=count((gpu.hbm_latency_cycles + gpu.tma_latency_cycles) * gpu.tensor_rate(2))),
            ),
        ),
    )  # fmt: skip


def _one_tile(course: Course) -> Section:
    work, gpu = course.workload, course.device
    tile = course.run("fa3").tile
    rows = tile.block_m // tile.consumers
    product = 2 * rows * tile.block_n * work.head_dim / gpu.tensor_rate(work.element_bytes)
    exps = rows * tile.block_n / (SUB_PARTITIONS * WARP_LANES / gpu.mufu_cycles)
    return Section(
        "One block for one warpgroup",
        (
            say("In `fa3` a warpgroup has {m} queries and meets {n} keys at a time. For one such block it needs two products and an exp for each score:", m=count(rows), n=count(tile.block_n)),
            Bars("cycles, if each machine had nothing else to do", (("S = Q K^T, tensor cores", cycles(product)), ("exp, MUFU", cycles(exps)), ("O += P V, tensor cores", cycles(product)))),
            say("The rest of the softmax (largest score, sums, scaling) uses FMA and ALU on top. If a warpgroup does one after the other, tensor cores stand idle for all of the softmax; that is what the next lessons take away."),
            Question(
                say("An SM's tensor cores do {rate} operations in a cycle. A product of {m} x {n} x {d} is twice that many operations. How many cycles is it?", rate=count(gpu.tensor_rate(work.element_bytes)), m=count(rows), n=count(tile.block_n), d=count(work.head_dim)),
                answer=product, unit="cycles", tolerance=0.02,
                hint=say("Multiply the three and two, and divide by the rate."),
                why=say("Two products a block, {both} in all, and no less, whatever the schedule.", both=cycles(2 * product)),
            ),
            Question(
                say("MUFU takes {lanes} numbers in a cycle, all quarters together. How many cycles do {m} x {n} exp take?", lanes=count(SUB_PARTITIONS * WARP_LANES / gpu.mufu_cycles), m=count(rows), n=count(tile.block_n)),
                answer=exps, unit="cycles", tolerance=0.02,
                hint=say("Multiply, and divide."),
                why=say("Both products take {ratio} that. If exp hides under products, it costs nothing.", ratio=times(2 * product / exps)),
            ),
        ),
    )  # fmt: skip


def _loads(course: Course) -> Section:
    from ...simulator.language.program import disassemble
    from ...simulator.predict import programs

    tile = course.run("fa3").tile
    text = disassemble(programs(course.workload, "warp-specialized", course.device, kv_blocks=1)[0])
    stream = text[text.index("\nWG0:") + 1 :].split("\n\n")[0]
    shown = "\n".join(line.removeprefix("    ") for line in stream.splitlines() if "COMPUTE" not in line)
    block = tile.block_n * course.workload.head_dim * course.workload.element_bytes
    return Section(
        "What a schedule says",
        (
            say("A schedule is a list of such requests for each warp. This is what one warpgroup of `warp-specialized` says for a single block of keys, without its arithmetic (`fasim disasm warp-specialized` prints it all):"),
            Listing(shown, "fasim disasm warp-specialized --kv-blocks 1"),
            say("WAIT and ARRIVE are the barriers, `b` with their number: wait until K is there; say that V may be overwritten. A generation is how often a barrier has been passed. A block of K is {size}; the {n} k steps of a product take the summed dimension a piece at a time.", size=nbytes(block), n=count(course.workload.head_dim * course.workload.element_bytes // K_PER_STEP_BYTES)),
        ),
    )  # fmt: skip
