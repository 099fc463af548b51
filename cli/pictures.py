"""The files of a timeline: an SVG picture, a Chrome trace and a page for a browser, all or none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from ..simulator.errors import UsageError
from . import output

if TYPE_CHECKING:
    from ..simulator.results.run import Run
    from ..traces.beside import Panel
    from ..traces.window import Window

WIDTHS = range(40, 1001)
"""Columns that a timeline can be drawn in."""
COLUMN, USUAL_COLUMNS = 10, 128
"""Pixels of an SVG per column, and the columns it has unless asked."""


@dataclass(frozen=True)
class Wanted:
    """Which files of a timeline were asked for."""

    svg: Path | None = None
    trace: Path | None = None
    html: Path | None = None

    def __bool__(self) -> bool:
        return bool(self.svg or self.trace or self.html)

    def check(self, width: int | None) -> None:
        """Before anything is computed: raises UsageError where not all files can be written, or the width is not possible."""
        if width is not None and width not in WIDTHS:
            raise UsageError(f"--width {width} is not possible: give {WIDTHS[0]} to {WIDTHS[-1]} columns")
        given = [(name, path) for name, path in vars(self).items() if path]
        for (one, first), (other, second) in combinations(given, 2):
            if _same(first, second):
                raise UsageError(f"--{one} and --{other} are the same file, {first}: give each its own")
        for _, path in given:
            output.check_file(path)


def write(wanted: Wanted, window: Window, run: Run, width: int | None) -> None:
    """Write what was asked for of a window and of all that its run recorded; a name that ends in .gz is compressed."""
    files = {}
    if wanted.svg:
        from .svg import svg as draw

        files[wanted.svg] = draw(window, pixels(width))
    if wanted.trace:
        from ..traces.perfetto import chrome_trace

        files[wanted.trace] = json.dumps(chrome_trace(run), allow_nan=False) + "\n"
    if wanted.html:
        from .site.build import timeline_page

        files[wanted.html] = timeline_page(run, window)
    _write(files)


def write_several(wanted: Wanted, panels: Sequence[Panel], shown: Sequence[Panel], width: int | None) -> None:
    """The same for several schedules below each other: `panels` in a picture, `shown` on a page that is zoomed."""
    files = {}
    if wanted.svg:
        from .svg_beside import svg_beside

        files[wanted.svg] = svg_beside(panels, pixels(width))
    if wanted.html:
        from .site.build import several_page

        files[wanted.html] = several_page(shown)
    _write(files)


def _write(files: dict[Path, str]) -> None:
    output.write_files(files)
    for path in files:
        output.note(f"wrote {path}")


def pixels(width: int | None) -> int:
    """How wide an SVG is that stands for so many columns."""
    return COLUMN * (width or USUAL_COLUMNS)


def _same(one: Path, other: Path) -> bool:
    try:
        return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))
    except (OSError, ValueError):  # a path that no system has: writing it says so
        return False
