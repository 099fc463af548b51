"""Estimate: the code of a kernel that is not written yet, from its algorithm and from what our compiled kernels do.

A warp's `Pen` hears, in the order of its schedule, what the warp is about to do and answers with the instructions that a
compiled kernel executes there. It knows of the order only what it has heard.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from . import softmax as counts
from .around import Around
from .phase import Phase
from .softmax import CHUNK, EXACT, ONLINE, RUNNING, Left, Softmax

STATISTICS = ("LSE", "l", "m", "delta", "LSEpart")
"""Results of one fp32 number per row."""

# -- what a kernel does around its arithmetic ---------------------------------------------------------------------------
# From the SASS of kernels/cuda (CUDA 13.0): chains of dependent instructions, each waiting for the last. A "latency" is a
# shuffle's (24 cycles: also about an LDS, two branches on a predicate, or five dependent integer instructions). Code that
# runs once a tile comes from a cache behind the nearest ones, which the loop over blocks has filled: it counts as fetched.
ADDRESS = Phase(latencies=3)
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
_BOTH = (False, True)
_DESCRIPTORS = {(scores, looped): Phase(latencies=int(scores), branches=int(looped)) for scores in _BOTH for looped in _BOTH}


ROW = 512
"""Bytes of one LDSM.x4 or STSM.x4 of a warp, 16 of each lane; a phase counts them for four warps."""
TRANSPOSE = Phase(alu=4, other=7, matrices=2)
"""Of 16 bytes a lane: four PRMT, addresses, barriers and branches, LDSM and STSM, which move as much (FlashAttention-3's e4m3
kernel of 128 x 224 at d128, wheel fa3-fwd 0.0.3: 204 instructions for 14 LDSM, 14 STSM and 57 PRMT)."""
TRANSPOSE_RUN, TRANSPOSE_BLOCK = 20, 65
"""Instructions of ours beside those six: of a run of units, which one warp takes as a whole, 17 to 31, and of a warp's share of a
block 59 to 71 (kernels/cuda/fp8/producer.cuh, SASS of its four tiles: 128 x 192 at d128 197 instructions a warp for 16 units)."""


@dataclass(frozen=True)
class Spill:
    """Registers that a compiler had no room for: 4-byte words of a thread that it stores to local memory, by head dim and mask."""

    head_dim: int
    causal: bool
    each_block: int
    each_tile: int  # besides


@dataclass(frozen=True)
class Estimate:
    """The code of a kernel with this softmax; one that is `persistent` has TMA, rings and a next tile to see to."""

    softmax: Softmax
    persistent: bool
    copied: bool = field(default=False, kw_only=True)
    """Whether a tile's first block, those with a mask and the loop run code of their own, each fetched anew."""

    transposers: int = field(default=4, kw_only=True)
    """Warps that transpose a block of 8-bit V."""

    prologue: tuple[int, int] = field(default=(0, 0), kw_only=True)
    """Instructions of a warp until barriers and roles are known, or its first copies; and how many more those of a cluster take."""

    alone: int = field(default=0, kw_only=True)
    """Cycles that one warp alone takes for them at least, by the counts in the instructions."""

    epilogue: int = field(default=0, kw_only=True)
    """Instructions behind the loop besides the arithmetic of O."""

    beside: int = field(default=0, kw_only=True)
    """Instructions of a block besides, where warps share its keys, as they do of few rows."""

    near: bool = field(default=False, kw_only=True)
    """Whether it finds its code near, from the call before: calls so short come one behind another."""

    spills: tuple[Spill, ...] = field(default=(), kw_only=True)

    @property
    def operand_sets(self) -> int:
        """Register sets for P between which blocks alternate."""
        return self.softmax.operand_sets

    def pen(self, rank: int) -> Pen:
        """The code of one warp role: the producer (-1) or a consumer."""
        return Pen(self, rank)

    def spilled(self, head_dim: int, causal: bool) -> Spill | None:
        """What it stores to local memory, if anything."""
        return next((each for each in self.spills if (each.head_dim, each.causal) == (head_dim, causal)), None)


class Pen(Around):
    """What one warp executes around the points of its order; `tile` is a view of the tile it is in."""

    def __init__(self, code: Estimate, rank: int):
        self.code, self.rank = code, rank
        self.by_tma = code.persistent  # whether results leave by TMA
        self.votes = code.softmax is RUNNING
        self.in_pairs = False  # blocks: a loop that writes one set of P while a product reads the other has two copies
        self.loops = False  # whether such a loop's next GEMM is behind its branch back
        self.ahead = False  # whether S of the next block is issued before the softmax of this one
        self.left: list[Left] = []  # what the last softmax left to do

    def prologue(self, tile) -> list[Phase]:
        """What a warp executes before its role begins, once a CTA."""
        alone, of_cluster = self.code.prologue
        instructions = alone + of_cluster * (tile.tile.cluster > 1)
        return [Phase(other=instructions, stalls=self.code.alone)] if instructions else []

    def next_tile(self) -> list[Phase]:
        """To find the tile that comes next."""
        return [NEXT_TILE if self.rank >= 0 else LOCATE]

    def load(self) -> list[Phase]:
        """Before a TMA load."""
        return [ADDRESS]

    def gemm(self, scores: bool) -> list[Phase]:
        """Before a WGMMA, behind the wait for its block: stage and descriptors in a row, and the loop's branch."""
        if not self.code.persistent:
            return []
        looped = self.loops if self.in_pairs else scores
        self.loops = False
        return [_DESCRIPTORS[scores, looped]]

    def exchange(self, tile) -> list[Phase]:
        """Of a block whose keys the warps share: to meet and read what the others have, about a shuffle's latency each."""
        if not self.code.beside or tile.tile.block_m >= 4 * ROWS_OF_A_WARP:
            return []
        meetings = MEETINGS_OF_EIGHT if tile.head_dim > 128 else MEETINGS
        return [Phase(other=self.code.beside, latencies=2 * meetings)]

    def weights(self, tile, j: int, in_flight: Collection[str]) -> list[Phase]:
        """The softmax of block j beside GEMMs in flight, by what they write; the rest is left for `rescale`."""
        if j == 0:
            self.ahead = "S" in in_flight
        under_product = "O" in in_flight
        self.in_pairs = under_product and self.code.operand_sets > 1
        phases, self.left = self.code.softmax.block(tile, j, under_product, self.rank, self.ahead)
        if self.code.copied and (j <= 1 or tile.is_masked(j - 1) > tile.is_masked(j)):
            fetched = sum(each.instructions for each in (*phases, *(left.phase for left in self.left)))
            phases = [replace(each, own=True) for each in phases]
            phases = [replace(phases[0], fetched=fetched), *phases[1:]]
            self.left = [left._replace(phase=replace(left.phase, own=True)) for left in self.left]
        return [*self.exchange(tile), *phases]

    def rescale(self, j: int, of: str = "") -> list[Left]:
        """What the softmax of block j has left, or that part of it which writes one register tensor."""
        self.loops = j % 2 == 0
        now = [each for each in self.left if of in ("", each.writes)]
        self.left = [each for each in self.left if each not in now]
        if of == "O":  # by itself: the compiler spreads it over the issue of the S before
            now = [each._replace(phase=replace(each.phase, interleaved=True)) for each in now]
        return now

    def normalize(self, tile) -> list[Phase]:
        """The epilogue's arithmetic, or FlashAttention-1's at every step."""
        statistics, scaled = counts.normalize(tile)
        around = [Phase(other=self.code.epilogue)] if self.code.epilogue else []
        return [statistics, *around, replace(scaled, fetched=scaled.instructions if self.code.persistent else 0)]

    def stage(self, tile, name: str) -> list[Phase]:
        """Convert a result to its output type and put it in shared memory by STSM (8 values each), then fence and barrier."""
        once = self.code.persistent  # a tile
        if name in STATISTICS:
            return [STATISTIC if once else Phase(other=2 * counts.rows_per_thread(tile))]
        elements = counts.outputs_per_thread(tile) if name in ("O", "Opart") else counts.scores_per_thread(tile)
        fetched = elements // 2 + elements // CHUNK + SEND.other if once else 0
        return [Phase(convert=CHUNK // 2, other=1, stsm=1, chunks=-(-elements // CHUNK), latencies=1, fetched=fetched)]

    def arithmetic(self, tile, what: str) -> list[Phase]:
        """Of a combine: a part's weight by its LSE, and its rows of O added with it, FFMA."""
        chunks = -(-counts.outputs_per_thread(tile) // CHUNK)
        return [Phase(mufu=1, fma=4, alu=4, latencies=1), Phase(fma=CHUNK, other=2, chunks=chunks)]

    def put(self, tile, name: str) -> list[Phase]:
        """Converted weights into shared memory by STSM (8 values each), then fence and barrier."""
        return [Phase(other=1, stsm=1, chunks=-(-tile.per_thread(name) // CHUNK), latencies=1)]

    def transpose(self, tile) -> list[Phase]:
        """A block of 8-bit V: LDSM, byte permutes and STSM (16 bytes a lane each), then fence and barrier."""
        warps, units = self.code.transposers, -(-tile.v_bytes // ROW)
        chunks, each, before = -(-units // warps), TRANSPOSE, []
        if warps < 4:  # ours: a run is a panel's units of 32 keys, or half of them where those do not come out even
            run = 8 if tile.block_n // 32 * -(-tile.head_dim // 128) % warps == 0 else 4
            chunks = -(-units // run // warps) * run
            each, before = replace(TRANSPOSE, other=TRANSPOSE_RUN // run), [Phase(other=TRANSPOSE_BLOCK)]
        moved = 2 * -(-units // 4)
        full = replace(each, chunks=moved - chunks)  # fewer than four warps move less than a chunk of four does
        rest = replace(each, other=each.other + 1, matrices=1, chunks=2 * chunks - moved)
        return [*before, *(phase for phase in (full, rest) if phase.chunks > 0), Phase(latencies=2)]

    def send(self) -> list[Phase]:
        """From staged rows to a TMA store."""
        return [SEND]

    def reading(self, tile, of: str) -> list[Phase]:
        """One reading of a block of S by a softmax that is a kernel of its own."""
        return [counts.reading(tile, of)]


PLAIN, OURS, SHIPPED = (
    Estimate(ONLINE, persistent=False),
    Estimate(RUNNING, persistent=True, transposers=3, prologue=(75, 0)),
    Estimate(ONLINE, persistent=True, prologue=(150, 80)),
)
"""Kernels without TMA; ours for Hopper (kernels/cuda), one of whose producer's four warps loads; FlashAttention-3's. Prologues are
counted in SASS: up to the branch between roles (fa3.cu 73; wheel fa3-fwd 0.0.3, bf16: d64 to d256 147 to 151, clusters 232)."""
FEW_ROWS = Estimate(ONLINE, persistent=False, prologue=(444, 0), alone=705, epilogue=400, beside=120, near=True)
COMBINE = Estimate(ONLINE, persistent=False, prologue=(280, 0), near=True)
"""Triton's kernels of few queries (kernels/decode), SASS of 16 rows at d128: 1,690 instructions, of which the first copy of K is
the 444th, 392 are the loop and 410 behind it. In the loop warps meet seven times, eight warps at d256 eleven times: for maxima,
sums and weights, which go through shared memory, as each warp has some of the keys. The combine: 352, 280 of them for a row."""
MEETINGS, MEETINGS_OF_EIGHT, ROWS_OF_A_WARP = 7, 11, 16
SPILLED = "spilled"
"""What is stored so, among the tensors of a call."""
PYTORCH_SPILLS = ((64, False, 6, 22), (64, True, 6, 26), (128, False, 14, 19), (128, True, 14, 18), (256, True, 0, 15))
PYTORCH = Estimate(EXACT, persistent=False, copied=True, spills=tuple(Spill(*each) for each in PYTORCH_SPILLS))
"""FlashAttention-2 as PyTorch compiles it (SASS of flash_fwd_kernel in torch 2.11, sm_90: a block of 128 x 64 at d128 has 1,189
instructions a warp, 256 of them HMMA, 336 FMUL, 128 FADD, 72 FSETP, 68 MUFU; blocks with a mask have a copy of the loop). Spills
are its STL: the words in the loop, and those besides that lie at another address of the stack."""
