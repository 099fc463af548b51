"""A roofline plot as an SVG in a page's own colours, and what each resource alone would need."""

from __future__ import annotations

from html import escape
from math import ceil, floor, log10

from ...simulator.units import digits, percent, scaled
from ...traces.standing import RESOURCES, Standing
from ..side_by_side import letter
from .page import table

_WIDTH, _HEIGHT = 720, 380
_LEFT, _RIGHT, _TOP, _BELOW = 64, 12, 24, 44
_COLOURS = {"tensor": "#2f9e6e", "mufu": "#b5559a", "hbm": "#2b8fc4", "l2": "#6a78c8"}


def roofs(found: Standing) -> str:
    """The plot and the table below it."""
    roof, marks = found.roofline, found.marks
    flat = [c for c in roof.ceilings if c.flops_per_s is not None]
    rising = next(c for c in roof.ceilings if c.over == "HBM")
    across = [*(m.flops_per_hbm_byte for m in marks), roof.ridge_flops_per_byte, roof.arithmetic_intensity]
    x0, x1 = floor(log10(min(across)) - 0.3), ceil(log10(max(across)) + 0.2)
    down = [m.flops_per_s for m in marks] + [c.flops_per_s for c in flat]
    y0, y1 = floor(log10(min(down)) - 0.2), log10(max(down)) + 0.25

    def x(value: float) -> float:
        return _LEFT + (log10(value) - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (y1 - log10(value)) / (y1 - y0) * (_HEIGHT - _TOP - _BELOW)

    right, bottom, body = _WIDTH - _RIGHT, _HEIGHT - _BELOW, []
    for exponent in range(x0, x1 + 1):
        at = x(10.0**exponent)
        body.append(_line(at, _TOP, at, bottom, "var(--grid)"))
        label = digits(10.0**exponent).removesuffix(".00").removesuffix(".0")
        anchor = "end" if exponent == x1 else "middle"
        body.append(f'<text class="soft" x="{at:.1f}" y="{bottom + 16}" text-anchor="{anchor}">{label}</text>')
    for exponent in range(ceil(y0), floor(y1) + 1):
        at = y(10.0**exponent)
        body.append(_line(_LEFT, at, right, at, "var(--grid)"))
        body.append(f'<text class="soft" x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{10.0**exponent / 1e12:,g}</text>')
    for c in flat:
        at = y(c.flops_per_s)
        name = f"{RESOURCES[c.name]} {c.flops_per_s / 1e12:,.0f}"
        body.append(_line(_LEFT, at, right, at, _COLOURS[c.name], 2))
        side = -6 if c.name == "tensor" else 15
        body.append(f'<text x="{_LEFT + 6}" y="{at + side:.1f}">{name}</text>')
    low, high = max(10.0**x0, 10.0**y0 / rising.bytes_per_s), min(10.0**x1, 10.0**y1 / rising.bytes_per_s)
    body.append(_line(x(low), y(rising.at(low)), x(high), y(rising.at(high)), _COLOURS["hbm"], 2))
    for index, mark in enumerate(marks):
        at, top, own = x(mark.flops_per_hbm_byte), y(mark.flops_per_s), y(mark.roofline.bound_flops_per_s)
        hint = f"{mark.schedule}: {mark.flops_per_s / 1e12:,.0f} TFLOP/s, {mark.flops_per_hbm_byte:,.0f} FLOP per HBM byte"
        body.append(_line(at - 8, own, at + 8, own, "var(--ink)", 3))
        body.append(f'<circle cx="{at:.1f}" cy="{top:.1f}" r="9" fill="var(--ink)"><title>{escape(hint)}</title></circle>')
        body.append(f'<text x="{at:.1f}" y="{top + 4:.1f}" text-anchor="middle" style="fill:var(--paper)">{letter(index)}</text>')
    body.append('<text class="soft" x="4" y="14">TFLOP/s</text>')
    body.append(f'<text class="soft" x="{right}" y="{_HEIGHT - 8}" text-anchor="end">FLOP per HBM byte</text>')
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="roofline"'
    plot = f'<div class="scroll"><svg class="roofs" {box}>{"".join(body)}</svg></div>'
    named = " · ".join(f"<strong>{letter(n)}</strong> {escape(mark.schedule)}" for n, mark in enumerate(marks))
    signs = "a thick dash is a run's bound at its own clock, the slope is HBM"
    return f'{plot}<p class="caption">{named}; {signs}</p>{_numbers(found)}'


def _line(x1: float, y1: float, x2: float, y2: float, stroke: str, width: int = 1) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}" stroke-width="{width}"/>'


def _numbers(found: Standing) -> str:
    marks = found.marks
    rows = [[f"{name} alone", *(scaled(mark.alone_s(each), "s") for mark in marks)] for each, name in RESOURCES.items()]
    rows += [
        ["predicted", *(scaled(mark.time_s, "s") for mark in marks)],
        ["of the bound", *(percent(mark.share_of_bound) for mark in marks)],
        ["TFLOP/s", *(f"{mark.flops_per_s / 1e12:,.0f}" for mark in marks)],
        ["FLOP per HBM byte", *(f"{mark.flops_per_hbm_byte:,.0f}" for mark in marks)],
    ]
    return table(["", *(f">{letter(n)}" for n in range(len(marks)))], rows)
