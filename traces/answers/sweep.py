"""Sweep: predictions at every crossing of lists of options, as rows that come while they are made, and as one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack

from ...simulator.errors import UsageError
from ...simulator.results import metrics
from ...simulator.results.run import Run
from ...simulator.schedules.own import is_own
from ..predictions import Advance, Elsewhere, Question, content, processes, stream
from . import grid
from .grid import Point
from .table import Table
from .verdict import CLOSE

INPUTS = (
    "schedule", "device", "set", "direction", "batch", "heads", "kv_heads", "seqlen_q", "seqlen_k", "head_dim", "dtype", "causal",
    "tile", "stages", "consumers", "cluster", "clock_asked_mhz", "regime",
)  # fmt: skip
"""Columns of what was asked."""
OUTPUTS: Mapping[str, Callable[[Run], object]] = {
    "time_s": metrics.time_s,
    "tflops": metrics.tflops,
    "cycles": lambda run: run.cycles,
    "sm_clock_mhz": lambda run: run.sm_clock_hz / 1e6,
    "power_w": lambda run: run.power_w,
    "energy_j": metrics.energy_j,
    "joules_per_million_tokens": metrics.joules_per_million_tokens,
    "kwh_per_million_tokens": metrics.kwh_per_million_tokens,
    "tensor_utilization": metrics.tensor_utilization,
    "mufu_utilization": metrics.mufu_utilization,
    "issue_utilization": metrics.issue_utilization,
    "hbm_read_bytes": lambda run: run.traffic.total("hbm_read"),
    "hbm_write_bytes": lambda run: run.traffic.total("hbm_write"),
    "l2_read_bytes": lambda run: run.traffic.total("l2_read"),
    "l2_write_bytes": lambda run: run.traffic.total("l2_write"),
    "l2_hit_rate": lambda run: run.traffic.l2_hit_rate,
    "bottleneck": lambda run: run.bottleneck.resource,
    "why": lambda run: run.bottleneck.why,
}
"""Columns of what is predicted."""
COLUMNS = (*INPUTS, *OUTPUTS, "error", "content")
"""`error` says why a crossing is not possible; `content` is the hash of all that a prediction follows from."""
WORDS = frozenset({"schedule", "device", "set", "direction", "dtype", "tile", "regime", "bottleneck", "why", "error", "content"})
"""Columns that hold text."""


def sweep(
    *,
    advance: Advance | None = None,
    workers: int | None = None,
    dask: str | None = None,
    **axes: object,
) -> Table:
    """Predict at every crossing of the options, each a value or a list: a table whose columns have units in their names.

        fasim.sweep(schedule=["fa3", "pingpong"], seqlen=[1024, 4096], head_dim=[64, 128], causal=True, device="h200")

    Options: schedule, device, set ("hbm=x2"), direction, batch (or tokens), heads, kv_heads, seqlen (or seqlen_q and seqlen_k),
    head_dim, dtype, causal, tile ("128x128"), stages, cluster, clock_mhz, regime. Runs in `workers` processes, or one a core;
    from a script, as ever with processes, under `if __name__ == "__main__":`. `pandas.DataFrame(table)` and
    `polars.DataFrame(table)` take it. `dask` is the address of a scheduler whose workers make the predictions, or "local".
    Raises UsageError for an unknown option, schedule or device, and where no crossing at all is possible.
    """
    points = grid.points(axes)
    with ExitStack() as stack:
        elsewhere = None
        if dask is not None:
            from .cluster import connected

            elsewhere = stack.enter_context(connected(dask, workers))
        made = dict(rows(points, advance, workers or processes(), elsewhere))
    if all(row["error"] for row in made.values()):
        raise UsageError(str(made[0]["error"]))
    return Table.of([made[number] for number in range(len(points))], COLUMNS)


def rows(
    points: Sequence[Point],
    advance: Advance | None = None,
    workers: int = 1,
    elsewhere: Elsewhere | None = None,
    known: Mapping[str, Mapping[str, object]] | None = None,
) -> Iterator[tuple[int, dict[str, object]]]:
    """Each point's number and row, as they come, every one once. `known` has rows of before by their `content`."""
    tell = advance or (lambda done, total, what: None)
    asked: dict[Question, list[int]] = {}
    done = 0
    for number, point in enumerate(points):
        key = content(point.question) if known and point.question else None
        if point.question is None:
            row = row_of(point, None)
        elif key in (known or {}):
            row = dict(known[key])
        else:
            asked.setdefault(point.question, []).append(number)
            continue
        done += 1
        yield number, row
    if any(is_own(question.schedule) for question in asked):
        workers, elsewhere = 1, None  # a file of the user's is run here alone
    tell(done, len(points), "")
    for question, answer in stream(asked, workers, elsewhere):
        for number in asked[question]:
            done += 1
            yield number, row_of(points[number], answer)
        tell(done, len(points), question.name)


def row_of(point: Point, answer: Run | UsageError | None) -> dict[str, object]:
    """The row of a point; where there is no prediction its figures are None and `error` says why."""
    asked, question = dict(point.asked), point.question
    row: dict[str, object] = dict.fromkeys(COLUMNS)
    row |= {name: asked[name] for name in INPUTS if name in asked}
    row["clock_asked_mhz"], row["device"] = asked["clock_mhz"], str(getattr(asked["device"], "name", asked["device"]))
    row["tile"], row["set"] = asked["tile"] and str(asked["tile"]), asked["set"] or None
    row["seqlen_q"], row["seqlen_k"] = (asked[name] or asked["seqlen"] for name in ("seqlen_q", "seqlen_k"))
    row["batch"] = question.workload.batch if question else None if asked["tokens"] else asked["batch"]
    row["kv_heads"] = asked["kv_heads"] or asked["heads"]
    row["error"] = point.error or (str(answer) if isinstance(answer, UsageError) else None)
    if isinstance(answer, Run):
        tile = answer.tile
        row |= {"tile": str(tile), "stages": tile.stages, "consumers": tile.consumers, "cluster": tile.cluster}
        row |= {name: of(answer) for name, of in OUTPUTS.items()}
    row["content"] = question and content(question)
    return row


# -- the sentence ---------------------------------------------------------------------------------------------------------

_SHAPE = ("direction", "batch", "heads", "kv_heads", "seqlen_q", "seqlen_k", "head_dim", "dtype", "causal")


def summary(table: Table) -> str:
    """What a sweep amounts to: who is fastest at how many shapes, or from where to where the rate goes."""
    found = [row for row in table.rows if not row["error"]]
    failed = table.count - len(found)
    but = f"; {failed:,} of {table.count:,} were not possible" if failed else ""
    if not found:
        return f"None of {table.count:,} crossings is possible: {table['error'][0]}"
    best, least = max(found, key=_rate), min(found, key=_rate)
    rivals = _varying(found, ("schedule", "device", "set", "clock_asked_mhz", "regime"))
    shapes = _varying(found, _SHAPE)
    by_shape: dict[tuple, list[dict]] = {}
    for row in found:
        by_shape.setdefault(tuple(row[name] for name in _SHAPE), []).append(row)
    if not rivals and len(by_shape) < len(found):
        rivals = _varying(found, ("tile", "stages", "consumers", "cluster"))
    contested = {shape: rows for shape, rows in by_shape.items() if len(rows) > 1}
    if rivals and contested:
        won = Counter(_winner(rivals_, rivals) for rivals_ in contested.values())
        level = won.pop("", 0)
        said = [f"{name} at {count} of {len(contested)}" for name, count in won.most_common(4)]
        head = _level(list(contested.values()), rivals)
        if said:
            head = f"The fastest by more than {CLOSE:.0%}: {', '.join(said)} shapes"
        ties = f", level at {level}" if level and said else ""
        where = f" ({named(best, shapes)})" if shapes else ""
        top = f"the highest rate is {_rate(best):.0f} TFLOP/s, {named(best, rivals)}{where}"
        return f"{head}{ties}; {top}{but}."
    if len(found) == 1:
        return f"{best['schedule']} on {best['device']} reaches {_rate(best):.0f} TFLOP/s{but}."
    vary = shapes + rivals
    return (
        f"From {_rate(least):.0f} TFLOP/s at {named(least, vary)} to {_rate(best):.0f} at {named(best, vary)}, "
        f"{len(found):,} predictions of {best['schedule']} on {best['device']}{but}."
    )


def _winner(found: Sequence[Mapping[str, object]], rivals: Sequence[str]) -> str:
    """Which of the rows of one shape is ahead of all others; empty where none is by more than the model can tell."""
    first, second, *_ = sorted(found, key=lambda row: row["time_s"])
    return named(first, rivals) if second["time_s"] / first["time_s"] - 1 >= CLOSE else ""


def _level(contested: Sequence[Sequence[Mapping[str, object]]], rivals: Sequence[str]) -> str:
    """Where none leads: who is with the fastest at every shape, and how near."""
    behind: dict[str, float] = {}
    for found in contested:
        least = min(row["time_s"] for row in found)
        near = {named(row, rivals): row["time_s"] / least - 1 for row in found if row["time_s"] / least - 1 < CLOSE}
        behind = {name: max(gap, behind.get(name, 0.0)) for name, gap in near.items() if name in behind or found is contested[0]}
    if len(behind) < 2:
        return "None is ahead by more than the model can tell"
    *others, last = sorted(behind, key=behind.get)
    count = len(contested)
    where = f"at all {count} shapes" if count > 1 else "here"
    return f"{', '.join(others)} and {last} are level, within {max(behind.values()):.1%} of the fastest {where}: none leads"


def named(row: Mapping[str, object], columns: Sequence[str]) -> str:
    """A row by what tells it apart."""
    return " ".join(part for name in columns if (part := word(name, row[name])))


def word(name: str, value: object, short: bool = False) -> str:
    """An option's value as a sentence says it, or in a column of that name."""
    if value is None or value == "":
        return ""
    if name == "causal":
        return "causal" if value in (True, "true") else "full"
    if name in ("schedule", "device", "dtype", "direction", "regime", "set", "tile"):
        return str(value)
    said = f"{value:,}" if isinstance(value, (int, float)) else str(value)
    return said if short else f"{_SPOKEN.get(name, name.replace('_', ' '))} {said}"


_SPOKEN = {"seqlen_q": "seqlen", "clock_asked_mhz": "MHz"}


def varying(table: Table) -> list[str]:
    """Columns of what was asked that tell the rows apart: none that follows from the others, as a default tile does."""
    rows_ = table.rows
    kept = _varying(rows_, INPUTS)
    for name in ("consumers", "cluster", "stages", "tile", "batch"):
        rest = [each for each in kept if each != name]
        if name in kept and len({tuple(str(row[each]) for each in rest) for row in rows_}) == len(rows_):
            kept = rest
    return kept


def _varying(found: Sequence[Mapping[str, object]], columns: Sequence[str]) -> list[str]:
    several = [name for name in columns if len({str(row[name]) for row in found}) > 1]
    if "seqlen_q" in several and "seqlen_k" in several and all(row["seqlen_q"] == row["seqlen_k"] for row in found):
        several.remove("seqlen_k")
    if "kv_heads" in several and all(row["kv_heads"] == row["heads"] for row in found):
        several.remove("kv_heads")
    return several


def _rate(row: Mapping[str, object]) -> float:
    return float(row["tflops"])
