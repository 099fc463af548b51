"""`fasim timeline`: which warp and which unit is busy when, on the terminal, as SVG and as a Chrome trace."""

from __future__ import annotations

from pathlib import Path

from ..simulator.errors import UsageError
from . import output
from .options import Json, MachineOptions, Schedule, WorkloadOptions

_DEFAULT = WorkloadOptions()
_MACHINE = MachineOptions()


def timeline(
    schedule: Schedule = "pingpong",
    workload: WorkloadOptions = _DEFAULT,
    machine: MachineOptions = _MACHINE,
    *,
    iterations: str = "1-4",
    cycles: str | None = None,
    width: int | None = None,
    svg: Path | None = None,
    trace: Path | None = None,
    json: Json = False,
) -> None:
    """Draw which warp and which hardware unit is busy when.

    One line per warp and per unit of one SM: TMA, tensor cores, MUFU, FMA, barriers. A colour is one K/V block, light
    for warpgroup 0 and dark for warpgroup 1; blank is idle. Time runs in SM cycles from the start of the kernel.

    Example: fasim timeline fa3 --iterations 2-5 --svg fa3.svg --trace fa3.json

    Theory: under pingpong the two shades alternate on the tensor cores, and each warpgroup's softmax lies under the
    other's GEMMs; the gaps that stay are what overlap within a warpgroup (fa3) can still fill.

    Parameters
    ----------
    iterations
        K/V blocks of the first tile to show, as 1-4 or 3.
    cycles
        Show these SM cycles instead, as 2000-6000.
    width
        Columns to draw in (default: the terminal's); pixels for --svg are 10 times that.
    svg
        Also write the picture as an SVG file.
    trace
        Also write a Chrome trace of all that was recorded, for Perfetto.
    """
    if width is not None and not 40 <= width <= 1000:
        raise UsageError(f"--width {width} is not possible: give 40 to 1000 columns")
    span = whole_range("--cycles", cycles) if cycles else None
    first, last = whole_range("--iterations", iterations)
    run = machine.predict(workload.build(), schedule)

    from ..traces.perfetto import chrome_trace
    from ..traces.window import by_cycles, by_iterations

    window = by_cycles(run, *span) if span else by_iterations(run, first, last)
    if svg:
        from .svg import svg as draw

        output.write_file(svg, draw(window, (width or 128) * 10))
        output.note(f"wrote {svg}")
    if trace:
        import json as codec

        output.write_file(trace, codec.dumps(chrome_trace(run)) + "\n")
        output.note(f"wrote {trace}")
    if json:
        output.emit_json(chrome_trace(run, window))
        return
    from .timeline import Timeline

    console = output.stdout(width)
    console.print(window.title, style="bold", markup=False)
    console.print(Timeline(window))


def whole_range(option: str, text: str) -> tuple[int, int]:
    """Two whole numbers from "1-4", or one from "3"."""
    parts = text.split("-")
    if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"{option} {text!r} is not a range: give two whole numbers, such as 1-4")
    first, last = int(parts[0]), int(parts[-1])
    if last < first:
        raise UsageError(f"{option} {text!r} runs backwards: give the smaller number first")
    return first, last
