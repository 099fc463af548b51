"""Softmax as instructions: how many of each class one thread executes per block, by phase.

A WGMMA accumulator of m x n scores leaves m * n / 128 fp32 values in each of a warpgroup's 128 threads, m / 32 rows
per thread, four threads (a quad) to a row (PTX ISA, wgmma register fragments). mma.sync kernels have the same counts
for four warps. Phases are cut into chunks of four elements, so that warps share the pipes as finely as the
interleaved instructions of a compiled kernel do.

There are two softmaxes. Online looks for the maximum of every block before its exponentials (FlashAttention-2 and -3).
Running takes the weights from the maximum of the blocks before and looks for a new one only where they grow large, which
on ordinary data is a tile's first block (kernels/cuda/softmax.cuh).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

THREADS = 128
CHUNK = 4
STATISTICS = ("LSE", "l", "m")
"""Results of one fp32 number per row."""


@dataclass(frozen=True)
class Phase:
    """Warp instructions per chunk by pipe, how many chunks, and how many shuffle round trips end the phase."""

    fma: int = 0  # FFMA, FADD, FMUL
    alu: int = 0  # FMNMX, ISETP, FSEL, integer
    mufu: int = 0  # EX2, RCP, LG2
    convert: int = 0  # F2FP: two fp32 to a packed pair
    other: int = 0  # issue slots only: SHFL, PRMT, uniform
    stsm: int = 0  # STSM.x4
    chunks: int = 1
    latencies: int = 0
    sparse: bool = False  # bound by MUFU with little around it: WGMMA hardly notices


# -- what a kernel does around its arithmetic ---------------------------------------------------------------------------
# From the SASS of kernels/cuda (CUDA 13.0): chains of dependent instructions, each waiting a few cycles for the last, in units
# of a shuffle's latency (24 cycles: also about an S2R, an LDS, a vote, or five dependent integer instructions).
VOTE = 4
"""Behind the weights: the last sums, two FSETP, the vote and the branches on it, on the mask and on the first block."""
SCORES, VALUES = Phase(latencies=3, sparse=True), Phase(latencies=1, sparse=True)
"""Before a GEMM: stage, phase and descriptors of the block, 12 uniform instructions in a row; most are shared by P V."""
ADDRESS = Phase(latencies=8, sparse=True)
"""Before a TMA load: 40 instructions in a row, stage, phase, election and coordinates."""


def lines(instructions: int) -> int:
    """Latencies for the fetch of code that runs once a tile: one a cache line of eight instructions (provisional).

    No microbenchmark of ours times instruction fetch. In the trace of fa3 (d128, 4 x 16 x 4096) an epilogue lasts 1,250
    cycles, 500 more than its arithmetic, and d64 and d256 lie as far above theirs by their lines. The first warpgroup pays
    more than the others, who find the code there: 1,390 and 1,180 cycles for the first softmax of a tile.
    """
    return -(-instructions // 8)


SEND = Phase(other=32, latencies=4 + lines(32))
"""From staged rows to the TMA store: the fence, election, the tile read from shared memory, coordinates."""
STATISTIC = Phase(fma=8, alu=16, other=8, latencies=4 + lines(32))
"""A statistic's address, and its store from registers."""
LOCATE = Phase(other=160, latencies=3 * 8 + lines(160))
"""The producer's next tile: three integer divisions by run-time values, about 200 cycles each, and the post to the consumers."""
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
    scaled = replace(rescale(tile), latencies=once * lines(outputs_per_thread(tile)))
    return [Phase(fma=2 * rows, other=2 * rows, mufu=2 * rows, latencies=3), scaled]


def stage_out(tile, name: str, once: bool) -> Phase:
    """Convert a result to its output type and put it in shared memory by STSM (8 values each), then fence and barrier."""
    if name in STATISTICS:
        return STATISTIC if once else Phase(other=2 * rows_per_thread(tile))
    elements = outputs_per_thread(tile) if name == "O" else scores_per_thread(tile)
    fetched = once * lines(elements // 2 + elements // CHUNK)
    return Phase(convert=CHUNK // 2, other=1, stsm=1, chunks=_chunks(elements), latencies=1 + fetched)


# -- the two softmaxes --------------------------------------------------------------------------------------------------

Labelled = tuple[str, Phase]


class Softmax(Protocol):
    """How the weights of a block are made, and what is left to do once no product reads P or writes O any more."""

    name: ClassVar[str]
    operand_sets: ClassVar[int]  # register sets for P: with two, weights become operands while a product reads those before

    def block(self, tile, j: int, under_product: bool, rank: int = 0) -> tuple[list[Phase], list[Labelled]]:
        """(phases of consumer `rank`'s softmax of block j, labelled phases left for the verb `rescale`)."""


class Online:
    """The maximum of every block first: FlashAttention-2 Algorithm 1 lines 8 to 10, FlashAttention-3 Algorithms 1 and 2."""

    name = "online"
    operand_sets = 1

    def block(self, tile, j: int, under_product: bool, rank: int = 0) -> tuple[list[Phase], list[Labelled]]:
        """Under a product that uses P and O, both are left alone until it is over; else a compiler hides all under exp2."""
        before, weights = scores_to_max(tile, tile.is_masked(j)), exponentials(tile)
        if under_product:
            return [*before, weights], [("convert P", convert(tile)), ("rescale O", rescale(tile))]
        return [*before, _interleaved(weights, [convert(tile), rescale(tile)])], []


class Running:
    """Weights from the maximum of the blocks before: no exponential waits for a maximum, and O keeps its scale.

    Per element FFMA, EX2, FADD and half an F2FP; per row FMUL, two FADD and FSETP, per block one VOTE, as compiled. A tile's
    first block has no maximum before it and takes the online way; then O is rescaled if the schedule says so.
    """

    name = "running"
    operand_sets = 2

    def block(self, tile, j: int, under_product: bool, rank: int = 0) -> tuple[list[Phase], list[Labelled]]:
        """P is converted at once, whatever runs."""
        weights = replace(_interleaved(exponentials(tile), [convert(tile)]), sparse=True)
        first = rank == 0  # those behind it find the code in the cache
        masked = [replace(mask(tile), latencies=first * lines(2 * scores_per_thread(tile)))] if tile.is_masked(j) else []
        rows = rows_per_thread(tile)
        bound = Phase(fma=3 * rows, alu=rows, other=1, latencies=VOTE, sparse=True)
        if 0 < j and j > tile.hidden(rank):
            return [*masked, weights, bound], []
        exact = scores_to_max(tile, masked=False)
        exact[-2] = replace(exact[-2], latencies=2 + first * lines(scores_per_thread(tile)))
        tried = [weights, bound] if j > 0 else []
        return [*masked, *tried, *exact, weights], [("rescale O", rescale(tile))]


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
