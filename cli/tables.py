"""Runs, schedules and devices as rich tables and panels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..simulator import metrics
from ..simulator.device import Device
from ..simulator.run import Run
from ..simulator.schedules import Schedule
from ..traces.published import Bar, match, unmatched
from ..traces.standing import Standing
from .breakdown import Savings, Shares, bar, shares_of_several
from .loglog import LogLog, letter
from .units import percent, scaled


def result(run: Run) -> RenderableType:
    """Everything about one run: figures, utilisations, the tensor cores' time, bottleneck, bytes per tensor, warnings."""
    title = Text.assemble((run.schedule, "bold"), f" on {run.device}\n{run.workload}, tile {_tile(run)}")
    printed = [Text.assemble(("published   ", "dim"), _printed(each)) for each in _published(run)]
    parts: list[RenderableType] = [title, "", _figures(run), *printed, "", Shares(run.breakdown), "", _bottleneck(run)]
    parts += ["", Savings(run)] if run.savings else []
    return Group(*parts, "", _traffic(run), *_remarks([run]))


def comparison(runs: Sequence[Run]) -> RenderableType:
    """Several schedules of one workload, one row each, and why each is as fast as it is."""
    first = runs[0]
    letters = [letter(index) for index in range(len(runs))]
    table = house_table(
        "", "schedule", ">tile", ">time", ">TFLOP/s", ">paper", ">MHz", ">W", ">tensor", ">MUFU", ">HBM", gap=1
    )
    for mark, run in zip(letters, runs, strict=True):
        hbm = run.traffic.total("hbm_read") + run.traffic.total("hbm_write")
        table.add_row(
            mark,
            Text(run.schedule, "bold"),
            str(run.tile),
            scaled(metrics.time_s(run), "s"),
            f"{metrics.tflops(run):.0f}",
            ", ".join(f"{each.tflops:.0f}" for each in _published(run)) or "-",
            f"{run.sm_clock_hz / 1e6:.0f}",
            f"{run.power_w:.0f}",
            f"{metrics.tensor_utilization(run):.0%}",
            f"{metrics.mufu_utilization(run):.0%}",
            scaled(hbm, "B"),
        )
    reasons = [
        Text.assemble((run.schedule, "bold"), f", {run.bottleneck.resource}: {run.bottleneck.why}") for run in runs
    ]
    parts: list[RenderableType] = [table, "", shares_of_several(runs, letters), "", *reasons]
    for run in runs:
        parts += ["", Text(run.schedule, "bold"), Savings(run)] if run.savings else []
    return Group(Text(f"{first.workload} on {first.device}"), "", *parts, *_remarks(runs))


def standing(found: Standing) -> RenderableType:
    """The roofline plot, what each resource alone would need, and the runs under it."""
    roof = found.roofline
    needs = house_table("resource alone", ">cycles", ">of the bound", "")
    for resource in found.resources:
        name = Text(resource.name, "bold" if resource.binding else "")
        mark = "binds" if resource.binding else ""
        needs.add_row(name, f"{resource.cycles:,.0f}", percent(resource.share_of_bound), mark)
    runs = house_table("", "schedule", ">TFLOP/s", ">of the bound", ">FLOP per HBM byte", ">per algorithmic byte")
    for index, mark in enumerate(found.marks):
        runs.add_row(
            Text(letter(index), "bold"),
            mark.schedule,
            f"{mark.flops_per_s / 1e12:.0f}",
            percent(mark.share_of_bound),
            f"{mark.flops_per_hbm_byte:,.0f}",
            f"{mark.flops_per_algorithmic_byte:,.0f}",
        )
    title = Text(f"{roof.workload} on {roof.device} at {roof.clock_hz / 1e6:.0f} MHz")
    return Group(title, "", LogLog(found), "", needs, "", runs)


def schedules(found: Iterable[Schedule]) -> RenderableType:
    """Name, idea and paper section of each schedule."""
    table = house_table("schedule", "idea", "source")
    for schedule in found:
        table.add_row(Text(schedule.name, "bold"), schedule.summary, schedule.paper)
    return table


def devices(found: Mapping[str, Device]) -> RenderableType:
    """The devices side by side, in the fields that decide most."""
    table = house_table("device", ">SMs", ">boost MHz", ">fp16 TFLOP/s", ">HBM", ">L2", ">SMEM/SM", ">power")
    for name, each in found.items():
        table.add_row(
            Text(name, "bold"),
            f"{each.sms}",
            f"{each.max_clock_hz / 1e6:.0f}",
            f"{each.sms * each.tensor_rate(2) * each.max_clock_hz / 1e12:,.0f}",
            scaled(each.hbm_bytes_per_s, "B/s"),
            scaled(each.l2_bytes, "B"),
            f"{each.smem_bytes_per_sm / 1024:.0f} KiB",
            f"{each.power_limit_w:.0f} W",
        )
    return table


def device(found: Device) -> RenderableType:
    """Every field of one device with unit and source."""
    table = house_table("field", ">value", "unit", "source")
    for name, entry in device_fields(found).items():
        value = entry["value"]
        shown = value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:,g}"
        table.add_row(name, shown, entry["unit"], entry["source"])
    return table


def device_fields(found: Device) -> dict[str, dict]:
    """Field -> value, unit and source, as in the device's file."""
    return {
        name: {"value": getattr(found, name), "unit": unit, "source": source}
        for name, (unit, source) in found.sources.items()
    }


# -- parts ------------------------------------------------------------------------------------------------------------


def house_table(*columns: str, gap: int = 2) -> Table:
    """A table in the house style; ">" before a column's name aligns it right."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, gap, 0, 0))
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


def _tile(run: Run) -> str:
    cluster = f", cluster {run.tile.cluster}" if run.tile.cluster > 1 else ""
    stages = f", {run.tile.stages} stages" if run.tile.stages > 1 else ""
    return f"{run.tile}{stages}{cluster}"


def _figures(run: Run) -> Table:
    grid = Table.grid(padding=(0, 3, 0, 0))
    left, right = Table.grid(padding=(0, 2, 0, 0)), Table.grid(padding=(0, 2, 0, 0))
    for name, value in (
        ("time", scaled(metrics.time_s(run), "s")),
        ("throughput", f"{metrics.tflops(run):.0f} TFLOP/s"),
        ("cycles", f"{run.cycles:,}"),
        ("SM clock", f"{run.sm_clock_hz / 1e6:.0f} MHz"),
        ("power", f"{run.power_w:.0f} W"),
        ("energy", scaled(metrics.energy_j(run), "J") + " per call"),
    ):
        left.add_row(Text(name, "dim"), value)
    for name, value in (
        ("tensor cores", metrics.tensor_utilization(run)),
        ("MUFU", metrics.mufu_utilization(run)),
        ("issue slots", metrics.issue_utilization(run)),
        ("L2 hits", run.traffic.l2_hit_rate),
    ):
        right.add_row(Text(name, "dim"), bar(value), percent(value))
    grid.add_row(left, right)
    return grid


def _published(run: Run) -> list[Bar]:
    return [bar for bar in match(run.workload, run.schedule, run.device) if not bar.out_of_memory]


def _printed(bar: Bar) -> str:
    clock = f" at {bar.clock_hz / 1e6:.0f} MHz" if bar.clock_hz else ""
    time = f", {scaled(bar.time_s, 's')}" if bar.time_s else ""
    return f"{bar.tflops:.0f} TFLOP/s{time}{clock} ({_place(bar)})"


def _place(bar: Bar) -> str:
    return bar.source if bar.figure in bar.source or bar.figure.startswith("H200") else f"{bar.source}, {bar.figure}"


def _traffic(run: Run) -> Table:
    table = house_table("bytes", ">algorithmic read", ">written", ">L2 read", ">written", ">HBM read", ">written")
    fields = ("algorithmic_read", "algorithmic_write", "l2_read", "l2_write", "hbm_read", "hbm_write")
    for name, counted in run.traffic.by_tensor.items():
        table.add_row(name, *(_bytes(getattr(counted, field)) for field in fields))
    table.add_section()
    table.add_row(*(Text(text, "bold") for text in ("all", *(_bytes(run.traffic.total(field)) for field in fields))))
    return table


def _bytes(count: int) -> str:
    return scaled(count, "B") if count else "-"


def _bottleneck(run: Run) -> Text:
    return Text.assemble(("bottleneck ", "dim"), (run.bottleneck.resource, "bold"), f": {run.bottleneck.why}")


def _remarks(runs: Sequence[Run]) -> list[RenderableType]:
    """Warnings, and what the papers' tables say beyond the schedules shown."""
    lines = [f"warning: {text}" for run in runs for text in run.warnings]
    notes = []
    bars = [each for run in runs for each in _published(run) if each.clock_hz and each.clock_hz != run.sm_clock_hz]
    if bars:
        mhz = bars[0].clock_hz / 1e6
        notes.append(f"published bars ran at {mhz:.0f} MHz: --clock {mhz:.0f} predicts at theirs")
    for other in unmatched(runs[0].workload, runs[0].device):
        notes.append(f"{_place(other)} also has '{other.implementation}': {other.tflops:.0f} TFLOP/s (no schedule here)")
    shown = [Text(line, "yellow") for line in dict.fromkeys(lines)]
    shown += [Text(line, "dim") for line in dict.fromkeys(notes)]
    return [Text(""), *shown] if shown else []
