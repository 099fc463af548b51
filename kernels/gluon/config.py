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
ROWS = 64
"""Of a consumer warpgroup."""
REGISTERS = {2: (240, 24), 3: (160, 32)}
"""Consumers -> registers a thread of a consumer and of the producer, as FlashAttention-3 splits them; the first consumer, Triton's
default partition, has what is left."""
MAX_SMEM_BYTES = 227 * 1024

BLOCK_N = {64: 64, 128: 128, 256: 64}
"""Keys per block. Shapes of Gluon tensors are powers of two: 176 or 80 keys, FlashAttention-3's choice, cannot be had."""
CONSUMERS = {64: 3, 128: 2, 256: 2}
"""Three hide d64's long softmax, as in our CUDA kernels."""
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
    consumers: int = 2
    ragged: bool = True  # whether the last block may hold keys past the end

    @property
    def name(self) -> str:
        """As it is spoken of: "fa3 bf16 d128 causal"."""
        whole = "" if self.masked else " whole"
        return f"{self.schedule} {self.dtype} d{self.head_dim} {'causal' if self.causal else 'full'}{whole}"

    @property
    def masked(self) -> bool:
        """Whether any score may have to be masked."""
        return self.causal or self.ragged

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
        return self.block_m if self.one_partition else ROWS

    @property
    def block_m(self) -> int:
        """Queries of a tile."""
        return ROWS * self.consumers

    @property
    def o_tiles(self) -> int:
        """Tiles of O in shared memory: one a consumer where there is room, so that Q of the next tile need not wait for O to leave;
        else 1, a token, and O leaves by way of Q's."""
        row_bytes = 2 * self.head_dim
        taken = (2 * self.block_m + 2 * self.stages * self.block_n) * row_bytes
        return self.consumers if taken + 1024 <= MAX_SMEM_BYTES else 1


def config_for(schedule: str, dtype: str, head_dim: int, causal: bool, seqlen_k: int = 1) -> GluonConfig:
    """The kernel of a schedule on its tile; without a mask where neither it nor the length asks for one."""
    consumers = CONSUMERS[head_dim] if schedule != "tma" else 2
    block_n = BLOCK_N[head_dim]
    return GluonConfig(schedule, dtype, head_dim, causal, block_n, consumers=consumers, ragged=causal or seqlen_k % block_n != 0)


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
