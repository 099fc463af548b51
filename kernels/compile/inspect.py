"""Inspect: what a compiled kernel is, from its machine code alone."""

from __future__ import annotations

from dataclasses import dataclass

from ...simulator.code import sass
from ...simulator.code.sass import Code, Loop, Point, Segment


@dataclass(frozen=True)
class Turn:
    """One turn of a loop with GEMMs: what stands in it and what it costs a warp at least."""

    order: tuple[str, ...]
    gemms: tuple[str, ...]
    scores: int  # of a thread
    instructions: int
    pipes: dict[str, int]
    stalls: int  # cycles between the points, by the compiler's counts; one warp alone needs no fewer to issue
    mufu_cycles: int  # of the sub-partition's MUFU, for one warp
    parts: tuple[str, ...]

    @property
    def per_score(self) -> float | None:
        """Instructions a score; None where no scores are made."""
        return self.instructions / self.scores if self.scores else None


@dataclass(frozen=True)
class Inspection:
    """One kernel."""

    kernel: str
    instructions: int
    local: int  # instructions that go to local memory: spills
    means: tuple[str, ...]
    turns: tuple[Turn, ...]
    remarks: tuple[str, ...]

    def to_dict(self) -> dict:
        """As plain JSON values."""
        return vars(self) | {"turns": [vars(turn) | {"per_score": turn.per_score} for turn in self.turns]}


def inspect(code: Code) -> Inspection:
    """Read one kernel."""
    loops = sass.loops(code)
    local = sum(each.pipe == "local" for each in code.instructions)
    turns = tuple(map(_turn, loops))
    return Inspection(code.name, len(code.instructions), local, tuple(_means(code)), turns, tuple(_remarks(loops, local)))


_MEANS = (
    ("USETMAXREG", "registers are dealt between warpgroups (setmaxnreg)"),
    ("UTMALDG", "loads by TMA"),
    ("LDGSTS", "loads by cp.async"),
    ("HGMMA", "GEMMs by WGMMA"),
    ("QGMMA", "GEMMs by 8-bit WGMMA"),
    ("HMMA", "GEMMs by mma.sync"),
)


def _means(code: Code) -> list[str]:
    names = {each.name for each in code.instructions}
    turns = any("BAR.ARV" in each.opcode for each in code.instructions)
    return [words for name, words in _MEANS if name in names] + ["turns by named barriers"] * turns


def _turn(loop: Loop) -> Turn:
    pipes = loop.pipes
    return Turn(
        order=tuple(sass.order(loop.points)),
        gemms=tuple(dict.fromkeys(str(point) for point in loop.points if point.what == "gemm")),
        scores=loop.scores,
        instructions=loop.end - loop.start + 1,
        pipes={pipe: pipes[pipe] for pipe in sass.PIPES if pipes[pipe]},
        stalls=sum(part.stalls for part in loop.parts if isinstance(part, Segment)),
        mufu_cycles=sass.MUFU_CYCLES * pipes["mufu"],
        parts=tuple(map(_said, loop.parts)),
    )


def _said(part: Point | Segment) -> str:
    if isinstance(part, Point):
        return str(part)
    counts = ", ".join(f"{count} {pipe}" for pipe, count in part.pipes.items())
    return f"  {counts}; stalls {part.stalls} cycles"


def _remarks(loops: list[Loop], local: int) -> list[str]:
    """What looks wrong."""
    found = [f"{local} instructions go to local memory: registers are spilled"] if local else []
    for loop in loops:
        gemms = [point for point in loop.points if point.what == "gemm"]
        if len(gemms) > 3 and all(point.steps == 1 for point in gemms):
            found.append("each WGMMA is a group of its own: the compiler has serialised them")
    return list(dict.fromkeys(found))
