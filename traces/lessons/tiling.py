"""Lesson: S computed tile by tile in shared memory; how often K and V are loaded follows from the height of a tile."""

from __future__ import annotations

from ...simulator.problem.tile import Tile
from ...simulator.problem.workload import Workload
from .course import WALKED, Course
from .parts import Facts, Frame, Question, Reading, Say, Section, TileWalk, Walk, count, nbytes, say, share

TITLE = "Tiling"
ABOUT = "S is computed a tile at a time and forgotten; the tile's height decides how often K and V are read"
READING = Reading(
    code=(
        ("simulator/problem/tile.py", "the tile of each schedule, and why it was chosen"),
        ("simulator/schedules/forward/fa2.py", "the walk over one row of tiles"),
    ),
    papers=("FlashAttention (arXiv:2205.14135), Theorem 2", "FlashAttention-2 (arXiv:2307.08691), section 3.1"),
)
HEIGHTS = (32, 64, 128, 256)


def key_bytes(workload: Workload, block_m: int) -> int:
    """Bytes of K and V that are loaded in all: each of the Q tiles of a head loads all of that head's K and V."""
    tiles = -(-workload.seqlen_q // block_m)
    return tiles * workload.batch * workload.heads * 2 * workload.seqlen_k * workload.head_dim * workload.element_bytes


def sections(course: Course) -> tuple[Section, ...]:
    """The lesson on the course's device."""
    run = course.run(course.best)
    return (_walk(course, run.tile), _fits(course, run.tile), _closed_form(course, run))


def _walk(course: Course, tile: Tile) -> Section:
    work = course.workload
    rows, columns = WALKED // tile.block_m, WALKED // tile.block_n
    q, kv = (size * work.head_dim * work.element_bytes for size in (tile.block_m, 2 * tile.block_n))
    order = [(i, j) for i in range(rows) for j in range(columns)]
    frames = []
    for moment in (*range(columns + 2), len(order) - 1):
        i, j = order[moment]
        cells = tuple(
            "".join("#" if (r, c) == (i, j) else "+" if (r, c) in order[:moment] else "." for c in range(columns))
            for r in range(rows)
        )
        loaded = (i + 1) * q + (moment + 1) * kv
        what = (
            "A tile of Q comes and stays; with it the first block of K and of V."
            if j == 0
            else "The next block of K and of V takes the place of the one before."
        )
        frames.append(
            Frame(cells, say(what + " Loaded so far: {bytes}. Written: {written}.", bytes=nbytes(loaded), written=nbytes(i * q)))
        )
    return Section(
        "A walk over S",
        (
            say(
                """Cut S into tiles of {m} queries by {n} keys. A tile needs {m} rows of Q and {n} rows of K, and then {n} rows of V. It is
                computed in registers, its softmax is taken (online, as the last lesson showed), its product with V is added to O,
                and it is forgotten. Nothing of S or P is ever written.""",
                m=count(tile.block_m), n=count(tile.block_n),
            ),
            Walk(
                "one head of few tokens", "tiles of queries", "blocks of keys",
                (("#", "computed now"), ("+", "done and forgotten"), (".", "to come")), tuple(frames),
            ),
            Question(
                say("One tile of Q is {m} rows of {d} numbers of {e} bytes. How many kB is that? (A kB is a thousand bytes.)", m=count(tile.block_m), d=count(work.head_dim), e=count(work.element_bytes)),
                answer=q / 1e3, unit="kB", tolerance=0.02,
                hint=say("Multiply the three."),
                why=say("A block of K and one of V are {kv} together. All of this fits beside each other in an SM's shared memory.", kv=nbytes(kv)),
            ),
        ),
    )  # fmt: skip


def _fits(course: Course, tile: Tile) -> Section:
    work, gpu = course.workload, course.device
    row = work.head_dim * work.element_bytes
    parts = (
        ("Q", tile.block_m * row),
        ("K", tile.stages * tile.block_n * row),
        ("V", tile.stages * tile.block_n * row),
        ("O, on its way out", tile.block_m * row),
    )
    held = sum(size for _, size in parts)
    return Section(
        "What lies in shared memory",
        (
            _places(tile),
            Facts(("what", ">bytes"), tuple((name, nbytes(size)) for name, size in parts)),
            say("Together {held}, of the {most} that one program on {name} may have: {part}.", held=nbytes(held), most=nbytes(gpu.smem_bytes_per_cta), name=gpu.name, part=share(held / gpu.smem_bytes_per_cta)),
            Question(
                say("S of one tile is {m} x {n} numbers, kept in fp32, four bytes each, in registers. How many kB is that?", m=count(tile.block_m), n=count(tile.block_n)),
                answer=4 * tile.block_m * tile.block_n / 1e3, unit="kB", tolerance=0.02,
                hint=say("Rows times columns times four, then divide by a thousand."),
                why=say("An SM has {all} of registers, and O of the tile, {o} in fp32, must be there too. That is why tiles are not larger.", all=nbytes(4 * gpu.registers_per_sm), o=nbytes(4 * tile.block_m * work.head_dim)),
            ),
        ),
    )  # fmt: skip


def _places(tile: Tile) -> Say:
    if tile.stages == 1:
        return say("K and V have one place each: V is loaded while S is computed, and the next K while O is.")
    return say("So that loads need not wait for products, K and V have {stages} places each: one is filled while another is used.", stages=count(tile.stages))


def _closed_form(course: Course, run) -> Section:
    work, tile = course.workload, run.tile
    counted = sum(run.traffic.by_tensor[name].algorithmic_read for name in "KV")
    rows = tuple(
        (count(m), count(-(-work.seqlen_q // m)), nbytes(key_bytes(work, m)), count(m * 2 / work.element_bytes)) for m in HEIGHTS
    )
    return Section(
        "Taller tiles, fewer bytes",
        (
            say("Every tile of Q walks over all keys. So K and V are loaded once for each tile of Q in a head, and that is all there is to count:"),
            Facts((">queries in a tile", ">tiles in a head", ">K and V loaded", ">FLOP for each byte"), rows),
            say(
                """At the {m} queries that `{best}` takes, the closed form gives {form}; the model, which replays every load, counts {counted}.
                L2 serves most of them: HBM delivers {hbm}, because tiles of one head run at the same time and ask for the same keys.""",
                best=course.best, m=count(tile.block_m), form=nbytes(key_bytes(work, tile.block_m)), counted=nbytes(counted),
                hbm=nbytes(sum(run.traffic.by_tensor[name].hbm_read for name in "KV")),
            ),
            _played(course, tile),
            Question(
                say("With tiles of {m} queries, how many GB of K and V would be loaded?", m=count(3 * HEIGHTS[1])),
                answer=key_bytes(work, 3 * HEIGHTS[1]) / 1e9, unit="GB", tolerance=0.05,
                hint=say("There are {tokens} queries in a head; count the tiles (the last may be cut short), and multiply by K and V of all heads, {kv}.", tokens=count(work.seqlen), kv=nbytes(2 * work.tensor_bytes["K"])),
                why=say("Bytes fall as the height grows. Without tiles, with one query at a time, it would be {worst}.", worst=nbytes(key_bytes(work, 1))),
            ),
        ),
    )  # fmt: skip


def _played(course: Course, tile: Tile) -> TileWalk:
    """The walk of the best schedule with shorter and taller tiles."""
    walks = course.walks(course.best)
    usual = tuple(walk for walk in walks if walk.tile.block_m == tile.block_m)
    sums = {walk.tile.block_m: walk.totals["L2 to SRAM"] for walk in walks}
    least, most = min(sums), max(sums)
    return TileWalk(
        walks, usual,
        say("One head of {tokens} tokens as `{best}` walks over it, a step at a time, and the bytes between each two levels of memory (SRAM is shared memory). Keys are walked from the last to the first, so that the tile which a causal mask cuts comes first. With tiles of {m} queries {few} come from L2, with tiles of {n} it is {many}.",
            best=course.best, tokens=count(WALKED), m=count(most), few=nbytes(sums[most]), n=count(least), many=nbytes(sums[least])),
    )  # fmt: skip
