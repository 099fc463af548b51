"""Flows: which span of a window follows from which. A load feeds a GEMM, that GEMM the softmax, the softmax the next GEMM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .window import AHEAD, SOFTMAX, TENSOR_CORES, Row, Span, Window

Place = tuple[int, Span]
"""A row of the window, by its number, and a span in it."""


@dataclass(frozen=True)
class Flow:
    """Spans in the order in which one follows from the other; two at least."""

    name: str
    spans: tuple[Place, ...]


_OPERANDS = {"S": ("load K", "load Q"), "O": ("load V", "load P"), "P": ("load S",)}
"""What S, O and a pass over S are made from."""


def flows(window: Window) -> Iterator[Flow]:
    """Of every loop step of every tile and warpgroup: load -> S -> softmax -> O and load -> O; where softmax reads S from
    memory, load -> pass, for each pass. Those of which the window shows one span alone are left out."""
    loads: dict[tuple, list[Place]] = {}
    for place in _spans(window, lambda row: row.kind == "unit" and _unit(row) in AHEAD):
        loads.setdefault((place[1].label, place[1].tile, place[1].step), []).append(place)
    gemms = _first(_spans(window, lambda row: _unit(row) == TENSOR_CORES))
    made = {(*key[:3], key[3][0]): place for key, place in gemms.items() if key[1] >= 0 and key[2] >= 0}
    passes = _first(p for p in _spans(window, lambda row: row.kind == "warp") if p[1].kind == SOFTMAX)
    weights: dict[tuple, Place] = {}
    for key, place in passes.items():
        weights.setdefault(key[:3], place)
    for (tile, step, group, makes), gemm in made.items():
        chain = [_fed(loads, gemm[1], _OPERANDS.get(makes, ())), gemm]
        if makes == "S":
            chain.append(_if_after(weights.get((tile, step, group)), gemm))
            chain.append(_if_after(made.get((tile, step, group, "O")), chain[-1]))
        yield from _flow(f"block {step}", chain)
    for place in passes.values():
        yield from _flow(f"{place[1].label} {place[1].step}", [_fed(loads, place[1], _OPERANDS["P"]), place])


def _flow(name: str, chain: Iterable[Place | None]) -> Iterator[Flow]:
    spans = tuple(place for place in chain if place)
    if len(spans) > 1:
        yield Flow(name, spans)


def _unit(row: Row) -> str:
    return row.name.partition(" (")[0]


def _spans(window: Window, of: Callable[[Row], bool]) -> Iterator[Place]:
    """Work in the rows chosen, in order of time; what was recorded names no unit, and is left out."""
    rows = [(number, row) for number, row in enumerate(window.rows) if of(row) and not row.name.endswith(" measured")]
    places = [(number, span) for number, row in rows for span in row.spans if not span.wait]
    yield from sorted(places, key=lambda place: (place[1].start, place[0]))


def _first(places: Iterable[Place]) -> dict[tuple, Place]:
    """The first span of each (tile, step, warpgroup, label)."""
    found: dict[tuple, Place] = {}
    for place in places:
        span = place[1]
        found.setdefault((span.tile, span.step, span.group, span.label), place)
    return found


def _if_after(place: Place | None, before: Place | None) -> Place | None:
    return place if place and before and place[1].start >= before[1].start else None


def _fed(loads: dict[tuple, list[Place]], span: Span, labels: Iterable[str]) -> Place | None:
    """The last load that a span waited for: of its step or, without one, of its tile, by its own warps or by a producer."""
    for step in (span.step, -1):
        fitting = [
            place for label in labels for place in loads.get((label, span.tile, step), ())
            if place[1].group in (span.group, -1) and place[1].start <= span.start
        ]  # fmt: skip
        if fitting:
            return max(fitting, key=lambda place: place[1].start)
    return None
