"""Once: what the warps of a tile without a producer execute before their loop, between two loops, and behind the last.

Their loads stand there in the order of the code: Q, awaited before the first K and V are asked for or not; a second loop's first
blocks, for which nothing has been asked before; and of a kernel whose products run a block late, the last V.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from .pipeline import Step
from .sass import Code, Loop, Point, Segment, parts
from .way import usual

_NAMES = {"load": "load", "wait": "wait", "sync": "meet", "gemm": "values", "gemm wait": "finished"}
_ENDS = ("BRA", "RET", "BRX", "JMP", "EXIT")


def before(code: Code, first: Loop) -> tuple[Step, ...]:
    """From the kernel's entry to its first loop."""
    return _steps(code, usual(code, Loop(0, first.start))[:-1])


def between(code: Code, one: Loop, next_: Loop) -> tuple[Step, ...]:
    """From the end of a loop to the beginning of the next."""
    return _steps(code, _shortest(code, _exits(code, one), {next_.start})[:-1])


def after(code: Code, last: Loop) -> tuple[Step, ...]:
    """From the end of the last loop to the kernel's."""
    ends = {at for at, each in enumerate(code.instructions) if each.name == "EXIT" and not _goes_on(code, at)}
    return _steps(code, _shortest(code, _exits(code, last), ends))


def _steps(code: Code, way: Sequence[int]) -> tuple[Step, ...]:
    found = []
    for part in parts(code, way, finely=True) if way else ():
        if isinstance(part, Segment):
            found.append(Step("once", code=(part,)))
        elif isinstance(part, Point) and part.what in _NAMES:
            found.append(Step(_NAMES[part.what]))
    return tuple(found)


def _exits(code: Code, loop: Loop) -> set[int]:
    inside = range(loop.start, loop.end + 1)
    return {to for at in inside for to in _next(code, at) if to not in inside}


def _shortest(code: Code, starts: set[int], ends: set[int]) -> list[int]:
    """The shortest way from any of the starts to any of the ends; empty where there is none."""
    length, came, queue = dict.fromkeys(starts, 0), {}, [(0, start) for start in sorted(starts)]
    while queue:
        so_far, at = heapq.heappop(queue)
        if at in ends:
            return _back(at, came)
        for to in _next(code, at) if so_far == length[at] else ():
            if so_far + 1 < length.get(to, so_far + 2):
                length[to], came[to] = so_far + 1, at
                heapq.heappush(queue, (so_far + 1, to))
    return []


def _back(at: int, came: dict[int, int]) -> list[int]:
    way = [at]
    while way[-1] in came:
        way.append(came[way[-1]])
    return way[::-1]


def _next(code: Code, at: int) -> Iterator[int]:
    if _goes_on(code, at) and at + 1 < len(code.instructions):
        yield at + 1
    target = code.target(at)
    if target is not None:
        yield target


def _goes_on(code: Code, at: int) -> bool:
    each = code.instructions[at]
    return each.name not in _ENDS or each.predicate not in ("", "PT", "UPT") or ".DIV" in each.opcode
