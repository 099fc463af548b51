"""What a lesson is made of: texts, tables, pictures and questions as data, which a terminal or a page can show alike.

No number stands in a text. A text has named places, and each place is filled with a `Number`, a value with its unit, which
came from a prediction, a closed form or a recording; whoever renders the lesson decides how a number is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...simulator.results.run import Run
from ..beside import beside
from ..standing import Standing
from ..walk import Walk as Played


@dataclass(frozen=True)
class Number:
    """A value with its unit. "B", "s", "Hz", "W", "FLOP", "B/s" and "FLOP/s" take SI prefixes; "%" is a fraction shown in
    percent, "x" a ratio, "cycles" and "" are counts, "exact" is shown with all its digits."""

    value: float
    unit: str = ""

    def to_dict(self) -> dict:
        """As plain JSON values; null for what is not finite, as fp16 beyond its range."""
        finite = abs(self.value) < float("inf")
        return {"value": self.value if finite else None, "unit": self.unit, **({} if finite else {"text": str(self.value)})}


Cell = str | Number
"""Of a table."""


@dataclass(frozen=True)
class Say:
    """A paragraph: a text with named places in braces, and what fills them. `code` stands between backticks."""

    template: str
    numbers: Mapping[str, Cell] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """As plain JSON values."""
        return {"kind": "say", "template": self.template, "numbers": {name: plain(cell) for name, cell in self.numbers.items()}}


def say(template: str, **numbers: Cell) -> Say:
    """A paragraph, its line breaks taken out; its places are filled with `numbers`."""
    return Say(" ".join(template.split()), numbers)


@dataclass(frozen=True)
class Facts:
    """A table; a column whose name starts with ">" is aligned right. `note` stands below it."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: Say | None = None

    def to_dict(self) -> dict:
        """As plain JSON values."""
        rows = [[plain(cell) for cell in row] for row in self.rows]
        columns = [column.removeprefix(">") for column in self.columns]
        return {"kind": "table", "columns": columns, "rows": rows, "note": self.note and self.note.to_dict()}


@dataclass(frozen=True)
class Bars:
    """One bar for each name, from zero, all on one scale; `logarithmic` where they lie orders of magnitude apart."""

    title: str
    bars: tuple[tuple[str, Number], ...]
    logarithmic: bool = False

    def to_dict(self) -> dict:
        """As plain JSON values."""
        bars = [{"name": name, **number.to_dict()} for name, number in self.bars]
        return {"kind": "bars", "title": self.title, "logarithmic": self.logarithmic, "bars": bars}


@dataclass(frozen=True)
class Level:
    """One level of the memory hierarchy: how much it holds, how fast it answers and how soon; None where no field says."""

    name: str
    where: str
    size: Number
    rate: Number | None
    latency: Number | None


@dataclass(frozen=True)
class Hierarchy:
    """The levels of memory, the smallest first, drawn as layers that widen downwards."""

    levels: tuple[Level, ...]

    def to_dict(self) -> dict:
        """As plain JSON values."""
        parts = ("size", "rate", "latency")
        levels = [
            {"name": level.name, "where": level.where, **{p: plain(found) if (found := getattr(level, p)) else None for p in parts}}
            for level in self.levels
        ]
        return {"kind": "hierarchy", "levels": levels}


@dataclass(frozen=True)
class Timeline:
    """Loop steps `first` to `last` of a run that keeps its spans; a reader may step on through the others."""

    run: Run
    first: int
    last: int
    caption: Say

    def to_dict(self) -> dict:
        """As plain JSON values: what is drawn, not the spans (`fasim timeline --json` has those)."""
        drawn = {"schedule": self.run.schedule, "workload": self.run.workload.to_dict(), "device": self.run.device}
        return {"kind": "timeline", **drawn, "first": self.first, "last": self.last, "caption": self.caption.to_dict()}


@dataclass(frozen=True)
class Beside:
    """Loop steps `first` to `last` of several runs below each other on one axis, with what each one's softmax hides under."""

    runs: tuple[Run, ...]
    first: int
    last: int
    caption: Say

    def to_dict(self) -> dict:
        """As plain JSON values: the shares, not the spans."""
        panels = [panel.to_dict() for panel in beside(self.runs, self.first, self.last)]
        return {"kind": "beside", "first": self.first, "last": self.last, "panels": panels, "caption": self.caption.to_dict()}


@dataclass(frozen=True)
class Roofs:
    """A roofline plot with runs under it."""

    standing: Standing
    caption: Say

    def to_dict(self) -> dict:
        """As plain JSON values."""
        return {"kind": "roofline", "standing": self.standing.to_dict(), "caption": self.caption.to_dict()}


@dataclass(frozen=True)
class Shares:
    """Where the tensor cores' time goes in each of several runs."""

    runs: tuple[Run, ...]

    def to_dict(self) -> dict:
        """As plain JSON values."""
        parts = {run.schedule: run.breakdown.to_dict() if run.breakdown else None for run in self.runs}
        return {"kind": "shares", "breakdowns": parts}


@dataclass(frozen=True)
class Frame:
    """One moment of a walk: rows of cells, a letter each, and what happens."""

    cells: tuple[str, ...]
    caption: Say


@dataclass(frozen=True)
class Walk:
    """A matrix seen moment after moment, as tile after tile is visited; `legend` says what each letter of the cells means."""

    title: str
    rows: str  # what the rows are
    columns: str
    legend: tuple[tuple[str, str], ...]
    frames: tuple[Frame, ...]

    def to_dict(self) -> dict:
        """As plain JSON values."""
        frames = [{"cells": list(frame.cells), "caption": frame.caption.to_dict()} for frame in self.frames]
        shown = {"title": self.title, "rows": self.rows, "columns": self.columns, "legend": [list(each) for each in self.legend]}
        return {"kind": "walk", **shown, "frames": frames}


@dataclass(frozen=True)
class TileWalk:
    """Schedules' walks over the tiles of S with the bytes that move, to play and to compare; `usual` are shown first."""

    walks: tuple[Played, ...]
    usual: tuple[Played, ...]
    caption: Say

    def to_dict(self) -> dict:
        """As plain JSON values: the sums of each walk (`fasim walk --json` has the steps)."""
        shown = [
            {"schedule": each.schedule, "workload": each.workload.to_dict(), "tile": each.tile.to_dict(), "steps": len(each.steps),
             "total_bytes": each.totals}
            for each in self.walks
        ]  # fmt: skip
        return {"kind": "tile walk", "walks": shown, "caption": self.caption.to_dict()}


@dataclass(frozen=True)
class Listing:
    """Source text as it stands in a file of the package, or a command to try."""

    text: str
    source: str

    def to_dict(self) -> dict:
        """As plain JSON values."""
        return {"kind": "listing", "source": self.source, "text": self.text}


@dataclass(frozen=True)
class Question:
    """A number to work out, in `unit`. An answer is right within `tolerance`, relative; `hint` follows a wrong one, and
    `why` a right one. `answer` is computed, so the same question has another answer on another device."""

    ask: Say
    answer: float
    unit: str
    tolerance: float
    hint: Say
    why: Say

    def to_dict(self) -> dict:
        """As plain JSON values, the answer with them: it is there for whoever shows the lesson."""
        texts = {name: getattr(self, name).to_dict() for name in ("ask", "hint", "why")}
        return {"kind": "question", "answer": self.answer, "unit": self.unit, "tolerance": self.tolerance, **texts}


Part = Say | Facts | Bars | Hierarchy | Timeline | Beside | Roofs | Shares | Walk | TileWalk | Listing | Question


@dataclass(frozen=True)
class Section:
    """A page of a lesson: a heading and what stands under it."""

    title: str
    parts: tuple[Part, ...]

    def to_dict(self) -> dict:
        """As plain JSON values."""
        return {"title": self.title, "parts": [part.to_dict() for part in self.parts]}


@dataclass(frozen=True)
class Reading:
    """What to read next: files of this package with what is in them, and places in the papers."""

    code: tuple[tuple[str, str], ...]
    papers: tuple[str, ...]

    def to_dict(self) -> dict:
        """As plain JSON values."""
        return {"code": [list(each) for each in self.code], "papers": list(self.papers)}


@dataclass(frozen=True)
class Lesson:
    """One lesson, computed for one device."""

    number: int
    name: str
    title: str
    about: str
    device: str
    sections: tuple[Section, ...]
    reading: Reading

    @property
    def questions(self) -> tuple[Question, ...]:
        """All of them, in order; the first is number 1."""
        return tuple(part for section in self.sections for part in section.parts if isinstance(part, Question))

    def to_dict(self) -> dict:
        """As plain JSON values."""
        head = {name: getattr(self, name) for name in ("number", "name", "title", "about", "device")}
        return {**head, "sections": [section.to_dict() for section in self.sections], "reading": self.reading.to_dict()}


def plain(cell: Cell) -> object:
    """A cell as a JSON value."""
    return cell.to_dict() if isinstance(cell, Number) else cell


# -- numbers by their unit ----------------------------------------------------------------------------------------------


def nbytes(value: float) -> Number:
    """Bytes."""
    return Number(value, "B")


def seconds(value: float) -> Number:
    """Seconds."""
    return Number(value, "s")


def count(value: float) -> Number:
    """How many."""
    return Number(value)


def cycles(value: float) -> Number:
    """SM cycles."""
    return Number(value, "cycles")


def share(value: float) -> Number:
    """A fraction, shown in percent."""
    return Number(value, "%")


def times(value: float) -> Number:
    """A ratio."""
    return Number(value, "x")


def exact(value: float) -> Number:
    """A value of a worked example, shown with the digits it has."""
    return Number(float(value), "exact")


def rate(value: float, unit: str) -> Number:
    """Per second: "B" or "FLOP"."""
    return Number(value, f"{unit}/s")
