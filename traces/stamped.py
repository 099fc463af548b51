"""Stamped: the words of an in-kernel trace, of a forward and of a backward, and what a schedule calls the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..simulator.problem.tile import Tile
from ..simulator.problem.workload import Workload
from . import gradient_trace, kernel_trace


@dataclass(frozen=True)
class Stamped:
    """Labels that a kernel stamps; those that begin a block, count it, and end a tile; a schedule's own words for them."""

    labels: tuple[str, ...]
    first: str  # a block's first GEMM
    block: str  # what a consumer computes once a block
    end: str
    same: Mapping[str, str]
    put: str = ""  # what a warpgroup beside the consumers does once a block

    def word(self, label: str) -> str:
        """A schedule's label as the kernel stamps it."""
        return self.same.get(label, label)


FORWARD = Stamped(kernel_trace.LABELS, "S=QK^T", "softmax", "store O", {"stage LSE": "store O"})
"""Where the simulator has several spans for what a kernel stamps once at the end, the last of them says it."""
BACKWARD = Stamped(
    gradient_trace.LABELS, "S^T=KQ^T", "dS^T", "store dK",
    {"dQ^T=K^TdS^T": "dQ=dSK", "wait dQ^T=K^TdS^T": "wait dQ=dSK", "put dQ^T": "put dQ", "stage dK": "store dK"}, "put dQ",
)  # fmt: skip
"""Where queries are fewer than rows of a GEMM a schedule has dQ transposed; it multiplies as much (schedules/backward/NOTES.md)."""


def of(workload: Workload) -> Stamped:
    """The words of a workload's direction."""
    return BACKWARD if workload.backward else FORWARD


BESIDE = "multiplier"
"""What a schedule calls the warpgroup behind its consumers that multiplies what they have put."""


def warp_of(name: str, tile: Tile) -> str:
    """What a schedule calls a recorded warp: WG0, WG1, .., and the one behind the consumers."""
    return BESIDE if name.startswith("WG") and int(name.removeprefix("WG")) >= tile.consumers else name


def over(events: Iterable[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """(label, step, when it was over) in order, of what comes again in a step, as where half of it waits for something, only the
    last: a kernel stamps it when all of it is over. What has no step stays."""
    found: dict[tuple, tuple[str, int, int]] = {}
    for number, (label, step, end) in enumerate(events):
        key = (label, step) if step >= 0 else (label, step, number)
        found.pop(key, None)
        found[key] = (label, step, end)
    return list(found.values())
