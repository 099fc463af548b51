"""Kernel and Schedule: what a schedule consists of, each launch with its grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..code.estimate import PLAIN, Estimate
from ..code.gradients import Gradients
from ..problem.order import SECTION_BYTES
from ..problem.tile import HEAD_DIMS, OURS, Tile

_STEPS = {"V": "K/V block", "K": "K/V block", "Q": "Q block", "S": "block of S"}


@dataclass(frozen=True)
class Kernel:
    """One launch: the schedule function of its CTA and how the grid is laid over the problem."""

    body: Callable
    grid: str  # "rows": a CTA per Q tile; "heads": per (batch, head), or `splits` of them; "tiles": per tile of S;
    # "columns": per K/V tile, which walks the Q blocks that see it; "parts": per part of a K/V head's keys; "combine": per tile
    walk: frozenset[str] = frozenset({"K", "V"})  # rings that advance once per loop step
    persistent: bool = False
    strides: bool = False  # over tiles: every CTA of a persistent kernel takes each so many-th, however long they are
    descending: bool = False  # K/V blocks are walked from the last to the first, as FlashAttention-2 and -3 do
    skips_masked: bool = True  # whether blocks above the diagonal are left out
    by_row: bool = False  # a row goes through all passes before the next: what a pass reads again, L2 has just delivered
    code: Estimate | Gradients = PLAIN  # what its warps execute around the points of the order
    fills: bool = False  # of grid "heads": Q blocks are dealt to as many CTAs as fill the SMs (`order.splits_that_fill`)
    splits: int = 1  # so many, once workload and device are known
    section_bytes: int = SECTION_BYTES  # K and V of the heads that are walked together under a causal mask
    where: str = ""  # of a user's own: file and line of its function
    early: bool = False  # launched while the kernel before still runs (programmatic dependent launch)
    registers: int = 0  # of a thread of a compiled kernel without a producer; 0: as many as its tensors need
    plain: bool = False  # of a Hopper schedule's kernels one without TMA and WGMMA
    finishers: tuple[int, int] = ()  # of a backward of ours: warps of a CTA that write dQ's sums out, in so many rounds each share
    live: tuple[tuple[str, ...], ...] = ()  # fp32 register tensors that are live at a time, where S, P and O do not tell

    @property
    def name(self) -> str:
        """The function's name."""
        return self.body.__name__

    @property
    def step(self) -> str:
        """What one step of the loop is, in words."""
        return next((word for tensor, word in _STEPS.items() if tensor in self.walk), "step")


@dataclass(frozen=True)
class Schedule:
    """How one attention forward, or backward, orders its loads, GEMMs and softmax."""

    name: str
    summary: str
    paper: str
    family: str  # row of the default tile table
    kernels: tuple[Kernel, ...]
    scores_live: int = 1  # fp32 score blocks a consumer holds at once
    dtypes: tuple[str, ...] = ("fp16", "bf16")
    head_dims: tuple[int, ...] = HEAD_DIMS
    tile: Tile | None = None  # of a compiled kernel, which has no other
    direction: str = "forward"

    @property
    def packs(self) -> bool:
        """Whether the query heads that share a K/V head are rows of one tile, and their keys may be walked in parts."""
        return self.kernels[0].grid == "parts"

    def cut(self, tile: Tile) -> Schedule:
        """The schedule as it runs on a tile: without a combine where there is but one part."""
        if tile.parts > 1:
            return self
        return replace(self, kernels=tuple(kernel for kernel in self.kernels if kernel.grid != "combine"))

    @property
    def hopper(self) -> bool:
        """Whether it needs TMA and WGMMA."""
        backwards = tuple(f"{kind} backward" for kind in ("hopper", "lagged", "narrow", "cudnn"))
        return self.family in (*OURS, "published", *backwards)
