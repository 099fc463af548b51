"""Which kernels there are: one KernelConfig per schedule, dtype, head dim and mask, on the tiles the simulator has too."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ...simulator.errors import UsageError
from ...simulator.problem.tile import Tile, default_for
from ...simulator.problem.workload import Workload
from ...simulator.schedules import SCHEDULES as SIMULATED
from ..compile.build import Source

HERE = Path(__file__).parent
SCHEDULES = ("warp-specialized", "pingpong", "overlap-2stage", "overlap-3stage", "fa3")
DTYPES = ("fp16", "bf16")
HEAD_DIMS = (64, 128, 256)
WARPGROUP = 128


@dataclass(frozen=True)
class KernelConfig:
    """One compiled kernel: everything that is chosen at compile time."""

    schedule: str
    dtype: str
    head_dim: int
    causal: bool
    tile: Tile
    trace: bool = False  # stores the clock at each event into Params::trace
    fast_math: bool = False

    @property
    def name(self) -> str:
        """As it is spoken of: "fa3 fp16 d128 causal"."""
        mask = "causal" if self.causal else "full"
        return f"{self.schedule} {self.dtype} d{self.head_dim} {mask}" + (" trace" if self.trace else "")

    @property
    def asked(self) -> str:
        """What flash_attn_func calls it."""
        return self.schedule

    @property
    def path(self) -> Path:
        """The schedule's .cu."""
        return path_of(self.schedule)

    @property
    def threads(self) -> int:
        """Threads of a CTA: a producer warpgroup and the consumers."""
        return WARPGROUP * (1 + self.tile.consumers)

    @property
    def kv_box_rows(self) -> int:
        """Rows of one TMA box of K or V: a CTA of a cluster loads its share and multicasts it."""
        return self.tile.block_n // self.tile.cluster

    @property
    def defines(self) -> dict[str, int]:
        """The -D macros of the source."""
        tile = self.tile
        return {
            "HEAD_DIM": self.head_dim,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "STAGES": tile.stages,
            "CONSUMERS": tile.consumers,
            "CLUSTER": tile.cluster,
            "CAUSAL": int(self.causal),
            "BF16": int(self.dtype == "bf16"),
            "TRACE": int(self.trace),
        }

    @property
    def source(self) -> Source:
        """The kernel's text with its headers and macros; UsageError where the schedule has no kernel yet."""
        if not self.path.exists():
            raise UsageError(f"schedule {self.schedule!r} has no CUDA kernel yet ({', '.join(available()) or 'none has'})")
        text = self.path.read_text(encoding="utf-8")
        return Source(self.path.name, text, headers(), self.defines, self.fast_math)


def config_for(schedule: str, dtype: str, head_dim: int, causal: bool, trace: bool = False) -> KernelConfig:
    """The kernel of a schedule on its default tile (simulator/problem/tile.py, with the reason for each)."""
    workload = Workload(1, 1, 8448, head_dim, dtype, causal)
    tile, _ = default_for(SIMULATED[schedule].family, workload)
    return KernelConfig(schedule, dtype, head_dim, causal, tile, trace)


def variants() -> list[KernelConfig]:
    """Every kernel that there is to be: schedules x dtypes x head dims x masks."""
    return [
        config_for(schedule, dtype, head_dim, causal)
        for schedule in SCHEDULES
        for head_dim in HEAD_DIMS
        for causal in (False, True)
        for dtype in DTYPES
    ]


def path_of(schedule: str) -> Path:
    """The .cu of a schedule."""
    return HERE / f"{schedule.replace('-', '_')}.cu"


def available() -> tuple[str, ...]:
    """Schedules whose source is here."""
    return tuple(schedule for schedule in SCHEDULES if path_of(schedule).exists())


@lru_cache(maxsize=1)
def headers() -> dict[str, str]:
    """Every header a kernel may include, by name; wgmma.cuh is generated."""
    from .wgmma import header

    written = {path.name: path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.cuh"))}
    return written | {"wgmma.cuh": header()}
