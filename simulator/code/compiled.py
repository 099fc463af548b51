"""Compiled: the code of a kernel as its machine code has it, for the main loop; what comes once a tile is estimated."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from . import softmax as counts
from .around import of_gemm
from .estimate import OURS, SHIPPED, Estimate, Pen, Spill
from .phase import Phase
from .pipeline import Pipeline, Step
from .softmax import RUNNING, Left


@dataclass(frozen=True)
class Compiled(Estimate):
    """The code of a compiled kernel, whose main loop is `pipeline`, in its own order."""

    pipeline: Pipeline = field(hash=False)  # a segment counts in a dict

    def pen(self, rank: int) -> Reader:
        """The code of one warp role: the producer (-1) or a consumer."""
        return Reader(self, rank)

    def spilled(self, head_dim: int, causal: bool) -> Spill | None:
        """What it stores to local memory, if anything."""
        return Spill(head_dim, causal, *self.pipeline.spilled) if any(self.pipeline.spilled) else None


@dataclass(frozen=True)
class Lent(Compiled):
    """The same code at the points of a schedule that was not read from it."""

    def pen(self, rank: int) -> Lender:
        """The code of one warp role: the producer (-1) or a consumer."""
        return Lender(self, rank)


def code_of(pipeline: Pipeline, lent: bool = False) -> Compiled:
    """The code around a main loop, in its own order or (`lent`) in that of a schedule."""
    like = SHIPPED if pipeline.looks_for_maximum else OURS
    prologue = like.prologue if pipeline.persistent else (0, 0)
    return (Lent if lent else Compiled)(like.softmax, persistent=pipeline.persistent, prologue=prologue, pipeline=pipeline)


class Reader(Pen):
    """What one warp executes, from what was read."""

    def load(self) -> list[Phase]:
        """Nothing where the warps load for themselves: addresses and elections are in the code that was read."""
        return super().load() if self.rank < 0 else []

    def gemm(self, scores: bool) -> list[Phase]:
        """Nothing: the addresses before a GEMM are steps of the order."""
        return []

    def once(self, step: Step, is_first: bool) -> list[Phase]:
        """Code that runs once a tile, which the loop has displaced from the nearest caches. Straight code waits for fetch or for
        its own results, whichever is longer (`fetch_mixes`); these are (2 cycles an instruction), so what comes first is fetched.
        """
        first, *rest = step.phases
        return [replace(first, fetched=first.instructions) if is_first else first, *rest]

    def normalize(self, tile) -> list[Phase]:
        """Nothing where what stands behind the loop was read."""
        return [] if self.code.pipeline.after else super().normalize(tile)

    def stage(self, tile, name: str) -> list[Phase]:
        """Nothing where what stands behind the loop was read."""
        return [] if self.code.pipeline.after else super().stage(tile, name)

    def issues(self, k_steps: int, in_shared_memory: int, scores: bool, stages: int) -> int:
        """Those of its steps, and its descriptors, which are no step of the order; all else once a block is one."""
        return of_gemm(k_steps, in_shared_memory)

    def issues_of_barrier(self, waits: bool, turn: bool) -> int:
        """Itself: what is around it is a step of the order."""
        return 1

    def put(self, tile, name: str) -> list[Phase]:
        """The stores of P: their issue is in the code that was read, the bytes and the fence are not."""
        return [replace(each, other=0) for each in super().put(tile, name)]

    def begins(self, tile, j: int) -> bool:
        """Whether block j does not go the loop's way: it is a tile's first, or no key was seen before it by a running softmax."""
        if self.code.pipeline.before:  # there the loop takes a tile's first block too
            return False
        return j == 0 or (self.code.softmax is RUNNING and j <= tile.hidden(self.rank))

    def first(self, tile, j: int) -> list[Phase]:
        """The whole softmax of such a block, estimated: the maximum, exponentials, P; O, which a tile's first block finds empty."""
        phases, left = self.code.softmax.block(tile, j, under_product=False, rank=self.rank)
        return [*phases, *(each.phase for each in left if j > 0 or each.writes != "O")]

    def softmax(self, tile, j: int, gap: int, is_first: bool) -> list[Phase]:
        """The part of block j's softmax behind so many points of the loop; the first also masks, if a masked block needs it.

        What runs for the first time in a tile is fetched.
        """
        pipeline = self.code.pipeline
        blocks, masked = pipeline.blocks, tile.is_masked(j)
        phases = list((pipeline.masked if masked and pipeline.masked else blocks[(j - 1) % len(blocks)]).softmax.get(gap, ()))
        if masked and is_first and not pipeline.masked:
            phases = [replace(counts.mask(tile), fetched=counts.mask(tile).instructions), *phases]
        first = 0 if pipeline.before else 1
        if first <= j < first + len(blocks):
            phases = [replace(each, fetched=each.instructions) for each in phases]
        return phases


class Lender(Reader):
    """What one warp executes at the points of a schedule: the same, as far as the two orders agree."""

    def gemm(self, scores: bool) -> list[Phase]:
        """The addresses before S, or before P V."""
        return self.code.pipeline.blocks[0].addresses("scores" if scores else "values")

    def weights(self, tile, j: int, in_flight: Collection[str]) -> list[Phase]:
        """The softmax of block j up to where the kernel waits for P V of the one before, if that is in flight; else all of it."""
        if self.begins(tile, j):
            self.left = []
            return self.first(tile, j)
        block = self.code.pipeline.blocks[0]
        own = [gap for gap in block.softmax if gap not in block.ahead]
        now = [gap for gap in own if "O" not in in_flight or gap < block.product_done]
        late = [phase for gap in own if gap not in now for phase in self.softmax(tile, j, gap, is_first=False)]
        under = [phase for gap in block.ahead for phase in self.softmax(tile, j, gap, is_first=False)]
        self.left = [Left("softmax", phase, "P") for phase in late] + [Left("rescale O", phase, "O") for phase in under]
        self.left += [Left("address", each, "P") for each in block.addresses("")]
        return [phase for gap in now for phase in self.softmax(tile, j, gap, is_first=gap == own[0])]
