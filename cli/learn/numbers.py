"""Numbers of a lesson as text, by their unit."""

from __future__ import annotations

from ...simulator.units import digits, percent, scaled
from ...traces.lessons.parts import Cell

_PREFIXED = ("B", "s", "Hz", "W", "J", "FLOP", "B/s", "FLOP/s")


def written(cell: Cell) -> str:
    """A number as it is read: three digits and a unit, all digits of a count; a text as it is."""
    if isinstance(cell, str):
        return cell
    value, unit = cell.value, cell.unit
    if unit in _PREFIXED:
        return scaled(value, unit)
    if unit == "%":
        return percent(value)
    if unit == "x":
        return f"{digits(value)} times"
    if unit == "exact":
        return f"{value:g}" if abs(value) < 1e5 else f"{value:,.0f}"
    text = f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 99.95 else digits(value)
    return f"{text} {unit}".rstrip()
