"""A run, and any table, as a little HTML: what a notebook shows of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from ..units import percent, scaled
from . import metrics


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> str:
    """A table under a title; the first column names what its row is, the others are aligned right."""
    cells = [
        "".join(f"<td style='text-align:{'left' if n == 0 else 'right'}'>{escape(cell)}</td>" for n, cell in enumerate(row))
        for row in rows
    ]
    heads = "".join(f"<th style='text-align:{'left' if n == 0 else 'right'}'>{escape(name)}</th>" for n, name in enumerate(columns))
    below = f"<p>{escape(note)}</p>" if note else ""
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<p><b>{escape(title)}</b></p><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>{below}"


def of_run(run: Any) -> str:
    """The figures of a Run (run.py), what it moves over HBM, and what holds it back; what was not measured is left out."""
    moved = [run.traffic.total(f"hbm_{way}") for way in ("read", "write")]
    found = [
        ("time", scaled(metrics.time_s(run), "s")),
        ("throughput", f"{metrics.tflops(run):.0f} TFLOP/s"),
        ("cycles", f"{run.cycles:,}"),
        ("SM clock", f"{run.sm_clock_hz / 1e6:.0f} MHz"),
        ("power", "" if run.power_w is None else f"{run.power_w:.0f} W"),
        ("tensor cores", percent(metrics.tensor_utilization(run))),
        ("MUFU", percent(metrics.mufu_utilization(run))),
        ("issue slots", percent(metrics.issue_utilization(run))),
        *((name, "" if size is None else scaled(size, "B")) for name, size in zip(("HBM read", "HBM written"), moved, strict=True)),
    ]
    title = f"{run.schedule} on {run.device}, {run.origin}: {run.workload}" + (f", tile {run.tile}" if run.tile else "")
    notes = [f"{run.bottleneck.resource}: {run.bottleneck.why}", *(f"warning: {text}" for text in run.warnings)]
    return table(title, ("", ""), [row for row in found if row[1]], ". ".join(notes))
