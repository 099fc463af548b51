"""Parts of a lesson as rich renderables; what they hold is decided in traces/lessons."""

from __future__ import annotations

import re
from collections.abc import Callable
from textwrap import wrap

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ...traces.beside import beside
from ...traces.lessons import LESSONS, parts
from ...traces.window import by_iterations
from ..beside import Beside
from ..breakdown import shares_of_several
from ..loglog import LogLog
from ..side_by_side import SideBySide, letter
from ..standing import runs as standing_runs
from ..tables import house_table
from ..timeline import Timeline
from ..walk import Frame, evenly
from .numbers import written

READABLE = 88
"""Columns of a paragraph; longer lines are hard to follow."""
_CODE = re.compile(r"`([^`]+)`")
_LEVEL, _WIDEN = 40, 4


def part(shown: parts.Part) -> RenderableType:
    """Whatever a section holds."""
    return _DRAWN[type(shown)](shown)


def heading(lesson: parts.Lesson, section: parts.Section, number: int) -> RenderableType:
    """Which lesson, and which of its pages."""
    place = f"lesson {lesson.number}, {lesson.title} · page {number} of {len(lesson.sections)} · {lesson.device}"
    return Group(Text(place, "dim"), Text(section.title, "bold underline"))


def paragraph(said: parts.Say) -> Paragraph:
    """A text with its numbers, code in another colour where there are colours."""
    return Paragraph(words(said))


def words(said: parts.Say) -> Text:
    """The same, not wrapped."""
    text = said.template.format_map({name: written(cell) for name, cell in said.numbers.items()})
    out = Text()
    for index, piece in enumerate(_CODE.split(text)):
        out.append(piece, "bold cyan" if index % 2 else "")
    return out


class Paragraph:
    """Text wrapped at a width that is read easily."""

    def __init__(self, text: Text, indent: int = 0) -> None:
        self.text, self.indent = text, indent

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = Padding(self.text, (0, 0, 0, self.indent)) if self.indent else self.text
        yield from console.render(shown, options.update(width=min(READABLE, options.max_width)))


def reading(found: parts.Reading) -> RenderableType:
    """What to read next."""
    lines: list[RenderableType] = [Text("Read on", "bold underline")]
    lines += [Paragraph(Text.assemble((path, "bold"), f"  {what}"), 2) for path, what in found.code]
    lines += [Paragraph(Text(paper), 2) for paper in found.papers]
    return Group(*lines)


def onward(lesson: parts.Lesson, answering: bool = False) -> RenderableType:
    """How to answer, where that is to be said, and what comes after."""
    lines = [f"Answer with: fasim learn {lesson.number} --answer 1=.. --answer 2=.."] if answering else []
    following = next((entry for entry in LESSONS if entry.number == lesson.number + 1), None)
    lines.append(f"Next: fasim learn {following.number}, {following.title}" if following else "That was the last lesson.")
    return Text("\n".join(lines), "dim")


def _facts(shown: parts.Facts) -> RenderableType:
    table = house_table(*shown.columns)
    for name, *cells in shown.rows:
        first = Text(name, "bold") if isinstance(name, str) else written(name)
        table.add_row(first, *(Text(written(cell)) for cell in cells))
    return Group(table, *([paragraph(shown.note)] if shown.note else []))


class _Bars:
    def __init__(self, shown: parts.Bars) -> None:
        self.shown = shown

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.shown.title + (" (logarithmic)" if self.shown.logarithmic else ""), "dim")
        names = max(len(name) for name, _ in self.shown.bars)
        numbers = max(len(written(number)) for _, number in self.shown.bars)
        room = max(8, min(READABLE, options.max_width) - names - numbers - 4)
        for (name, number), length in zip(self.shown.bars, _lengths(self.shown, room), strict=True):
            bar = "█" * length + " " * (room - length)
            yield Text.assemble(f"{name:<{names}}  ", (bar, "green"), f"  {written(number):>{numbers}}")


def _lengths(shown: parts.Bars, room: int) -> list[int]:
    """Cells of each bar, one at least for what is not nothing."""
    from math import log

    values = [number.value for _, number in shown.bars]
    if shown.logarithmic:
        least = min(values) / 2
        values = [log(value / least) for value in values]
    most = max(values)
    return [max(int(value > 0), round(value / most * room)) if most else 0 for value in values]


class _Hierarchy:
    def __init__(self, shown: parts.Hierarchy) -> None:
        self.levels = shown.levels

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widest = min(options.max_width, _LEVEL + 2 * _WIDEN * len(self.levels))
        for index, level in enumerate(self.levels):
            inner = widest - 2 - 2 * _WIDEN * (len(self.levels) - 1 - index)
            edge = " " * ((widest - 2 - inner) // 2)
            lines = [f"{level.name} ({level.where})", written(level.size) + " in all"]
            speed = [written(level.rate)] if level.rate else []
            speed += [f"first byte after {written(level.latency)}"] if level.latency else []
            lines += [", ".join(speed)] if speed else []
            yield Text(f"{edge}┌{'─' * inner}┐")
            for number, line in enumerate(lines):
                yield Text.assemble(f"{edge}│", (line[:inner].center(inner), "bold" if not number else ""), "│")
        yield Text(f"└{'─' * (widest - 2)}┘")


def timeline(shown: parts.Timeline, first: int | None = None, last: int | None = None) -> RenderableType:
    """The loop steps of a timeline, by default its own, with its caption."""
    window = by_iterations(shown.run, shown.first if first is None else first, shown.last if last is None else last)
    return Group(Text(window.title, "dim"), Timeline(window), paragraph(shown.caption))


def _beside(shown: parts.Beside) -> RenderableType:
    return Group(Beside(beside(shown.runs, shown.first, shown.last)), paragraph(shown.caption))


def frame(walk: parts.Walk, number: int) -> RenderableType:
    """One moment of a walk, spaced so that a cell is about as wide as it is high."""
    shown = walk.frames[number]
    lines = [Text(f"{walk.title}, {number + 1} of {len(walk.frames)}: rows are {walk.rows}, columns {walk.columns}", "dim")]
    for row in shown.cells:
        line = Text("  ")
        for cell in row:
            line.append(cell * 2 + " ", _CELLS.get(cell, ""))
        lines.append(line)
    return Group(*lines, paragraph(shown.caption))


_CELLS = {"#": "bold green", "+": "cyan", "x": "dim", ".": "dim"}


def _walk(shown: parts.Walk) -> RenderableType:
    """The first moments and the last, with the legend: a reader in a terminal steps through all of them."""
    wanted = sorted({0, 1, 2, len(shown.frames) - 1} & set(range(len(shown.frames))))
    return Group(legend(shown), *(frame(shown, number) for number in wanted))


def _played(shown: parts.TileWalk) -> RenderableType:
    """An early step of each and its last, where no one steps."""
    frames = [Frame(walk, number) for walk in shown.usual for number in evenly(len(walk.steps), 4)[1:4:2]]
    spaced = [each for frame in frames for each in ("", frame)]
    return Group(paragraph(shown.caption), *spaced)


def legend(walk: parts.Walk) -> RenderableType:
    """What each letter of a walk's cells means."""
    return Paragraph(Text("   ").join(Text.assemble((sign * 2, _CELLS.get(sign, "")), f" {what}") for sign, what in walk.legend))


def _roofs(shown: parts.Roofs) -> RenderableType:
    marks = shown.standing.marks
    named = Text("   ").join(Text.assemble((letter(index), "bold"), f" {mark.schedule}") for index, mark in enumerate(marks))
    return Group(LogLog(shown.standing), Paragraph(named), "", standing_runs(marks), paragraph(shown.caption))


def _shares(shown: parts.Shares) -> RenderableType:
    named = Text("   ").join(Text.assemble((letter(index), "bold"), f" {run.schedule}") for index, run in enumerate(shown.runs))
    return Group(Paragraph(named), SideBySide(shares_of_several(shown.runs)))


def _listing(shown: parts.Listing) -> RenderableType:
    return Group(Text(shown.source, "dim"), _Source(shown.text.strip("\n").split("\n")))


class _Source:
    """Lines of source text; one that is too long goes on below, further in."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines:
            edge = " " * (2 + len(line) - len(line.lstrip()))
            wrapped = wrap(line.strip(), max(20, options.max_width), initial_indent=edge, subsequent_indent=edge + "    ",
                           break_long_words=False, break_on_hyphens=False)  # fmt: skip
            for piece in wrapped or [""]:
                yield Text(piece, "cyan", overflow="fold")


def question(shown: parts.Question, number: int) -> RenderableType:
    """A question with its number and the unit of its answer."""
    unit = f" [in {shown.unit}]" if shown.unit else ""
    return Paragraph(Text.assemble((f"Question {number}  ", "bold yellow"), words(shown.ask), (unit, "dim")))


def verdict(shown: parts.Question, right: bool) -> RenderableType:
    """Right, with the explanation; or not, with the hint."""
    if right:
        return Paragraph(Text.assemble(("Right. ", "bold green"), words(shown.why)))
    return Paragraph(Text.assemble(("Not yet. ", "bold yellow"), words(shown.hint)))


def menu(rows: list[tuple[int, str, str, int, int | None]], kept: str) -> RenderableType:
    """The lessons with how many of their questions are answered (of how many, once that is known)."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for column in ("right", "left", "left"):
        table.add_column(justify=column)
    for number, title, about, answered, of in rows:
        done = "" if not of else "done" if answered >= of else f"{answered} of {of}"
        table.add_row(Text(str(number), "bold"), Text.assemble((title, "bold"), "\n", (about, "dim")), Text(done, "green"))
    return Group(table, "", Paragraph(Text(kept, "dim")))


_DRAWN: dict[type, Callable[..., RenderableType]] = {
    parts.Say: paragraph,
    parts.Facts: _facts,
    parts.Bars: _Bars,
    parts.Hierarchy: _Hierarchy,
    parts.Timeline: timeline,
    parts.Beside: _beside,
    parts.Roofs: _roofs,
    parts.Shares: _shares,
    parts.Walk: _walk,
    parts.TileWalk: _played,
    parts.Listing: _listing,
}
