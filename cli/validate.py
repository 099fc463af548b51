"""Validation reports and the kill table as rich tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from .tables import house_table

if TYPE_CHECKING:
    from ..kernels.validation.check import Check
    from ..kernels.validation.kill_table import KillTable
    from ..kernels.validation.report import Report

_FAILURES_SHOWN = 3  # of each group, in words
_STYLE = {"pass": "green", "fail": "bold red", "skip": "dim", "note": "cyan"}


def report(found: Report, titles: Mapping[str, str]) -> RenderableType:
    """One table per group, the failures in words, the RMSE table, the conclusion."""
    parts: list[RenderableType] = []
    for group in found.groups:
        parts += [Text.assemble((group, "bold"), (f"  {titles.get(group, '')}", "dim")), _checks(found.of(group)), Text("")]
    if found.rmse:
        parts += [_rmse(found.rmse), Text("")]
    for group in found.groups:
        failures = [check for check in found.of(group) if check.verdict == "fail"]
        for check in failures[:_FAILURES_SHOWN]:
            parts += [_failure(found, check), Text("")]
        if len(failures) > _FAILURES_SHOWN:
            parts += [Text(f"and {len(failures) - _FAILURES_SHOWN} more in {group}: --json holds every message", "dim"), Text("")]
    parts += [_note(check) for check in found.notes] + [Text("")] * bool(found.notes)
    return Group(*parts, conclusion(found))


def conclusion(found: Report) -> Text:
    """The verdict in one line."""
    return Text(found.conclusion, "bold green" if found.passed else "bold red")


def _checks(checks: Sequence[Check]) -> RenderableType:
    table = house_table("check", ">max error", ">allowed", ">mean", ">LSE", "verdict", gap=1)
    for check in checks:
        figures = [_figure(check.figures.get(name)) for name in _FIGURES]
        verdict = Text(check.verdict, _STYLE[check.verdict])
        table.add_row(Text(check.case), *figures, verdict)
    skipped = [c for c in checks if c.verdict == "skip"]
    reasons = dict.fromkeys(c.message for c in skipped)
    notes = [Text(f"skipped {sum(c.message == reason for c in skipped)}: {reason}", "dim") for reason in reasons]
    return Group(table, *notes)


_FIGURES = ("max_error", "max_error_allowed", "mean_error", "lse_error")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _failure(found: Report, check: Check) -> RenderableType:
    return Group(
        Text.assemble(("fail ", "bold red"), (f"{check.group}, {check.case}", "bold")),
        Text(f"     {check.message}"),
        Text(f"     reproduce: {found.reproduce(check)}", "dim"),
    )


def _note(check: Check) -> RenderableType:
    return Group(
        Text.assemble(("note ", "cyan"), (f"{check.group}, {check.case}", "bold")), Text(f"     {check.message}")
    )


def _rmse(rows: Sequence[Mapping]) -> RenderableType:
    table = house_table("RMSE on N(0,1) + N(0,100) Bernoulli(0.001)", ">RMSE", "source")
    for row in rows:
        table.add_row(Text(row["method"]), f"{row['rmse']:.1e}", Text(row["source"]))
    return table


def kill_table(found: KillTable) -> RenderableType:
    """Planted fault by group: which groups reject it; then what each group alone rejects."""
    table = house_table("planted fault", *(f">{group}" for group in found.groups), "what is wrong with it", gap=1)
    for name in found.reports:
        kills = found.kills(name)
        cells = [Text("×" if kills[group] else "·", "red" if kills[group] else "dim") for group in found.groups]
        alive = not any(kills.values())
        table.add_row(Text(name, "bold red" if alive else "bold"), *cells, Text(found.mutants[name].fault))
    needed = [
        Text(f"only {group} rejects: {', '.join(found.only_by(group)) or 'nothing'}", "dim") for group in found.groups
    ]
    verdict = Text(found.conclusion, "bold green" if found.passed else "bold red")
    return Group(table, Text(""), *needed, Text(""), verdict)
