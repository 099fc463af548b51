"""Series: a sweep's rows as lines of a figure, what is plotted over what, and which rows belong to one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...simulator.errors import UsageError, did_you_mean
from .sweep import INPUTS, OUTPUTS, WORDS, named, varying
from .table import Table

NAMES: Mapping[str, str] = {
    "seqlen_q": "sequence length",
    "seqlen_k": "length of keys",
    "head_dim": "head dim",
    "kv_heads": "key and value heads",
    "clock_asked_mhz": "SM clock, MHz",
    "tflops": "TFLOP/s",
    "time_s": "time, s",
    "sm_clock_mhz": "SM clock, MHz",
    "power_w": "power, W",
    "energy_j": "energy of a call, J",
    "joules_per_million_tokens": "J per million tokens",
    "kwh_per_million_tokens": "kWh per million tokens",
    "hbm_read_bytes": "read from HBM, bytes",
}
"""What a column is called on an axis, where its own name is no word."""
MOST_LINES = 12


@dataclass(frozen=True)
class Figure:
    """Lines of (x, y) in the order of x, by name; the names of both axes."""

    x: str
    y: str
    lines: Mapping[str, tuple[tuple[float, float], ...]]

    @property
    def doubling(self) -> bool:
        """Whether x is drawn on a logarithmic scale: it spans more than a factor of four."""
        every = [x for line in self.lines.values() for x, _ in line]
        return min(every) > 0 and max(every) / min(every) > 4


def figure(table: Table, x: str | None = None, y: str = "tflops") -> Figure:
    """The lines of a sweep: `y` over `x`, by default over the number that takes most values; all else that varies names lines.

    Raises UsageError where nothing varies that can be an axis, for names that are no columns, and for more than MOST_LINES lines.
    """
    figures = [name for name in OUTPUTS if name not in WORDS]
    if y not in figures:
        raise UsageError(f"there is no figure {y!r} to plot ({', '.join(figures)}){did_you_mean(y, figures)}")
    found = [row for row in table.rows if not row["error"]]
    vary = varying(table)
    numbers = [name for name in vary if name not in WORDS and name != "causal"]
    across = _axis(x, numbers, {name: len(set(table[name])) for name in numbers})
    others = [name for name in vary if name != across]
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in found:
        lines.setdefault(named(row, others) or str(row["schedule"]), []).append((float(row[across]), float(row[y])))
    if len(lines) > MOST_LINES:
        raise UsageError(f"{len(lines)} lines are more than a figure shows ({MOST_LINES}): sweep over fewer options at a time")
    return Figure(across, y, {name: tuple(sorted(points)) for name, points in lines.items()})


def _axis(x: str | None, numbers: list[str], counts: Mapping[str, int]) -> str:
    if x is not None:
        asked = "seqlen_q" if x == "seqlen" else x
        if asked not in INPUTS or asked in WORDS:
            raise UsageError(f"there is no axis {x!r} to plot over{did_you_mean(x, [*numbers, 'seqlen'])}")
        if asked not in numbers:
            raise UsageError(f"{x} does not vary here; what does: {', '.join(numbers) or 'nothing'}")
        return asked
    if not numbers:
        raise UsageError("nothing varies that could be an axis: give a list of lengths, say")
    return max(numbers, key=lambda name: counts[name])


def name_of(column: str) -> str:
    """What an axis is called."""
    return NAMES.get(column, column.replace("_", " "))
