"""The list of compiled kernels as a rich table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from .tables import house_table

if TYPE_CHECKING:
    from ..kernels.cuda.catalog import Entry


def listing(found: Sequence[Entry]) -> RenderableType:
    """One row per kernel (CTAs of a cluster, registers per thread at entry), then what the compiler remarked or refused."""
    table = house_table(
        "schedule", "dtype", ">d", "mask", ">tile", ">CTAs", ">regs", ">spills", ">SMEM", ">cubin", "cached", gap=1
    )
    for entry in found:
        config, report = entry.config, entry.built.report if entry.built else None
        figures = ["-"] * 4
        if report:
            spills = Text(str(report.spill_bytes), "bold red" if report.spill_bytes else "")
            figures = [str(report.registers), spills, _kilobytes(report.smem_bytes), _kilobytes(report.cubin_bytes)]
        table.add_row(
            Text(config.asked, "bold"),
            config.dtype,
            str(config.head_dim),
            "causal" if config.causal else "full",
            str(config.tile),
            str(config.tile.cluster),
            *figures,
            _state(entry),
        )
    return Group(table, *_remarks(found))


def _state(entry: Entry) -> Text:
    if entry.error:
        return Text("broken", "bold red")
    if not entry.built:
        return Text("no", "dim")
    return Text("yes" if entry.built.cached else "now", "green")


def _kilobytes(count: int) -> str:
    return f"{count / 1000:.0f} kB"


def _remarks(found: Sequence[Entry]) -> list[Text]:
    said = [(entry.config.name, remark) for entry in found if entry.built for remark in entry.built.report.remarks]
    said += [(entry.config.name, entry.error) for entry in found if entry.error]
    return [Text.assemble((name, "bold"), f"  {remark}") for name, remark in said]
