"""The terminal that results are drawn on: what comes from files and arguments is shown on it and never obeyed by it."""

from __future__ import annotations

from collections.abc import Iterable

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment


class Terminal(Console):
    """rich's console, whose texts hold no character that is not visible, but line ends; the styles are rich's own."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does, each piece of text made fit; so many columns as before, so that tables stay aligned."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable() or segment.text == "\n":
                yield segment
            else:
                yield Segment("".join(map(_visible, segment.text)), segment.style)


def _visible(char: str) -> str:
    return char if char.isprintable() or char == "\n" else "?" * cell_len(char)
