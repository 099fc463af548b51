"""Runs, schedules and devices as rich tables and panels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from ..simulator.devices.device import Device
from ..simulator.results import metrics
from ..simulator.results.run import Run
from ..simulator.schedules import Schedule
from ..simulator.units import percent, scaled
from ..traces.published import Bar, Beside, unmatched
from .breakdown import Savings, Shares, bar, savings_of_several, shares_of_several
from .side_by_side import SideBySide, letter
from .whole_table import WholeTable

_TWO_COLUMNS = 76


def result(run: Run, published: Sequence[Beside] = ()) -> RenderableType:
    """Everything about one run: figures, utilisations, the tensor cores' time, bottleneck, bytes per tensor, warnings."""
    title = Text.assemble((run.schedule, "bold"), f" on {run.device}\n{run.workload}, tile {_tile(run)}")
    printed = [Text.assemble(("published   ", "dim"), _printed(run, each)) for each in published]
    parts: list[RenderableType] = [title, "", Figures(run), *printed, "", Shares(run.breakdown), "", _bottleneck(run)]
    parts += ["", Savings(run)] if run.savings else []
    return Group(*parts, "", Moved(run), *_remarks([run]))


def together(runs: Sequence[Run], passes: int) -> RenderableType:
    """Forward and backward of each schedule as one: a training step's attention."""
    table = house_table("forward and backward", ">time", ">TFLOP/s")
    for first in range(0, len(runs), passes):
        both = runs[first : first + passes]
        seconds = sum(map(metrics.time_s, both))
        table.add_row(both[0].schedule, scaled(seconds, "s"), f"{sum(run.workload.flops for run in both) / seconds / 1e12:.0f}")
    return table


def comparison(runs: Sequence[Run], published: Sequence[Sequence[Beside]]) -> RenderableType:
    """Several schedules of one workload in columns, where the time of each goes, and the cause that costs it most."""
    first = runs[0]
    named = [Text.assemble((f"{letter(i)} {run.schedule}", "bold"), f", tile {_tile(run)}") for i, run in enumerate(runs)]
    reasons = [
        Text.assemble((f"{letter(i)} {run.schedule}", "bold"), f", {run.bottleneck.resource}: {run.bottleneck.why}")
        for i, run in enumerate(runs)
    ]
    table = SideBySide(
        [
            ("time", [scaled(metrics.time_s(run), "s") for run in runs]),
            ("TFLOP/s", [f"{metrics.tflops(run):.0f}" for run in runs]),
            ("SM clock", [f"{run.sm_clock_hz / 1e6:.0f} MHz" for run in runs]),
            ("power", [f"{run.power_w:.0f} W" for run in runs]),
            ("tensor cores", [percent(metrics.tensor_utilization(run)) for run in runs]),
            ("MUFU", [percent(metrics.mufu_utilization(run)) for run in runs]),
            ("issue slots", [percent(metrics.issue_utilization(run)) for run in runs]),
            ("HBM", [scaled(run.traffic.total("hbm_read") + run.traffic.total("hbm_write"), "B") for run in runs]),
            None,
            *shares_of_several(runs),
            *savings_of_several(runs),
        ]
    )
    pairs = [(run, each) for run, found in zip(runs, published, strict=True) for each in found]
    printed = [Text.assemble((f"published {run.schedule}: ", "dim"), _printed(run, each)) for run, each in pairs]
    title = Text(f"{first.workload} on {first.device}")
    return Group(title, "", *named, "", table, "", *reasons, *(["", *printed] if printed else []), *_remarks(runs))


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


def house_table(*columns: str, gap: int = 2) -> WholeTable:
    """A table in the house style; ">" before a column's name aligns it right."""
    table = WholeTable(box=None, pad_edge=False, header_style="dim", padding=(0, gap, 0, 0))
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


def _tile(run: Run) -> str:
    cluster = f", cluster {run.tile.cluster}" if run.tile.cluster > 1 else ""
    stages = f", {run.tile.stages} stages" if run.tile.stages > 1 else ""
    parts = f", {run.tile.parts} parts" if run.tile.parts > 1 else ""
    packed = "" if run.tile.packed else ", heads apart"
    resident = f", {run.tile.resident} CTAs an SM" if run.tile.resident > 1 else ""
    return f"{run.tile}{stages}{cluster}{parts}{packed}{resident}"


class Figures:
    """A run's figures beside how busy its units are; below each other where there is no room."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        run = self.run
        left, right = (Table.grid(padding=(0, 2, 0, 0)) for _ in range(2))
        for name, value in (
            ("time", scaled(metrics.time_s(run), "s")),
            ("throughput", f"{metrics.tflops(run):.0f} TFLOP/s"),
            ("cycles", f"{run.cycles:,}"),
            ("SM clock", f"{run.sm_clock_hz / 1e6:.0f} MHz"),
            ("power", f"{run.power_w:.0f} W"),
            ("energy", scaled(metrics.energy_j(run), "J") + " per call"),
            ("", scaled(metrics.joules_per_million_tokens(run), "J") + " per Mtoken"),
        ):
            left.add_row(Text(name, "dim"), value)
        for name, value in (
            ("tensor cores", metrics.tensor_utilization(run)),
            ("MUFU", metrics.mufu_utilization(run)),
            ("issue slots", metrics.issue_utilization(run)),
            ("L2 hits", run.traffic.l2_hit_rate),
        ):
            right.add_row(Text(name, "dim"), bar(value), percent(value))
        if options.max_width < _TWO_COLUMNS:
            yield from (left, *self._kernels(), "", right)
            return
        grid = Table.grid(padding=(0, 3, 0, 0))
        grid.add_row(left, right)
        yield from (grid, *self._kernels())

    def _kernels(self) -> Iterator[Table]:
        """Each kernel of a call of several, with its share of the time: a line of its own, so that the bars keep their room."""
        if len(self.run.kernels) > 1:
            line = Table.grid(padding=(0, 2, 0, 0))
            line.add_column(min_width=len("throughput"))
            line.add_row(
                Text("kernels", "dim"),
                ", ".join(f"{name} {percent(cycles / self.run.cycles)}" for name, cycles in self.run.kernels),
            )
            yield line


def _printed(run: Run, beside: Beside) -> str:
    """A published figure, and what is predicted under its conditions: only those two are to be held together."""
    bar = beside.bar
    where = f"at {bar.clock_hz / 1e6:.0f} MHz" if bar.clock_hz else f"clock {bar.regime}"
    time = f", {scaled(bar.time_s, 's')}" if bar.time_s else ""
    other = f"; theirs is another program, see {beside.another}" if beside.another else ""
    return (
        f"{bar.tflops:.0f} TFLOP/s{time} {where} ({_place(bar)}); "
        f"{run.schedule} is predicted {beside.predicted_tflops:.0f} there{other}"
    )


def _place(bar: Bar) -> str:
    return bar.source if bar.figure in bar.source or bar.figure.startswith("H200") else f"{bar.source}, {bar.figure}"


class Moved:
    """Bytes of each tensor at three levels, read and written; the levels below each other where there is no room."""

    def __init__(self, run: Run) -> None:
        self.traffic = run.traffic

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width >= _TWO_COLUMNS:
            yield self._table(_LEVELS)
            return
        for number, level in enumerate(_LEVELS):
            if number:
                yield ""
            yield self._table((level,))

    def _table(self, levels: Iterable[str]) -> Table:
        levels = tuple(levels)
        heads = [head for level in levels for head in (f">{_LEVELS[level]} read", ">written")]
        fields = [f"{level}_{way}" for level in levels for way in ("read", "write")]
        table = house_table("bytes", *heads)
        for name, counted in self.traffic.by_tensor.items():
            table.add_row(name, *(_bytes(getattr(counted, field)) for field in fields))
        table.add_section()
        table.add_row(*(Text(text, "bold") for text in ("all", *(_bytes(self.traffic.total(field)) for field in fields))))
        return table


_LEVELS = {"algorithmic": "algorithmic", "l2": "L2", "hbm": "HBM"}


def _bytes(count: int) -> str:
    return scaled(count, "B") if count else "-"


def _bottleneck(run: Run) -> Text:
    return Text.assemble(("bottleneck ", "dim"), (run.bottleneck.resource, "bold"), f": {run.bottleneck.why}")


def _remarks(runs: Sequence[Run]) -> list[RenderableType]:
    """Warnings, and what the papers' tables say beyond the schedules shown."""
    lines = [f"warning: {text}" for run in runs for text in run.warnings]
    notes = []
    for other in unmatched(runs[0].workload, runs[0].device):
        notes.append(f"{_place(other)} also has '{other.implementation}': {other.tflops:.0f} TFLOP/s (no schedule here)")
    shown = [Text(line, "yellow") for line in dict.fromkeys(lines)]
    shown += [Text(line, "dim") for line in dict.fromkeys(notes)]
    return [Text(""), *shown] if shown else []
