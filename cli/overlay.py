"""`fasim compare --timeline`: recorded and predicted lanes under each other, and the phases of both as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..simulator.errors import UsageError
from . import output, pictures

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..traces.overlay import Pair


@dataclass(frozen=True)
class Drawing:
    """What to draw of a timeline, and where to."""

    device: str | None
    cta: str | None
    iterations: str | None
    width: int | None
    svg: Path | None
    trace: Path | None
    html: Path | None
    json: bool


def timelines(paths: Sequence[Path], wanted: Drawing) -> int:
    """Draw every recorded timeline of files and folders beside its prediction; 1 where one does not conform."""
    from ..traces.overlay import pair
    from ..traces.store import TIMELINES, load_paths
    from ..traces.window import by_iterations
    from .commands.timeline import whole_range
    from .timeline import Timeline

    if wanted.json and not wanted.svg and (wanted.width is not None or wanted.iterations is not None):
        raise UsageError("--width and --iterations have nothing to do beside --json: give them with --svg, or leave them out")
    files = pictures.Wanted(wanted.svg, wanted.trace, wanted.html)
    files.check(wanted.width)
    steps = whole_range("--iterations", wanted.iterations) if wanted.iterations is not None else (None, None)
    runs = load_paths(paths or (TIMELINES,))
    if len(runs) > 1 and files:
        raise UsageError(f"--svg, --trace and --html draw one timeline, and {len(runs)} were given: {', '.join(runs)}")
    with output.progress("predicting") as advance:
        pairs = []
        for done, (name, run) in enumerate(runs.items()):
            advance(done, len(runs), name)
            pairs.append(pair(name, run, wanted.cta, wanted.device))
    if files:
        both = pairs[0].both
        pictures.write(files, by_iterations(both, *steps), both, wanted.width)
    if wanted.json:
        output.emit_json([each.to_dict() for each in pairs])
    else:
        console = output.stdout(wanted.width)
        for each in pairs:
            window = by_iterations(each.both, *steps)
            console.print(window.title, style="bold", markup=False)
            console.print(Timeline(window))
            console.print(_phases(each))
    return 0 if all(each.conformance.holds for each in pairs) else 1


def _phases(pair: Pair) -> RenderableType:
    """The phases of both sides with their difference, whether the order holds, and what tracing cost."""
    from rich.console import Group
    from rich.text import Text

    from .tables import house_table

    table = house_table("cycles up to the end of", ">predicted", ">measured", ">difference")
    for phase in pair.phases:
        values = [_cycles(value) for value in (phase.predicted, phase.measured)]
        table.add_row(Text(phase.name, "dim"), *values, "-" if phase.difference is None else f"{phase.difference:+,.0f}")
    found, cost = pair.conformance, pair.measured.measurement.trace_overhead
    order = f"{found.events:,} events of {found.warps} warps " + ("in the schedule's order" if found.holds else "compared:")
    order += f", {found.frees:,} stages handed back before they were loaded anew" * (found.frees > 0)
    lines = [Text(order), *(Text(f"not the schedule's order: {each}", "yellow") for each in found.differences)]
    if cost is not None:
        each = "" if pair.stamp_cycles is None else f", about {pair.stamp_cycles:.0f} a stamp; the measured phases are without"
        lines.append(Text(f"stamping costs the kernel {cost:+.1%} cycles{each}", "dim"))
    block = "Q" if pair.measured.workload.backward else "K/V"
    what = f"Mean over warpgroups, per {block} block in the steady state of the first tile; first block and epilogue once."
    note = Text(what, "dim")
    return Group(Text(""), table, note, *lines)


def _cycles(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
