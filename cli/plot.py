"""A sweep's lines as a picture, by matplotlib, or in the characters of a terminal."""

from __future__ import annotations

import io
from math import log10
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from ..simulator.errors import UsageError
from ..simulator.units import digits

if TYPE_CHECKING:
    from ..traces.answers.series import Figure

FORMATS = (".svg", ".png")
TERMINAL = "terminal"
_HEIGHT, _GUTTER = 16, 10
_STYLES = ("cyan", "magenta", "green", "yellow", "blue", "red")
_SIGNS = "●◆▲■○◇△□+x*#"


def suffix_of(place: str) -> str:
    """The picture's format by its name; raises UsageError for another, and where matplotlib is not installed."""
    suffix = Path(place).suffix
    if suffix not in FORMATS:
        raise UsageError(f"--plot {place}: a picture's name ends in {' or '.join(FORMATS)}; terminal draws there")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        how = "pip install 'fasim[plot]'; --plot terminal draws without"
        raise UsageError(f"--plot needs matplotlib for a picture: {how}") from None
    return suffix


def picture(figure: Figure, suffix: str) -> bytes:
    """The figure as SVG or PNG, the same bytes for the same figure."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Sheet

    from ..traces.answers.series import name_of

    with matplotlib.rc_context({"svg.hashsalt": "fasim", "svg.fonttype": "none"}):
        sheet = Sheet(figsize=(8, 5), layout="constrained")
        axes = sheet.add_subplot()
        for (name, points), marker in zip(figure.lines.items(), "oDs^vP*Xdph<", strict=False):
            axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, label=name)
        if figure.doubling:
            ticks = sorted({x for points in figure.lines.values() for x, _ in points})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{x:,.0f}" for x in ticks], rotation=45 if len(ticks) > 8 else 0)
            axes.minorticks_off()
        axes.set_xlabel(name_of(figure.x))
        axes.set_ylabel(name_of(figure.y))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
        out = io.BytesIO()
        if suffix == ".svg":
            FigureCanvasSVG(sheet).print_svg(out, metadata={"Date": None})
        else:
            FigureCanvasAgg(sheet).print_png(out)
    return out.getvalue()


class Chart:
    """The figure in characters: a sign per line, x doubling where it spans much, y from zero."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from ..traces.answers.series import name_of

        width = max(20, min(options.max_width, 100) - _GUTTER)
        every = [point for line in self.figure.lines.values() for point in line]
        top = max(y for _, y in every) or 1.0
        low, high = min(x for x, _ in every), max(x for x, _ in every)
        cells: list[list[tuple[str, str]]] = [[(" ", "")] * width for _ in range(_HEIGHT)]
        for number, points in enumerate(self.figure.lines.values()):
            style, sign = _STYLES[number % len(_STYLES)], _SIGNS[number % len(_SIGNS)]
            for x, y in points:
                cells[round((1 - y / top) * (_HEIGHT - 1))][self._column(x, low, high, width)] = (sign, style)
        yield Text(name_of(self.figure.y), "dim")
        for row, line in enumerate(cells):
            label = digits(top * (1 - row / (_HEIGHT - 1))) if row % 5 == 0 else ""
            yield Text.assemble((f"{label:>{_GUTTER - 2}} ", "dim"), "│", *line)
        yield Text(" " * (_GUTTER - 1) + "└" + "─" * width)
        yield Text(self._ticks(sorted({x for x, _ in every}), low, high, width))
        yield Text(" " * _GUTTER + name_of(self.figure.x), "dim")
        for number, name in enumerate(self.figure.lines):
            yield Text.assemble(" " * _GUTTER, (_SIGNS[number % len(_SIGNS)], _STYLES[number % len(_STYLES)]), f" {name}")

    def _column(self, x: float, low: float, high: float, width: int) -> int:
        if high == low:
            return width // 2
        share = log10(x / low) / log10(high / low) if self.figure.doubling else (x - low) / (high - low)
        return round(share * (width - 1))

    def _ticks(self, marks: list[float], low: float, high: float, width: int) -> str:
        """Values under their columns, those that fit."""
        line = [" "] * (width + _GUTTER)
        end = 0
        for x in marks:
            text = f"{x:,.0f}"
            at = min(_GUTTER + self._column(x, low, high, width), len(line) - len(text))
            if at > end:
                line[at : at + len(text)] = text
                end = at + len(text)
        return "".join(line).rstrip()
