"""A table in which no name and no number is ever cut or broken; where columns have no room for that, rows become blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

_PATH = 24
"""Characters of a path or an address that stay together; the rest goes to the next line."""


class WholeTable(Table):
    """A rich table whose columns share the width by need, none of them less than its longest word or number."""

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        least, most = (sum(widths) + self._gaps() for widths in zip(*map(_needs, self.columns), strict=True))
        return Measurement(min(least, options.max_width), min(most, options.max_width))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        needs = [_needs(column) for column in self.columns]
        room = options.max_width - self._gaps()
        if sum(least for least, _ in needs) > room:
            yield from self._blocks(options.max_width)
            return
        for column, width in zip(self.columns, _shared(needs, room), strict=True):
            column.width, column.overflow = width, "fold"
        yield from super().__rich_console__(console, options)

    def _gaps(self) -> int:
        return self.padding[1] * (len(self.columns) - 1)

    def _blocks(self, width: int) -> Iterator[Text | Padding]:
        """Each row as its first cell, and indented below it every other cell that holds something behind its column's name."""
        names = [str(column.header) for column in self.columns]
        for row in zip(*map(_cells, self.columns), strict=True):
            yield row[0]
            pairs = [Text.assemble((f"{name} " if name else "", "dim"), cell) for name, cell in zip(names[1:], row[1:], strict=True)
                     if cell.plain.strip()]  # fmt: skip
            for line in _filled(pairs, width - 2):
                yield Padding(line, (0, 0, 0, 2)) if width > 8 else line


def _cells(column: Column) -> Iterator[Text]:
    """A column's cells as texts that fold rather than lose characters."""
    for cell in column.cells:
        text = cell.copy() if isinstance(cell, Text) else Text.from_markup(str(cell))
        text.overflow = "fold"
        yield text


def _needs(column: Column) -> tuple[int, int]:
    """The width that a column needs not to break a word (of a right-aligned one: a cell), and that of its longest line."""
    cells = list(_cells(column))
    header = Text(str(column.header))
    most = max(line.cell_len for cell in (header, *cells) for line in (cell.split() or [cell]))
    words = [_least(word) for cell in (header, *cells) for word in cell.plain.split()]
    if column.justify == "right":
        words += [line.cell_len for cell in cells for line in cell.split()]
    return max(words, default=0), most


def _least(word: str) -> int:
    width = Text(word).cell_len
    return min(width, _PATH) if "/" in word else width


def _shared(needs: Sequence[tuple[int, int]], room: int) -> list[int]:
    """Widths between least and most of each column within `room`: the columns that are furthest from their most grow first."""
    widths = [least for least, _ in needs]
    for _ in range(room - sum(widths)):
        column = max(range(len(needs)), key=lambda n: needs[n][1] / max(1, widths[n]))
        if widths[column] >= needs[column][1]:
            break
        widths[column] += 1
    return widths


def _filled(pairs: Sequence[Text], width: int) -> Iterator[Text]:
    """The pairs in lines, as many to a line as it has room for."""
    line = Text(overflow="fold")
    for pair in pairs:
        if line and line.cell_len + 2 + pair.cell_len > width:
            yield line
            line = Text(overflow="fold")
        line.append("  " if line else "").append_text(pair)
    if line:
        yield line
