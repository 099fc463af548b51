"""The quantities that a prediction and a measurement share, and their errors, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..simulator.units import percent, scaled

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..traces.comparison import Comparison, Quantity

MAIN = "main kernel"
"""Of a call of several kernels, which only a backward is."""


def quantities(found: Comparison) -> RenderableType:
    """A table of every quantity of both runs, with the error; what was not measured is missing."""
    from rich.text import Text

    from .tables import house_table

    table = house_table("", ">predicted", ">measured", ">error")
    for row in found.rows:
        if row.quantity.name == MAIN and not found.measured.workload.backward:
            continue
        cells = [value_of(row.quantity, value) for value in (row.predicted, row.measured)]
        table.add_row(Text(row.quantity.name, "dim"), *cells, error_of(row.quantity, row.error))
    return table


def value_of(quantity: Quantity, value: float | None) -> str:
    """A value with its unit."""
    if value is None:
        return "missing"
    if quantity.is_share:
        return percent(value)
    if quantity.unit == "cycles":
        return f"{value:,.0f}"
    return f"{value / 1e6:,.0f} MHz" if quantity.unit == "Hz" else scaled(value, quantity.unit)


def error_of(quantity: Quantity, error: float | None, signed: bool = True) -> str:
    """An error in percent, or in points of a share."""
    if error is None:
        return "-"
    sign = "+" if signed else ""
    return f"{error * 100:{sign}.1f} {'pp' if quantity.is_share else '%'}"
