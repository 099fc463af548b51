"""Timelines in a notebook: an SVG figure of one run, or of several on one axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..simulator.errors import UsageError
from ..simulator.results.run import Run
from ..traces.beside import Panel, beside
from ..traces.window import Window, by_iterations
from .svg import svg
from .svg_beside import svg_beside

WIDTH = 1000
"""Pixels of a figure unless asked."""


@dataclass(frozen=True)
class Timeline:
    """A figure that shows itself in Jupyter; `save` writes it."""

    panels: Sequence[Panel]
    window: Window | None
    width: int

    def _repr_svg_(self) -> str:
        return svg(self.window, self.width) if self.window else svg_beside(self.panels, self.width)

    def save(self, path: str) -> None:
        """Write the figure as an SVG file."""
        from pathlib import Path

        from .output import write_file

        write_file(Path(path), self._repr_svg_())


def timeline(*runs: Run, first: int | None = None, last: int | None = None, width: int = WIDTH) -> Timeline:
    """The loop steps `first` to `last` of a run's timeline, or of several runs below each other on one axis.

    Runs of `fasim.predict` keep their spans, as do recorded timelines. Raises UsageError where a run keeps none.
    """
    if not runs:
        raise UsageError("timeline needs a run: fasim.timeline(fasim.predict(workload))")
    if len(runs) == 1:
        return Timeline((), by_iterations(runs[0], first, last), width)
    return Timeline(beside(runs, first, last), None, width)
