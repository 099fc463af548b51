"""Window -> rich renderable: one line per warp and unit, colours by iteration, idle gaps blank, waits dim."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style

from ..traces.window import Row, Span, Window
from .palette import WAIT, colour, ink, shades, ticks

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_WAIT = "┄"


class Timeline:
    """Draws a Window across the console's width; without colour, digits and letters name the iteration."""

    def __init__(self, window: Window) -> None:
        self.window = window

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        window = self.window
        plain = console.no_color or console.color_system is None
        gutter = max([len(row.name) for row in window.rows] + [6]) + 1
        width = max(16, options.max_width - gutter)
        kind = None
        for row in window.rows:
            if kind not in (None, row.kind):
                yield Segment.line()
            kind = row.kind
            yield Segment(f"{row.name:<{gutter}}", Style(bold=row.kind == "warp"))
            cells = _plain_cells(row, window, width) if plain else _colour_cells(row, window, width)
            yield from cells
            yield Segment.line()
        yield from _axis(window, gutter, width)
        yield from _legend(window, gutter, plain)


def _cells_of(span: Span, window: Window, width: int) -> tuple[float, float]:
    """First and last position of a span, in cells."""
    scale = width / (window.end - window.start)
    return (span.start - window.start) * scale, (span.end - window.start) * scale


def _shares(row: Row, window: Window, width: int) -> list[list[tuple[float, float, Span]]]:
    """For each cell the parts of spans in it, as (from, to, span) within 0..1."""
    cells: list[list[tuple[float, float, Span]]] = [[] for _ in range(width)]
    for span in row.spans:
        left, right = _cells_of(span, window, width)
        for cell in range(int(left), min(width, int(right) + 1)):
            begin, end = max(left - cell, 0.0), min(right - cell, 1.0)
            if end > begin:
                cells[cell].append((begin, end, span))
    return cells


def _colour_cells(row: Row, window: Window, width: int) -> Iterator[Segment]:
    """Eighth-cell blocks: a cell shows at most two parts, left in the foreground and right in the background."""
    texts = _labels(row, window, width)
    for cell, parts in enumerate(_shares(row, window, width)):
        if cell in texts:
            letter, span = texts[cell]
            yield Segment(letter, Style(color=ink(span.step, span.group), bgcolor=colour(span.step, span.group)))
            continue
        yield _cell(parts)


def _cell(parts: list[tuple[float, float, Span]]) -> Segment:
    work = [part for part in parts if not part[2].wait]
    if not work:
        waits = sum(end - begin for begin, end, _ in parts)
        return Segment(_WAIT, Style(color=WAIT)) if waits >= 0.5 else Segment(" ")
    best = sorted(sorted(work, key=lambda p: p[0] - p[1])[:2])
    begin, end, span = best[0]
    own = colour(span.step, span.group)
    if len(best) == 2:
        other = best[1][2]
        return _split(round((end + best[1][0]) * 4), own, colour(other.step, other.group))
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


def _labels(row: Row, window: Window, width: int) -> dict[int, tuple[str, Span]]:
    """Text inside the spans that are wide enough, by cell."""
    texts: dict[int, tuple[str, Span]] = {}
    for span in row.spans:
        if span.wait:
            continue
        left, right = _cells_of(span, window, width)
        first, last = int(left + 0.999), int(right)
        if last - first >= len(span.short) + 1:
            at = first + (last - first - len(span.short)) // 2
            texts.update({at + i: (letter, span) for i, letter in enumerate(span.short)})
    return texts


def _plain_cells(row: Row, window: Window, width: int) -> Iterator[Segment]:
    """Without colour: the iteration's last digit, a letter for WG1 and above, = or ~ outside the loop, . for waits."""
    for parts in _shares(row, window, width):
        work = [part for part in parts if not part[2].wait]
        if work:
            span = min(work, key=lambda p: (p[0] - p[1], p[0]))[2]
            yield Segment(_letter(span))
        else:
            yield Segment("." if sum(end - begin for begin, end, _ in parts) >= 0.5 else " ")


def _letter(span: Span) -> str:
    if span.step < 0:
        return "=~"[max(0, span.group) % 2]
    digit = span.step % 10
    return str(digit) if span.group <= 0 else chr(ord("aA"[span.group - 1 & 1]) + digit)


def _axis(window: Window, gutter: int, width: int) -> Iterator[Segment]:
    """Tick marks and, under them, cycles from the start of the recording."""
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
    yield Segment.line()
    yield Segment(f"{'cycles':<{gutter}}" + "".join(numbers)[:width].rstrip(), Style(dim=True))
    yield Segment.line()


def _legend(window: Window, gutter: int, plain: bool) -> Iterator[Segment]:
    """Which colour (or character) is which iteration and which warpgroup."""
    yield Segment(" " * gutter)
    if plain:
        if len(window.groups) > 1:
            first, second = window.warpgroups[:2]
            yield Segment(f"0 1 2: K/V block of {first}, a b c: of {second}")
            yield Segment.line()
            yield Segment(" " * gutter)
        yield Segment("= and ~ outside the loop, and whose turn   . waits   blank is idle")
    else:
        for step in window.steps[:6]:
            for group in window.groups or (-1,):
                yield Segment(" ", Style(bgcolor=colour(step, group)))
            yield Segment(f" K/V block {step}  " if step == window.steps[0] else f" {step}  ")
        if len(window.groups) > 1:
            yield Segment(shades(window.warpgroups) + "  ", Style(dim=True))
        yield Segment(f"{_WAIT}{_WAIT} waits, blank is idle", Style(dim=True))
    yield Segment.line()
