"""Where output goes: results on stdout, notes and progress on stderr, files whole or not at all."""

from __future__ import annotations

import ctypes
import gzip
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..simulator.errors import UsageError
from ..simulator.values import printable
from ..traces.files import check_place, write_all

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[int, int, str], None]
"""Progress of long work: how many are done, of how many, and what the next one is."""
_LEAST_COLUMNS = 20


def emit_json(value: object) -> None:
    """Print `value` as JSON, alone on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def emit_text(text: str) -> None:
    """Print plain text on stdout."""
    sys.stdout.write(_lines(text) + "\n")


def _lines(text: str) -> str:
    """Text with its line ends, and everything else that is not visible as its escape."""
    return "\n".join(map(printable, text.split("\n")))


def stdout(width: int | None = None) -> Console:
    """The terminal that results are drawn on; NO_COLOR and pipes are rich's own business."""
    from .terminal import Terminal

    found = Terminal(width=width, highlight=False)
    found.width = max(found.width, _LEAST_COLUMNS)  # COLUMNS=0 would show nothing
    return found


def note(text: str) -> None:
    """Print one remark on stderr, so that stdout holds results only."""
    sys.stderr.write(_lines(text) + "\n")


@contextmanager
def stdout_is_ours() -> Iterator[None]:
    """What others print meanwhile, the user's kernel in Python or C, goes to stderr: stdout holds results only."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with suppress(OSError):  # where stderr is closed
            os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).fflush(None)  # what C still holds
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def progress(title: str, estimate: bool = False) -> Iterator[Advance]:
    """A rich progress bar on stderr, drawn only where stderr is a terminal; yields the function that moves it.

    With `estimate` it also says how long the rest will take.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    columns += (TextColumn("left"), TimeRemainingColumn()) if estimate else ()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def advance(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=printable(f"{title} {what}".rstrip()))

        yield advance


def write_file(path: Path, text: str) -> None:
    """Write `text` to a temporary file beside `path` and move it into place, so that no half-written file is ever left.

    Raises UsageError, one sentence, where the folder or the file cannot be written.
    """
    write_files({path: text})


def write_files(files: Mapping[Path, str]) -> None:
    """The same for several, all or none; one whose name ends in .gz or .svgz is compressed, alike every time.

    Raises UsageError, one sentence, where one cannot be written.
    """
    packed = {path: path.name.endswith((".gz", ".svgz")) for path in files}
    write_all({path: gzip.compress(text.encode(), mtime=0) if packed[path] else text.encode() for path, text in files.items()})


def check_file(path: Path) -> None:
    """Raises UsageError, one sentence, where it is plain before the work that no file can be written to `path`."""
    check_place(path)


def make_folder(path: Path) -> None:
    """Create a folder where there is none. Raises UsageError, one sentence, where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot create folder {path}: {error.strerror or error}") from error
