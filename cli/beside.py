"""Several schedules on one axis and scale: a timeline each, what its softmax hides under, and the shares as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.text import Text

from ..traces.beside import Panel, longest
from .palette import BARE, UNDER_OTHERS, UNDER_OWN
from .side_by_side import Row, SideBySide, letter
from .timeline import DONE, EXPOSURE, Timeline

SHARES = {
    "others": ("under the others' GEMMs", UNDER_OTHERS),
    "own": ("under its own GEMMs", UNDER_OWN),
    "exposed": ("exposed: tensor cores idle", BARE),
}
"""Of Panel.softmax: what each share is, and its colour."""


class Beside:
    """Draws panels below each other across the console's width, and their shares beside each other."""

    def __init__(self, panels: Sequence[Panel]) -> None:
        self.panels = panels

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        until, last = longest(self.panels), self.panels[-1]
        gutter = max(len(row.name) for panel in self.panels for row in panel.figure.rows)
        plain = console.no_color or console.color_system is None
        for index, panel in enumerate(self.panels):
            yield Text.assemble((f"{letter(index)}  ", "dim"), (panel.run.schedule, "bold"), f"  {headline(panel)}".rstrip())
            yield Timeline(panel.window, until, panel.covers, panel.idle, gutter, feet=panel is last)
            yield ""
        yield from _explained(plain, shorter=any(panel.window.end < until for panel in self.panels))
        yield ""
        yield SideBySide(list(_rows(self.panels)))


def headline(panel: Panel) -> str:
    """What a block takes, and how much of its softmax is hidden."""
    parts = [f"{panel.cycles_per_block:,.0f} cycles per {panel.window.step}"] if panel.cycles_per_block else []
    if panel.softmax:
        parts.append(f"{1 - panel.softmax['exposed']:.0%} of softmax hidden")
    return ", ".join(parts)


def _explained(plain: bool, shorter: bool) -> Iterator[Text]:
    """What the signs of the rows below the warpgroups' say, and the end of a window that is shorter than another."""
    text = Text("under: softmax while the tensor cores work for ", "dim")
    if plain:
        text.append(f"WG 0, WG 1, ..; {EXPOSURE} for none")
    else:
        for sign, name, what in (("1", "others", "another warpgroup"), ("0", "own", "its own"), (EXPOSURE, "exposed", "none")):
            text.append(f" {sign} ", Style(bgcolor=SHARES[name][1], color="#ffffff"))
            text.append(f" {what}  ", "dim")
    yield text
    if shorter:
        yield Text(f"{DONE if plain else '│'} as many blocks are done here", "dim")


def _rows(panels: Sequence[Panel]) -> Iterator[Row | None]:
    yield "schedule", [panel.run.schedule for panel in panels]
    yield "tile", [str(panel.run.tile) for panel in panels]
    steps = sorted({panel.window.step for panel in panels})
    yield f"cycles per {steps[0] if len(steps) == 1 else 'step of the loop'}", [_cycles(panel.cycles_per_block) for panel in panels]
    yield None
    for name, (what, _) in SHARES.items():
        yield f"softmax {what}", [f"{panel.softmax[name]:.0%}" if panel.softmax else "-" for panel in panels]
    yield None
    for lane in dict.fromkeys(lane for panel in panels for lane in panel.idle):
        yield f"{lane} idle", [f"{panel.idle[lane]:.0%}" if lane in panel.idle else "-" for panel in panels]


def _cycles(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
