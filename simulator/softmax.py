"""Softmax as instructions: how many of each class one thread executes per block, by phase.

A WGMMA accumulator of m x n scores leaves m * n / 128 fp32 values in each of a warpgroup's 128 threads, m / 32 rows
per thread, four threads (a quad) to a row (PTX ISA, wgmma register fragments). mma.sync kernels have the same counts
for four warps. Phases are cut into chunks of eight elements, so that warps share the pipes as finely as the
interleaved instructions of a compiled kernel do.
"""

from __future__ import annotations

from dataclasses import dataclass

THREADS = 128
CHUNK = 8


@dataclass(frozen=True)
class Phase:
    """Warp instructions per chunk by pipe, how many chunks, and how many shuffle round trips end the phase."""

    fma: int = 0  # FFMA, FADD, FMUL
    alu: int = 0  # FMNMX, ISETP, FSEL, integer
    mufu: int = 0  # EX2, RCP, LG2
    convert: int = 0  # F2FP: two fp32 to a packed pair
    other: int = 0  # issue slots only: SHFL, STSM, PRMT
    chunks: int = 1
    latencies: int = 0


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


def online(tile, masked: bool) -> list[Phase]:
    """One online softmax step up to the probabilities in fp32 (FlashAttention-3 Algorithm 2, P and O still in use by PV)."""
    return [*scores_to_max(tile, masked), exponentials(tile)]


def online_to_operand(tile, masked: bool) -> list[Phase]:
    """A whole step: converts P and rescales O as well, their instructions interleaved with exp2 as a compiler does.

    FlashAttention-2 Algorithm 1 lines 8 to 10, FlashAttention-3 Algorithm 1.
    """
    base = exponentials(tile)
    hidden = [convert(tile), rescale(tile)]

    def per_chunk(name: str) -> int:
        return -(-sum(getattr(phase, name) * phase.chunks for phase in hidden) // base.chunks)

    merged = Phase(
        fma=base.fma + per_chunk("fma"),
        mufu=base.mufu,
        convert=per_chunk("convert"),
        other=per_chunk("other"),
        chunks=base.chunks,
        latencies=max(phase.latencies for phase in hidden),
    )
    return [*scores_to_max(tile, masked), merged]


def convert(tile) -> Phase:
    """P to the operand type: one F2FP per two elements; e4m3 also permutes bytes into the operand layout (FA3 section 3.3)."""
    chunks = _chunks(scores_per_thread(tile))
    if tile.element_bytes == 1:
        return Phase(convert=CHUNK // 2, other=CHUNK // 2, chunks=chunks, latencies=1)
    return Phase(convert=CHUNK // 2, chunks=chunks)


def rescale(tile) -> Phase:
    """FMUL of every O accumulator value."""
    return Phase(fma=CHUNK, chunks=_chunks(outputs_per_thread(tile)))


def normalize(tile) -> list[Phase]:
    """Epilogue: share row sums in the quad, RCP and LG2 per row, FMUL of O."""
    rows = rows_per_thread(tile)
    return [Phase(fma=2 * rows, other=2 * rows, mufu=2 * rows, latencies=3), rescale(tile)]


def stage_out(tile, name: str) -> Phase:
    """Convert a result to its output type and put it in shared memory by STSM (8 values each), then fence and barrier."""
    if name in ("LSE", "l", "m"):
        return Phase(other=2 * rows_per_thread(tile))
    elements = outputs_per_thread(tile) if name == "O" else scores_per_thread(tile)
    return Phase(convert=CHUNK // 2, other=2, chunks=_chunks(elements), latencies=1)
