"""`fasim compare`: recorded runs beside their predictions, with the errors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ..simulator.errors import UsageError
from . import output
from .options import Json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from ..traces.compare import Column, Comparison, Quantity, Report

_BRIEF = ("cycles", "SM clock", "time", "HBM read", "HBM written", "tensor cores", "MUFU", "issue slots")
_SELECTIONS = {
    "all": "all runs of our kernels",
    "seen": "those the model was improved by",
    "unseen": "the held-out third",
    "others": "kernels that are not ours, beside the nearest schedule",
}


def compare(
    *paths: Path,
    schedule: str | None = None,
    device: str | None = None,
    markdown: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    timeline: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    cta: str | None = None,
    iterations: str | None = None,
    width: int | None = None,
    svg: Path | None = None,
    trace: Path | None = None,
    json: Json = False,
) -> int:
    """Set recorded runs beside their predictions: error per quantity, the mean, the worst, and why.

    Every measured run is predicted with its own tile. One run shows all its numbers; several show the errors and, per
    quantity, the mean absolute error and the worst run. A fixed third of the runs, chosen by a hash of schedule and
    workload, is held out and scored apart. Runs of kernels that are not ours are set beside the nearest schedule, and
    not counted. With --timeline it draws what each warp of a CTA was recorded to do under what the model says it does, and
    says how long each phase takes in both. Needs no GPU. Exit status: 1 where a kernel's recorded order is not its schedule's.

    Example: fasim compare

    Theory: a model that fits what it was tuned on proves nothing; the held-out runs say what it is worth. Errors of
    cycles and of the clock can cancel in the time, so they are shown apart.

    Parameters
    ----------
    paths
        Recorded runs, or folders of them. [default: the runs that came with the source]
    schedule
        What kernels that are not ours are set beside. [default: fa3 for cuDNN, fa2 for PyTorch's FlashAttention-2]
    device
        Device model, where the GPU has none by its name: a name or a TOML file.
    markdown
        Print the table of errors as Markdown, for a README.
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
    """
    drawing = {"--cta": cta, "--iterations": iterations, "--width": width, "--svg": svg, "--trace": trace}
    tables = {"--schedule": schedule, "--markdown": markdown or None}
    idle = [name for name, given in (tables if timeline else drawing).items() if given is not None]
    if idle:
        without = "beside" if timeline else "without"
        raise UsageError(f"{', '.join(idle)}: nothing to do {without} --timeline, so not taken {without} it")
    if timeline:
        from .overlay import Drawing, timelines

        return timelines(paths, Drawing(device, cta, iterations, width, svg, trace, json))
    from ..traces import compare as book
    from ..traces.predictions import processes
    from ..traces.store import RECORDED, load_paths

    runs = load_paths(paths or (RECORDED,))
    with output.progress("predicting") as advance:
        report = book.compare_all(runs, schedule=schedule, device=device, advance=advance, processes=processes())
    if json:
        output.emit_json(report.to_dict())
    elif markdown:
        output.emit_text(_markdown(report))
    elif len(report.comparisons) == 1:
        output.stdout().print(_one(report.comparisons[0]))
    else:
        output.stdout().print(_several(report))
    return 0


def _one(found: Comparison) -> RenderableType:
    """Every quantity of one run, and the explanation."""
    from rich.console import Group
    from rich.text import Text

    from .tables import house_table

    taken = found.measured.measurement
    title = Text.assemble(
        (found.measured.schedule, "bold"),
        f" on {taken.gpu}, {found.measured.workload}\n"
        f"measured {taken.date}: {taken.calls:,} calls, {taken.regime}, L2 {taken.l2}; cycles from {taken.cycles_from}",
    )
    table = house_table("", ">predicted", ">measured", ">error")
    for row in found.rows:
        cells = [_value(row.quantity, value) for value in (row.predicted, row.measured)]
        table.add_row(Text(row.quantity.name, "dim"), *cells, _error(row.quantity, row.error))
    parts = [title, Text(""), table, Text(""), Text(found.explanation)]
    return Group(*parts, *([Text(found.note, "yellow")] if found.note else []))


def _several(report: Report) -> RenderableType:
    """A row of errors per run, the columns' means and worst, the ranking, and the largest disagreement."""
    from rich.console import Group
    from rich.text import Text

    from .tables import house_table

    table = house_table("kernel", "workload", *(f">{name}" for name in _BRIEF), "", gap=1)
    for found in report.comparisons:
        rows = [found.row(name) for name in _BRIEF]
        mark = "unseen" if found.unseen and found.counts else "" if found.counts else "not ours"
        table.add_row(
            Text(found.measured.schedule, "bold"), str(found.measured.workload),
            *(_error(row.quantity, row.error) for row in rows), Text(mark, "dim"),
        )  # fmt: skip
    parts: list[RenderableType] = [table]
    for which, title in _SELECTIONS.items():
        if report.count(which):
            heading = Text.assemble((f"\n{which}", "bold"), (f", {title}: {report.count(which)} runs", "dim"))
            parts += [heading, _columns(report.columns(which))]
    ranking = report.ranking
    if ranking.pairs:
        parts.append(Text(f"\nranking: {ranking.pairs - len(ranking.reversed)} of {ranking.pairs} pairs of schedules as measured"))
        parts += [Text(f"  {each}") for each in ranking.reversed]
    worst = report.worst
    parts.append(Text.assemble(("\nlargest disagreement ", "dim"), (worst.name, "bold"), f": {worst.explanation}"))
    notes = dict.fromkeys(each.note for each in report.comparisons if each.note)
    return Group(*parts, *(Text(note, "dim") for note in notes))


def _columns(columns: Sequence[Column]) -> RenderableType:
    from .tables import house_table

    table = house_table("", ">runs", ">mean error", ">worst", "of")
    for column in columns:
        quantity = column.quantity
        table.add_row(
            quantity.name, str(column.count), _error(quantity, column.mape, signed=False), _error(quantity, column.worst),
            column.worst_run,
        )  # fmt: skip
    return table


def _markdown(report: Report) -> str:
    """The table of errors for a README: a row per quantity, the runs that count."""
    runs = [each.measured for each in report.comparisons if each.counts]
    lines = ["| quantity | runs | mean error | worst | mean error, unseen third |", "|---|---|---|---|---|"]
    for column, unseen in zip(report.columns("all"), report.columns("unseen"), strict=True):
        cells = (
            column.quantity.name, str(column.count), _error(column.quantity, column.mape, signed=False),
            _error(column.quantity, column.worst), _error(column.quantity, unseen.mape, signed=False),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    places = " and ".join(sorted({run.measurement.gpu for run in runs})) or "no GPU"
    dates = sorted({run.measurement.date for run in runs})
    when = f", {dates[0]} to {dates[-1]}" if len(dates) > 1 else f", {dates[0]}" if dates else ""
    lines += ["", f"{len(runs)} runs of our kernels on {places}{when}; shares in percentage points (pp)."]
    return "\n".join(lines)


def _value(quantity: Quantity, value: float | None) -> str:
    from .units import percent, scaled

    if value is None:
        return "missing"
    if quantity.is_share:
        return percent(value)
    if quantity.unit == "cycles":
        return f"{value:,.0f}"
    return f"{value / 1e6:,.0f} MHz" if quantity.unit == "Hz" else scaled(value, quantity.unit)


def _error(quantity: Quantity, error: float | None, signed: bool = True) -> str:
    if error is None:
        return "-"
    sign = "+" if signed else ""
    return f"{error * 100:{sign}.1f} {'pp' if quantity.is_share else '%'}"
