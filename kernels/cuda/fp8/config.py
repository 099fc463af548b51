"""Which FP8 kernels there are: the schedules' own .cu files over e4m3's headers, and the tile each runs on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ....simulator.errors import UsageError
from ....simulator.problem.tile import Tile
from ...compile.build import Source
from .. import config as sixteen_bit
from .wgmma import header

HERE = Path(__file__).parent
SCHEDULES = ("fa3", "overlap-2stage")
OUTPUTS = ("bf16", "fp16")
WARPGROUP = 128
SHIFT = 4
"""A weight at the maximum in use is 2^SHIFT: it may grow 28-fold before e4m3 ends and O must be rescaled (fp8/NOTES.md)."""


@dataclass(frozen=True)
class Fit:
    """A tile and what else its kernel needs; for up to so many keys."""

    tile: Tile
    v_stages: int  # slots of V as loaded
    vt_stages: int  # and transposed
    consumer_registers: int  # of a thread
    keys: float = math.inf
    key_panel: int = 0  # keys of a swizzled row of the transposed V, 128, 64 or 32; 0 for the widest that divides block_n


FITS = {
    64: (Fit(Tile(192, 128, 2, 3), 2, 2, 160),),
    128: (Fit(Tile(128, 128, 2, 2), 2, 4, 208, keys=1024), Fit(Tile(128, 192, 2, 2), 1, 3, 240, key_panel=128)),
    256: (Fit(Tile(128, 96, 2, 2), 2, 2, 232),),
}
"""By head_dim, the first that takes the keys. At d128 N = 192 is the widest whose S, two P and O fit 240 registers; 1k keys are
five and a third such blocks and eight of 128."""
FITS_TWO_LEVELS = {64: Fit(Tile(128, 192, 3, 2), 2, 3, 240), 128: Fit(Tile(128, 96, 3, 2), 2, 4, 232)}
"""Where P V is added up in two levels: a second accumulator as wide as O, for which d256 has no registers."""
APPROXIMATE = {64: 8, 128: 16}
"""Head dims at which exponentials bind, where half of them may be approximate: those of every second so many keys."""
HEAD_DIMS = tuple(FITS)
QUERY_ROWS = 64
"""Rows of Q to a descale of a block: a consumer warpgroup's. Those of K and V are the tile's block_n."""


@dataclass(frozen=True)
class Fp8Config:
    """One compiled kernel: everything that is chosen at compile time."""

    schedule: str
    output: str
    head_dim: int
    causal: bool
    fit: Fit
    block_scales: bool = False  # for 64 rows of Q and for each block of K and V; else for a head
    two_levels: bool = False  # P V of some blocks added up apart
    approximate: bool = False  # half of the exponentials along lines between powers of two
    trace: bool = False  # stores the clock at each event into Params::trace

    @property
    def name(self) -> str:
        """As it is spoken of: "fa3 e4m3 d128 causal"."""
        more = " block scales" * self.block_scales + " two levels" * self.two_levels
        more += " approximate" * self.approximate + " trace" * self.trace
        return f"{self.schedule} e4m3 d{self.head_dim} {'causal' if self.causal else 'full'} to {self.output}{more}"

    @property
    def path(self) -> Path:
        """The schedule's .cu. Where exponentials are approximate turns cost a percent, and the order without them is taken."""
        return sixteen_bit.path_of("overlap-2stage" if self.approximate else self.schedule)

    @property
    def threads(self) -> int:
        """Threads of a CTA: a producer warpgroup, one warp of which loads and three transpose V, and the consumers."""
        return WARPGROUP * (1 + self.fit.tile.consumers)

    @property
    def source(self) -> Source:
        """The schedule's text with e4m3's headers and macros."""
        tile = self.fit.tile
        defines = {
            "HEAD_DIM": self.head_dim,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "STAGES": tile.stages,
            "V_STAGES": self.fit.v_stages,
            "VT_STAGES": self.fit.vt_stages,
            "KEY_PANEL": self.fit.key_panel or next(keys for keys in (128, 64, 32) if tile.block_n % keys == 0),
            "CONSUMERS": tile.consumers,
            "CONSUMER_REGISTERS": self.fit.consumer_registers,
            "CAUSAL": int(self.causal),
            "BF16": int(self.output == "bf16"),
            "SHIFT": SHIFT,
            "BLOCK_SCALES": int(self.block_scales),
            "TWO_LEVELS": int(self.two_levels),
            "APPROXIMATE": APPROXIMATE[self.head_dim] if self.approximate else 0,
            "TRACE": int(self.trace),
        }
        return Source(f"fp8_{self.path.name}", self.path.read_text(encoding="utf-8"), headers(), defines)


def config_for(
    schedule: str,
    output: str,
    head_dim: int,
    causal: bool,
    seqlen_k: int,
    block_scales: bool = False,
    two_levels: bool = False,
    approximate: bool = False,
) -> Fp8Config:
    """The kernel of a schedule on the tile for so many keys; UsageError where there is none."""
    if schedule not in SCHEDULES:
        raise UsageError(f"schedule={schedule!r} has no FP8 kernel ({', '.join(SCHEDULES)})")
    if head_dim not in HEAD_DIMS:
        raise UsageError(f"head_dim={head_dim} is not supported in FP8 ({', '.join(map(str, HEAD_DIMS))})")
    if two_levels and head_dim not in FITS_TWO_LEVELS:
        able = " or ".join(map(str, FITS_TWO_LEVELS))
        raise UsageError(f"two_level at head_dim={head_dim} is not possible: a second accumulator as wide needs head_dim {able}")
    if approximate and head_dim not in APPROXIMATE:
        able = " or ".join(map(str, APPROXIMATE))
        raise UsageError(f"approximate exponentials gain nothing at head_dim={head_dim}: leave them out, or give head_dim {able}")
    fit = FITS_TWO_LEVELS[head_dim] if two_levels else next(fit for fit in FITS[head_dim] if seqlen_k <= fit.keys)
    return Fp8Config(schedule, output, head_dim, causal, fit, block_scales, two_levels, approximate)


def variants() -> list[Fp8Config]:
    """Every FP8 kernel that there is."""
    fits = [(head_dim, fit, False) for head_dim, fits in FITS.items() for fit in fits]
    fits += [(head_dim, fit, True) for head_dim, fit in FITS_TWO_LEVELS.items()]
    return [
        Fp8Config(schedule, output, head_dim, causal, fit, block_scales, two_levels, approximate)
        for schedule in SCHEDULES
        for head_dim, fit, two_levels in fits
        for block_scales in (False, True)
        for causal in (False, True)
        for output in OUTPUTS
        for approximate in (False, True)
        if not approximate or (head_dim in APPROXIMATE and schedule == "fa3")  # the other's would be the same kernel
    ]


@lru_cache(maxsize=1)
def headers() -> dict[str, str]:
    """The 16-bit kernels' headers, those of e4m3 in the place of their namesakes; wgmma.cuh is generated."""
    own = {path.name: path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.cuh"))}
    return sixteen_bit.headers() | own | {"wgmma.cuh": header()}
