"""Which Gluon kernels there are: one GluonConfig per schedule, dtype, head dim and mask, and its tile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SCHEDULES = ("tma", "warp-specialized", "pingpong", "overlap-2stage", "fa3")
"""The rungs, each one idea past another."""
PREFIX = "gluon-"
NAMES = tuple(PREFIX + schedule for schedule in SCHEDULES)
"""How they are spoken of among kernels of every kind."""
DTYPES = ("fp16", "bf16")
HEAD_DIMS = (64, 128, 256)
BLOCK_M = 128
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24
"""A thread, as FlashAttention-3 splits them: the first consumer, Triton's default partition, has what is left, 240 too."""

BLOCK_N = {64: 128, 128: 128, 256: 64}
"""Keys per block. Shapes of Gluon tensors are powers of two: 176 or 80 keys, FlashAttention-3's choice, cannot be had."""
STAGES = 2


@dataclass(frozen=True)
class GluonConfig:
    """One compiled kernel: everything that is chosen at compile time."""

    schedule: str
    dtype: str
    head_dim: int
    causal: bool
    block_n: int
    stages: int = STAGES

    @property
    def name(self) -> str:
        """As it is spoken of: "fa3 bf16 d128 causal"."""
        return f"{self.schedule} {self.dtype} d{self.head_dim} {'causal' if self.causal else 'full'}"

    @property
    def one_partition(self) -> bool:
        """Whether all warps run the same code."""
        return self.schedule == "tma"

    @property
    def num_warps(self) -> int:
        """Warps of the first partition, as Triton counts them."""
        return 8 if self.one_partition else 4

    @property
    def q_rows(self) -> int:
        """Rows of a box of Q and of O."""
        return BLOCK_M if self.one_partition else BLOCK_M // 2


def config_for(schedule: str, dtype: str, head_dim: int, causal: bool) -> GluonConfig:
    """The kernel of a schedule on its tile."""
    return GluonConfig(schedule, dtype, head_dim, causal, BLOCK_N[head_dim])


def variants() -> list[GluonConfig]:
    """Every kernel: schedules x dtypes x head dims x masks."""
    return [
        config_for(schedule, dtype, head_dim, causal)
        for schedule in SCHEDULES
        for head_dim in HEAD_DIMS
        for causal in (False, True)
        for dtype in DTYPES
    ]


def module_of(schedule: str) -> str:
    """The file of a rung, as a module's name."""
    return schedule.replace("-", "_")


def sources_of(schedule: str) -> list[Path]:
    """The files that make up a rung's kernel and its launch."""
    shared = ("attention.py", "build.py", "config.py", "launch.py", "verbs.py")
    return [HERE / f"{module_of(schedule)}.py", *(HERE / name for name in shared)]
