"""Which kernels the backward has: preprocess and main kernel of each schedule, dtype, head dim and mask."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ....simulator.errors import UsageError
from ....simulator.problem.tile import Tile
from ...compile.build import Source
from .. import config as forward
from .wgmma import header

HERE = Path(__file__).parent
SCHEDULES = ("fa3", "lagged", "apart", "across", "late", "relay")
DTYPES = ("fp16", "bf16")
WARPGROUP = 128
ENTRIES = {"prepare": "attention_prepare", "main": "attention_backward"}
"""The kernel that the source of each part defines."""
TILES = {
    ("fa3", 64, False): Tile(128, 128, 2, 2),
    ("fa3", 64, True): Tile(128, 128, 2, 2),
    ("fa3", 128, False): Tile(64, 128, 2, 2),
    ("fa3", 128, True): Tile(64, 128, 2, 2),
    ("lagged", 64, False): Tile(128, 128, 2, 2),
    ("lagged", 64, True): Tile(128, 128, 2, 2),
    ("lagged", 128, False): Tile(64, 128, 2, 2),
    ("lagged", 128, True): Tile(64, 128, 2, 2),
    ("apart", 64, False): Tile(128, 128, 2, 2),
    ("apart", 64, True): Tile(128, 128, 2, 2),
    ("apart", 128, False): Tile(64, 128, 2, 2),
    ("apart", 128, True): Tile(64, 128, 2, 2),
    ("across", 128, False): Tile(80, 128, 2, 2),
    ("across", 128, True): Tile(80, 128, 2, 2),
    ("late", 128, False): Tile(80, 128, 2, 2),
    ("late", 128, True): Tile(80, 128, 2, 2),
    ("relay", 256, False): Tile(64, 64, 2, 2),
    ("relay", 256, True): Tile(64, 64, 2, 2),
}
"""By schedule, head_dim and mask."""
HEAD_DIMS = tuple(sorted({head_dim for _, head_dim, _ in TILES}))


@dataclass(frozen=True)
class BackwardConfig:
    """The kernels of a backward: everything that is chosen at compile time."""

    schedule: str
    dtype: str
    head_dim: int
    causal: bool
    tile: Tile
    deterministic: bool = False
    has_dlse: bool = False
    trace: bool = False  # stores the clock at each event into Params::trace

    @property
    def name(self) -> str:
        """As it is spoken of: "fa3 backward fp16 d128 causal"."""
        more = " deterministic" * self.deterministic + " dlse" * self.has_dlse + " trace" * self.trace
        return f"{self.schedule} backward {self.dtype} d{self.head_dim} {'causal' if self.causal else 'full'}{more}"

    @property
    def threads(self) -> int:
        """Threads of the main kernel's CTA: a warpgroup that loads and adds dQ, the consumers, and one that finishes dQ."""
        return WARPGROUP * (2 + self.tile.consumers)

    def source(self, part: str = "main") -> Source:
        """The text of "prepare" or "main" with its headers and macros."""
        path = HERE / (f"{self.schedule.replace('-', '_')}.cu" if part == "main" else f"{part}.cu")
        tile = self.tile
        defines = {"HEAD_DIM": self.head_dim, "BLOCK_M": tile.block_m, "BF16": int(self.dtype == "bf16")}
        if part == "prepare":
            defines["HAS_DLSE"] = int(self.has_dlse)
        if part == "main":
            defines |= {
                "BLOCK_N": tile.block_n,
                "STAGES": tile.stages,
                "CONSUMERS": tile.consumers,
                "CAUSAL": int(self.causal),
                "DETERMINISTIC": int(self.deterministic),
                "TRACE": int(self.trace),
            }
        return Source(f"backward_{path.name}", path.read_text(encoding="utf-8"), headers(), defines)


def config_for(
    schedule: str, dtype: str, head_dim: int, causal: bool, deterministic: bool = False, has_dlse: bool = False, trace: bool = False
) -> BackwardConfig:
    """The kernels of a schedule on its tile; UsageError where there are none."""
    if schedule not in SCHEDULES:
        raise UsageError(f"schedule={schedule!r} has no CUDA backward ({', '.join(SCHEDULES)})")
    tile = TILES.get((schedule, head_dim, causal))
    if tile is None:
        raise UsageError(f"head_dim={head_dim} is not supported by the backward {schedule!r} ({', '.join(map(str, HEAD_DIMS))})")
    return BackwardConfig(schedule, dtype, head_dim, causal, tile, deterministic, has_dlse, trace)


def variants() -> list[BackwardConfig]:
    """Every main kernel: schedules x head dims x masks x dtypes."""
    return [config_for(schedule, dtype, head_dim, causal) for schedule, head_dim, causal in TILES for dtype in DTYPES]


@lru_cache(maxsize=1)
def headers() -> dict[str, str]:
    """The forward's headers and the backward's own; wgmma.cuh is generated."""
    own = {path.name: path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.cuh"))}
    return forward.headers() | own | {"wgmma.cuh": header()}
