"""A lesson as a page: each part as HTML, and the data of those that scripts draw."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape
from math import log

from ...traces.beside import whole_blocks
from ...traces.lessons import parts
from ...traces.window import by_iterations
from ..breakdown import parts_of
from ..learn.numbers import written
from ..side_by_side import letter
from . import drawn
from .page import table
from .roofs import roofs

_CODE = re.compile(r"`([^`]+)`")


class LessonPage:
    """Collects a lesson's HTML and data."""

    def __init__(self, lesson: parts.Lesson) -> None:
        self.lesson = lesson
        self.data: dict = {"timelines": {}, "walks": {}, "frames": {}, "questions": {}, "lesson": lesson.name}
        self.asked = 0
        self.drawn: dict[type, Callable[..., str]] = {
            parts.Say: paragraph, parts.Facts: facts, parts.Bars: bars, parts.Hierarchy: hierarchy, parts.Roofs: _roofs,
            parts.Shares: shares, parts.Listing: listing, parts.Question: self.question, parts.Timeline: self.timeline,
            parts.Walk: self.frames, parts.TileWalk: self.walk, parts.Beside: self.beside,
        }  # fmt: skip

    def body(self) -> str:
        """All sections."""
        out = [f"<p class='muted'>lesson {self.lesson.number} · {escape(self.lesson.device)}</p>"]
        out += [f"<h1>{escape(self.lesson.title)}</h1>", f"<p class='about'>{escape(self.lesson.about)}</p>"]
        for section in self.lesson.sections:
            out.append(f"<section><h2>{escape(section.title)}</h2>")
            out += [self.drawn[type(part)](part) for part in section.parts]
            out.append("</section>")
        return "\n".join([*out, reading(self.lesson.reading)])

    def _place(self, kind: str, data: dict, css: str, instead: str) -> str:
        key = f"{kind[0]}{len(self.data[kind]) + 1}"
        self.data[kind][key] = data
        missing = f"<noscript>This needs JavaScript; <code>{instead}</code> shows it too.</noscript>"
        return f'<div class="{css}" data-key="{key}">{missing}</div>'

    def timeline(self, shown: parts.Timeline) -> str:
        """A timeline of one run, or of several, to zoom and scrub."""
        data = drawn.timeline(shown.run, by_iterations(shown.run, shown.first, shown.last))
        place = self._place("timelines", data, "timeline", "fasim timeline")
        title = escape(data["panels"][0]["title"])
        return f"<figure><figcaption>{title}</figcaption>{place}{paragraph(shown.caption)}</figure>"

    def beside(self, shown: parts.Beside) -> str:
        """Timelines of several runs on one axis, to zoom and scrub together."""
        place = self._place("timelines", drawn.timelines(whole_blocks(shown.runs)), "timeline", "fasim timeline")
        return f"<figure>{place}{paragraph(shown.caption)}</figure>"

    def frames(self, shown: parts.Walk) -> str:
        """A few moments of a small matrix."""
        moments = [{"cells": list(frame.cells), "caption": _plain(frame.caption)} for frame in shown.frames]
        place = self._place("frames", {"frames": moments}, "frames", "fasim learn")
        key = "".join(f'<span><i class="cells-key" data-sign="{sign}"></i>{escape(what)}</span>' for sign, what in shown.legend)
        title = f"{escape(shown.title)}: rows are {escape(shown.rows)}, columns {escape(shown.columns)}"
        return f'<figure><figcaption>{title}</figcaption><div class="legend cells">{key}</div>{place}</figure>'

    def walk(self, shown: parts.TileWalk) -> str:
        """Walks with their bytes, to play."""
        place = self._place("walks", drawn.walks(shown.walks, shown.usual), "walk", "fasim walk")
        return f"<figure>{paragraph(shown.caption)}{place}</figure>"

    def question(self, shown: parts.Question) -> str:
        """A question, checked in the page."""
        self.asked += 1
        unit = shown.unit if shown.unit not in ("B", "s") else ""
        self.data["questions"][str(self.asked)] = {
            "answer": shown.answer,
            "tolerance": shown.tolerance,
            "unit": shown.unit,
            "shown": written(parts.Number(shown.answer, unit)),
            "hint": _plain(shown.hint),
            "why": _plain(shown.why),
        }
        wanted = f" <span class='muted'>in {escape(shown.unit)}</span>" if shown.unit else ""
        return (
            f'<form class="question" data-key="{self.asked}"><p><strong>Question {self.asked}.</strong> {words(shown.ask)}</p>'
            f'<div class="controls"><input type="text" autocomplete="off" aria-label="answer to question {self.asked}">'
            f'{wanted}<button>check</button><button type="button" class="hint">hint</button>'
            f'<button type="button" class="show">show</button></div><p class="verdict" aria-live="polite"></p></form>'
        )


def words(said: parts.Say) -> str:
    """A text with its numbers as HTML."""
    text = said.template.format_map({name: written(cell) for name, cell in said.numbers.items()})
    return "".join(f"<code>{escape(piece)}</code>" if n % 2 else escape(piece) for n, piece in enumerate(_CODE.split(text)))


def _plain(said: parts.Say) -> str:
    """The same without markup."""
    return said.template.format_map({name: written(cell) for name, cell in said.numbers.items()}).replace("`", "")


def paragraph(said: parts.Say) -> str:
    """A paragraph."""
    return f"<p>{words(said)}</p>"


def facts(shown: parts.Facts) -> str:
    """A table."""
    rows = [[escape(written(cell)) for cell in row] for row in shown.rows]
    return table(shown.columns, rows) + (paragraph(shown.note) if shown.note else "")


def bars(shown: parts.Bars) -> str:
    """Bars on one scale."""
    values = [number.value for _, number in shown.bars]
    if shown.logarithmic:
        least = min(values) / 2
        values = [log(value / least) for value in values]
    most = max(values) or 1
    lines = [
        f'<span>{escape(name)}</span><span><div class="bar" style="width:{100 * value / most:.2f}%"></div></span>'
        f'<span class="value">{escape(written(number))}</span>'
        for (name, number), value in zip(shown.bars, values, strict=True)
    ]
    title = escape(shown.title + (" (logarithmic)" if shown.logarithmic else ""))
    return f'<figure><figcaption>{title}</figcaption><div class="bars">{"".join(lines)}</div></figure>'


def hierarchy(shown: parts.Hierarchy) -> str:
    """The levels of memory, one below the other, wider and wider."""
    lines = []
    for index, level in enumerate(shown.levels):
        speed = [written(level.rate)] if level.rate else []
        speed += [f"first byte after {written(level.latency)}"] if level.latency else []
        width = 40 + 60 * (index + 1) / len(shown.levels)
        said = "".join(f"<span>{escape(text)}</span>" for text in (f"{written(level.size)} in all", ", ".join(speed)) if text)
        lines.append(f'<div style="width:{width:.0f}%"><strong>{escape(level.name)}</strong> ({escape(level.where)}){said}</div>')
    return f'<div class="hierarchy">{"".join(lines)}</div>'


_FILLS = (
    "#2f9e6e", "#8a8f98", "#b0a030", "#c98a2b", "#d9622b", "#1f6395", "#6a47a3", "#b58900", "#953a67",
    "#77808c", "#444b55", "#999999",
)  # fmt: skip
"""Of the parts of a breakdown, in their order."""


def shares(shown: parts.Shares) -> str:
    """Where the tensor cores' time goes, run by run: a bar cut in parts, and the numbers."""
    found, stacks = parts_of(shown.runs), []
    for number, run in enumerate(shown.runs):
        cuts = "".join(
            f'<i style="width:{100 * values[number]:.3f}%;background:{_FILLS[n]}" title="{escape(name)} {values[number]:.1%}"></i>'
            for n, (name, values) in found.items()
        )
        stacks.append(f'<div><strong>{letter(number)}</strong> {escape(run.schedule)}</div><div class="stack">{cuts}</div>')
    legend = "".join(f'<span><i style="background:{_FILLS[n]}"></i>{escape(name)}</span>' for n, (name, _) in found.items())
    rows = [[escape(name), *(f"{100 * value:.1f} %" if value else "-" for value in values)] for name, values in found.values()]
    columns = ["tensor cores' time", *(f">{letter(number)}" for number in range(len(shown.runs)))]
    return f'<figure>{"".join(stacks)}<div class="legend">{legend}</div>{table(columns, rows)}</figure>'


def _roofs(shown: parts.Roofs) -> str:
    return f"<figure>{roofs(shown.standing)}{paragraph(shown.caption)}</figure>"


def listing(shown: parts.Listing) -> str:
    """Source text."""
    return f"<figure><figcaption>{escape(shown.source)}</figcaption><pre><code>{escape(shown.text.strip())}</code></pre></figure>"


def reading(found: parts.Reading) -> str:
    """What to read next."""
    code = "".join(f"<li><code>{escape(path)}</code> {escape(what)}</li>" for path, what in found.code)
    papers = "".join(f"<li>{escape(paper)}</li>" for paper in found.papers)
    return f"<section><h2>Read on</h2><ul>{code}{papers}</ul></section>"
