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
    return Group(title, "", LogLog(found), "", runs(found.marks), "", *reasons)


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


def _binding(mark: Mark) -> list[str]:
    """The resources that bind, all those that would take as long as the one that takes longest."""
    bound = mark.roofline.bound_cycles
    return [each for each in RESOURCES if getattr(mark.roofline, f"{each}_cycles") * _SAME >= bound]
