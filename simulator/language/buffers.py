"""Buffers: what a schedule's warps share, as it holds them: slots of rings, batons, meetings. They are names, they do nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from .recorder import Recorder


class Ranked(Protocol):
    """A warp, of which its place among the consumers matters."""

    rank: int


@dataclass(frozen=True)
class Slot:
    """Load `index` of a ring, e.g. K[3]; `again` is the block it holds where that differs: a later pass over the same blocks."""

    ring: Ring
    index: int
    again: int | None = None

    @property
    def stage(self) -> int:
        """The stage that holds it."""
        return (self.ring.base + self.index) % self.ring.stages

    @property
    def generation(self) -> int:
        """How many times the stage has been filled before."""
        return (self.ring.base + self.index) // self.ring.stages

    @property
    def block(self) -> int:
        """The tensor's block that it holds."""
        return self.index if self.again is None else self.again

    @property
    def step(self) -> int:
        """The loop step it belongs to, -1 outside the loop."""
        return self.ring.cta.tile.step(self.ring.tensor, self.block)

    def __str__(self) -> str:
        return f"{self.ring.name}[{self.index}]"


@dataclass
class Ring:
    """A ring of `stages` buffers of `nbytes` each in shared memory."""

    cta: Recorder
    name: str
    nbytes: int
    stages: int
    number: int
    full: list[int]
    empty: list[int]
    over: str = ""  # the ring whose memory it shares
    part: int = 0  # of a tensor that every consumer has its own part of: which consumer's
    base: int = 0
    used: int = 0
    readers: set[int] = field(default_factory=set)
    loaders: set[int] = field(default_factory=set)

    def __getitem__(self, index: int) -> Slot:
        return Slot(self, index)

    def again(self, block: int, reading: int, blocks: int) -> Slot:
        """Load of a block in the `reading`-th pass (from 0) over all `blocks` of them."""
        return Slot(self, reading * blocks + block, block)

    @cached_property
    def tensor(self) -> str:
        """What it holds: the ring's name, less the consumer's number."""
        return self.name.rstrip("0123456789")


@dataclass
class Private:
    """A buffer of one stage for each consumer: `Q[wg]` is that consumer's."""

    rings: list[Ring]

    def __getitem__(self, warp: Ranked) -> Slot:
        return Slot(self.rings[warp.rank], 0)


@dataclass
class Outbox:
    """A ring of one stage for each consumer: `dQ[wg, i]` is what that consumer sends away at step i."""

    rings: list[Ring]

    def __getitem__(self, key: tuple[Ranked, int]) -> Slot:
        warp, index = key
        return Slot(self.rings[warp.rank], index)


@dataclass(frozen=True)
class Result:
    """What a GEMM of one warp will produce; `wait(result)` becomes wait_group<n>."""

    label: str
    group: int


@dataclass
class Baton:
    """A turn that circulates among the consumers: one named barrier each."""

    barriers: list[int]
    takes: list[int]


@dataclass
class Meeting:
    """A point at which all consumers wait for each other: one named barrier for all of them."""

    barrier: int
    times: list[int]
