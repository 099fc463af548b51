"""Lesson: FlashAttention-1 walks keys outside and queries inside, FlashAttention-2 the other way round."""

from __future__ import annotations

from ...simulator.results import metrics
from ...simulator.results.run import Run
from .course import WALKED, Course, hbm_bytes, source
from .parts import Bars, Facts, Frame, Question, Reading, Section, TileWalk, Walk, count, nbytes, say, seconds, share

TITLE = "FlashAttention-1 and -2"
ABOUT = "two loops, one inside the other: which is outside decides what is written again and again, and how many SMs work"
READING = Reading(
    code=(
        ("simulator/schedules/forward/fa1.py", "K/V outside, Q inside"),
        ("simulator/schedules/forward/fa2.py", "Q outside, K/V inside"),
        ("kernels/triton/fa1.py", "FlashAttention-1 as a kernel that runs"),
    ),
    papers=("FlashAttention (arXiv:2205.14135), Algorithm 1", "FlashAttention-2 (arXiv:2307.08691), sections 3.1 and 3.2"),
)
_SIDE = 4


def sections(course: Course) -> tuple[Section, ...]:
    """The lesson on the course's device."""
    fa1, shipped, fa2 = course.runs("fa1", "fa1-published", "fa2")
    return (_order(course, fa1), _travels(course, fa1, fa2), _parallel(course, fa1, shipped, fa2))


def _frames(order: list[tuple[int, int]], inner: str) -> tuple[Frame, ...]:
    frames = []
    for moment, (i, j) in enumerate(order[: _SIDE + 2]):
        cells = tuple(
            "".join("#" if (r, c) == (i, j) else "+" if (r, c) in order[:moment] else "." for c in range(_SIDE))
            for r in range(_SIDE)
        )
        frames.append(Frame(cells, say("Step {n}: " + inner, n=count(moment + 1))))
    return tuple(frames)


def _order(course: Course, fa1: Run) -> Section:
    from ...simulator.schedules.forward import fa1 as one

    legend = (("#", "now"), ("+", "done"), (".", "to come"))
    down = [(i, j) for j in range(_SIDE) for i in range(_SIDE)]
    across = [(i, j) for i in range(_SIDE) for j in range(_SIDE)]
    blocks = -(-course.workload.seqlen_k // fa1.tile.block_n)
    return Section(
        "Which loop is outside",
        (
            say("FlashAttention-1 takes a block of keys and goes over all queries, then takes the next block of keys. Every query's O is begun, written away, and read again for the next block of keys."),
            Walk("FlashAttention-1, one head", "tiles of queries", "blocks of keys", legend, _frames(down, "read Q and what there is of O, m and l; add this tile; write O, m and l.")),
            say("FlashAttention-2 takes a tile of queries and goes over all keys. O stays in registers until it is whole."),
            Walk("FlashAttention-2, one head", "tiles of queries", "blocks of keys", legend, _frames(across, "read a block of K and V; add this tile to O in registers.")),
            source(one.fa1),
            Question(
                say("At {tokens} keys and blocks of {n}, over how many blocks of keys does FlashAttention-1's outer loop run?", tokens=count(course.workload.seqlen_k), n=count(fa1.tile.block_n)),
                answer=blocks, unit="", tolerance=0.001,
                hint=say("Divide and round up: the last block may be cut short."),
                why=say("So each O is read and written that many times. (The very first reading finds nothing yet: the kernel reads it all the same.)"),
            ),
        ),
    )  # fmt: skip


def _travels(course: Course, fa1: Run, fa2: Run) -> Section:
    names = [
        name for name in ("Q", "K", "V", "O", "l", "m", "LSE") if name in fa1.traffic.by_tensor or name in fa2.traffic.by_tensor
    ]
    rows = tuple(
        (name, *(nbytes(hbm_bytes(run, name)) if name in run.traffic.by_tensor else "-" for run in (fa1, fa2))) for name in names
    )
    return Section(
        "What travels",
        (
            say("Bytes over HBM, both directions, as the model counts them:"),
            Facts(("matrix", ">fa1", ">fa2"), rows),
            say("`fa1` reads K and V once, and Q and O again and again. For `fa2` it is the other way round, but its K and V come from L2: several tiles of one head run at once. What is written cannot be shared, so O must go the whole way. (LSE, one number for each query, is kept for training: the next lesson is about it.)"),
            _played(course, fa1, fa2),
            Question(
                say("What share of the bytes of `fa1` is O?"),
                answer=100 * hbm_bytes(fa1, "O") / hbm_bytes(fa1), unit="%", tolerance=0.03,
                hint=say("All bytes of `fa1` are {all}. Divide, and give percent.", all=nbytes(hbm_bytes(fa1))),
                why=say("In `fa2` O is written once, {once}, and never read.", once=nbytes(hbm_bytes(fa2, "O"))),
            ),
        ),
    )  # fmt: skip


def _played(course: Course, fa1: Run, fa2: Run) -> TileWalk:
    """Both orders, step by step, with smaller and larger blocks."""
    walks = course.walks("fa1") + course.walks("fa2")
    usual = tuple(walk for walk in walks if walk.tile in (fa1.tile, fa2.tile))
    stored = {walk.schedule: walk.totals["SRAM to L2"] for walk in usual}
    return TileWalk(
        walks, usual,
        say("One head of {tokens} tokens, step by step: `fa1` stores {many}, `fa2` {few}.",
            tokens=count(WALKED), many=nbytes(stored["fa1"]), few=nbytes(stored["fa2"])),
    )  # fmt: skip


def _parallel(course: Course, fa1: Run, shipped: Run, fa2: Run) -> Section:
    work, gpu = course.workload, course.device
    heads = work.batch * work.heads
    tiles = heads * -(-work.seqlen_q // fa2.tile.block_m)
    runs = (fa1, shipped, fa2)
    return Section(
        "Who can work at once",
        (
            say(
                """A program for a GPU is started many times at once, each a block of threads on one SM, called a CTA. In `fa1` a CTA is a whole
                head, {heads} of them, and {name} has {sms} SMs. In `fa2` a CTA is one tile of queries, of which there are {tiles}.""",
                heads=count(heads), name=gpu.name, sms=count(gpu.sms), tiles=count(tiles),
            ),
            Bars("SMs that never get work", tuple((run.schedule, share(run.breakdown.no_cta)) for run in runs)),
            Bars("time, predicted", tuple((run.schedule, seconds(metrics.time_s(run))) for run in runs)),
            say("`fa1-published` is what was shipped: it deals the queries of a head to several CTAs, so all SMs work, and all of O still travels."),
            Question(
                say("With one CTA a head, which share of the SMs has nothing to do in `fa1`?"),
                answer=100 * max(0.0, 1 - heads / gpu.sms), unit="%", tolerance=0.05,
                hint=say("{heads} heads, {sms} SMs, at most one head on each.", heads=count(heads), sms=count(gpu.sms)),
                why=say("The model says {model}: no amount of arithmetic helps an SM that was given nothing.", model=share(fa1.breakdown.no_cta)),
            ),
        ),
    )  # fmt: skip
