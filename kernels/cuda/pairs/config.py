"""Which kernels there are whose CTAs share an SM: the schedules' own .cu files, over an edited header.

What differs from the kernels that have an SM alone is how many CTAs its registers are dealt to. None of those is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ....simulator.errors import UsageError
from ....simulator.problem.tile import Tile
from ...compile.build import Source
from .. import config as alone
from ..config import DTYPES, KernelConfig

HERE = Path(__file__).parent
PREFIX = "pairs-"
TILES = {"overlap-2stage": Tile(64, 64, 3, 1, resident=3)}
"""By schedule, at head_dim 64. Rejected: two CTAs of 128x64 an SM, up to 13 % slower at 512 keys and more beyond (NOTES.md)."""
NAMES = tuple(f"{PREFIX}{schedule}" for schedule in TILES)
"""As flash_attn_func's `schedule`."""
HEAD_DIM = 64

REGISTERS = (
    "constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 24;\n"
    "constexpr int CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 240;\n"
    "constexpr int ENTRY_REGISTERS = 65536 / THREADS / 8 * 8;\n",
    "constexpr int PRODUCER_REGISTERS = 24;\n"
    "constexpr int ENTRY_REGISTERS = 65536 / (THREADS * RESIDENT) / 8 * 8;\n"
    "constexpr int CONSUMER_REGISTERS = (ENTRY_REGISTERS * (1 + CONSUMERS) - PRODUCER_REGISTERS) / CONSUMERS / 8 * 8;\n",
)
BOUNDS = ("__launch_bounds__(THREADS, 1)", "__launch_bounds__(THREADS, RESIDENT)")
"""(text of attention.cuh, what stands in its place here); each text stands there once."""


@dataclass(frozen=True)
class PairConfig(KernelConfig):
    """A kernel whose tile has several CTAs resident on an SM."""

    @property
    def name(self) -> str:
        """As it is spoken of: "overlap-2stage bf16 d64 causal, 64x64, 3 an SM"."""
        return f"{super().name}, {self.tile}, {self.tile.resident} an SM"

    @property
    def asked(self) -> str:
        """What flash_attn_func calls it, one of NAMES."""
        return f"{PREFIX}{self.schedule}"

    @property
    def source(self) -> Source:
        """The schedule's text with the edited header."""
        of = super().source
        return Source(f"pair_{of.name}", of.text, headers(), of.defines | {"RESIDENT": self.tile.resident})


def config_for(name: str, dtype: str, head_dim: int, causal: bool) -> PairConfig:
    """The kernel of one of NAMES; UsageError for a head_dim that it has no tile for."""
    if head_dim != HEAD_DIM:
        raise UsageError(f"head_dim={head_dim} is not supported by {name!r} ({HEAD_DIM})")
    schedule = name.removeprefix(PREFIX)
    return PairConfig(schedule, dtype, head_dim, causal, TILES[schedule])


def variants() -> list[PairConfig]:
    """Every kernel that there is to be."""
    return [config_for(name, dtype, HEAD_DIM, causal) for name in NAMES for causal in (False, True) for dtype in DTYPES]


@lru_cache(maxsize=1)
def headers() -> dict[str, str]:
    """The headers of kernels that have an SM alone, one of them edited. ValueError where an edit has lost its place."""
    found = alone.headers()
    return found | {"attention.cuh": _edited("attention.cuh", found["attention.cuh"], (REGISTERS, BOUNDS))}


def _edited(name: str, text: str, edits: tuple[tuple[str, str], ...]) -> str:
    for old, new in edits:
        if text.count(old) != 1:
            raise ValueError(f"{name} has {text.count(old)} places for {old.strip().splitlines()[0]!r}, not one")
        text = text.replace(old, new)
    return text
