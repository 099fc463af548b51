"""`fasim compare`: recorded runs beside their predictions, with the errors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ..simulator.errors import UsageError
from . import output
from .options import Json, WorkloadOptions
from .own_measurement import OwnOptions, compare_own
from .quantities import MAIN, error_of, quantities

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..traces.compare import Column, Report
    from ..traces.comparison import Comparison

_BRIEF = ("cycles", "SM clock", "time", "HBM read", "HBM written", "L2 read", "tensor cores", "MUFU", "issue slots")


_OWN = OwnOptions()
_WORKLOAD = WorkloadOptions()


def compare(
    *paths: Path,
    own: OwnOptions = _OWN,
    workload: WorkloadOptions = _WORKLOAD,
    schedule: str | None = None,
    device: str | None = None,
    markdown: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    timeline: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    cta: str | None = None,
    iterations: str | None = None,
    width: int | None = None,
    svg: Path | None = None,
    trace: Path | None = None,
    html: Path | None = None,
    json: Json = False,
) -> int:
    """Set recorded runs beside their predictions: error per quantity, the mean, the worst, and why.

    Every measured run is predicted with its own tile. One run shows all its numbers; several give tables of mean errors and
    the worst, kept apart: our kernels beside which the model was made, those recorded after it was finished and compared
    once, and other people's kernels, each beside the schedule that stands for it (FlashAttention-3, FlashAttention-2; others
    are listed without). Runs that are named are listed one by one before. With --timeline it draws what each warp of a CTA
    was recorded to do under what the model says it does, and says how long each phase takes in both. Needs no GPU. Exit
    status: 1 where a kernel's recorded order is not its schedule's.

    A measurement of your own is set beside its prediction with --ncu or --time-us, without torch and GPU: the first line says how
    far off the kernel is, and which part, by the counters, or by what one fault at a time would take.

    Example: fasim compare

    Example: fasim compare --time-us 720 --clock 1700 --schedule fa3 --seqlen 4096 --device h200

    Theory: a model that fits what it was made beside proves nothing; kernels that others wrote say what a prediction of yours
    is worth. Errors of cycles and of the clock can cancel in the time, so they are shown apart.

    Parameters
    ----------
    paths
        Recorded runs, or folders of them. [default: the runs that came with the source]
    schedule
        What kernels that are not ours are set beside. [default: fa3-published for FlashAttention-3, fa2 for FlashAttention-2; fa3
        for a measurement of your own]
    device
        Device model, where the GPU has none by its name: a name or a TOML file.
    markdown
        Print the tables of errors as Markdown, for a README.
    timeline
        Compare in-kernel traces (`fasim measure --timeline`). [default: those that came with the source]
    cta
        The CTA to draw, as CTA0. [default: the first that was kept]
    iterations
        K/V blocks of the first tile to draw, as 1-3 or 2. [default: 1-4, or what there is]
    width
        Columns to draw in (default: the terminal's); pixels for --svg are 10 times that.
    svg
        Also write the timeline of one run as an SVG file.
    trace
        Also write the timeline of one run as a Chrome trace, for Perfetto.
    html
        Also write the timeline of one run as a page for a browser, one file, to zoom, to point at, to scrub through.
    """
    drawing = {"--cta": cta, "--iterations": iterations, "--width": width, "--svg": svg, "--trace": trace, "--html": html}
    tables = {"--schedule": schedule, "--markdown": markdown or None}
    idle = [name for name, given in (tables if timeline else drawing).items() if given is not None]
    if idle:
        without = "beside" if timeline else "without"
        raise UsageError(f"{', '.join(idle)}: nothing to do {without} --timeline, so not taken {without} it")
    if own.given:
        others = {"PATHS": bool(paths), "--markdown": markdown, "--timeline": timeline}
        if named := [name for name, given in others.items() if given]:
            raise UsageError(f"{', '.join(named)}: recorded runs are compared without --ncu and --time-us")
        return compare_own(own, workload, schedule, device, json)
    if own != _OWN or workload != _WORKLOAD:
        raise UsageError("a workload and its tile belong to a measurement of your own: give --ncu or --time-us")
    if timeline:
        from .overlay import Drawing, timelines

        return timelines(paths, Drawing(device, cta, iterations, width, svg, trace, html, json))
    from ..traces import compare as book
    from ..traces.predictions import processes
    from ..traces.store import BLIND, PEERS, RECORDED, load_paths, names_in

    runs = load_paths(paths or (RECORDED, BLIND, PEERS))
    with output.progress("predicting") as advance:
        how = {"after": names_in(BLIND), "advance": advance, "processes": processes()}
        report = book.compare_all(runs, schedule=schedule, device=device, **how)
    if json:
        output.emit_json(report.to_dict())
    elif markdown:
        output.emit_text(_markdown(report))
    elif len(report.comparisons) == 1:
        output.stdout().print(_one(report.comparisons[0]))
    else:
        output.stdout().print(_several(report, each=bool(paths)))
    return 0


def _one(found: Comparison) -> RenderableType:
    """Every quantity of one run, and the explanation."""
    from rich.console import Group
    from rich.text import Text

    taken = found.measured.measurement
    title = Text.assemble(
        (found.measured.schedule, "bold"),
        f" on {taken.gpu}, {found.measured.workload}\n"
        f"measured {taken.date}: {taken.calls:,} calls, {taken.regime}, L2 {taken.l2}; cycles from {taken.cycles_from}",
    )
    parts: list[RenderableType] = [title, Text(""), quantities(found), Text(""), Text(found.explanation)]
    return Group(*parts, *([Text(found.note, "yellow")] if found.note else []))


def _several(report: Report, each: bool) -> RenderableType:
    """A row of errors per run where asked, a table per set, the ranking, and the largest disagreement."""
    from rich.console import Group
    from rich.text import Text

    from ..traces.comparison import SETS

    parts: list[RenderableType] = [_runs(report)] if each else []
    for which, title in SETS.items():
        if count := len(report.of(which)):
            heading = Text.assemble((f"{title}", "bold"), (f", {count} run{'s' if count > 1 else ''}", "dim"))
            parts += [*([Text("")] if parts else []), heading, _means(report, which)]
    ranking = report.ranking
    if ranking.pairs:
        parts.append(Text(f"\nranking: {ranking.pairs - len(ranking.reversed)} of {ranking.pairs} pairs of schedules as measured"))
        parts += [Text(f"  {each}") for each in ranking.reversed]
    worst = report.worst
    parts.append(Text.assemble(("\nlargest disagreement ", "dim"), (worst.name, "bold"), f": {worst.explanation}"))
    notes = dict.fromkeys(each.note for each in report.comparisons if each.note)
    return Group(*parts, *(Text(note, "dim") for note in notes))


def _runs(report: Report) -> RenderableType:
    """A row of errors per run."""
    from rich.text import Text

    from .tables import house_table

    names = _names(report)
    table = house_table("kernel", "workload", *(f">{name}" for name in names), gap=1)
    for found in report.comparisons:
        rows = [found.row(name) for name in names]
        cells = [error_of(row.quantity, row.error) for row in rows] if found.predicted else [_NONE]
        table.add_row(Text(found.measured.schedule, "bold"), str(found.measured.workload), *cells)
    return table


def _means(report: Report, which: str) -> RenderableType:
    """Mean absolute errors of a set: a row per kernel, one for all, and the worst of each quantity."""
    from rich.text import Text

    from .tables import house_table

    table = house_table("", ">runs", *(f">{name}" for name in _heads(report)), gap=1)
    for name, count, cells in _table(report, which):
        table.add_row(Text(name, "bold" if count else "dim"), count, *cells)
    return table


def _names(report: Report) -> tuple[str, ...]:
    """The quantities of a table: of backwards, the main kernel beside all that the call launched."""
    first, *rest = _BRIEF
    return (first, MAIN, *rest) if any(each.measured.workload.backward for each in report.comparisons) else _BRIEF


def _heads(report: Report) -> tuple[str, ...]:
    first, *rest = _names(report)
    return (first, "worst", *rest)


_NONE = "no schedule"


def _table(report: Report, which: str) -> list[tuple[str, str, list[str]]]:
    """(kernel, runs, cells) per kernel, for all, and of the worst run per quantity."""
    found = []
    for kernel, chosen in report.kernels(which).items():
        predicted = any(each.predicted for each in chosen)
        cells = _cells(report, which, kernel) if predicted else [_NONE, *["-"] * len(_names(report))]
        found.append((kernel, str(len(chosen)), cells))
    compared = sum(each.predicted is not None for each in report.of(which))
    if len(found) > 1 and compared:
        every = "all that have a schedule" if compared < len(report.of(which)) else "all"
        found.append((every, str(compared), _cells(report, which)))
    worst = [error_of(column.quantity, column.worst) for column in _brief(report, which)]
    if compared > 1:
        found.append(("worst", "", [worst[0], "", *worst[1:]]))
    return found


def _brief(report: Report, which: str, kernel: str | None = None) -> list[Column]:
    columns = {column.quantity.name: column for column in report.columns(which, kernel)}
    return [columns[name] for name in _names(report)]


def _cells(report: Report, which: str, kernel: str | None = None) -> list[str]:
    """Mean errors, those of the cycles with the worst."""
    cycles, *rest = _brief(report, which, kernel)
    means = [error_of(column.quantity, column.mape, signed=False) for column in (cycles, *rest)]
    return [means[0], error_of(cycles.quantity, cycles.worst), *means[1:]]


def _markdown(report: Report) -> str:
    """The tables for a README, each under its title."""
    from ..traces.comparison import SETS

    lines = []
    for which, title in SETS.items():
        runs = [each.measured for each in report.of(which)]
        if not runs:
            continue
        places = " and ".join(sorted({run.measurement.gpu for run in runs}))
        dates = sorted({run.measurement.date for run in runs})
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        lines += ["" if lines else None, f"**{title[0].upper()}{title[1:]}** ({len(runs)} runs, {places}, {when})", ""]
        lines += [f"| | runs | {' | '.join(_heads(report))} |", "|" + "---|" * (len(_heads(report)) + 2)]
        lines += [f"| {' | '.join((name, count, *cells))} |" for name, count, cells in _table(report, which)]
    return "\n".join([line for line in lines if line is not None] + ["", "Mean absolute errors; shares in percentage points (pp)."])
