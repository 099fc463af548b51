"""The rows of a sweep on a terminal: what varies, and the figures that are asked for most."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from ..simulator.units import digits, percent, scaled
from .tables import house_table

if TYPE_CHECKING:
    from ..traces.answers.table import Table

MOST_ROWS, MOST_REASONS = 60, 5
"""Rows that are shown, and reasons why some are not possible; --out, --csv and --json have them all."""
_WIDE = 100
_HEADS = {"seqlen_q": "seqlen", "head_dim": "d", "causal": "mask", "clock_asked_mhz": "asked"}


def shown(table: Table, sentence: str, width: int) -> RenderableType:
    """The sentence, then the rows, with the options in which they differ; fewer figures where there are few columns of text."""
    from ..traces.answers.sweep import varying, word

    columns = varying(table) or ["schedule"]
    heads = [">time", ">TFLOP/s", ">J/Mtoken", *([">MHz", ">tensor", ">HBM", "bottleneck"] if width >= _WIDE else [])]
    found = house_table(*(_HEADS.get(name, name.replace("_", " ")) for name in columns), *heads)
    rows = table.rows
    for row in rows[:MOST_ROWS]:
        options = [word(name, row[name], short=True) for name in columns]
        found.add_row(*options, *_figures(row)[: len(heads)])
    parts: list[RenderableType] = [Text(sentence, "bold"), Text(""), found]
    parts += [Text(why, "yellow") for why in dict.fromkeys(row["error"] for row in rows if row["error"])][:MOST_REASONS]
    if len(rows) > MOST_ROWS:
        parts.append(Text(f"{len(rows) - MOST_ROWS:,} more rows: --out FILE, --csv or --json have all", "dim"))
    return Group(*parts)


def _figures(row: dict) -> list[str | Text]:
    if row["error"]:
        return ["not possible", *["-"] * 6]
    return [
        scaled(row["time_s"], "s"),
        f"{row['tflops']:.0f}",
        digits(row["joules_per_million_tokens"]),
        f"{row['sm_clock_mhz']:.0f}",
        percent(row["tensor_utilization"]),
        scaled(row["hbm_read_bytes"] + row["hbm_write_bytes"], "B"),
        row["bottleneck"],
    ]
