"""Inspect: what a compiled kernel is, from its machine code alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ...simulator.code import loop_reader, sass
from ...simulator.code.pipeline import Pipeline
from ...simulator.code.sass import Code, Loop, Point, Segment
from ...simulator.code.way import usual
from ...simulator.errors import UsageError


@dataclass(frozen=True)
class Turn:
    """One turn of a loop with GEMMs on its usual way, past what is skipped most of the time, and what it costs a warp at least."""

    order: tuple[str, ...]
    gemms: tuple[str, ...]
    scores: int  # of a thread
    instructions: int
    standing: int  # instructions in the loop, with what is skipped
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
    threads: int  # of a CTA; 0 where the machine code does not say
    registers: int  # of a thread at its start; later they may be dealt anew
    instructions: int
    local: int  # instructions that go to local memory: spills
    means: tuple[str, ...]
    turns: tuple[Turn, ...]
    reads_as: str  # its main loop in words
    not_read: str  # or why `fasim predict --kernel` cannot read it
    remarks: tuple[str, ...]

    def to_dict(self) -> dict:
        """As plain JSON values."""
        return vars(self) | {"turns": [vars(turn) | {"per_score": turn.per_score} for turn in self.turns]}


def inspect(code: Code) -> Inspection:
    """Read one kernel."""
    loops = sass.loops(code)
    local = sum(each.pipe == "local" for each in code.instructions)
    turns = tuple(_turn(code, loop) for loop in loops)
    reads_as, not_read, late = _reading(code)
    return Inspection(
        kernel=code.name,
        threads=code.threads,
        registers=code.registers,
        instructions=len(code.instructions),
        local=local,
        means=tuple(_means(code)),
        turns=turns,
        reads_as=reads_as,
        not_read=not_read,
        remarks=(*_remarks(loops, local), *late),
    )


_MEANS = (
    ("UTMALDG", "loads by TMA"),
    ("LDGSTS", "loads by cp.async"),
    ("HGMMA", "GEMMs by WGMMA"),
    ("QGMMA", "GEMMs by 8-bit WGMMA"),
    ("HMMA", "GEMMs by mma.sync"),
)


def _means(code: Code) -> list[str]:
    names = {each.name for each in code.instructions}
    dealt = sorted({sass.last_number(each) for each in code.instructions if each.name == "USETMAXREG"})
    words = [f"warpgroups with {' and '.join(map(str, dealt))} registers (setmaxnreg)"] if dealt else []
    turns = any("BAR.ARV" in each.opcode for each in code.instructions)
    return words + [said for name, said in _MEANS if name in names] + ["turns by named barriers"] * turns


def _turn(code: Code, loop: Loop) -> Turn:
    way = usual(code, loop)
    taken = Loop(loop.start, loop.end, tuple(sass.parts(code, way)))
    pipes = taken.pipes
    return Turn(
        order=tuple(sass.order(taken.points)),
        gemms=tuple(_gemms(code, way, taken)),
        scores=loop.scores,
        instructions=len(way),
        standing=loop.end - loop.start + 1,
        pipes={pipe: pipes[pipe] for pipe in sass.PIPES if pipes[pipe]},
        stalls=sum(part.stalls for part in taken.parts if isinstance(part, Segment)),
        mufu_cycles=sass.MUFU_CYCLES * pipes["mufu"],
        parts=tuple(map(_said, taken.parts)),
    )


def _gemms(code: Code, way: list[int], taken: Loop) -> list[str]:
    """Each kind once; those by mma.sync, which are not told apart, as a count."""
    kinds = dict.fromkeys(str(point) for point in taken.points if point.what == "gemm")
    by_warp = Counter(each.opcode.split(".")[1] for each in (code.instructions[number] for number in way) if each.name in _MMA)
    return [*kinds, *(f"{count} x {_shape(digits)} by mma.sync" for digits, count in by_warp.items())]


_MMA = ("HMMA", "QMMA", "IMMA")


def _shape(digits: str) -> str:
    """16816 is m16n8k16."""
    return f"m{digits[:2]}n{digits[2:3]}k{digits[3:]}" if digits.isdigit() else digits


def _said(part: Point | Segment) -> str:
    if isinstance(part, Point):
        return str(part)
    counts = ", ".join(f"{count} {pipe}" for pipe, count in part.pipes.items())
    return f"  {counts}; stalls {part.stalls} cycles"


def _reading(code: Code) -> tuple[str, str, list[str]]:
    """(the main loop in words, or why it is not read, what looks wrong in it)."""
    try:
        pipeline = loop_reader.read(code)
    except UsageError as error:
        return "", str(error).removeprefix(f"{code.name}: "), []
    tile = f"{pipeline.rows * pipeline.consumers}x{pipeline.block_n}" if pipeline.consumers else f"{pipeline.block_n} keys"
    words = [
        f"tile {tile}, d{pipeline.head_dim}",
        f"P V {pipeline.lag} block{'s' * (pipeline.lag > 1)} behind S" if pipeline.lag else "P V of the same block as S",
        "turns" if pipeline.takes_turns else "no turns",
        *([f"{pipeline.stages} stages"] if pipeline.stages else []),
        "the maximum of every block first" if pipeline.looks_for_maximum else "weights from the maximum of the blocks before",
    ]
    if pipeline.blocks[0].ahead:
        words.append("O rescaled under the next S")
    return "; ".join(words), "", _late(pipeline)


def _remarks(loops: list[Loop], local: int) -> list[str]:
    """What looks wrong."""
    found = [f"{local} instructions go to local memory: registers are spilled"] if local else []
    for loop in loops:
        gemms = [point for point in loop.points if point.what == "gemm"]
        if len(gemms) > 3 and all(point.steps == 1 for point in gemms):
            found.append("each WGMMA is a group of its own and waited for: the compiler has serialised them")
    return list(dict.fromkeys(found))


def _late(pipeline: Pipeline) -> list[str]:
    """Exponentials that a product beside them was to hide, and that stand behind the wait for it."""
    block = pipeline.blocks[0]
    if not pipeline.lag:
        return []
    made = {gap: sum(phase.mufu * phase.chunks for phase in phases) for gap, phases in block.softmax.items()}
    late, whole = sum(count for gap, count in made.items() if gap >= block.product_done), sum(made.values())
    said = f"{late} of {whole} exponentials a thread stand behind the wait for the product that was to hide them"
    return [said] if 2 * late > whole else []
