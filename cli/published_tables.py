"""The papers' tables with the predictions beside them, as rich tables and as plain JSON values."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ..simulator.units import percent, scaled
from ..traces.hbm import HbmReport, HbmRow
from ..traces.published import Group, Report, Row
from .tables import house_table


def report(found: Report) -> Iterator[RenderableType]:
    """One table per figure, then one line per group, per family, and what was left out."""
    panels: dict[tuple[str, str], list[Group]] = {}
    for group in found.groups:
        panels.setdefault((group.source, group.figure), []).append(group)
    ablation = [g for (_, figure), groups in panels.items() if not _is_figure(figure) for g in groups]
    if ablation:
        yield from _titled("FlashAttention-3 ablation (arXiv:2407.08608), H100 at 1830 MHz", _ablation(ablation))
    for (_, figure), groups in panels.items():
        if _is_figure(figure):
            yield from _titled(_heading(groups[0]), _panel(groups))
    yield from _titled("Error per figure and implementation", _summary(found.groups))
    if found.families:
        yield from _titled("Error per implementation, raw and after one factor per panel or figure", _families(found))
    if found.left_out:
        names = ", ".join(f"{name} ({count})" for name, count in sorted(found.left_out.items()))
        yield Text(f"\nLeft out, no schedule here: {names}.", "dim")


def hbm(found: HbmReport) -> Iterator[RenderableType]:
    """FlashAttention Figure 2: both panels and the sentence that explains them."""
    yield from _titled(f"{found.left[0].source}: GPT-2 medium, forward + backward as published; ours both, and the forward",
                       _hbm_left(found.left))  # fmt: skip
    yield Text(found.why)
    yield from _titled(
        f"{found.middle[0].source}: fa1 forward at four K/V block sizes, bytes", _hbm_middle(found.middle)
    )


def plain(found: Report | None, found_hbm: HbmReport | None) -> dict:
    """Everything as plain JSON values."""
    answer: dict = {}
    if found:
        answer["groups"] = [
            {
                "source": g.source,
                "figure": g.figure,
                "implementation": g.implementation,
                "schedule": g.schedule,
                "mape": g.mape,
                "implementation_efficiency": g.efficiency,
                "residual_mape": g.residual_mape,
                "rows": [_plain_row(row) for row in g.rows],
            }
            for g in found.groups
        ]
        answer["families"] = [dict(vars(family)) for family in found.families]
        answer["left_out"] = found.left_out
    if found_hbm:
        answer["hbm"] = {
            "left": [dict(vars(row)) for row in found_hbm.left],
            "middle": [dict(vars(row)) for row in found_hbm.middle],
            "why": found_hbm.why,
        }
    return answer


def _plain_row(row: Row) -> dict:
    return {
        "gpu": row.bar.gpu,
        "device": row.bar.device,
        "clock_hz": row.bar.clock_hz,
        "workload": row.bar.workload.to_dict(),
        "out_of_memory": row.bar.out_of_memory,
        "published_tflops": row.bar.tflops,
        "predicted_tflops": row.predicted_tflops,
        "error": row.error,
    }


def _titled(title: str, body: RenderableType) -> Iterator[RenderableType]:
    yield Text(f"\n{title}", "bold")
    yield body


def _is_figure(figure: str) -> bool:
    return figure.startswith(("Figure", "H200"))


def _heading(group: Group) -> str:
    bar = group.rows[0].bar
    place = f"{group.source}, {group.figure}" if group.figure.startswith("Figure") else group.source
    clock = f"{bar.clock_hz / 1e6:.0f} MHz" if bar.clock_hz else "free clock"
    shape = f"d{bar.workload.head_dim}, {bar.workload.dtype}, {'causal' if bar.workload.causal else 'full'}, forward"
    return f"{place}: {bar.gpu} at {clock}, {bar.workload.dtype if _mixed(group) else shape}"


def _mixed(group: Group) -> bool:
    """Whether a table mixes head dimensions and masks, so that its rows must name them."""
    return group.figure.startswith("H200")


def _panel(groups: list[Group]) -> Table:
    """Rows are workloads, and for each implementation: published, predicted, error."""
    shapes = dict.fromkeys(_label(row, group) for group in groups for row in group.rows)
    table = house_table("", *(column for g in groups for column in (f">{_name(g)}", f">{g.schedule}", ">error")))
    for shape in shapes:
        cells: list[str | Text] = [shape]
        for group in groups:
            row = next((r for r in group.rows if _label(r, group) == shape), None)
            cells += _cells(row)
        table.add_row(*cells)
    return table


def _label(row: Row, group: Group) -> str:
    length = f"{row.bar.label // 1024}k" if row.bar.label >= 1024 else f"{row.bar.label}"
    if not _mixed(group):
        return length
    work = row.bar.workload
    return f"d{work.head_dim} {'causal' if work.causal else 'full'} {length}"


def _cells(row: Row | None) -> list[str | Text]:
    if row is None:
        return ["", "", ""]
    if row.bar.out_of_memory:
        return [Text("out of memory", "dim"), "-", ""]
    return [f"{row.bar.tflops:.0f}", f"{row.predicted_tflops:.0f}", _error(row.error)]


def _error(error: float | None) -> Text:
    size = abs(error or 0)
    return Text(percent(error, signed=True), "green" if size <= 0.1 else "yellow" if size <= 0.25 else "red")


def _name(group: Group) -> str:
    return group.implementation.split(" (")[0].split(" through ")[0]


def _ablation(groups: list[Group]) -> Table:
    table = house_table("configuration", "schedule", "where", ">published", ">predicted", ">error", gap=1)
    for group in groups:
        for row in group.rows:
            table.add_row(group.implementation, group.schedule, group.figure, *_cells(row))
    return table


def _summary(groups: tuple[Group, ...]) -> Table:
    table = house_table("figure", "implementation", "schedule", ">bars", ">MAPE", ">efficiency", ">after it")
    for group in groups:
        if not _is_figure(group.figure) or not group.measured:
            continue
        table.add_row(
            f"{_paper(group.source)} {group.figure.removeprefix('Figure ')}",
            _name(group),
            group.schedule,
            str(len(group.measured)),
            percent(group.mape),
            f"{group.efficiency:.3f}",
            percent(group.residual_mape),
        )
    return table


def _families(found: Report) -> Table:
    """Raw error, and what one factor per panel or per whole figure leaves."""
    table = house_table(
        "paper", "implementation", "schedule", "dtype", ">bars", ">MAPE", ">worst", ">panel", ">figure", gap=1
    )
    for family in found.families:
        table.add_row(
            _paper(family.source),
            family.implementation.split(" (")[0].split(" through ")[0],
            family.schedule,
            family.dtype,
            str(family.count),
            percent(family.mape),
            percent(family.worst, signed=True),
            percent(family.residual_per_panel),
            percent(family.residual_per_figure),
        )
    return table


def _paper(source: str) -> str:
    """FA3 for "arXiv:2407.08608 (FlashAttention-3)"; what is no paper was measured."""
    return "FA" + source.rpartition("-")[2].rstrip(")") if source.startswith("arXiv") else "run"


def _hbm_left(rows: tuple[HbmRow, ...]) -> Table:
    table = house_table("published", ">bytes", "schedule", ">both, HBM", ">algorithmic", ">forward, HBM", ">algorithmic")
    for row in rows:
        table.add_row(
            row.implementation,
            _bytes(row.published_bytes),
            row.schedule,
            _bytes(row.both_hbm_bytes),
            _bytes(row.both_algorithmic_bytes),
            _bytes(row.hbm_bytes),
            _bytes(row.algorithmic_bytes + row.statistics_bytes),
        )
    return table


def _hbm_middle(rows: tuple[HbmRow, ...]) -> Table:
    table = house_table("tile", ">published", ">closed form", ">Q, K, V, O", ">differ", ">l and m", ">HBM behind L2")
    for row in rows:
        table.add_row(
            row.tile,
            _bytes(row.published_bytes),
            f"{row.closed_form_bytes:,}",
            f"{row.algorithmic_bytes:,}",
            f"{row.algorithmic_bytes - row.closed_form_bytes:,}",
            _bytes(row.statistics_bytes),
            _bytes(row.hbm_bytes),
        )
    return table


def _bytes(count: float | None) -> str:
    return scaled(count, "B") if count else ""
