"""Static conformance of the backward: does a compiled kernel's main loop stand in the order that its schedule says?

As static.py has it for the forward, with what the backward has more: five GEMMs, dS that both warpgroups fill, dQ's outbox, and the
arithmetic between. Both sides become the same words. LSE comes with Q and delta with dO, by their barriers; a slot of dS is never
waited for, since whoever fills it has waited for the other's next; so those waits and frees of a schedule are left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from ..simulator.code import sass
from ..simulator.code.sass import Code, Loop, Point, Segment
from ..simulator.code.way import walked
from ..simulator.language.ops import Op
from ..simulator.language.program import Program, trace
from ..simulator.problem.tile import Tile
from ..simulator.problem.workload import Workload
from ..simulator.schedules import find_schedule

BLOCKS = 12
"""Q blocks of the tile that is recorded; the block amid them has both its neighbours."""
LEAST = 8
"""Exponentials, or conversions, between two points that are more than others' that the compiler has moved there."""
_BARRIERS = {
    ("wait", 0): "wait Q", ("arrive", 2): "free Q", ("wait", 4): "wait dO", ("arrive", 6): "free dO",
    ("wait", 8): "wait dS", ("arrive", 8): "fill dS", ("arrive", 10): "fill dQ", ("wait", 11): "claim dQ",
    ("wait", -2): "", ("wait", 14): "",  # V, once a tile; and room for dS, where a schedule has a warpgroup of its own read it
}  # fmt: skip
"""Where the kernels' mbarriers lie behind that of Q, in 8 bytes each, with two stages (struct Shared of shared.cuh)."""

_V_BEFORE_Q = 16
"""V's barrier, where a loop has one, lies so many bytes before Q's, which is the first else."""


def differs(code: Code, schedule: str, workload: Workload, tile: Tile) -> str:
    """One sentence where the main loop is not the schedule's, else nothing."""
    block = block_of(schedule, workload, tile)
    found = [list(_of_loop(code, loop)) for loop in sass.loops(code)]
    if any(sass.turns(each, block) == 1 for each in found):
        return ""
    loop = ", ".join(found[0]) if found else "nothing with WGMMA"
    return f"{code.name}: the main loop is {loop}, where {schedule} says {', '.join(block)}, again and again"


def block_of(schedule: str, workload: Workload, tile: Tile) -> list[str]:
    """One block of a consumer in the steady state, from an S to before the next."""
    kernel = next(kernel for kernel in find_schedule(schedule, "backward").kernels if kernel.grid == "columns")
    words = _once(_of_program(trace(kernel, workload, tile, [(BLOCKS, 0)])))
    scores = [number for number, word in enumerate(words) if word == "gemm S"]
    return words[scores[BLOCKS // 2] : scores[BLOCKS // 2 + 1]]


def _once(words: Iterator[str]) -> list[str]:
    """Without the same word again at once: a barrier is tried and then waited for, arithmetic comes in several phases.

    What of dS is computed when dV, whose operand is P, has been issued might stand before it: that is the compiler's choice.
    """
    found: list[str] = []
    for word in words:
        if word == "gradient" and found[-1:] == ["gemm dV"]:
            found[-1:] = ["gemm dV"] if found[-2:-1] == ["gradient"] else ["gradient", "gemm dV"]
        elif found[-1:] != [word]:
            found.append(word)
    return found


def _of_program(program: Program) -> Iterator[str]:
    for row in program.stream(program.warps.index("WG0")):
        op, label = Op(int(row["op"])), program.labels[row["label"]]
        ring = program.rings[row["ring"]].tensor.removesuffix("0") if row["ring"] >= 0 else ""
        if op == Op.WGMMA:
            yield f"gemm {re.split('[=+]', label)[0].removesuffix('^T')}"
        elif op == Op.WGMMA_WAIT:
            yield f"gemms but {int(row['target'])}"
        elif op == Op.WAIT and (ring in ("Q", "dO") or (ring, label) == ("dS", "wait")):
            yield f"wait {ring}"
        elif op == Op.WAIT and ring == "dQ":
            yield "claim dQ"
        elif op == Op.ARRIVE and (ring in ("Q", "dO", "dQ") or (ring, label) == ("dS", "fill")):
            yield f"{label} {ring}"
        elif op == Op.COMPUTE and label in ("P^T", "dS^T"):
            yield "exponentials" if label == "P^T" else "gradient"


def _of_loop(code: Code, loop: Loop) -> list[str]:
    """The words of a loop's usual way."""
    parts = walked(code, loop)
    points = [part for part in parts if isinstance(part, Point)]
    places = {point.place for point in points if point.what == "wait" and point.place}
    first = min(places, default=0)
    first += _V_BEFORE_Q * (first + _V_BEFORE_Q in places)
    stores = [each for each in code.instructions[loop.start : loop.end + 1] if each.name == "STSM"]
    stored = {_register(each.operands.partition("]")[2]) for each in stores}
    waits = [_barrier(point, first) for point in points if point.what == "wait"]
    before = next((word for word in reversed(waits) if word in ("wait Q", "wait dO")), "")
    words = []
    pipes: Counter[str] = Counter()
    for part in parts:
        if isinstance(part, Segment):  # of several between two points the sum tells
            pipes.update(part.pipes)
            continue
        word = _of_point(code, part, first, stored, before)
        before = word if word in ("wait Q", "wait dO") else before
        words += [_arithmetic(pipes), word]
        pipes.clear()
    return _once(word for word in (*words, _arithmetic(pipes)) if word)


def _arithmetic(pipes: Counter[str]) -> str:
    if pipes["mufu"] >= LEAST:
        return "exponentials"
    return "gradient" if pipes["convert"] >= LEAST else ""


def _of_point(code: Code, point: Point, first: int, stored: set[int], before: str) -> str:
    if point.what == "gemm wait":
        return f"gemms but {point.outstanding}"
    if point.what != "gemm":
        return _barrier(point, first)
    if point.makes_scores:
        return "gemm S" if before == "wait Q" else "gemm dP"
    if not point.a_in_registers:
        return "gemm dQ"
    # dK's operand is dS, whose registers are stored for the other warpgroup as well.
    return "gemm dK" if _register(code.instructions[point.at].operands.split(",")[1]) in stored else "gemm dV"


def _barrier(point: Point, first: int) -> str:
    """What is waited for, or arrived at, by where the barrier lies."""
    at, rest = divmod(point.place - first, 8)
    return _BARRIERS.get((point.what, at), f"{point.what} at {at}") if rest == 0 else f"{point.what} at {point.place}"


def _register(operand: str) -> int:
    found = re.search(r"\bR(\d+)", operand)
    return int(found[1]) if found else -1
