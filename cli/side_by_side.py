"""Several runs in columns, a letter over each: as many side by side as the terminal is wide, the rest below."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_GAP = 2
Row = tuple[str, Sequence[str | Text]]
"""A quantity, and what each run has of it."""


def letter(index: int) -> str:
    """The sign of the index-th run: A to Z, then A1, B1, .."""
    return _LETTERS[index % len(_LETTERS)] + (str(index // len(_LETTERS)) if index >= len(_LETTERS) else "")


class SideBySide:
    """A table of quantities, one row each, with a column per run; a row of None is an empty line."""

    def __init__(self, rows: Sequence[Row | None]) -> None:
        self.rows = [row for row in rows if row]
        self.layout = rows
        self.count = len(self.rows[0][1])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names = max(cell_len(name) for name, _ in self.rows)
        columns = zip(*(cells for _, cells in self.rows), strict=True)
        widths = [max(len(letter(index)), *map(_width, column)) for index, column in enumerate(columns)]
        first = 0
        while first < self.count:
            last, used = first, names
            while last < self.count and (last == first or used + _GAP + widths[last] <= options.max_width):
                used += _GAP + widths[last]
                last += 1
            if first:
                yield ""
            yield self._part(first, last)
            first = last

    def _part(self, first: int, last: int) -> RenderableType:
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, _GAP, 0, 0), collapse_padding=True)
        table.add_column("", no_wrap=True)
        for index in range(first, last):
            table.add_column(letter(index), justify="right", no_wrap=True)
        for row in self.layout:
            table.add_row(*([Text(row[0], "dim"), *row[1][first:last]] if row else []))
        return table


def _width(cell: str | Text) -> int:
    return max(cell_len(line) for line in str(cell).split("\n"))
