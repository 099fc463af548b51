"""A roofline plot in characters: FLOP/s over FLOPs per HBM byte, both logarithmic."""

from __future__ import annotations

from math import ceil, floor, log10

from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.text import Text

from ..simulator.results.roofline import Ceiling
from ..simulator.units import digits
from ..traces.standing import RESOURCES, Standing
from .side_by_side import letter

_HEIGHT, _GUTTER = 16, 8
_STYLES = {"tensor": "green", "mufu": "magenta", "hbm": "cyan", "l2": "blue"}
_DASH, _OWN, _L2 = 6, "▔", "═"
Cells = list[list[tuple[str, str]]]


class LogLog:
    """Draws the ceilings of a Standing, and per run a letter, the bound at its own clock and the one by its L2 bytes."""

    def __init__(self, standing: Standing) -> None:
        self.roof, self.marks = standing.roofline, standing.marks
        self.flat = [c for c in self.roof.ceilings if c.flops_per_s is not None]
        self.rising = next(c for c in self.roof.ceilings if c.over == "HBM")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self._scale(max(24, min(options.max_width, 110) - _GUTTER))
        cells: Cells = [[(" ", "")] * self.width for _ in range(_HEIGHT)]
        self._draw_lines(cells)
        self._draw_runs(cells)
        yield Text("TFLOP/s", "dim")
        yield from self._rows(cells)
        yield from self._axis()
        yield from self._legend()

    def _scale(self, width: int) -> None:
        """Ranges of both axes, so that everything but an L2 bound far above the roof is inside."""
        self.width = width
        flat = [c.flops_per_s for c in self.flat]
        across = [m.flops_per_hbm_byte for m in self.marks] + [self.roof.ridge_flops_per_byte, self.roof.arithmetic_intensity]
        self.x0, self.x1 = floor(log10(min(across)) - 0.3), ceil(log10(max(across)) + 0.2)
        down = [m.flops_per_s for m in self.marks] + [m.roofline.bound_flops_per_s for m in self.marks] + flat
        self.y0, self.y1 = floor(log10(min(down)) - 0.2), log10(max(flat)) + 0.25

    def _row(self, y: float) -> int:
        return round((self.y1 - log10(y)) / (self.y1 - self.y0) * (_HEIGHT - 1))

    def _column(self, x: float) -> int:
        return min(self.width - 1, max(0, round((log10(x) - self.x0) / (self.x1 - self.x0) * (self.width - 1))))

    def _draw_lines(self, cells: Cells) -> None:
        """The diagonal, then the flat lines; those that fall on one row take it in turns, dash by dash."""
        for column in range(self.width):
            row = self._row(self.rising.at(10 ** (self.x0 + column / (self.width - 1) * (self.x1 - self.x0))))
            if 0 <= row < _HEIGHT:
                cells[row][column] = ("╱", _STYLES[self.rising.name])
        for row, lines in self._flat_rows().items():
            for column in range(self.width):
                cells[row][column] = ("─", _STYLES[lines[column // _DASH % len(lines)].name])

    def _flat_rows(self) -> dict[int, list[Ceiling]]:
        rows: dict[int, list[Ceiling]] = {}
        for line in self.flat:
            rows.setdefault(self._row(line.flops_per_s), []).append(line)
        return rows

    def _draw_runs(self, cells: Cells) -> None:
        """Bounds first, so that no letter is hidden; runs that fall on one cell stand side by side."""
        for mark in self.marks:
            column = self._column(mark.flops_per_hbm_byte)
            for y, sign, style in ((mark.l2_flops_per_s, _L2, _STYLES["l2"]), (mark.roofline.bound_flops_per_s, _OWN, "bold")):
                row = self._row(y)
                if 0 <= row < _HEIGHT:
                    for near in range(max(0, column - 1), min(self.width, column + 2)):
                        cells[row][near] = (sign, style)
        taken: set[tuple[int, int]] = set()
        for index, mark in enumerate(self.marks):
            row, column = min(_HEIGHT - 1, max(0, self._row(mark.flops_per_s))), self._column(mark.flops_per_hbm_byte)
            while (row, column) in taken and column + 1 < self.width:
                column += 1
            taken.add((row, column))
            cells[row][column] = (letter(index)[0], "bold reverse")

    def _rows(self, cells: Cells) -> list[Text]:
        labels = {row: f"{lines[0].flops_per_s / 1e12:,.0f}" for row, lines in self._flat_rows().items()}
        for decade in (10.0**e for e in range(ceil(self.y0), floor(self.y1) + 1)):
            labels.setdefault(self._row(decade), f"{decade / 1e12:,g}")
        drawn = []
        for number, row in enumerate(cells):
            line = Text(f"{labels.get(number, ''):>{_GUTTER - 2}} │")
            for char, style in row:
                line.append(char, Style.parse(style) if style else None)
            drawn.append(line)
        return drawn

    def _axis(self) -> list[Text]:
        scale = [" "] * (self.width + 12)
        for exponent in range(self.x0, self.x1 + 1):
            text = digits(10.0**exponent).removesuffix(".00").removesuffix(".0")
            at = self._column(10.0**exponent)
            if at + len(text) <= self.width:
                scale[at : at + len(text)] = text
        line = Text(" " * (_GUTTER - 1) + "└" + "─" * (self.width - 1))
        return [line, Text(" " * _GUTTER + "".join(scale)[: self.width].rstrip()), Text(" " * _GUTTER + "FLOP per HBM byte")]

    def _legend(self) -> list[Text]:
        """Each line with its height, then the signs of a run."""
        parts = [Text.assemble(("╱╱", _STYLES[self.rising.name]), f" {RESOURCES[self.rising.name]}")]
        for lines in self._flat_rows().values():
            for line in lines:
                note = " (on one line)" if len(lines) > 1 and line is lines[-1] else ""
                text = f" {RESOURCES[line.name]} {line.flops_per_s / 1e12:,.0f}{note}"
                parts.append(Text.assemble(("──", _STYLES[line.name]), text))
        own = Text.assemble((_OWN * 2, "bold"), " a run's bound at its own clock")
        l2 = Text.assemble((_L2 * 2, _STYLES["l2"]), " what L2 allows at the bytes a run asks of it")
        return [Text("   ").join(parts), own, l2]
