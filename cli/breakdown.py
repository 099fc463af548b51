"""Where the tensor cores' time goes, and what each resource twice as fast would save."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from ..simulator.results.breakdown import Breakdown
from ..simulator.results.run import Run
from ..simulator.units import percent, scaled
from .side_by_side import Row

_NAMES = {
    "useful": ("useful work", "the workload's FLOPs at the tensor cores' peak"),
    "padding": ("padding", "rows and keys of a tile beyond the lengths"),
    "masked": ("masked pairs", "above the diagonal, in tiles that are computed"),
    "slow_gemms": ("slow GEMMs", "mma.sync, or operands that come too late"),
    "softmax": ("exposed softmax", "the next GEMM's warpgroup is in arithmetic"),
    "memory": ("loads and stores", "it waits for shared memory to be filled or emptied"),
    "latency": ("between GEMMs", "results, issue, barriers, turns"),
    "prologue": ("prologue", "before a tile's first GEMM"),
    "epilogue": ("epilogue", "behind a tile's last GEMM"),
    "tail": ("last wave", "SMs that have run out of CTAs"),
    "no_cta": ("SMs without work", "they never get a CTA"),
    "launch": ("launch", "of the kernels"),
}
"""Part of a Breakdown -> its name, and what it is."""
_SHOWN = 0.0005
_BAR, _WIDE = 20, 96
_EIGHTHS = " ▏▎▍▌▋▊▉█"


class Shares:
    """The parts of one breakdown as bars, in the order of a Breakdown; parts of nothing are left out."""

    def __init__(self, breakdown: Breakdown | None) -> None:
        self.breakdown = breakdown

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.breakdown is None:
            yield Text("tensor cores' time: counters do not tell where it goes", "dim")
            return
        wide = options.max_width >= _WIDE
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, justify="right")
        for name, share in self.breakdown.to_dict().items():
            if share < _SHOWN:
                continue
            title, meaning = _NAMES[name]
            row = [Text(title), bar(share, "green" if name == "useful" else "yellow"), percent(share)]
            table.add_row(*row, *([Text(meaning, "dim")] if wide else []))
        yield Text("tensor cores' time, of all SMs over all cycles", "dim")
        yield table


def shares_of_several(runs: Sequence[Run]) -> list[Row | None]:
    """The breakdowns of several runs, a row for each part that any of them has, under a heading."""
    parts = [run.breakdown.to_dict() if run.breakdown else {} for run in runs]
    rows = [
        (title, [percent(each[name]) if each.get(name, 0.0) >= _SHOWN else "-" for each in parts])
        for name, (title, _) in _NAMES.items()
        if any(each.get(name, 0.0) >= _SHOWN for each in parts)
    ]
    return [("tensor cores' time", [""] * len(runs)), *rows]


def parts_of(runs: Sequence[Run]) -> dict[int, tuple[str, list[float]]]:
    """The parts of a breakdown that any of several runs has, by their place in it: name, and the share of each run."""
    parts = [run.breakdown.to_dict() if run.breakdown else {} for run in runs]
    found = {n: (title, [each.get(name, 0.0) for each in parts]) for n, (name, (title, _)) in enumerate(_NAMES.items())}
    return {n: (title, values) for n, (title, values) in found.items() if max(values) >= _SHOWN}


def savings_of_several(runs: Sequence[Run]) -> list[Row | None]:
    """What each resource twice as fast would save, where that was asked."""
    if not all(run.savings for run in runs):
        return []
    rows = [[each.saved for each in found] for found in zip(*(run.savings for run in runs), strict=True)]
    shown = [[percent(0.0 - round(saved, 3), signed=True) for saved in row] for row in rows]
    names = [f"{each.resource} twice as fast" for each in runs[0].savings]
    return [None, *zip(names, shown, strict=True)]


class Savings:
    """What each resource twice as fast would save, the largest saving first, and which fields of the device changed."""

    def __init__(self, run: Run) -> None:
        self.found = sorted(run.savings or (), key=lambda saving: -saving.saved)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.max_width >= _WIDE
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        table.add_column("twice as fast", no_wrap=True)
        table.add_column("time", justify="right", no_wrap=True)
        table.add_column("falls by", justify="right", no_wrap=True)
        if wide:
            table.add_column("device fields that change")
        for each in self.found:
            row = [Text(each.resource, "bold"), scaled(each.time_s, "s"), percent(round(each.saved, 3) + 0.0)]
            table.add_row(*row, *([Text(", ".join(each.changed), "dim")] if wide else []))
        yield table


def bar(fraction: float, style: str = "cyan") -> Text:
    """A small bar in eighths of a cell."""
    eighths = round(min(1.0, max(0.0, fraction)) * _BAR * 8)
    full, rest = divmod(eighths, 8)
    return Text(("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(_BAR, "·"), style)
