"""Gradients: the code of the backward's kernels, estimated from their algorithm: counts per element, as softmax.py has them.

P comes back from S and LSE without a maximum or a sum: FFMA and EX2 per element. dS = P (dP - delta): FADD and FMUL. Both
become operands, half an F2FP each. dS is not scaled: dQ and dK are, once, at the end. Where scores are transposed, a thread's
elements of a row of S^T belong to n / 4 queries, whose LSE and delta it reads from shared memory, two at a time; else to
the two queries of each 64 rows. No compiled kernel of ours stands behind these counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import softmax as counts
from .around import Around
from .estimate import ADDRESS, LOCATE, NEXT_TILE, SEND, STATISTIC, STATISTICS
from .phase import Phase
from .softmax import CHUNK

STORED_BYTES = 16
"""A lane's share of one store to shared memory: STSM.x4, or 16 bytes of fp32."""


@dataclass(frozen=True)
class Gradients:
    """The code of one kernel of a backward: by WGMMA and TMA, or by mma.sync; red adds `added_bytes` of each lane at a time."""

    wgmma: bool
    added_bytes: int = 4
    weight_fma: int = 1
    """FMA of an element of P: S times scale less LSE."""
    gradient_fma: int = 2
    """FMA of an element of dS."""
    statistic_alu: int = 0
    """Of an LSE or a delta that is read: whether it is one."""
    mask_alu: int = 2
    """Of an element of a masked block."""
    around: int = 100
    """Instructions of a block beside four of an element."""
    last_apart: bool = False
    """Whether a tile's last block runs code of its own."""
    asks: bool = False
    """Whether it is read from shared memory, once the scores are there, if a block needs a mask."""
    begin: int = 0
    """Instructions of a warp until barriers and roles are known."""
    masked: int = 0
    """Blocks of a tile that are masked, the diagonal's or not, where they are more than those; 0: those."""
    persistent = False
    operand_sets = 1

    def pen(self, rank: int) -> GradientPen:
        """The code of one warp role."""
        return GradientPen(self, rank)


class GradientPen(Around):
    """What one warp executes around the points of its order; `tile` is a view of the tile it is in."""

    votes = False

    def __init__(self, code: Gradients, rank: int):
        self.code, self.rank = code, rank
        self.added_bytes, self.by_tma = code.added_bytes, code.wgmma
        self.has_read = False  # a statistic of the scores that come next

    def prologue(self, tile) -> list[Phase]:
        """What a warp executes before its role begins, once a CTA."""
        return [Phase(other=self.code.begin)] if self.code.begin else []

    def next_tile(self) -> list[Phase]:
        """To find the tile that comes next; a consumer divides its first block by those of a head."""
        return [replace(NEXT_TILE, divisions=1, fetched=NEXT_TILE.instructions) if self.rank >= 0 else LOCATE]

    def load(self) -> list[Phase]:
        """Before a TMA load, or a bulk copy that adds."""
        return [ADDRESS]

    def gemm(self, scores: bool) -> list[Phase]:
        """Before a WGMMA: stage and descriptors; the loop's branch before the scores."""
        return [Phase(latencies=int(scores), branches=int(scores))]

    def probabilities(self, tile, scores: str, step: int, half: int | None = None, ready: bool = False) -> list[Phase]:
        """P of one block: LSE, (mask,) exponentials, conversion; or one half of the exponentials, the first with what is before,
        unless that is `ready`.
        """
        elements, fma = tile.per_thread(scores), CHUNK * (self.code.weight_fma - ready)
        weights = Phase(fma=fma, mufu=CHUNK, convert=CHUNK // 2, chunks=_chunks(elements), interleaved=True)
        if half is not None:
            weights = replace(weights, chunks=-(-weights.chunks // 2))
        return [weights] if half == 1 or ready else [*self._before(tile, scores, step), weights]

    def exponents(self, tile, scores: str, step: int) -> list[Phase]:
        """What is before the exponentials of one block, where they are not among it: LSE, mask, FFMA."""
        return [*self._before(tile, scores, step), Phase(fma=CHUNK, chunks=_chunks(tile.per_thread(scores)))]

    def _before(self, tile, scores: str, step: int) -> list[Phase]:
        elements = tile.per_thread(scores)
        is_last = self.code.last_apart and step == tile.loop - 1
        fetched = 4 * elements + self.code.around if step == 0 or is_last else 0
        asked = [Phase(loads=1, latencies=1)] if self.code.asks else []
        is_masked = step < self.code.masked if self.code.masked and tile.masked else tile.is_masked(step)
        masked = [Phase(alu=self.code.mask_alu * CHUNK, chunks=_chunks(elements))] if is_masked else []
        return [replace(self._statistics(tile, scores), fetched=fetched), *asked, *masked]

    def gradient(self, tile, products: str) -> list[Phase]:
        """dS of one block: delta, subtraction, product, conversion."""
        elements = tile.per_thread(products)
        arithmetic = Phase(fma=self.code.gradient_fma * CHUNK, convert=CHUNK // 2, chunks=_chunks(elements))
        return [self._statistics(tile, products), arithmetic]

    def _statistics(self, tile, scores: str) -> Phase:
        """LSE, or delta, of the queries that a thread's elements belong to, out of shared memory."""
        if not scores.endswith("^T"):
            return Phase(other=counts.rows_per_thread(tile), latencies=1)
        columns, alu = tile.share(scores)[1], self.code.statistic_alu
        if self.has_read:
            self.has_read = False
            return Phase(alu=alu * columns // 4)
        return Phase(loads=-(-columns // 16), alu=alu * columns // 4, latencies=1)

    def read(self, tile, of: str) -> list[Phase]:
        """The same before it is wanted."""
        phase = self._statistics(tile, of)
        self.has_read = True
        return [replace(phase, alu=0, latencies=0, goes_on=True)]

    def put(self, tile, name: str) -> list[Phase]:
        """A register tensor into shared memory for others: 16-bit operands by STSM, sums as they lie; then fence and barrier."""
        nbytes = tile.store_bytes(name.removesuffix("^T")) if name.startswith(("P", "dS")) else 4 * 128 * tile.per_thread(name)
        stores = max(1, nbytes // (128 * STORED_BYTES))
        if self.code.wgmma:
            return [Phase(other=1, stsm=1, chunks=stores, latencies=1)]
        return [Phase(other=4, stsm=1, chunks=stores, latencies=1)]  # st.shared of pairs

    def add(self, tile, name: str, parts: int = 1) -> list[Phase]:
        """Sums from registers to memory: the addresses; the instructions that add are the op's own."""
        return [Phase(alu=2, other=2, chunks=_chunks(tile.per_thread(name) // parts))]

    def arithmetic(self, tile, what: str) -> list[Phase]:
        """What the kernels around the main one compute."""
        elements = -(-tile.tile.block_m * tile.head_dim // (128 * tile.consumers))
        if what == "row dot":  # O and dO to fp32, FFMA, and three shuffles among the eight threads of a row
            return [Phase(fma=CHUNK, alu=CHUNK, other=2, chunks=_chunks(elements), latencies=3)]
        if what == "scale dQ":  # in and out of shared memory, FMUL
            return [Phase(fma=CHUNK, other=4, chunks=_chunks(elements), latencies=1)]
        return [replace(READINGS[what], chunks=_chunks(tile.per_thread("dP")))]

    def stage(self, tile, name: str) -> list[Phase]:
        """Convert a result, and scale dK, for its way out; LSE-like statistics and zeros go as they are."""
        if name in STATISTICS:
            return [STATISTIC]
        if name == "dQaccum":
            return [Phase(other=1, chunks=max(1, tile.store_bytes(name) // (128 * STORED_BYTES)))]
        elements = tile.store_bytes(name) // (128 * tile.workload.output_bytes)
        fetched = elements + SEND.other if self.code.wgmma else 0
        scaled = CHUNK if name == "dK" else 0
        return [Phase(fma=scaled, convert=CHUNK // 2, other=1, stsm=1, chunks=_chunks(elements), latencies=1, fetched=fetched)]

    def send(self) -> list[Phase]:
        """From staged rows to a TMA store."""
        return [SEND]


READINGS = {"row sum of P dP": Phase(fma=CHUNK, latencies=2), "P (dP - delta)": Phase(fma=2 * CHUNK)}
"""Standard attention's reading of a block of P and dP: FFMA; FADD and FMUL. Per chunk."""


def _chunks(elements: int) -> int:
    return max(1, -(-elements // CHUNK))
