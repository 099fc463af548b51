"""Timelines and walks as the plain data that the pages' scripts draw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ...simulator.results.run import Run
from ...traces.beside import Panel, longest
from ...traces.figure import figure
from ...traces.walk import LEVELS, Step, Walk, sized_by_keys
from ...traces.window import GEMM, ON_COPY, ON_GEMM, ON_TURN, SOFTMAX, WORK, Row, Window, short_label, whole
from ..beside import SHARES, headline
from ..palette import HUES, colour, cover_colour
from ..walk import tensors_of

KINDS = (GEMM, SOFTMAX, WORK, ON_COPY, ON_GEMM, ON_TURN)
"""By number in the data; the scripts know the first, and that from the fourth on a warp waits."""
VIEW = 3
"""Loop steps that are in view at first, where several schedules stand below each other."""


@dataclass
class _Names:
    """Texts that many spans share, by number."""

    found: dict[object, int] = field(default_factory=dict)

    def __getitem__(self, name: object) -> int:
        return self.found.setdefault(name, len(self.found))

    def __iter__(self):
        return iter(self.found)


def timeline(run: Run, seen: Window) -> dict:
    """All that a run recorded of its timeline, with a part of it in view."""
    everything = whole(run)
    return _data([_panel(run, everything, "", "")], (seen.start, seen.end), [everything])


def timelines(panels: Sequence[Panel]) -> dict:
    """Several schedules below each other on one axis, the first few blocks in view."""
    drawn = [_panel(each.run, each.window, each.run.schedule, headline(each), each) for each in panels]
    until = longest(panels) * min(1.0, VIEW / max(1, max(panel.blocks for panel in panels)))
    data = _data(drawn, (0, round(until)), [panel.window for panel in panels])
    data["legend"] += [[fill, f"softmax {what}"] for what, fill in SHARES.values()]
    return data


def _data(panels: list[dict], view: tuple[int, int], windows: Sequence[Window]) -> dict:
    """Panels with their texts and colours by number."""
    labels, fills = _Names(), _Names()
    for panel in panels:
        groups = len(panel["groups"])
        for row in panel["rows"]:
            row["spans"] = [
                [span.start, span.end - span.start, labels[span.label], span.step, span.group, KINDS.index(span.kind),
                 fills[colour(span.step, span.group, groups)]]
                for span in row["spans"]
            ]  # fmt: skip
    stepped = [[label, short_label(label, -1), int(short_label(label, 1) != short_label(label, -1))] for label in labels]
    return {"panels": panels, "view": list(view), "labels": stepped, "fills": list(fills), "legend": _legend(windows)}


def _panel(run: Run, window: Window, name: str, said: str, panel: Panel | None = None) -> dict:
    drawn = figure(window)
    copies = {each.label: [each.way, each.l2, each.hbm] for each in run.sample.copies} if run.sample else {}
    idle, covers = (panel.idle, _covers(panel)) if panel else ({}, {})
    under = _softmax_rows(drawn.rows) if panel else {}
    rows = [
        {"name": row.name, "kind": row.kind, "idle": idle.get(row.name), "covered": under.get(row.name, ""), "spans": row.spans}
        for row in drawn.rows
    ]
    return {
        "name": name, "headline": said, "title": window.title, "start": window.start, "end": window.end,
        "groups": list(window.warpgroups), "copies": copies, "rows": rows, "covers": covers,
    }  # fmt: skip


def _softmax_rows(rows: Iterable[Row]) -> dict[str, str]:
    """By row in which a warpgroup's softmax stands, the warpgroup's number as text."""
    return {row.name: str(s.group) for row in rows if row.kind == "warp" for s in row.spans if s.kind == SOFTMAX}


def _covers(panel: Panel) -> dict[str, list[list]]:
    """By warpgroup, what its softmax runs under, as colours."""
    found: dict[str, list[list]] = {}
    for cover in panel.covers:
        found.setdefault(str(cover.group), []).append([cover.start, cover.end, cover_colour(cover.by, cover.group)])
    return found


def _legend(windows: Sequence[Window]) -> list[list[str]]:
    first = windows[0]
    groups, steps = len(first.warpgroups), first.steps[: len(HUES)]
    items = [[colour(step, 0, groups), f"{first.step} {step}" if step == steps[0] else str(step)] for step in steps]
    if groups > 1 and steps:
        items += [[colour(steps[0], group, groups), name] for group, name in enumerate(first.warpgroups)]
    items.append([colour(-1, 0, groups), "outside the loop, turns"])
    figures = [figure(window) for window in windows]
    named = dict(each for drawn in figures for each in drawn.softmax.items())
    gemms = "a warp issues a GEMM" if any(drawn.issued for drawn in figures) else "a GEMM on the tensor cores"
    said = [f"S, O framed: {gemms}", *(f"{letter} {label}" for letter, label in named.items()), "lines: waits, dashed for a turn"]
    return [*items, *(["transparent", text] for text in said)]


# -- walks ----------------------------------------------------------------------------------------------------------------


def walks(found: Sequence[Walk], usual: Iterable[Walk] = ()) -> dict:
    """Walks to choose from, by schedule, mask and block size; `usual` are those shown first."""
    shown = list(usual)
    return {"levels": [level.replace(" to ", " → ") for level in LEVELS], "walks": [_walk(each, each in shown) for each in found]}


def _walk(found: Walk, usual: bool) -> dict:
    """A walk; steps that move alike share a pattern."""
    kernels, patterns = _Names(), _Names()
    steps = [
        [kernels[s.kernel], s.head, -1 if s.row is None else s.row, -1 if s.column is None else s.column, patterns[_pattern(s)]]
        for s in found.steps
    ]
    by_keys = sized_by_keys(found.schedule)
    return {
        "schedule": found.schedule, "causal": found.workload.causal, "tile": str(found.tile), "usual": usual,
        "size": found.tile.block_n if by_keys else found.tile.block_m,
        "sized": "keys in a block" if by_keys else "queries in a tile",
        "heads": found.workload.batch * found.workload.heads, "rows": found.rows, "columns": found.columns,
        "kernels": list(kernels), "steps": steps, "totals": list(found.so_far[-1]),
        "patterns": [{"bytes": list(sizes), "tensors": list(tensors)} for sizes, tensors in patterns],
    }  # fmt: skip


def _pattern(step: Step) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Bytes by level, and which tensors they are of."""
    return step.levels, tuple(", ".join(tensors_of(step, level)) for level in range(len(LEVELS)))
