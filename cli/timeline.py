"""Window -> rich renderable: a line per warp and unit, colours by iteration, idle gaps blank, waits by what is waited for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from math import ceil

from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style

from ..traces.beside import EXPOSED, Cover
from ..traces.figure import figure
from ..traces.window import GEMM, ON_COPY, ON_GEMM, ON_TURN, SOFTMAX, WORK, Row, Span, Window
from .legend import legend
from .palette import TURN, WAIT, colour, cover_colour, ink, letter, ticks

_EIGHTHS = " ▏▎▍▌▋▊▉█"
FILL = {GEMM: "=", SOFTMAX: "~", WORK: "-", ON_COPY: ".", ON_GEMM: ":", ON_TURN: "_"}
"""Without colour: what a warp does. In colour the waits are drawn so, too."""
SEVERAL = "+"
UNDER, EXPOSURE, DONE = "  under", "!", "|"
"""The row below a warpgroup's, what it shows where softmax runs while the tensor cores idle, and the end of a shorter window."""
_SHARE = 5  # columns at the right for the share of the time that a unit is busy

Part = tuple[float, float, Span]
"""From, to within a cell's 0..1, and of which span."""


class Timeline:
    """Draws a Window across the console's width; without colour, letters name GEMMs, softmax and waits.

    Beside others it is drawn to the scale of the longest, `until`, with the shares of each lane that are `idle` at the right,
    a row of `covers` under each warpgroup, and axis and legend once for all (`feet`).
    """

    def __init__(
        self, window: Window, until: int | None = None, covers: Sequence[Cover] = (), idle: dict[str, float] | None = None,
        gutter: int = 0, feet: bool = True,
    ) -> None:  # fmt: skip
        self.figure, self.covers, self.idle, self.feet = figure(window), covers, idle, feet
        self.sheet = replace(window, end=max(window.end, until or 0))
        self.gutter = max([gutter, 6] + [len(row.name) for row in self.figure.rows]) + 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        drawn, window, gutter = self.figure, self.sheet, self.gutter
        plain = console.no_color or console.color_system is None
        width = max(8, options.max_width - gutter - _SHARE)
        kind, several = None, False
        for row in drawn.rows:
            if kind not in (None, row.kind):
                yield Segment.line()
            kind = row.kind
            yield Segment(f"{row.name:<{gutter}}", Style(bold=row.kind == "warp"))
            cells = list((_plain if plain else _coloured)(row, window, width))
            several = several or any(cell.text == (SEVERAL if plain else "▒") for cell in cells)
            if window.end > drawn.window.end:
                done = ceil((drawn.window.end - window.start) * width / (window.end - window.start))
                cells[done : done + 1] = [Segment(DONE if plain else "│", Style(dim=True))] if done < width else []
            yield from cells
            yield Segment(self._share(row), Style(dim=True))
            yield Segment.line()
            if mine := [cover for cover in self.covers if row.kind == "warp" and cover.group in _softmax_of(row)]:
                yield Segment(f"{UNDER:<{gutter}}", Style(dim=True))
                yield from under(mine, window, width, plain)
                yield Segment.line()
        if self.feet:
            yield from axis(window, gutter, width, "busy" if self.idle is None else "idle")
            yield from legend(drawn, gutter, options.max_width, plain, several)

    def _share(self, row: Row) -> str:
        """At the right of a row: how much of the time a unit is busy; beside others, how much of it each lane is idle."""
        if self.idle is not None:
            return f"{self.idle[row.name]:{_SHARE}.0%}" if row.name in self.idle else ""
        return f"{self.figure.window.busy(row):{_SHARE}.0%}" if row.kind == "unit" and row.name != "barriers" else ""


def _softmax_of(row: Row) -> set[int]:
    """Warpgroups whose softmax is in a row."""
    return {span.group for span in row.spans if span.kind == SOFTMAX}


def _cells_of(span: Span, window: Window, width: int) -> tuple[float, float]:
    """First and last position of a span, in cells."""
    scale = width / (window.end - window.start)
    return (span.start - window.start) * scale, (span.end - window.start) * scale


def _parts(row: Row, window: Window, width: int) -> list[list[Part]]:
    """For each cell the parts of spans in it, in order of time."""
    cells: list[list[Part]] = [[] for _ in range(width)]
    for span in row.spans:
        left, right = _cells_of(span, window, width)
        for cell in range(int(left), min(width, int(right) + 1)):
            begin, end = max(left - cell, 0.0), min(right - cell, 1.0)
            if end > begin:
                cells[cell].append((begin, end, span))
    return cells


def _what(row: Row, span: Span) -> tuple:
    """What a cell can show of a span: in a warp's row its kind and step, in a unit's for whom it is and the step."""
    return (span.kind, span.step) if row.kind == "warp" else (span.group, span.step)


def _largest(row: Row, parts: Iterable[Part]) -> tuple[Span | None, bool]:
    """The span of what takes most of a cell, None where it is rather idle (in a unit's row any work is worth showing); and
    whether the cell holds more than one letter can show: three or more things one after another, none of them most of it."""
    shown = [part for part in parts if row.kind == "warp" or not part[2].wait]
    shares: dict[tuple, float] = {}
    spans: dict[tuple, Span] = {}
    for begin, end, span in shown:
        key = _what(row, span)
        shares[key] = shares.get(key, 0.0) + end - begin
        spans.setdefault(key, span)
    if not shares or (row.kind == "warp" and sum(shares.values()) < 0.25):
        return None, False
    most = max(shares, key=lambda key: shares[key])
    turns = len(list(groupby(_what(row, span) for begin, end, span in shown if end - begin > 0.02)))
    return spans[most], turns > 2 and shares[most] < 0.6 * sum(shares.values())


def _shown(row: Row, window: Window, width: int) -> list[tuple[list[Part], Span | None, bool, str]]:
    """For each cell its parts, the span that it shows, whether it holds several things, and the letter of a label or "".

    A label stands in the cells that show its span, if they are enough.
    """
    cells = [(parts, *_largest(row, parts)) for parts in _parts(row, window, width)]
    letters = [""] * width
    for span in row.spans:
        left, right = _cells_of(span, window, width)
        mine = [
            cell for cell in range(int(left), min(width, int(right) + 1))
            if (shown := cells[cell][1]) and not cells[cell][2] and _what(row, shown) == _what(row, span) and not shown.wait
        ]  # fmt: skip
        if not span.wait and len(mine) >= len(span.short) and mine[-1] - mine[0] < len(mine):
            at = mine[0] + (len(mine) - len(span.short)) // 2
            letters[at : at + len(span.short)] = span.short
    return [(*cell, letter) for cell, letter in zip(cells, letters, strict=True)]


def _plain(row: Row, window: Window, width: int) -> Iterator[Segment]:
    """Without colour: a warp's work as =S1=, ~P1~ and its waits; a unit's by whom it works for and which block."""
    for _, span, several, label in _shown(row, window, width):
        if span is None:
            yield Segment(" ")
        elif several:
            yield Segment(SEVERAL)
        elif row.kind == "unit":
            yield Segment(letter(span.step, span.group))
        else:
            yield Segment(label or FILL[span.kind])


def _coloured(row: Row, window: Window, width: int) -> Iterator[Segment]:
    """Eighth-cell blocks: a cell shows at most two parts, left in the foreground and right in the background."""
    groups = len(window.warpgroups)
    for parts, span, several, label in _shown(row, window, width):
        if span is None:
            yield Segment(" ")
        elif label:
            own = colour(span.step, span.group, groups)
            yield Segment(label, Style(color=ink(own), bgcolor=own, bold=span.kind == GEMM))
        elif span.wait:
            yield Segment(FILL[span.kind], Style(color=TURN if span.kind == ON_TURN else WAIT))
        elif several:
            yield Segment("▒", Style(color=colour(span.step, span.group, groups)))
        else:
            yield _cell([part for part in parts if not part[2].wait], row.kind == "warp", groups)


def _cell(work: list[Part], warp: bool, groups: int) -> Segment:
    best = sorted(sorted(work, key=lambda p: p[0] - p[1])[:2], key=lambda p: p[:2])
    begin, end, span = best[0]
    own = colour(span.step, span.group, groups)
    if len(best) == 2:
        other = best[1][2]
        return _split(round((end + best[1][0]) * 4), own, colour(other.step, other.group, groups))
    if warp and span.kind == GEMM and end - begin > 0.9:
        return Segment(FILL[GEMM], Style(color=ink(own), bgcolor=own))
    if begin < 0.0625 or end < 0.9375:  # from the left edge, or an island drawn from it
        return _split(round((end - (begin if begin >= 0.0625 else 0)) * 8), own, None)
    return _split(round(begin * 8), None, own)


def _split(eighths: int, left: str | None, right: str | None) -> Segment:
    """A cell whose left `eighths` have one colour and whose rest has another; None is the terminal's background."""
    eighths = min(8, max(0, eighths))
    if left is None:
        return Segment(_EIGHTHS[eighths], Style(color=right, reverse=True))
    if eighths in (0, 8) and right is None:
        return Segment("█" if eighths else "▏", Style(color=left))
    return Segment(_EIGHTHS[eighths], Style(color=left, bgcolor=right))


def under(covers: Sequence[Cover], window: Window, width: int, plain: bool) -> Iterator[Segment]:
    """Under a warpgroup's softmax the number of the warpgroup whose GEMM the tensor cores execute, or that they idle."""
    cells = [dict[int, float]() for _ in range(width)]
    scale = width / (window.end - window.start)
    for cover in covers:
        left, right = (cover.start - window.start) * scale, (cover.end - window.start) * scale
        for cell in range(int(left), min(width, int(right) + 1)):
            cells[cell][cover.by] = cells[cell].get(cover.by, 0.0) + min(right, cell + 1) - max(left, cell)
    for shares in cells:
        by = max(shares, key=lambda each: shares[each]) if shares and sum(shares.values()) >= 0.25 else None
        if by is None:
            yield Segment(" ")
            continue
        fill = cover_colour(by, covers[0].group)
        text = EXPOSURE if by == EXPOSED else str(by % 10)
        yield Segment(text, None if plain else Style(color=ink(fill), bgcolor=fill))


def axis(window: Window, gutter: int, width: int, share: str) -> Iterator[Segment]:
    """Tick marks and, under them, cycles from the start of the recording; over the shares at the right what they are of."""
    marks, numbers = [" "] * width, [" "] * (width + 12)
    free = 0
    for tick in ticks(window.start, window.end, width // 10):
        at = round((tick - window.start) * width / (window.end - window.start))
        if at < width:
            marks[at] = "┴"
            text = f"{tick:,}"
            if at >= free and at + len(text) <= width:
                numbers[at : at + len(text)] = text
                free = at + len(text) + 1
    yield Segment(" " * gutter + "".join("─" if mark == " " else mark for mark in marks), Style(dim=True))
    yield Segment(f"{share:>{_SHARE}}", Style(dim=True))
    yield Segment.line()
    yield Segment(f"{'cycles':<{gutter}}" + "".join(numbers)[:width].rstrip(), Style(dim=True))
    yield Segment.line()
