"""Which Gluon kernels there are: one GluonConfig per schedule, dtype, head dim and mask, and its tile."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).parent
SCHEDULES = ("tma", "warp-specialized", "pingpong", "overlap-2stage", "fa3", "persistent", "bounded")
"""The rungs, each one idea past another; the last two are of `fa3`'s order."""
QUEUED = ("persistent", "bounded")
"""Those whose tiles come from a queue, with a place for O; a mask only where one is asked for, hand-overs in either way."""
PREFIX = "gluon-"
NAMES = tuple(PREFIX + schedule for schedule in SCHEDULES)
"""How they are spoken of among kernels of every kind."""
DTYPES = ("fp16", "bf16")
HEAD_DIMS = (64, 128, 256)
ROWS = 64
"""Of a consumer warpgroup."""
REGISTERS = {2: (240, 24), 3: (160, 32)}
"""Consumers -> registers a thread of a consumer and of the producer, as FlashAttention-3 splits them; the first consumer, Triton's
default partition, has what is left, as many as the others."""
MAX_SMEM_BYTES = 227 * 1024

BLOCK_N = {64: 128, 128: 128, 256: 64}
"""Keys per block. Shapes of Gluon tensors are powers of two: 176 or 80 keys, FlashAttention-3's choice, cannot be had."""
STAGES = 2
LONG = {("bounded", 64): (8192, 3, 64)}
"""Rung, head dim -> from so many keys on, that many consumers and keys per block: three hide more of a softmax that is longer than
the GEMMs; below, the wider tile loses more to what lies around the loop and to the diagonal."""


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
    named: bool = True  # of QUEUED: hands over by named barriers, in inline assembly; else by mbarriers

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
        """Of QUEUED: tiles of O in shared memory, one a consumer where there is room, and Q of the next tile need not wait
        for O to leave; else 1, a token, and O leaves by way of Q's."""
        taken = (2 * self.block_m + 2 * self.stages * self.block_n) * 2 * self.head_dim
        return self.consumers if taken + 1024 <= MAX_SMEM_BYTES else 1


def config_for(schedule: str, dtype: str, head_dim: int, causal: bool, seqlen_k: int = 1) -> GluonConfig:
    """The kernel of a schedule on its tile; of QUEUED without a mask where neither it nor the length asks for one."""
    block_n, consumers = BLOCK_N[head_dim], 2
    if (schedule, head_dim) in LONG and seqlen_k >= LONG[schedule, head_dim][0]:
        _, consumers, block_n = LONG[schedule, head_dim]
    whole = schedule in QUEUED and not causal and seqlen_k % block_n == 0
    return GluonConfig(schedule, dtype, head_dim, causal, block_n, consumers=consumers, ragged=not whole)


def candidates(dtype: str, head_dim: int, causal: bool, seqlen_k: int = 1) -> dict[str, GluonConfig]:
    """What QUEUED might be, by a name for each: hand-overs by named barriers or by mbarriers, two or three consumers."""
    found = {}
    for schedule in QUEUED:
        block_n = BLOCK_N[head_dim]
        tiles = [GluonConfig(schedule, dtype, head_dim, causal, block_n, ragged=causal or seqlen_k % block_n != 0)]
        if head_dim == 64:  # with 128 keys 160 registers a thread do not hold S, P and O of three
            tiles.append(replace(tiles[0], block_n=64, consumers=3, ragged=causal or seqlen_k % 64 != 0))
        for tile in tiles:
            for named in (True, False):
                hands = "named barriers" if named else "mbarriers"
                found[f"{schedule} {tile.block_m}x{tile.block_n} {hands}"] = replace(tile, named=named)
    return found


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
    names = [f"{module_of(schedule)}.py", "attention.py", "build.py", "config.py", "launch.py", "verbs.py"]
    names += ["assembly.py", "persistent.py"] * (schedule in QUEUED)
    return [HERE / name for name in dict.fromkeys(names)]
