"""`fasim timeline`: which warp and which unit is busy when, on the terminal, as SVG and as a Chrome trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ...simulator.errors import UsageError
from .. import output, pictures
from ..options import Json, MachineOptions, PackedOptions, Schedules, TileOptions, WalkedOptions

if TYPE_CHECKING:
    from ...simulator.results.run import Run

_DEFAULT = PackedOptions()
_MACHINE = MachineOptions()


def timeline(
    schedule: Schedules = ("pingpong",),
    workload: PackedOptions = _DEFAULT,
    machine: MachineOptions = _MACHINE,
    *,
    kernel: str | None = None,
    iterations: str | None = None,
    cycles: str | None = None,
    width: int | None = None,
    svg: Path | None = None,
    trace: Path | None = None,
    html: Path | None = None,
    step: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    json: Json = False,
) -> None:
    """Draw which warp and which hardware unit is busy when, of one schedule or of several on one axis.

    One line per warp and per unit of one SM that is in use: copies (TMA or cp.async), tensor cores, MUFU, FMA, barriers. A
    GEMM stands in the line of its warpgroup while the tensor cores execute it. A colour is one K/V block, from light for
    the first warpgroup to dark for the last; blank is idle. Time runs in SM cycles from the start of the kernel.

    Several schedules are drawn below each other from the first GEMM of the same block on, to one scale. Under each
    warpgroup stands what its softmax hides under: another's GEMM, its own, or nothing. At the right how much of the time
    each lane is idle.

    Example: fasim timeline fa3 --iterations 2-5 --svg fa3.svg --trace fa3.json.gz

    Example: fasim timeline warp-specialized pingpong overlap-2stage fa3

    Theory: under pingpong the two shades alternate on the tensor cores, and each warpgroup's softmax lies under the
    other's GEMMs; the gaps that stay are what overlap within a warpgroup (fa3) can still fill.

    Parameters
    ----------
    kernel
        Of a schedule with several kernels the one to draw, by name or number. [default: the one with the softmax]
    iterations
        Loop steps of the first tile to show, as 1-4 or 3. [default: 1-4, of several schedules 3-5, or what there is]
    cycles
        Show these SM cycles instead, as 2000-6000, counted from the start of the kernel.
    width
        Columns to draw in (default: the terminal's); pixels for --svg are 10 times that.
    svg
        Also write the picture as an SVG file.
    trace
        Also write a Chrome trace of all that was recorded, for Perfetto.
    html
        Also write a page for a browser, one file that needs no network: to zoom, to point at, to scrub through.
    step
        Play the walk over the tiles of one head's S instead, 1,024 tokens unless a length is given: see `fasim walk`.
    """
    if step:
        workload.forward_only("fasim timeline --step")
        if workload.lengths is not None:
            raise UsageError("--step walks one head of one length: give --seqlen in place of --lengths")
        drawn = {"kernel": kernel, "iterations": iterations, "cycles": cycles, "width": width}
        drawn |= {"svg": svg, "trace": trace, "html": html}
        _step(schedule, workload, machine, [f"--{name}" for name, value in drawn.items() if value is not None], json)
        return
    if cycles is not None and iterations is not None:
        raise UsageError("--cycles and --iterations both say what to show: give one of them")
    if json and width is not None and not svg:
        raise UsageError("--width has nothing to do beside --json alone: give it with --svg, or leave it out")
    files = pictures.Wanted(svg, trace, html)
    files.check(width)
    span = whole_range("--cycles", cycles) if cycles is not None else None
    steps = whole_range("--iterations", iterations) if iterations is not None else (None, None)
    if len(schedule) > 1:
        for option, value in (("--kernel", kernel), ("--trace", trace)):
            if value is not None:
                raise UsageError(f"{option} is of one schedule, and {len(schedule)} were given")
        runs = [machine.predict(workload.build(), name) for name in schedule]
        _several(runs, span, steps, files, width, json)
        return
    run = machine.predict(workload.build(), schedule[0], kernel=kernel)

    from ...traces.perfetto import chrome_trace
    from ...traces.window import by_cycles, by_iterations, remarks

    window = by_cycles(run, *span) if span else by_iterations(run, *steps)
    pictures.write(files, window, run, width)
    for remark in remarks(run, last=steps[1], end=span and span[1]):
        output.note(remark)
    if json:
        output.emit_json(chrome_trace(run, window))
        return
    from ..timeline import Timeline

    console = output.stdout(width)
    console.print(window.title, style="bold", markup=False)
    console.print(Timeline(window))


def _step(
    schedule: Sequence[str], workload: PackedOptions, machine: MachineOptions, unused: Sequence[str], json: bool
) -> None:
    """The walk over one head of the workload."""
    from .walk import walk

    if len(schedule) > 1 or unused:
        raise UsageError(f"--step plays one schedule's walk: leave out {unused[0] if unused else schedule[1]}")
    lengths = {name: getattr(workload, name) for name in ("seqlen", "seqlen_q", "seqlen_k", "head_dim", "dtype", "causal")}
    places = {name: getattr(machine, name) for name in ("device", "tile", "stages", "cluster")}
    walk(schedule[0], WalkedOptions(**lengths), TileOptions(**places), json=json)


def _several(
    runs: Sequence[Run], span: tuple[int, int] | None, steps: tuple[int | None, int | None], files: pictures.Wanted,
    width: int | None, json: bool,
) -> None:  # fmt: skip
    """The same blocks, or the same cycles, of several runs on one axis."""
    from ...traces.beside import beside, by_clock, whole_blocks
    from ...traces.window import remarks

    panels = by_clock(runs, *span) if span else beside(runs, *steps)
    pictures.write_several(files, panels, panels if span or steps[0] is not None else whole_blocks(runs), width)
    for run in runs:
        for remark in remarks(run, last=steps[1], end=span and span[1]):
            output.note(f"{run.schedule}: {remark}")
    if json:
        output.emit_json([panel.to_dict() for panel in panels])
        return
    from ..beside import Beside

    console = output.stdout(width)
    console.print(f"on {runs[0].device}, {runs[0].workload}", style="bold", markup=False)
    console.print(Beside(panels))


def whole_range(option: str, text: str) -> tuple[int, int]:
    """Two whole numbers from "1-4", or one from "3"."""
    parts = [part.strip() for part in text.split("-")]
    if len(parts) > 2 or not all(part.isdecimal() and len(part) <= 15 for part in parts):
        raise UsageError(f"{option} {text[:40]!r} is not a range: give two whole numbers, such as 1-4")
    first, last = int(parts[0]), int(parts[-1])
    if last < first:
        raise UsageError(f"{option} {text!r} runs backwards: give the smaller number first")
    return first, last
