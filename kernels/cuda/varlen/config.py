"""Which kernels there are for packed sequences: the schedules' own .cu files, over another header of tiles.

What the fixed-length kernels read from the problem as a whole, these read from the tile: `EDITS` is all that differs in their
common header. A fixed-length kernel is not touched by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ....simulator.problem.tile import Tile
from ...compile.build import Source
from .. import config as fixed

HERE = Path(__file__).parent
SCHEDULES = fixed.SCHEDULES
DTYPES = fixed.DTYPES
HEAD_DIMS = fixed.HEAD_DIMS
PREPARE = "prepare_sequences"
"""The kernel of prepare.cu, which runs before."""

EDITS = (
    # tensor maps: one of each sequence, chosen by the batch entry that was a coordinate
    ("  const TensorMap &q, &k, &v, &o;\n", "  Maps q, k, v, o;\n"),
    ("void load(const TensorMap& map, Ring", "void load(Maps map, Ring"),
    # the maps were written by another kernel; asked for once as long as a CTA stays in a sequence
    (
        "  int ticket = 0;  // lane 0's of the next tile\n",
        "  int ticket = 0;  // lane 0's of the next tile\n  int sequence = -1;\n",
    ),
    (
        "    kv_head = tile.head / (problem.p.heads / problem.p.kv_heads);\n",
        "    kv_head = tile.head / (problem.p.heads / problem.p.kv_heads);\n"
        "    if (tile.batch != sequence && elected()) acquire_maps(problem.p, tile.batch);\n"
        "    sequence = tile.batch;\n",
    ),
    # lengths: of the tile's sequence
    (
        "      const Params& p = problem.p;\n      const int key = (last - j)",
        "      const Tile& p = tile();\n      const int key = (last - j)",
    ),
    (
        "    const Params& p = problem.p;\n    const int row = first_row();\n"
        "    float* to = p.lse + (u64)(u32)(tile().batch * p.heads + tile().head) * (u32)p.seqlen_q + row;\n",
        "    const Tile& p = tile();\n    const int row = first_row();\n"
        "    float* to = problem.p.lse + (u64)(u32)p.head * (u32)problem.p.total_q + p.start + row;\n",
    ),
    # arguments of the kernel
    (
        "      attention_forward(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,"
        " const __grid_constant__ TensorMap v, \\\n"
        "                        const __grid_constant__ TensorMap o, const __grid_constant__ Params p) {",
        "      attention_forward(const __grid_constant__ Params p) {",
    ),
    (
        "    attention(Problem{q, k, v, o, p}); ",
        "    attention(Problem{p.maps_of(0), p.maps_of(1), p.maps_of(2), p.maps_of(3), p}); ",
    ),
)
"""(text of attention.cuh, what stands in its place here); each text stands there once."""


@dataclass(frozen=True)
class VarlenConfig:
    """One compiled kernel: everything that is chosen at compile time."""

    schedule: str
    dtype: str
    head_dim: int
    causal: bool

    @property
    def fixed(self) -> fixed.KernelConfig:
        """The fixed-length kernel whose steps and tile these are."""
        return fixed.config_for(self.schedule, self.dtype, self.head_dim, self.causal)

    @property
    def name(self) -> str:
        """As it is spoken of: "fa3 bf16 d128 causal varlen"."""
        return f"{self.fixed.name} varlen"

    @property
    def tile(self) -> Tile:
        """The tile of the fixed-length kernel."""
        return self.fixed.tile

    @property
    def threads(self) -> int:
        """Threads of a CTA: a producer warpgroup and the consumers."""
        return self.fixed.threads

    @property
    def source(self) -> Source:
        """The schedule's text with the headers of packed sequences."""
        of = self.fixed.source
        return Source(f"varlen_{of.name}", of.text, headers(), of.defines)


def variants() -> list[VarlenConfig]:
    """Every kernel of packed sequences that `flash_attn_varlen_func` may take: fa3's."""
    return [VarlenConfig("fa3", dtype, head_dim, causal) for head_dim in HEAD_DIMS for causal in (False, True) for dtype in DTYPES]


def prepare() -> Source:
    """The kernel that lists the sequences and writes their tensor maps; one for all variants."""
    return Source("prepare.cu", (HERE / "prepare.cu").read_text(encoding="utf-8"), headers())


@lru_cache(maxsize=1)
def headers() -> dict[str, str]:
    """The fixed-length kernels' headers, those of packed sequences in the place of their namesakes."""
    own = {path.name: path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.cuh"))}
    return fixed.headers() | own | {"attention.cuh": edited(fixed.headers()["attention.cuh"])}


def edited(text: str) -> str:
    """attention.cuh for packed sequences. ValueError where an edit has lost its place."""
    for old, new in EDITS:
        if text.count(old) != 1:
            raise ValueError(f"attention.cuh has {text.count(old)} places for {old.strip().splitlines()[0]!r}, not one")
        text = text.replace(old, new)
    return text
