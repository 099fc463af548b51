"""The files of a timeline: an SVG picture and a Chrome trace, both or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..simulator.errors import UsageError
from . import output

if TYPE_CHECKING:
    from ..simulator.results.run import Run
    from ..traces.window import Window

WIDTHS = range(40, 1001)
"""Columns that a timeline can be drawn in."""
COLUMN, USUAL_COLUMNS = 10, 128
"""Pixels of an SVG per column, and the columns it has unless asked."""


def check(svg: Path | None, trace: Path | None, width: int | None) -> None:
    """Before anything is computed: raises UsageError where the files cannot both be written, or the width is not possible."""
    if width is not None and width not in WIDTHS:
        raise UsageError(f"--width {width} is not possible: give {WIDTHS[0]} to {WIDTHS[-1]} columns")
    if svg and trace and _same(svg, trace):
        raise UsageError(f"--svg and --trace are the same file, {svg}: give each its own")
    for path in (svg, trace):
        if path:
            output.check_file(path)


def write(svg: Path | None, trace: Path | None, window: Window, run: Run, width: int | None) -> None:
    """Write what was asked for of a window and of all that its run recorded; a name that ends in .gz is compressed."""
    files = {}
    if svg:
        from .svg import svg as draw

        files[svg] = draw(window, pixels(width))
    if trace:
        from ..traces.perfetto import chrome_trace

        files[trace] = json.dumps(chrome_trace(run), allow_nan=False) + "\n"
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
