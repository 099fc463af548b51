"""Way: what a warp usually executes in one turn of a loop, out of all that stands in it.

A loop holds code that is skipped most of the time: a mask that only the last blocks need, another try of a softmax, a second
look at a barrier. The usual way passes every point of order that it can, and apart from that it is the shortest.
"""

from __future__ import annotations

from .sass import Code, Instruction, Loop, Point, Segment, parts

_POINT = 10_000
"""Instructions that a way may be longer for a point more."""
_LOOKS = 8
"""Instructions between a look at a barrier and the next, which waits."""


def usual(code: Code, loop: Loop) -> list[int]:
    """The instructions of a turn by number, from the loop's first to the branch back."""
    cost: dict[int, int] = {loop.start: 0}
    before: dict[int, int] = {}
    for number in range(loop.start, loop.end + 1):
        if number not in cost:
            continue
        here = cost[number] + 1 - _POINT * _is_point(code, number)
        for after in _next(code, number, loop):
            if here < cost.get(after, here + 1):
                cost[after], before[after] = here, number
    if loop.end not in cost:
        return list(range(loop.start, loop.end + 1))
    way = [loop.end]
    while way[-1] != loop.start:
        way.append(before[way[-1]])
    return way[::-1]


def walked(code: Code, loop: Loop) -> tuple[Point | Segment, ...]:
    """Points and segments of the usual way."""
    return tuple(parts(code, usual(code, loop), finely=True))


def _next(code: Code, number: int, loop: Loop) -> list[int]:
    """Where a warp may go on within the loop, forward."""
    each, target = code.instructions[number], code.target(number)
    after = [] if _ends(each) else [number + 1]
    if target is not None and target > number:
        after.append(target)
    return [each for each in after if each <= loop.end]


def _ends(each: Instruction) -> bool:
    return each.name in ("BRA", "EXIT", "RET", "BRX", "JMP") and each.predicate in ("", "PT", "UPT") and ".DIV" not in each.opcode


def _is_point(code: Code, number: int) -> bool:
    each = code.instructions[number]
    if each.name == "SYNCS" and "TRYWAIT" in each.opcode:
        before = code.instructions[max(0, number - _LOOKS) : number]
        return not any("TRYWAIT" in other.opcode and _place(other) == _place(each) for other in before)  # else a second look
    return each.name in ("HGMMA", "QGMMA", "HMMA", "QMMA", "BAR") or "DEPBAR" in each.opcode or ".ARRIVE" in each.opcode


def _place(look: Instruction) -> str:
    """The barrier that is looked at."""
    return look.operands.partition("[")[2].partition("]")[0]
