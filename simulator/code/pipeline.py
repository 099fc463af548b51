"""Pipeline: the main loop of a compiled consumer, as steps that say which block they are about.

It is data: read from machine code (`loop_reader`), kept as JSON (`profiles`), and turned into the engine's phases here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cached_property
from itertools import accumulate

from .phase import Phase
from .sass import Segment


@dataclass(frozen=True)
class Step:
    """One thing that a consumer does in its loop, or once a tile.

    `what` is load, wait, scores, values, finished, free, take, give or meet, or of code softmax, address, descriptors of the
    GEMM behind them, or once; `tensor` what it is about, `lag` how many blocks before the one whose S the loop issues there.
    """

    what: str
    tensor: str = ""
    lag: int = 0
    code: tuple[Segment, ...] = ()

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The code for the engine; none of descriptors, since a GEMM's issue has been measured from the wait before them."""
        return () if self.what == "descriptors" else phases_of(self.code)


@dataclass(frozen=True)
class Block:
    """The steps of one turn, from its first point on."""

    steps: tuple[Step, ...]

    @property
    def order(self) -> tuple[tuple[str, str, int], ...]:
        """The points alone."""
        return tuple((step.what, step.tensor, step.lag) for step in self.steps if not step.code)

    @cached_property
    def gaps(self) -> tuple[int, ...]:
        """Of each step the number of points before it, by which code of two blocks of one order can be set beside each other."""
        return tuple(accumulate((not step.code for step in self.steps[:-1]), initial=0))

    @cached_property
    def softmax(self) -> dict[int, tuple[Phase, ...]]:
        """The softmax between two points, by the number of points before it."""
        return {gap: step.phases for gap, step in zip(self.gaps, self.steps, strict=True) if step.what == "softmax"}

    @cached_property
    def ahead(self) -> tuple[int, ...]:
        """Gaps of softmax that is of the block before, under the next S: O rescaled there."""
        return tuple(gap for gap, step in zip(self.gaps, self.steps, strict=True) if step.what == "softmax" and step.lag)

    @property
    def product_done(self) -> int:
        """The number of points up to the wait for P V."""
        done = [gap for gap, step in zip(self.gaps, self.steps, strict=True) if step.what == "finished" and step.tensor == "V"]
        return 1 + done[0]

    def addresses(self, before: str) -> list[Phase]:
        """Other code up to a point, "scores" or "values"; "" for what is behind both."""
        found: dict[str, list[Phase]] = {"scores": [], "values": [], "": []}
        waiting: list[Phase] = []
        for step in self.steps:
            if step.what == "address":
                waiting += step.phases
            elif step.what in ("scores", "values"):
                found[step.what], waiting = waiting, []
        found[""] = waiting
        return found[before]

    @property
    def pipes(self) -> Counter[str]:
        """Instructions between the points by pipe, of one warp."""
        return sum((Counter(part.pipes) for step in self.steps for part in step.code), Counter())

    @property
    def instructions(self) -> int:
        """Between the points, of one warp."""
        return sum(part.instructions for step in self.steps for part in step.code)


@dataclass(frozen=True)
class Pipeline:
    """A consumer's main loop: one block, in as many copies as the compiler has unrolled it to."""

    blocks: tuple[Block, ...]
    masked: Block | None  # of a block with a mask, if that has a loop of its own
    block_n: int
    head_dim: int
    element_bytes: int
    looks_for_maximum: bool  # in every block
    consumers: int  # warpgroups; 0 where that cannot be read
    persistent: bool  # another loop is around it, over tiles
    multicast: bool  # CTAs of a cluster share loads
    weights_in_registers: bool  # P, as the operand of P V; else it goes through shared memory
    meets: bool  # all consumers, behind the loop, before O leaves
    stages: int = 0  # of a ring; 0 where that cannot be read
    rows: int = 64  # of a consumer
    loads: str = "producer"  # or "tma" or "cp_async": the consumers themselves
    synchronous: bool = False  # mma.sync in the place of WGMMA
    registers: int = 0  # of a thread, where no warpgroup has others than the rest
    o_by_q: bool = False  # O leaves by way of Q's place in shared memory, which is handed back behind it
    draws: bool = True  # tiles from a queue in memory, where it is persistent; else every CTA takes those of a fixed stride
    turns_by_mbarrier: bool = False  # in the place of named barriers
    transposes: bool = False  # other warps than the consumers' transpose V of 8 bits in shared memory
    spilled: tuple[int, int] = (0, 0)  # words of a thread that go to local memory, by the block and once besides
    before: tuple[Step, ...] = ()  # what warps without a producer execute once a tile, before their loop, where that was read,
    between: tuple[Step, ...] = ()  # from the loop over blocks without a mask to that over the rest,
    after: tuple[Step, ...] = ()  # and behind the last

    @property
    def lag(self) -> int:
        """Blocks that are under way when a tile's last S has been issued."""
        return max(step.lag for step in self.blocks[0].steps if not step.code)

    @property
    def takes_turns(self) -> bool:
        """Whether consumers hand the tensor cores round."""
        return any(step.what == "take" for step in self.blocks[0].steps)

    @property
    def instructions(self) -> int:
        """Between the points of a block, of one warp."""
        return sum(block.instructions for block in self.blocks) // len(self.blocks)

    def to_dict(self) -> dict:
        """As plain JSON values; empty ones, and those that are as usual, are left out."""
        usual = {each.name: each.default for each in fields(self) if each.default is not MISSING}
        plain = {name: value for name, value in vars(self).items() if name not in ("blocks", "masked")}
        plain = {name: value for name, value in plain.items() if name not in usual or value != usual[name]}
        plain |= {name: _written(Block(plain[name])) for name in _ONCE if name in plain}
        return plain | {
            "blocks": [_written(block) for block in self.blocks],
            "masked": _written(self.masked) if self.masked else None,
        }

    @classmethod
    def from_dict(cls, data: Mapping) -> Pipeline:
        """What `to_dict` gave."""
        blocks = tuple(map(_block, data["blocks"]))
        masked, spilled = _block(data["masked"]) if data["masked"] else None, tuple(data.get("spilled", (0, 0)))
        once = {name: _block(data[name]).steps for name in _ONCE if name in data}
        return cls(**{**data, **once, "blocks": blocks, "masked": masked, "spilled": spilled})


_ONCE = ("before", "between", "after")


def _written(block: Block) -> list[dict]:
    return [{name: value for name, value in asdict(step).items() if value} for step in block.steps]


def _block(steps: list[dict]) -> Block:
    return Block(tuple(Step(**{**step, "code": tuple(Segment(**part) for part in step.get("code", ()))}) for step in steps))


def phases_of(parts: Sequence[Segment]) -> tuple[Phase, ...]:
    """Pieces of code one behind the other, for the engine: alike ones are chunks of one phase, waits for results are in them."""
    phases: list[Phase] = []
    for part in parts:
        count = {name: part.pipes.get(name, 0) for name in ("fma", "alu", "mufu", "convert")}
        count["other"] = part.instructions - sum(count.values())
        spread = count["mufu"] > 0 or part.stalls == 0  # no stalls are counted amid a GEMM's issue
        work = Phase(**count, stalls=part.stalls, interleaved=spread, goes_on=True)
        if phases and work == replace(phases[-1], chunks=1):
            phases[-1] = replace(work, chunks=phases[-1].chunks + 1)
        else:
            phases.append(work)
        if part.votes or part.branches:
            phases.append(Phase(votes=part.votes, branches=part.branches, goes_on=True))
    return tuple(phases)
