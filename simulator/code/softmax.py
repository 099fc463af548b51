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
from typing import ClassVar, NamedTuple, Protocol

from .phase import Phase

THREADS = 128
CHUNK = 8


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


def exponentials(tile, exact: bool = False) -> Phase:
    """exp2 and row sum: FFMA (scale and subtract), MUFU.EX2, FADD per element.

    `exact`: compiled without fast math and with products and sums apart, FMUL and FADD for the FFMA, and for the sake of
    denormals FSETP and an FMUL before and behind each EX2, which a predicate leaves out.
    """
    return Phase(
        fma=(5 if exact else 2) * CHUNK, alu=CHUNK if exact else 0, mufu=CHUNK, chunks=_chunks(scores_per_thread(tile))
    )


def convert(tile) -> Phase:
    """P to the operand type: one F2FP per two elements, in 16 bits and in 8: e4m3 lies in the order that V was transposed into,
    and no byte moves between threads (FlashAttention-3's kernels and ours, SASS)."""
    return Phase(convert=CHUNK // 2, chunks=_chunks(scores_per_thread(tile)))


def rescale(tile) -> Phase:
    """FMUL of every O accumulator value."""
    return Phase(fma=CHUNK, chunks=_chunks(outputs_per_thread(tile)))


def normalize(tile) -> list[Phase]:
    """Epilogue: share row sums in the quad, RCP and LG2 per row, FMUL of O."""
    rows = rows_per_thread(tile)
    return [Phase(fma=2 * rows, other=2 * rows, mufu=2 * rows, latencies=3), rescale(tile)]


def reading(tile, of: str) -> Phase:
    """One reading of a block of S by a softmax that is a kernel of its own (`READINGS`)."""
    return replace(READINGS[of], chunks=_chunks(scores_per_thread(tile)))


READINGS = {
    "row max": Phase(alu=CHUNK, latencies=2),
    "row sum": Phase(fma=2 * CHUNK, mufu=CHUNK, latencies=2),
    "row max and sum": Phase(fma=3 * CHUNK, alu=CHUNK, mufu=CHUNK, latencies=2),
    "probabilities": Phase(fma=2 * CHUNK, mufu=CHUNK),
}
"""FMNMX; FFMA, EX2, FADD; both with the sum scaled anew; FFMA, EX2, FMUL. Per chunk."""


# -- the two softmaxes --------------------------------------------------------------------------------------------------

SKIP = Phase(branches=1)
"""O is not rescaled: a branch over the code that would."""



class Left(NamedTuple):
    """What a softmax leaves to be done once no product reads P or writes O any more."""

    label: str
    phase: Phase
    writes: str  # the register tensor, if any


class Softmax(Protocol):
    """How the weights of a block are made, and what is left to do once no product reads P or writes O any more."""

    name: ClassVar[str]
    operand_sets: ClassVar[int]  # register sets for P: with two, weights become operands while a product reads those before

    def block(
        self, tile, j: int, under_product: bool, rank: int = 0, ahead: bool = False
    ) -> tuple[list[Phase], list[Left]]:
        """(phases of consumer `rank`'s softmax of block j, what is left for the verb `rescale`).

        `under_product`: P V of another block is in flight; `ahead`: the schedule issues S of the next block before.
        """


EARLY = {
    2: {64: (0.0, 0.2), 128: (0.26, 0.2), 256: (0.46, 0.3)},
    1: {64: (0.0, 0.35), 128: (0.29, 0.21), 256: (0.09, 0.09)},
}
"""By the operands' bytes, then (full, causal) by head dim: the share of a block's exponentials that FlashAttention-3's compiler has
left before the wait for P V; the rest is behind it. They are those of a thread's first row, and lie between the comparisons that
look for the maximum of the second (wheel fa3-fwd 0.0.3, simulator/code/profiles)."""


@dataclass(frozen=True)
class Online:
    """The maximum of every block first: FlashAttention-2 Algorithm 1 lines 8 to 10, FlashAttention-3 Algorithms 1 and 2."""

    name: ClassVar[str] = "online"
    operand_sets: ClassVar[int] = 1
    exact: bool = False  # as `exponentials` has it

    def block(
        self, tile, j: int, under_product: bool, rank: int = 0, ahead: bool = False
    ) -> tuple[list[Phase], list[Left]]:
        """Under a product that uses P and O, both are left alone until it is over, and so are most exponentials (`EARLY`); else a
        compiler hides all under exp2.
        """
        before, weights = scores_to_max(tile, tile.is_masked(j)), exponentials(tile, self.exact)
        if not under_product:
            return [*before, _interleaved(weights, [convert(tile), rescale(tile)])], []
        early = round(EARLY[tile.element_bytes][tile.head_dim][tile.workload.causal] * weights.chunks)
        late = replace(weights, chunks=weights.chunks - early)
        left = [Left("softmax", _interleaved(late, [convert(tile)]), "P"), Left("rescale O", rescale(tile), "O")]
        if not early:
            return before, left
        *masked, maxima, shared, scales = before
        second = replace(maxima, chunks=maxima.chunks // 2)
        first = replace(maxima, chunks=maxima.chunks - second.chunks)
        return [*masked, first, shared, scales, _interleaved(replace(weights, chunks=early), [second])], left


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
    ) -> tuple[list[Phase], list[Left]]:
        """P is converted at once, whatever runs."""
        weights = replace(_in_halves(_interleaved(exponentials(tile), [convert(tile)])), interleaved=True)
        masked = [mask(tile)] if tile.is_masked(j) else []
        rows = rows_per_thread(tile)
        bound = Phase(fma=3 * rows, alu=rows, other=1, latencies=2, votes=1, branches=2)
        is_new = self.is_new_code(j, tile.kv_blocks[-1], under_product, ahead)
        weights, masked = replace(weights, own=is_new), [replace(each, own=is_new) for each in masked]
        fetched = is_new * _instructions(weights)
        fetched += _instructions(*masked)  # a mask comes at a tile's end
        if 0 < j and j > tile.hidden(rank):
            return _behind_fetch([*masked, weights, bound], fetched), [Left("skip rescale", SKIP, "")]
        exact = scores_to_max(tile, masked=False)
        tried = [weights, bound] if j > 0 else []
        phases = [*masked, *tried, *exact, weights]
        return _behind_fetch(phases, fetched + _instructions(*exact)), [Left("rescale O", rescale(tile), "O")]

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
    return sum(phase.instructions for phase in phases)


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
        alu=base.alu + per_chunk("alu"),
        mufu=base.mufu,
        convert=per_chunk("convert"),
        other=per_chunk("other"),
        chunks=base.chunks,
        latencies=max(phase.latencies for phase in hidden),
    )


ONLINE, EXACT, RUNNING = Online(), Online(exact=True), Running()
