"""Softmax as instructions: how many of each class one thread executes per block, by phase.

A WGMMA accumulator of m x n scores leaves m * n / 128 fp32 values in each of a warpgroup's 128 threads, m / 32 rows
per thread, four threads (a quad) to a row (PTX ISA, wgmma register fragments). mma.sync kernels have the same counts
for four warps. Phases are cut into chunks of eight elements, the running softmax's weights of four, so that warps share the
pipes as finely as the interleaved instructions of a compiled kernel do.

There are two softmaxes. Online looks for the maximum of every block before its exponentials (FlashAttention-2 and -3).
Running takes the weights from the maximum of the blocks before and looks for a new one only where they grow large, which
on ordinary data is a tile's first block (kernels/cuda/softmax.cuh).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Protocol

THREADS = 128
CHUNK = 8
STATISTICS = ("LSE", "l", "m")
"""Results of one fp32 number per row."""


@dataclass(frozen=True)
class Phase:
    """Warp instructions per chunk by pipe, how many chunks, and the chain of dependent work that ends the phase."""

    fma: int = 0  # FFMA, FADD, FMUL
    alu: int = 0  # FMNMX, ISETP, FSEL, integer
    mufu: int = 0  # EX2, RCP, LG2
    convert: int = 0  # F2FP: two fp32 to a packed pair
    other: int = 0  # issue slots only: SHFL, PRMT, uniform
    stsm: int = 0  # STSM.x4
    chunks: int = 1
    latencies: int = 0  # of a shuffle
    fetched: int = 0  # instructions that the nearest instruction caches have lost; who comes first fetches them for all
    votes: int = 0  # of the warp, with what is compared before and the branch behind
    divisions: int = 0  # of integers, by run-time values
    branches: int = 0  # taken
    sparse: bool = False  # bound by MUFU with little around it: WGMMA hardly notices


# -- what a kernel does around its arithmetic ---------------------------------------------------------------------------
# From the SASS of kernels/cuda (CUDA 13.0): chains of dependent instructions, each waiting for the last. A "latency" is a
# shuffle's (24 cycles: also about an LDS, two branches on a predicate, or five dependent integer instructions). Code that
# runs once a tile comes from a cache behind the nearest ones, which the loop over blocks has filled: it counts as fetched.
SCORES, VALUES = Phase(latencies=1, sparse=True), Phase(sparse=True)
"""Before a GEMM, behind the wait for its block: stage and descriptors, in a row."""
SKIP = Phase(branches=1, sparse=True)
"""O is not rescaled: a branch over the code that would."""
ADDRESS = Phase(latencies=3, sparse=True)
"""Before a TMA load: stage, phase, election, coordinates, 13 instructions in a row and two branches; with the wait for a free
buffer 105 to 121 cycles between the stamps of loads that need not wait."""
SEND = Phase(other=32, latencies=3)
"""From staged rows to the TMA store: the fence, election, the tile read from shared memory, coordinates."""
STATISTIC = Phase(fma=8, alu=16, other=8, latencies=4, fetched=32)
"""A statistic's address, and its store from registers."""
LOCATE = Phase(other=160, divisions=3, fetched=160)
"""The producer's next tile: three integer divisions by run-time values, and the post to the consumers."""
NEXT_TILE = Phase(alu=20, other=40, latencies=6)
"""A consumer's next tile: free the post, wait for the next, read it, count its masked blocks."""


def _chunks(elements: int) -> int:
    return -(-elements // CHUNK)


def scores_per_thread(tile) -> int:
    """fp32 scores one thread holds of its consumer's block."""
    return -(-tile.rows * tile.block_n // THREADS)


def outputs_per_thread(tile) -> int:
    """fp32 values of the O accumulator one thread holds."""
    return -(-tile.rows * tile.head_dim // THREADS)


def rows_per_thread(tile) -> int:
    """Rows one thread takes part in."""
    return max(1, tile.rows // 32)


def mask(tile) -> Phase:
    """Compare the column with the row's limit and select -inf: ISETP and FSEL per element."""
    return Phase(alu=2 * CHUNK, chunks=_chunks(scores_per_thread(tile)))


def scores_to_max(tile, masked: bool) -> list[Phase]:
    """(Mask,) row maximum and new scale: FMNMX per element; per row two shuffles in the quad and exp2 of the change."""
    rows, chunks = rows_per_thread(tile), _chunks(scores_per_thread(tile))
    phases = [mask(tile)] if masked else []
    return phases + [
        Phase(alu=CHUNK, chunks=chunks),
        Phase(alu=2 * rows, other=2 * rows, latencies=2),
        Phase(fma=3 * rows, mufu=rows),
    ]


def exponentials(tile) -> Phase:
    """exp2 and row sum: FFMA (scale and subtract), MUFU.EX2, FADD per element."""
    return Phase(fma=2 * CHUNK, mufu=CHUNK, chunks=_chunks(scores_per_thread(tile)))


def convert(tile) -> Phase:
    """P to the operand type: one F2FP per two elements; e4m3 also permutes bytes into the operand layout (FA3 section 3.3)."""
    chunks = _chunks(scores_per_thread(tile))
    if tile.element_bytes == 1:
        return Phase(convert=CHUNK // 2, other=CHUNK // 2, chunks=chunks, latencies=1)
    return Phase(convert=CHUNK // 2, chunks=chunks)


def rescale(tile) -> Phase:
    """FMUL of every O accumulator value."""
    return Phase(fma=CHUNK, chunks=_chunks(outputs_per_thread(tile)))


def normalize(tile, once: bool) -> list[Phase]:
    """Epilogue: share row sums in the quad, RCP and LG2 per row, FMUL of O. `once`: its code runs once a tile."""
    rows = rows_per_thread(tile)
    scaled = replace(rescale(tile), fetched=once * outputs_per_thread(tile))
    return [Phase(fma=2 * rows, other=2 * rows, mufu=2 * rows, latencies=3), scaled]


def stage_out(tile, name: str, once: bool) -> Phase:
    """Convert a result to its output type and put it in shared memory by STSM (8 values each), then fence and barrier."""
    if name in STATISTICS:
        return STATISTIC if once else Phase(other=2 * rows_per_thread(tile))
    elements = outputs_per_thread(tile) if name == "O" else scores_per_thread(tile)
    fetched = once * (elements // 2 + elements // CHUNK + SEND.other)
    return Phase(convert=CHUNK // 2, other=1, stsm=1, chunks=_chunks(elements), latencies=1, fetched=fetched)


# -- the two softmaxes --------------------------------------------------------------------------------------------------

Labelled = tuple[str, Phase]


class Softmax(Protocol):
    """How the weights of a block are made, and what is left to do once no product reads P or writes O any more."""

    name: ClassVar[str]
    operand_sets: ClassVar[int]  # register sets for P: with two, weights become operands while a product reads those before

    def block(
        self, tile, j: int, under_product: bool, rank: int = 0, ahead: bool = False
    ) -> tuple[list[Phase], list[Labelled]]:
        """(phases of consumer `rank`'s softmax of block j, labelled phases left for the verb `rescale`).

        `under_product`: P V of another block is in flight; `ahead`: the schedule issues S of the next block before.
        """


class Online:
    """The maximum of every block first: FlashAttention-2 Algorithm 1 lines 8 to 10, FlashAttention-3 Algorithms 1 and 2."""

    name = "online"
    operand_sets = 1

    def block(
        self, tile, j: int, under_product: bool, rank: int = 0, ahead: bool = False
    ) -> tuple[list[Phase], list[Labelled]]:
        """Under a product that uses P and O, both are left alone until it is over; else a compiler hides all under exp2."""
        before, weights = scores_to_max(tile, tile.is_masked(j)), exponentials(tile)
        if under_product:
            return [*before, weights], [("convert P", convert(tile)), ("rescale O", rescale(tile))]
        return [*before, _interleaved(weights, [convert(tile), rescale(tile)])], []


class Running:
    """Weights from the maximum of the blocks before: no exponential waits for a maximum, and O keeps its scale.

    Per element FFMA, EX2, FADD and half an F2FP; per row FMUL, two FADD and FSETP, per block one vote, as compiled, and two
    branches, over the mask and over another try. A tile's
    first block has no maximum before it and takes the online way; then O is rescaled if the schedule says so.
    """

    name = "running"
    operand_sets = 2

    @lru_cache(maxsize=8192)  # noqa: B019 (there is one Running)
    def block(
        self, tile, j: int, under_product: bool, rank: int = 0, ahead: bool = False
    ) -> tuple[list[Phase], list[Labelled]]:
        """P is converted at once, whatever runs."""
        weights = replace(_in_halves(_interleaved(exponentials(tile), [convert(tile)])), sparse=True)
        masked = [mask(tile)] if tile.is_masked(j) else []
        rows = rows_per_thread(tile)
        bound = Phase(fma=3 * rows, alu=rows, other=1, latencies=2, votes=1, branches=2, sparse=True)
        fetched = self.is_new_code(j, tile.kv_blocks[-1], under_product, ahead) * _instructions(weights)
        fetched += _instructions(*masked)  # a mask comes at a tile's end
        if 0 < j and j > tile.hidden(rank):
            return _behind_fetch([*masked, weights, bound], fetched), [("skip rescale", SKIP)]
        exact = scores_to_max(tile, masked=False)
        tried = [weights, bound] if j > 0 else []
        phases = [*masked, *tried, *exact, weights]
        return _behind_fetch(phases, fetched + _instructions(*exact)), [("rescale O", rescale(tile))]

    def is_new_code(self, j: int, last: int, under_product: bool, ahead: bool = False) -> bool:
        """Whether block j is the first of its tile to run its copy of the code.

        The first block has one of its own, the loop one, or two where a product reads one set of P while the next is
        written; there an odd last block, which the loop over pairs leaves over, has its own as well. Where S runs ahead the
        last block issues none and has its own copy always, and so has the one before if the loop leaves over two.
        """
        if ahead:
            return j <= 2 or j == last or (j == last - 1 and last % 2 == 0)
        return j <= 1 or (under_product and (j == 2 or (j == last and j % 2 == 1)))


def _instructions(*phases: Phase) -> int:
    """How many a thread executes."""
    return sum(p.chunks * (p.fma + p.alu + p.mufu + p.convert + p.other) for p in phases)


def _in_halves(phase: Phase) -> Phase:
    """The same in chunks of half the size."""
    return replace(phase, fma=phase.fma // 2, mufu=phase.mufu // 2, convert=phase.convert // 2, chunks=2 * phase.chunks)


def _behind_fetch(phases: list[Phase], instructions: int) -> list[Phase]:
    """The phases, the first of which waits for so many instructions."""
    return [replace(phases[0], fetched=instructions), *phases[1:]]


def _interleaved(base: Phase, hidden: list[Phase]) -> Phase:
    """`base` with the instructions of other phases spread over its chunks, as a compiler does."""

    def per_chunk(name: str) -> int:
        return -(-sum(getattr(phase, name) * phase.chunks for phase in hidden) // base.chunks)

    return Phase(
        fma=base.fma + per_chunk("fma"),
        mufu=base.mufu,
        convert=per_chunk("convert"),
        other=per_chunk("other"),
        chunks=base.chunks,
        latencies=max(phase.latencies for phase in hidden),
    )


ONLINE, RUNNING = Online(), Running()
