"""A roofline plot in characters: FLOP/s over FLOPs per HBM byte, both logarithmic."""

from __future__ import annotations

from math import ceil, floor, log10

from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.text import Text

from ..traces.standing import Standing
from .units import digits

_HEIGHT, _GUTTER = 16, 8
_STYLES = {"tensor": "green", "mufu": "magenta", "hbm": "cyan", "l2": "blue"}
_NAMES = {"tensor": "tensor cores", "mufu": "MUFU", "hbm": "HBM", "l2": "L2"}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def letter(index: int) -> str:
    """The marker of the index-th run."""
    return _LETTERS[index % len(_LETTERS)]


class LogLog:
    """Draws the ceilings of a Standing and one letter per run."""

    def __init__(self, standing: Standing) -> None:
        self.standing = standing

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        roof, marks = self.standing.roofline, self.standing.marks
        width = max(24, min(options.max_width, 110) - _GUTTER)
        points = [(mark.flops_per_hbm_byte, mark.flops_per_s) for mark in marks]
        flat = [c.flops_per_s for c in roof.ceilings if c.flops_per_s is not None]
        across = [x for x, _ in points] + [roof.ridge_flops_per_byte, roof.arithmetic_intensity]
        x0, x1 = floor(log10(min(across)) - 0.3), ceil(log10(max(across)) + 0.2)
        y0 = floor(log10(min([y for _, y in points] + flat)) - 0.2)
        y1 = log10(max(flat)) + 0.25
        cells: list[list[tuple[str, str]]] = [[(" ", "")] * width for _ in range(_HEIGHT)]

        def row_of(y: float) -> int:
            return round((y1 - log10(y)) / (y1 - y0) * (_HEIGHT - 1))

        def column_of(x: float) -> int:
            return min(width - 1, max(0, round((log10(x) - x0) / (x1 - x0) * (width - 1))))

        for ceiling in reversed(roof.ceilings):
            for column in range(width):
                row = row_of(ceiling.at(10 ** (x0 + column / (width - 1) * (x1 - x0))))
                if 0 <= row < _HEIGHT:
                    cells[row][column] = ("─" if ceiling.flops_per_s else "╱", _STYLES[ceiling.name])
        for index, (x, y) in enumerate(points):
            cells[min(_HEIGHT - 1, max(0, row_of(y)))][column_of(x)] = (letter(index), "bold reverse")

        labels = {row_of(value): f"{value / 1e12:,.0f}" for value in flat}
        for decade in (10.0**e for e in range(ceil(y0), floor(y1) + 1)):
            labels.setdefault(row_of(decade), f"{decade / 1e12:,g}")
        yield Text("TFLOP/s", "dim")
        for number, cells_of_row in enumerate(cells):
            line = Text(f"{labels.get(number, ''):>{_GUTTER - 2}} │", style="")
            for char, style in cells_of_row:
                line.append(char, Style.parse(style) if style else None)
            yield line
        yield Text(" " * (_GUTTER - 1) + "└" + "─" * (width - 1))
        scale = [" "] * (width + 12)
        for exponent in range(x0, x1 + 1):
            text = digits(10.0**exponent).removesuffix(".00").removesuffix(".0")
            at = column_of(10.0**exponent)
            if at + len(text) <= width:
                scale[at : at + len(text)] = text
        yield Text(" " * _GUTTER + "".join(scale)[:width].rstrip())
        legend = Text(" " * _GUTTER + "FLOP per HBM byte   ")
        for ceiling in roof.ceilings:
            legend.append("── " if ceiling.flops_per_s else "╱╱ ", _STYLES[ceiling.name])
            legend.append(_NAMES[ceiling.name] + "  ")
        yield legend
