"""Tile: how one CTA cuts the problem, whether it fits an SM, and the tile a schedule takes by default."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field

from .errors import UsageError
from .softmax import ONLINE, Softmax
from .values import shown
from .workload import LSE_BYTES, Workload

K_PER_STEP_BYTES = 32
"""One WGMMA or mma.sync k step reads 32 bytes of K per row: 16 fp16 or 32 e4m3 values (PTX ISA, wgmma shapes)."""

MOST = {"block_m": 1024, "block_n": 4096, "stages": 256, "consumers": 16, "cluster": 16}
"""The most of each: several times what fits any SM, so that how much a tile exceeds it can still be said."""


@dataclass(frozen=True)
class Tile:
    """One CTA's share: block_m queries x block_n keys, `stages` K/V buffers, `consumers` warpgroups, `cluster` CTAs.

    For mma.sync kernels a consumer is four warps, one per sub-partition, as a warpgroup is.
    """

    block_m: int
    block_n: int
    stages: int = 2
    consumers: int = 2
    cluster: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise UsageError(f"tile: {name}={shown(value)} must be a positive whole number")
            if value > MOST[name]:
                raise UsageError(f"tile: {name}={shown(value)} fits no SM; give at most {MOST[name]:,}")
        if self.block_m % self.consumers:
            raise UsageError(f"tile {self}: block_m is not divided evenly by {self.consumers} consumers")
        if self.block_n % 16:
            raise UsageError(f"tile {self}: block_n must be a multiple of 16, the k step of the second GEMM")
        if self.cluster not in (1, 2, 4):
            raise UsageError(f"cluster={self.cluster} is not supported (1, 2, 4)")

    @classmethod
    def parse(cls, text: str, **fields: int) -> Tile:
        """A tile from "128x128" (block_m x block_n) and any other fields by name."""
        match = re.fullmatch(r"([0-9]{1,18})x([0-9]{1,18})", text.strip())
        if not match:
            raise UsageError(f"tile {shown(text)} is not of the form 128x128 (queries x keys)")
        return cls(int(match[1]), int(match[2]), **fields)

    def to_dict(self) -> dict:
        """The tile's fields as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}"


@dataclass(frozen=True)
class Gemm:
    """One consumer's share of a block GEMM: m x n, `k_steps` instructions deep."""

    m: int
    n: int
    k_steps: int
    k_per_step: int
    a_in_registers: int
    smem_bytes_per_step: int  # read by ldmatrix in the mma.sync form, all four warps together


@dataclass(frozen=True)
class TileView:
    """What a schedule sees of its tile: the loop, the bytes of its buffers, the shapes of its GEMMs."""

    tile: Tile
    workload: Workload
    loop: int  # K/V blocks this CTA walks
    masked: int = 0  # how many of them, from the first walked, cross the diagonal or the ragged end
    looped: frozenset[str] = field(default=frozenset({"K", "V"}))  # rings that advance once per loop step
    splits: int = 1  # CTAs that the Q blocks of a head are dealt to (FlashAttention-1)
    softmax: Softmax = ONLINE

    @property
    def stages(self) -> int:
        """Buffers per K/V ring."""
        return self.tile.stages

    @property
    def consumers(self) -> int:
        """Consumer warpgroups."""
        return self.tile.consumers

    @property
    def block_n(self) -> int:
        """Keys per block."""
        return self.tile.block_n

    @property
    def head_dim(self) -> int:
        """Head dimension."""
        return self.workload.head_dim

    @property
    def element_bytes(self) -> int:
        """Bytes per element of Q, K, V and P."""
        return self.workload.element_bytes

    @property
    def rows(self) -> int:
        """Query rows of one consumer."""
        return self.tile.block_m // self.tile.consumers

    @property
    def kv_blocks(self) -> range:
        """The K/V blocks in the order they are walked."""
        return range(self.loop)

    def q_blocks(self, j: int) -> range:
        """Q blocks under K/V block j (FlashAttention-1's inner loop): those that see some of it.

        Where `splits` CTAs deal them among themselves, as many as any of them has, by the numbers of the first.
        """
        end = -(-self.workload.seqlen_q // self.tile.block_m)
        first = self.first_q_block(j)
        return range(first // self.splits * self.splits if first < end else end, end, self.splits)

    def first_q_block(self, j: int) -> int:
        """The first Q block that sees any key of K/V block j; all are walked under the first, which leaves O, l and m of each."""
        work = self.workload
        unseen = j * self.block_n - (work.seqlen_k - work.seqlen_q) if work.causal and j > 0 else 0
        return max(0, unseen) // self.tile.block_m

    @property
    def q_bytes(self) -> int:
        """Shared memory of a Q tile."""
        return self.tile.block_m * self.head_dim * self.element_bytes

    @property
    def k_bytes(self) -> int:
        """Shared memory of a K tile."""
        return self.tile.block_n * self.head_dim * self.element_bytes

    v_bytes = k_bytes

    @property
    def o_bytes(self) -> int:
        """Shared memory of a staged O tile."""
        return self.tile.block_m * self.head_dim * self.workload.output_bytes

    @property
    def stage_bytes(self) -> int:
        """Shared memory through which O leaves in rounds, 128 columns at a time."""
        return self.o_bytes * min(128, self.head_dim) // self.head_dim

    @property
    def boxes(self) -> int:
        """TMA copies by which one warp's rows of O leave: a swizzled row of a box is 128 bytes."""
        return max(1, self.head_dim * self.workload.output_bytes // 128)

    @property
    def boxes_in(self) -> int:
        """TMA copies of one load of Q, K or V."""
        return max(1, self.head_dim * self.element_bytes // 128)

    @property
    def s_bytes(self) -> int:
        """Shared memory of an S or P tile."""
        return self.tile.block_m * self.tile.block_n * self.element_bytes

    @property
    def row_bytes(self) -> int:
        """One fp32 statistic per query row (LSE, l, m)."""
        return self.tile.block_m * LSE_BYTES

    def store_bytes(self, name: str) -> int:
        """Bytes one consumer stores of a result tile."""
        whole = {"O": self.o_bytes, "S": self.s_bytes, "P": self.s_bytes}.get(name, self.row_bytes)
        return whole // self.tile.consumers

    def is_masked(self, j: int) -> bool:
        """Whether the block walked at step j needs masking."""
        return j < self.masked

    def hidden(self, rank: int) -> int:
        """Of the walked blocks, how many from the first on consumer `rank` sees nothing of: they lie above its diagonal."""
        above = (self.tile.block_m - (rank + 1) * self.rows) // self.block_n
        return min(above, self.masked - 1) if self.workload.causal and self.masked else 0

    def sharing(self, ring: str) -> int:
        """CTAs of the cluster that receive the same multicast load of a ring (K and V; Q is each CTA's own)."""
        return self.tile.cluster if ring in ("K", "V") else 1

    def step(self, ring: str, index: int) -> int:
        """The loop step of a ring's load, -1 for what is loaded outside the loop."""
        return index if ring in self.looped else -1

    def gemm(self, label: str) -> Gemm:
        """Shape of "S=QK^T" (A and B from shared memory) or "O+=PV" (P from registers)."""
        per_step = K_PER_STEP_BYTES // self.element_bytes
        scores = label.startswith("S")
        n, k = (self.block_n, self.head_dim) if scores else (self.head_dim, self.block_n)
        b_bytes = 4 * n * K_PER_STEP_BYTES  # each of the four warps reads all of B
        a_bytes = self.rows * K_PER_STEP_BYTES if scores else 0
        return Gemm(self.rows, n, -(-k // per_step), per_step, int(not scores), a_bytes + b_bytes)


# -- the default tile per (family, head_dim, bytes per element, causal) -----------------------------------------------
# Each row: the tile, then why. "hopper" and "3-stage" are the tiles of our CUDA kernels, "published" those of
# FlashAttention-3 where they fit its buffers as modelled; mma.sync tiles follow FlashAttention-2's for A100/H100.
_T = Tile
DEFAULTS: dict[tuple, tuple[Tile, str]] = {
    ("hopper", 64, 2, False): (_T(192, 96, 2, 3), "three consumers hide d64's long softmax; S, P and the next P within 160 registers hold N <= 96"),
    ("hopper", 64, 2, True): (_T(192, 96, 2, 3), "as full; 128x128 gains 8 % at 1k and loses 9 % at 16k"),
    ("hopper", 128, 2, False): (_T(128, 128, 2, 2), "N = 128 leaves registers for a second P, so that weights are converted under PV; 144 gains 1 % at 16k, loses 9 % at 1k"),
    ("hopper", 128, 2, True): (_T(128, 128, 2, 2), "N = M masks one block per row of tiles"),
    ("hopper", 256, 2, False): (_T(128, 64, 2, 2), "O takes 128 registers; two stages of K and V at N = 64 leave room to stage O"),
    ("hopper", 256, 2, True): (_T(128, 64, 2, 2), "as full"),
    ("hopper", 64, 1, False): (_T(192, 128, 2, 3), "bytes halve, so N grows until 160 registers are full"),
    ("hopper", 128, 1, False): (_T(128, 192, 2, 2), "bytes halve, so N grows until 240 registers are full"),
    ("hopper", 256, 1, False): (_T(128, 96, 2, 2), "O takes 128 registers"),
    ("3-stage", 64, 2, False): (_T(192, 64, 2, 3), "two S and two P live at once: N <= 64 within 160 registers"),
    ("3-stage", 128, 2, False): (_T(128, 96, 2, 2), "two S and two P live at once: N <= 96 within 240 registers"),
    ("3-stage", 256, 2, False): (_T(128, 48, 2, 2), "two S and two P beside 128 registers of O: N <= 48"),
    ("3-stage", 64, 1, False): (_T(192, 64, 2, 3), "as fp16"),
    ("3-stage", 128, 1, False): (_T(128, 96, 2, 2), "as fp16"),
    ("3-stage", 256, 1, False): (_T(128, 64, 2, 2), "as fp16, P takes half"),
    ("published", 64, 2, False): (_T(192, 128, 2, 3), "three consumers hide d64's long softmax; P in registers needs N <= 128 within 160 registers"),
    ("published", 64, 2, True): (_T(192, 128, 2, 3), "as full; N = 128 wastes less of the diagonal than 192"),
    ("published", 128, 2, False): (_T(128, 176, 2, 2, 2), "the widest N whose S, P and O fit 240 registers and two stages 227 KiB; two CTAs share K and V"),
    ("published", 128, 2, True): (_T(128, 128, 2, 2), "N = M masks one block per row of tiles; no cluster, as CTAs of a pair would walk different lengths"),
    ("published", 256, 2, False): (_T(128, 80, 2, 2, 2), "O takes 128 registers, two stages of K and V at N = 80 take 160 KiB"),
    ("published", 256, 2, True): (_T(128, 80, 2, 2), "as full, without the cluster"),
    ("published", 64, 1, False): (_T(192, 160, 2, 3), "bytes halve, so N grows until 160 registers are full"),
    ("published", 128, 1, False): (_T(128, 224, 2, 2), "bytes halve, so N grows until 240 registers are full"),
    ("published", 256, 1, False): (_T(128, 128, 2, 2), "O takes 128 registers"),
    ("mma", 64, 2, False): (_T(128, 128, 1, 1), "FlashAttention-2's tile for d64: four warps, two CTAs per SM by registers"),
    ("mma", 128, 2, False): (_T(128, 64, 1, 1), "FlashAttention-2's tile for d128: O leaves room for N = 64; two CTAs per SM"),
    ("mma", 256, 2, False): (_T(64, 64, 1, 1), "FlashAttention-2's tile for d256 where 228 KiB hold two CTAs"),
    ("fa1", 64, 2, False): (_T(64, 256, 1, 2), "FlashAttention-1, Algorithm 1 line 1: N = M / 4d fp16 values of shared memory (318 on an A100), rows min(N, d)"),
    ("fa1", 128, 2, False): (_T(128, 160, 1, 2), "as d64: N = 159 on an A100, rows min(N, d)"),
    ("fa1", 256, 2, False): (_T(64, 64, 1, 2), "as d64: N = 79 on an A100; 80 rows and O of 256 are too many registers"),
    ("standard", 64, 2, False): (_T(128, 128, 1, 1), "three CTAs share an SM: one's loads and stores lie under another's GEMM; 128x256, alone, moves a fifth less"),
    ("standard", 128, 2, False): (_T(128, 128, 1, 1), "as d64"),
    ("standard", 256, 2, False): (_T(64, 128, 2, 1), "O takes 128 registers at 64 rows; two stages, since fewer CTAs fit"),
}  # fmt: skip
HEAD_DIMS = (64, 128, 256)


def default_for(family: str, workload: Workload) -> tuple[Tile, str]:
    """The default tile of a family of schedules for a workload, and the reason it was chosen."""
    key = (family, workload.head_dim, workload.element_bytes, workload.causal)
    found = DEFAULTS.get(key) or DEFAULTS[key[:3] + (False,)]
    tile, why = found
    if workload.causal and tile.cluster > 1 and key not in DEFAULTS:
        tile = Tile(tile.block_m, tile.block_n, tile.stages, tile.consumers, 1)
    return tile, why
