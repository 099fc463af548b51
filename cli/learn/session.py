"""A lesson read in a terminal: page by page, timelines stepped by keys, questions answered on the spot."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.segment import Segment, Segments
from rich.text import Text

from ...simulator.errors import UsageError
from ...simulator.values import printable
from ...traces.lessons import answers, parts, progress
from ...traces.window import held
from ..keys import BACK, ENTER, NEXT, QUIT, Keys
from ..walk import Frame
from . import render


class Quit(Exception):
    """The reader wants no more."""


class Session:
    """One reader at one terminal."""

    def __init__(self, console: Console, keys: Keys) -> None:
        self.console, self.keys = console, keys
        self.used = 0  # lines since the last pause

    def read(self, lesson: parts.Lesson) -> bool:
        """All pages of a lesson; False where the reader left before the end."""
        page, asked = 0, [0]
        for section in lesson.sections:
            asked.append(asked[-1] + sum(isinstance(part, parts.Question) for part in section.parts))
        try:
            while page < len(lesson.sections):
                self._page(lesson, page, asked[page])
                onward = "the next page" if page + 1 < len(lesson.sections) else "what to read next"
                key = self._pause(f"Enter for {onward}, b for the page before, q to stop")
                page = max(0, page - 1) if key in ("b", BACK) else page + 1
        except Quit:
            return False
        self.show(render.reading(lesson.reading))
        self.console.print(render.onward(lesson))
        return True

    def show(self, part: RenderableType) -> None:
        """Print one part; before it would push what is unread off the screen, wait for a key: between parts, and within one that
        is higher than the screen."""
        lines = self.console.render_lines(part, pad=False)
        room = max(3, self.console.height - 2)
        if self.used and self.used + len(lines) > room:
            self._pause("Enter for more")
        for first in range(0, len(lines), room):
            if first:
                self._pause("Enter for more")
            shown = lines[first : first + room]
            self.console.print(Segments([each for line in shown for each in (*line, Segment.line())]), end="")
            self.used += len(shown)
        if self.used < room:
            self.console.print()
            self.used += 1

    def _page(self, lesson: parts.Lesson, page: int, asked: int) -> None:
        section = lesson.sections[page]
        self.show(render.heading(lesson, section, page + 1))
        for part in section.parts:
            if isinstance(part, parts.Question):
                asked += 1
                self._ask(lesson, part, asked)
            elif isinstance(part, parts.Timeline):
                self._step_timeline(part)
            elif isinstance(part, parts.Walk):
                self._step_walk(part)
            elif isinstance(part, parts.TileWalk):
                self._step_tiles(part)
            else:
                self.show(render.part(part))

    def _ask(self, lesson: parts.Lesson, question: parts.Question, number: int) -> None:
        self.show(render.question(question, number))
        while True:
            self.console.print(Text("answer (? hint, ! show it, Enter to go on): ", "bold"), end="")
            line = self.keys.line()
            self.used += 3
            if line is None or line.strip().lower() == "q":
                raise Quit
            given = line.strip()
            if not given:
                break
            if given in ("?", "!"):
                self._tell(question, given)
                if given == "!":
                    break
                continue
            try:
                found = answers.check(question, given)
            except UsageError as error:
                self.console.print(Text(printable(str(error)), "yellow"))
                continue
            self.console.print(render.verdict(question, found.right))
            if found.right:
                progress.keep(lesson.name, number, len(lesson.questions))
                break
        self.console.print()
        self.used += 2

    def _tell(self, question: parts.Question, what: str) -> None:
        if what == "?":
            self.console.print(render.paragraph(question.hint))
            return
        shown = render.written(parts.Number(question.answer, question.unit if question.unit not in ("B", "s") else ""))
        self.console.print(Text(f"It is {shown}.", "bold"))
        self.console.print(render.paragraph(question.why))

    def _step_timeline(self, part: parts.Timeline) -> None:
        there, width = held(part.run), part.last - part.first
        first = part.first
        while True:
            self.show(render.timeline(part, first, first + width))
            if len(there) <= width + 1:
                return
            key = self._pause("n and p step through the loop, Enter goes on")
            if key not in (NEXT, BACK):
                return
            first = min(max(there[0], first + (1 if key == NEXT else -1)), there[-1] - width)

    def _step_walk(self, part: parts.Walk) -> None:
        number = 0
        self.show(render.legend(part))
        while True:
            self.show(render.frame(part, number))
            if len(part.frames) == 1:
                return
            key = self._pause(f"n and p step through the {len(part.frames)} moments, Enter goes on")
            if key not in (NEXT, BACK):
                return
            number = min(max(0, number + (1 if key == NEXT else -1)), len(part.frames) - 1)

    def _step_tiles(self, part: parts.TileWalk) -> None:
        self.show(render.paragraph(part.caption))
        for played in part.usual:
            number, last = 0, len(played.steps) - 1
            while True:
                self.show(Frame(played, number, self.console.height - 4))
                key = self._pause("n and p step through the tiles, l shows the last, Enter goes on", "l")
                if key not in (NEXT, BACK, "l"):
                    break
                number = last if key == "l" else min(max(0, number + (1 if key == NEXT else -1)), last)

    def _pause(self, text: str, more: str = "") -> str:
        """Wait for a key; what is on the screen then counts as read."""
        self.console.print(Text(f"[{text}]", "dim"))
        self.used = 0
        while True:
            key = self.keys.key()
            if key == QUIT:
                raise Quit
            if key in (ENTER, NEXT, BACK, "b", " ", *more):
                return NEXT if key == " " and "step" in text else key


def run_through(console: Console, lesson: parts.Lesson) -> None:
    """The whole lesson at once, where nobody presses keys; questions with how to answer them."""
    number = 0
    for page, section in enumerate(lesson.sections, start=1):
        console.print(render.heading(lesson, section, page))
        console.print()
        for part in section.parts:
            if isinstance(part, parts.Question):
                number += 1
                console.print(render.question(part, number))
            else:
                console.print(render.part(part))
            console.print()
    console.print(render.reading(lesson.reading))
    console.print()
    console.print(render.onward(lesson, answering=True))
