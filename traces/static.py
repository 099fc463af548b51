"""Static conformance: does a compiled kernel's main loop stand in the order that its schedule says? No GPU is needed."""

from __future__ import annotations

from collections.abc import Sequence

from ..simulator.code import sass
from ..simulator.code.sass import Loop, Point
from ..simulator.code.way import walked
from ..simulator.language.ops import BarrierKind, Op
from ..simulator.language.program import Program, trace
from ..simulator.problem.tile import Tile
from ..simulator.problem.workload import Workload
from ..simulator.schedules import find_schedule

BLOCKS = 12
"""K/V blocks of the tile that is recorded; the block amid them has both its neighbours."""


def block_of(schedule: str, workload: Workload, tile: Tile) -> list[str]:
    """One block of a consumer in the steady state, from an S to before the next, in the words of `sass.order`, frees by ring."""
    program = trace(find_schedule(schedule).kernels[0], workload, tile, [(BLOCKS, 0)])
    words = _words(program)
    scores = [number for number, word in enumerate(words) if word == "S = Q K^T"]
    first, after = scores[len(scores) // 2], scores[len(scores) // 2 + 1]
    return words[first:after]


def _words(program: Program) -> list[str]:
    words: list[str] = []
    for row in program.stream(program.warps.index("WG0")):
        op, named = Op(int(row["op"])), row["barrier"] >= 0 and program.barriers[row["barrier"]].kind == BarrierKind.NAMED
        if op == Op.WGMMA:
            word = "S = Q K^T" if program.registers[int(row["writes"]).bit_length() - 1] == "S" else "O += P V"
        elif op == Op.WGMMA_WAIT:
            word = f"gemms but {int(row['target'])}"
        elif op == Op.WAIT:
            word = "sync" if named else "wait"
        elif op == Op.ARRIVE:
            word = "hand over" if named else f"free {program.rings[row['ring']].tensor.removesuffix('^T')}"
        else:
            continue
        if word != "wait" or words[-1:] != [word]:
            words.append(word)
    return words


def order_of(points: Sequence[Point]) -> list[str]:
    """Points of a loop in the same words. A ring of ours has its empty barriers behind its full ones, so what is handed back is the
    ring whose wait lies next below; what lies below both, Q, is left out, since only a tile's last block hands it back."""
    full = {}
    for number, point in enumerate(points):
        before = [*points[number::-1], *points[:number:-1]]
        if point.what == "gemm":
            full["K" if point.makes_scores else "V"] = next((each.place for each in before if each.what == "wait"), 0)
    words = []
    for point in points:
        below = [(place, ring) for ring, place in full.items() if place <= point.place]
        if point.what != "arrive":
            words += [word for word in sass.order([point]) if word != "wait" or words[-1:] != [word]]
        elif below:
            words.append(f"free {max(below)[1]}")
    return words


def differs(code: sass.Code, schedule: str, workload: Workload, tile: Tile) -> str:
    """One sentence where the main loop is not the schedule's, else nothing."""
    block = block_of(schedule, workload, tile)
    found = [order_of(Loop(loop.start, loop.end, walked(code, loop)).points) for loop in sass.loops(code) if loop.scores]
    if any(sass.turns(each, block) for each in found):
        return ""
    loop = ", ".join(found[0]) if found else "nothing with WGMMA"
    return f"{code.name}: the main loop is {loop}, where {schedule} says {', '.join(block)}, again and again"
