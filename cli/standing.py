"""A Standing as text: the plot, what each resource alone would need, and what keeps each run below its bound."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from ..simulator.units import percent, scaled
from ..traces.standing import RESOURCES, Mark, Standing
from .loglog import LogLog
from .side_by_side import SideBySide, letter

_SAME = 1.001
"""Bounds within a thousandth bind together."""


def standing(found: Standing) -> RenderableType:
    """The roofline plot, the runs under it, and the cause that costs each most."""
    roof, named = found.roofline, [(letter(index), mark) for index, mark in enumerate(found.marks)]
    title = Text(f"{roof.workload} on {roof.device}; lines at {roof.clock_hz / 1e6:.0f} MHz")
    reasons = [
        Text.assemble((f"{sign} {mark.schedule}", "bold"), f", {mark.bottleneck.resource}: {mark.bottleneck.why}")
        for sign, mark in named
    ]
    return Group(title, "", LogLog(found), "", runs(found.marks), *_floors(found.marks), "", *reasons)


def runs(marks: Sequence[Mark]) -> SideBySide:
    """What every resource alone would need at each run's clock, and where the run stands."""
    alone = [
        (f"{name} alone", [Text(scaled(m.alone_s(each), "s"), "bold" if each in _binding(m) else "") for m in marks])
        for each, name in RESOURCES.items()
    ]
    return SideBySide(
        [
            ("SM clock", [f"{mark.roofline.clock_hz / 1e6:.0f} MHz" for mark in marks]),
            *alone,
            ("binds", [Text("\n".join(RESOURCES[each] for each in _binding(mark)), "bold") for mark in marks]),
            ("predicted", [scaled(mark.time_s, "s") for mark in marks]),
            ("of the bound", [percent(mark.share_of_bound) for mark in marks]),
            ("TFLOP/s", [f"{mark.flops_per_s / 1e12:,.0f}" for mark in marks]),
            ("L2 allows", [f"{mark.l2_flops_per_s / 1e12:,.0f}" for mark in marks]),
            ("FLOP per HBM byte", [f"{mark.flops_per_hbm_byte:,.0f}" for mark in marks]),
        ]
    )


def _floors(marks: Sequence[Mark]) -> list[RenderableType]:
    """What each resource of an SM alone needs for a step of each schedule's loop, the longest in bold."""
    if any(mark.floors is None for mark in marks):
        return []
    rows = []
    for name in ("tensor cores", "shared memory", "MUFU", "loads", "reduce-adds"):
        cells = [mark.floors.cycles[name] for mark in marks]
        if any(cells):
            longest = [max(mark.floors.cycles.values()) for mark in marks]
            styles = ["bold" if each == most else "" for each, most in zip(cells, longest, strict=True)]
            rows.append((name, [Text(f"{each:,.0f}", style) for each, style in zip(cells, styles, strict=True)]))
    rows.append(("with TMA, B/cycle", [f"{mark.floors.at_full_rate:.0f}" for mark in marks]))
    title = "a step of the loop: SM cycles that each resource alone needs (shared memory: operands and stores), and what passes"
    return ["", Text(f"{title} shared memory, TMA's copies too, if the tensor cores never wait", "dim"), SideBySide(rows)]


def _binding(mark: Mark) -> list[str]:
    """The resources that bind, all those that would take as long as the one that takes longest."""
    bound = mark.roofline.bound_cycles
    return [each for each in RESOURCES if getattr(mark.roofline, f"{each}_cycles") * _SAME >= bound]
