"""The legend of a timeline, for what appears in it, in lines that fit."""

from __future__ import annotations

from collections.abc import Iterator

from rich.segment import Segment
from rich.style import Style

from ..traces.figure import Figure
from ..traces.window import GEMM, ON_COPY, ON_GEMM, ON_TURN, SOFTMAX, WORK
from .palette import ALPHABETS, HUES, MARKS, TURN, WAIT, colour

KINDS = {
    GEMM: "",  # depends on the figure
    SOFTMAX: "",
    WORK: "other work",
    ON_COPY: "waits for a load, a store or a buffer",
    ON_GEMM: "",
    ON_TURN: "waits for its turn",
}
"""What the parts of a warp's row are called."""
SIGNS = {GEMM: "S1= O1=", SOFTMAX: "~", WORK: "-", ON_COPY: ".", ON_GEMM: ":", ON_TURN: "_"}

Item = tuple[list[Segment], str]
"""What stands before a text, and the text."""


def entries(drawn: Figure) -> dict[str, str]:
    """Kind -> its name, of the kinds that appear in the rows of warps."""
    gemms = ("issues a GEMM", "waits for a GEMM") if drawn.issued else ("a GEMM on the tensor cores", "issues or waits for a GEMM")
    named = KINDS | dict(zip((GEMM, ON_GEMM), gemms, strict=True))
    named |= {SOFTMAX: ", ".join(f"{letter} {label}" for letter, label in drawn.softmax.items())}
    return {kind: named[kind] for kind in KINDS if kind in drawn.kinds}


def legend(drawn: Figure, gutter: int, width: int, plain: bool, several: bool) -> Iterator[Segment]:
    """The entries one after another, in lines of `width` columns."""
    items = list(_plain(drawn) if plain else _coloured(drawn))
    if several:
        items.append(([Segment("+" if plain else "▒")], "several in one column"))
    items.append(([], "blank is idle"))
    used = 0
    for before, text in _broken(items, width - gutter):
        length = sum(len(each.text) for each in before) + len(text) + bool(before)
        if used and used + 3 + length > width - gutter:
            yield Segment.line()
            used = 0
        yield Segment("   " if used else " " * gutter)
        yield from before
        yield Segment((" " if before else "") + text, Style(dim=True))
        used += 3 * bool(used) + length
    yield Segment.line()


def _broken(items: list[Item], room: int) -> Iterator[Item]:
    """Texts longer than a line fall into words."""
    for before, text in items:
        if sum(len(each.text) for each in before) + 1 + len(text) <= room:
            yield before, text
            continue
        first, *words = text.split(" ")
        yield before, first
        yield from (([], word) for word in words)


def _plain(drawn: Figure) -> Iterator[Item]:
    for kind, name in entries(drawn).items():
        yield [Segment(SIGNS[kind])], name
    for group, name in enumerate(drawn.window.warpgroups):
        if group in drawn.groups and drawn.steps:
            alphabet = ALPHABETS[min(group, len(ALPHABETS) - 1)]
            yield [Segment(" ".join(alphabet[:3]))], f"{drawn.window.step} of {name}"
    spans = [span for row in drawn.rows if row.kind == "unit" for span in row.spans if not span.wait]
    for group, name in enumerate(drawn.window.warpgroups):
        if any(span.step < 0 and max(0, span.group) == group for span in spans):
            yield [Segment(MARKS[min(group, len(MARKS) - 1)])], f"{name} outside the loop, or its turn"


def _coloured(drawn: Figure) -> Iterator[Item]:
    groups = len(drawn.window.warpgroups)
    steps = drawn.steps[: len(HUES)]
    for step in steps:
        swatch = [Segment(" ", Style(bgcolor=colour(step, group, groups))) for group in drawn.groups or (0,)]
        yield swatch, f"{drawn.window.step} {step}" if step == steps[0] else str(step)
    if groups > 1 and steps:
        for group in drawn.groups:
            yield [Segment("  ", Style(bgcolor=colour(steps[0], group, groups)))], drawn.window.warpgroups[group]
    if any(s.step < 0 and not s.wait for row in drawn.rows for s in row.spans):
        swatch = [Segment(" ", Style(bgcolor=colour(-1, group, groups))) for group in drawn.groups or (0,)]
        yield swatch, "outside the loop, turns"
    for kind, name in entries(drawn).items():
        if kind == GEMM:
            yield [Segment("S1=")], name
        elif kind == SOFTMAX:
            yield [], name
        elif kind != WORK:
            yield [Segment(SIGNS[kind] * 2, Style(color=TURN if kind == ON_TURN else WAIT))], name
