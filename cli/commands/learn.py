"""`fasim learn`: the course, lesson by lesson."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ...simulator.errors import UsageError
from ...simulator.values import shown
from .. import output
from ..options import Json

if TYPE_CHECKING:
    from ...traces.lessons import Entry
    from ...traces.lessons.parts import Lesson

MAX_LINES = 100
"""Answers read from stdin."""


def learn(
    lesson: str | None = None,
    /,
    *,
    listing: Annotated[bool, Parameter(name="--list", negative=(), show_default=False)] = False,
    answer: Annotated[tuple[str, ...], Parameter(name="--answer", negative=(), show_default=False, allow_leading_hyphen=True)] = (),
    device: str | None = None,
    html: Path | None = None,
    json: Json = False,
) -> int:
    """Learn why attention is slow, and what FlashAttention-1, -2 and -3 do about it.

    A course for who knows Python and matrix products, and nothing of GPUs. Every figure in it is computed by the model as
    you read, or was recorded on hardware. In a terminal, read page by page: keys step through timelines, questions ask
    for a number to work out. Elsewhere a lesson is printed whole, and answered with --answer.

    Progress is kept in `~/.local/state/fasim/learn.json`, or in the folder FASIM_STATE_DIR.

    Example: fasim learn 1

    Theory: a kernel is slow where it waits. Each lesson names one thing to wait for, and the idea that removes it.

    Parameters
    ----------
    lesson
        A lesson's number or name; without it the menu.
    listing
        Print the menu and ask nothing.
    answer
        NUMBER=VALUE answers a question of the lesson: 2=8.6, or what to compute, "2=4*16*4096**2"; repeat it. `-` reads
        such lines from stdin. Exit status 1 where one is wrong.
    device
        Name of a device (see `fasim devices`) or path of your own TOML file. [default: h200, which the recordings are of]
    html
        Write the whole course as pages for a browser into this folder, which is made if need be; open its index.html.
    """
    from ...traces.lessons import LESSONS, find_lesson

    if html is not None:
        if lesson is not None or answer or listing or json:
            raise UsageError("--html writes the whole course: leave out the lesson, --answer, --list and --json")
        return _write_site(html, device)
    if lesson is None:
        if answer:
            raise UsageError("--answer needs to know of which lesson: fasim learn 1 --answer 1=8.6")
        if json:
            output.emit_json(_listed(LESSONS))
        elif listing or not _is_terminal():
            _print_menu(LESSONS)
        else:
            _choose(LESSONS, device)
        return 0
    entry = find_lesson(lesson)
    if listing:
        raise UsageError("--list shows all lessons: give it without a lesson")
    built = _build(entry, device)
    if answer:
        return _answered(built, list(_answers(answer)), json)
    if json:
        output.emit_json(built.to_dict())
    elif _is_terminal():
        _session().read(built)
    else:
        from ..learn.session import run_through

        run_through(output.stdout(), built)
    return 0


def _build(entry: Entry, device: str | None) -> Lesson:
    from ...simulator.compiling import COMPILES, heard
    from ...simulator.devices.device import load_device
    from ...traces.lessons import DEVICE, Course

    gpu = load_device(DEVICE if device is None else device)
    with output.progress("computing") as advance, heard(lambda: advance(0, 1, COMPILES)):
        return entry.build(Course(gpu, advance))


def _write_site(folder: Path, device: str | None) -> int:
    """Every page, or none."""
    from ...simulator.devices.device import load_device
    from ...traces.lessons import DEVICE, Course
    from ..site.build import site

    gpu = load_device(DEVICE if device is None else device)
    output.make_folder(folder)
    with output.progress("computing") as advance:
        files = site(Course(gpu, advance))
    output.write_files({folder / name: text for name, text in files.items()})
    size = sum(len(text.encode()) for text in files.values())
    output.note(f"wrote {len(files)} files, {size / 1e6:.1f} MB: open {folder / 'index.html'}")
    return 0


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def _session():
    from ..keys import TerminalKeys
    from ..learn.session import Session

    return Session(output.stdout(), TerminalKeys())


def _listed(lessons: Iterable[Entry]) -> list[dict]:
    from ...traces.lessons import progress

    kept = progress.load()
    return [
        {"number": each.number, "name": each.name, "title": each.title, "about": each.about, "answered": kept.done(each.name)}
        for each in lessons
    ]


def _print_menu(lessons: Iterable[Entry]) -> None:
    from ...traces.lessons import progress
    from ..learn import render

    kept, place = progress.load(), progress.state_file()
    where = f"progress is kept in {place}" if place else "there is no home folder, so progress is not kept"
    rows = [(each.number, each.title, each.about, kept.done(each.name), kept.questions.get(each.name)) for each in lessons]
    output.stdout().print(render.menu(rows, f"fasim learn 1 starts the first; {where}"))


def _choose(lessons: Iterable[Entry], device: str | None) -> None:
    """The menu, a lesson, the menu again, until the reader leaves."""
    from ...traces.lessons import find_lesson

    session = _session()
    while True:
        _print_menu(lessons)
        session.console.print("\nlesson (number, or q to stop): ", end="")
        line = session.keys.line()
        if line is None or line.strip().lower() in ("q", ""):
            return
        try:
            entry = find_lesson(line)
        except UsageError as error:
            output.note(f"{error}\n")
            continue
        session.used = 0
        session.read(_build(entry, device))


# -- answers --------------------------------------------------------------------------------------------------------------


def _answers(given: Iterable[str]) -> Iterable[tuple[int, str]]:
    """Number of the question and answer, of each NUMBER=VALUE and of the lines of stdin that "-" stands for."""
    for text in given:
        lines = [line.rstrip("\n") for _, line in zip(range(MAX_LINES), sys.stdin, strict=False)] if text == "-" else [text]
        for line in lines:
            if not line.strip():
                continue
            number, equals, value = line.partition("=")
            if not equals or not number.strip().isdecimal() or len(number.strip()) > 4:
                raise UsageError(f"--answer {shown(line)} is not of the form NUMBER=VALUE, such as 2=8.6")
            yield int(number), value


def _answered(lesson: Lesson, given: list[tuple[int, str]], json: bool) -> int:
    """Judge answers, keep those that are right; 1 where one is not."""
    from ...traces.lessons import answers, progress

    questions, found = lesson.questions, []
    for number, text in given:
        if not 1 <= number <= len(questions):
            raise UsageError(f"lesson {lesson.number} has questions 1 to {len(questions)}, not {number}")
        found.append((number, questions[number - 1], answers.check(questions[number - 1], text)))
    for number, _, verdict in found:
        if verdict.right:
            progress.keep(lesson.name, number, len(questions))
    if json:
        output.emit_json([{"question": number, "given": each.given, "right": each.right} for number, _, each in found])
    else:
        from ..learn import render

        console = output.stdout()
        for number, question, verdict in found:
            console.print(f"Question {number}:", style="bold")
            console.print(render.verdict(question, verdict.right))
    return 0 if found and all(verdict.right for _, _, verdict in found) else 1
