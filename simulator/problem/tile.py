"""Tile: how one CTA cuts the problem, whether it fits an SM, and the tile a schedule takes by default."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from ..errors import UsageError
from ..values import flag, shown
from .workload import Workload

MOST = {"block_m": 1024, "block_n": 4096, "stages": 256, "consumers": 16, "cluster": 16, "parts": 256, "resident": 8}
"""The most of each: several times what fits any SM, so that how much a tile exceeds it can still be said."""


@dataclass(frozen=True)
class Tile:
    """One CTA's share: block_m queries x block_n keys, `stages` K/V buffers, `consumers` warpgroups, `cluster` CTAs.

    The keys are walked in `parts`, of the schedule "decode" alone, whose block_m counts the rows of a K/V head's query heads, or,
    not `packed`, those of one query head.

    `resident` CTAs of a Hopper schedule share an SM and deal its registers among them; other kernels as many as fit.

    For mma.sync kernels a consumer is four warps, one per sub-partition, as a warpgroup is.
    """

    block_m: int
    block_n: int
    stages: int = 2
    consumers: int = 2
    cluster: int = 1
    parts: int = 1
    packed: bool = True
    resident: int = 1

    def __post_init__(self) -> None:
        flag(self.packed, "tile: packed")
        for name in MOST:
            value = getattr(self, name)
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

    def consumers_for(self, block_m: int, block_n: int | None = None) -> int:
        """Consumers of a tile of other height, so that each has as many rows as here; of a backward's other width, keys."""
        if block_n is not None:
            return max(1, block_n * self.consumers // self.block_n)
        return max(1, block_m * self.consumers // self.block_m)

    def to_dict(self) -> dict:
        """The tile's fields as plain JSON values; parts, heads that are not packed and CTAs that share an SM where it is so."""
        usual = {"parts": 1, "packed": True, "resident": 1}
        return {name: value for name, value in asdict(self).items() if usual.get(name) != value}

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}"


# -- the default tile per (family, head_dim, bytes per element, causal) -----------------------------------------------
# Each row: the tile, then why. "hopper", "in sequence" (no softmax under a warpgroup's own GEMMs; as "hopper" but where it has
# rows) and "3-stage" are the tiles of our CUDA kernels, "published" those of FlashAttention-3 where they fit its buffers as
# modelled; mma.sync tiles follow FlashAttention-2's for A100/H100.
_T = Tile
DEFAULTS: dict[tuple, tuple[Tile, str]] = {
    ("hopper", 64, 2, False): (_T(192, 96, 3, 3), "three consumers hide d64's long softmax; S, P and the next P within 160 registers hold N <= 96; a third stage gains 0 to 7 %"),
    ("hopper", 64, 2, True): (_T(192, 96, 3, 3), "as full; 128x128 gains 11 % at 1k and loses 8 % at 16k"),
    ("in sequence", 64, 2, False): (_T(192, 96, 2, 3), "as hopper; a third stage gains pingpong nothing, warp-specialized 2 to 10 %"),
    ("in sequence", 64, 2, True): (_T(192, 96, 2, 3), "as hopper; a third stage gains pingpong nothing and loses 1 to 5 % of warp-specialized"),
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
    ("published", 64, 2, False): (_T(192, 192, 2, 3), "three consumers hide d64's long softmax; P goes through shared memory, which N > 128 needs within 160 registers"),
    ("published", 64, 2, True): (_T(192, 128, 2, 3), "N = 128 wastes less of the diagonal than 192, and leaves P in registers"),
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
    ("mma backward", 64, 2, False): (_T(128, 128, 2, 2), "FlashAttention-2's tile for d64: eight warps, two Q buffers"),
    ("mma backward", 128, 2, False): (_T(64, 128, 2, 2), "FlashAttention-2's tile for d128: dK and dV of 128 keys take 128 registers of eight warps"),
    ("mma backward", 256, 2, False): (_T(64, 64, 1, 2), "FlashAttention-2's tile for d256: K, V, Q and dO take 128 KiB"),
    ("hopper backward", 64, 2, False): (_T(128, 128, 2, 2), "FlashAttention-3's for d64"),
    ("hopper backward", 64, 2, True): (_T(128, 128, 2, 2), "as full"),
    ("hopper backward", 128, 2, False): (_T(80, 128, 2, 2), "FlashAttention-3's for d128: S, dP, dK and dV of 80 queries and 128 keys take 208 registers"),
    ("hopper backward", 128, 2, True): (_T(64, 128, 2, 2), "FlashAttention-3's for d128, causal: 64 queries waste less of the diagonal"),
    ("hopper backward", 256, 2, False): (_T(64, 80, 2, 2), "FlashAttention-4's for d256: dK and dV of 80 keys take 160 registers"),
    ("cudnn backward", 64, 2, False): (_T(64, 128, 5, 2), "cuDNN's for d64"),
    ("cudnn backward", 128, 2, False): (_T(64, 128, 3, 2), "cuDNN's for d128: three buffers of Q and dO leave room for one dS"),
    ("narrow backward", 256, 2, False): (_T(64, 48, 2, 2), "FlashAttention-4's for d256: beside dQ, 64 KiB of fp32, and two stages of Q no more keys fit"),
    ("lagged backward", 64, 2, False): (_T(128, 128, 2, 2), "as fa3: dK, dV, P, dP and dQ take 192 registers"),
    ("lagged backward", 128, 2, False): (_T(64, 128, 2, 2), "dK, dV, P, dP and dQ of 64 queries take 208 registers; 80 with dQ sent before dP is as fast"),
    ("across backward", 128, 2, False): (_T(80, 128, 2, 2), "80 queries ask less of shared memory; dK, dV, S and P take 188 registers, of 184 above the first 24"),
    ("lagged backward", 256, 2, False): (_T(64, 64, 2, 2), "dK and dV of 64 keys, half of the head dim each, take 128 registers; 64 queries fill shared memory"),
    ("standard backward", 64, 2, False): (_T(128, 128, 1, 1), "as standard's forward: three CTAs share an SM"),
    ("standard backward", 128, 2, False): (_T(128, 128, 1, 2), "as d64; dK of 128 keys takes 64 registers of eight warps"),
    ("standard backward", 256, 2, False): (_T(128, 64, 1, 2), "dK of 64 keys takes 64 registers of eight warps"),
}  # fmt: skip
HEAD_DIMS = (64, 128, 256)
OURS = ("hopper", "in sequence", "3-stage")
"""Families of our CUDA forward kernels."""


def default_for(family: str, workload: Workload) -> tuple[Tile, str]:
    """The default tile of a family of schedules for a workload, and the reason it was chosen."""
    key = (family, workload.head_dim, workload.element_bytes, workload.causal)
    if family == "in sequence" and key not in DEFAULTS:
        return default_for("hopper", workload)
    found = DEFAULTS.get(key) or DEFAULTS[key[:3] + (False,)]
    tile, why = found
    if workload.causal and tile.cluster > 1 and key not in DEFAULTS:
        tile = Tile(tile.block_m, tile.block_n, tile.stages, tile.consumers, 1)
    return tile, why
