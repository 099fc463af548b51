"""Which kernels there are whose CTAs share an SM: the schedules' own .cu files, over edited headers.

What differs from the kernels that have an SM alone: how many CTAs its registers are dealt to, and, for tiles whose scores would not
fit beside their weights then, a softmax that looks for its maximum first (FlashAttention-2, arXiv:2307.08691, Algorithm 1), so that
scores need not be kept. No kernel that has an SM alone is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ....simulator.problem.tile import Tile
from ...compile.build import Source
from .. import config as alone
from ..config import KernelConfig

REGISTERS = (
    "constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 24;\n"
    "constexpr int CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 240;\n"
    "constexpr int ENTRY_REGISTERS = 65536 / THREADS / 8 * 8;\n",
    "constexpr int PRODUCER_REGISTERS = 24;\n"
    "constexpr int ENTRY_REGISTERS = 65536 / (THREADS * RESIDENT) / 8 * 8;\n"
    "constexpr int CONSUMER_REGISTERS = (ENTRY_REGISTERS * (1 + CONSUMERS) - PRODUCER_REGISTERS) / CONSUMERS / 8 * 8;\n",
)
BOUNDS = ("__launch_bounds__(THREADS, 1)", "__launch_bounds__(THREADS, RESIDENT)")
MAXIMUM_FIRST = ("    if (!first) {\n      const float shift[2]", "    if (false) {\n      const float shift[2]")
"""(text, what stands in its place here); each text stands there once: the first two in attention.cuh, the last in softmax.cuh."""


@dataclass(frozen=True)
class PairConfig(KernelConfig):
    """A kernel whose tile has several CTAs resident on an SM."""

    maximum_first: bool = False

    @property
    def name(self) -> str:
        """As it is spoken of: "pingpong bf16 d64 causal, 128x64, 2 an SM"."""
        first = ", maximum first" if self.maximum_first else ""
        return f"{super().name}, {self.tile}, {self.tile.resident} an SM{first}"

    @property
    def source(self) -> Source:
        """The schedule's text with the edited headers."""
        of = super().source
        return Source(f"pair_{of.name}", of.text, headers(self.maximum_first), of.defines | {"RESIDENT": self.tile.resident})


def candidates(dtype: str, causal: bool) -> list[PairConfig]:
    """The kernels at head_dim 64 that the model has ahead of the standing ones up to 2k keys, the one furthest ahead first."""
    wide, narrow = Tile(128, 64, 2, 2, resident=2), Tile(64, 64, 3, 1, resident=3)
    return [
        PairConfig("warp-specialized", dtype, 64, causal, wide, maximum_first=True),
        PairConfig("pingpong", dtype, 64, causal, wide, maximum_first=True),
        PairConfig("overlap-2stage", dtype, 64, causal, narrow),
    ]


@lru_cache(maxsize=2)
def headers(maximum_first: bool) -> dict[str, str]:
    """The headers of kernels that have an SM alone, edited. ValueError where an edit has lost its place."""
    found = alone.headers()
    edits = {"attention.cuh": (REGISTERS, BOUNDS), "softmax.cuh": (MAXIMUM_FIRST,) if maximum_first else ()}
    return found | {name: _edited(name, found[name], each) for name, each in edits.items()}


def _edited(name: str, text: str, edits: tuple[tuple[str, str], ...]) -> str:
    for old, new in edits:
        if text.count(old) != 1:
            raise ValueError(f"{name} has {text.count(old)} places for {old.strip().splitlines()[0]!r}, not one")
        text = text.replace(old, new)
    return text
