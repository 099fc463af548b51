"""`fasim sweep`: predictions at every crossing of lists of options."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from ...simulator.errors import UsageError
from ...traces.files import write_all
from .. import output
from ..options import Json, Schedules

if TYPE_CHECKING:
    from ...traces.answers.grid import Point

_AXES = Group("Lists and ranges", help="Each may be a list (1,2,4) or a range (512..16k, 512..4k+512, 64..4096x4).", sort_key=1)


@Parameter(name="*", group=_AXES)
@dataclass(frozen=True, kw_only=True)
class Axes:
    """What is swept over."""

    device: Annotated[tuple[str, ...], Parameter(negative=())] = ("h100-sxm",)
    "Devices, as h200,h100-sxm, or paths of your own TOML files. May be given several times."
    seqlen: str | None = None
    "Lengths of queries and of keys. [default: 8448]"
    seqlen_q: str | None = None
    "Lengths of queries alone; needs --seqlen-k."
    seqlen_k: str | None = None
    "Lengths of keys alone; needs --seqlen-q."
    batch: str = "4"
    "Sequences in the batch."
    tokens: str | None = None
    "Tokens in all, in place of --batch: the batch is these over the length, at least 1."
    heads: str = "16"
    "Query heads."
    kv_heads: str | None = None
    "Key and value heads. [default: as --heads]"
    head_dim: str = "128"
    "Widths of one head: 64,128,256."
    dtype: str = "fp16"
    "fp16,bf16,e4m3."
    mask: str = "full"
    "full,causal."
    pass_: Annotated[str, Parameter(name="--pass")] = "forward"
    "forward,backward."
    tile: str | None = None
    "Tiles, as 128x128,128x96. [default: from the schedule's table]"
    stages: str | None = None
    "Slots of the K and V rings."
    cluster: str | None = None
    "CTAs of a cluster."
    clock: str | None = None
    "Pinned SM clocks, in MHz. [default: the clock that the power model predicts]"
    regime: str = "sustained"
    "sustained,burst."
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative=(), show_default=False)] = ()
    "What if: fields or resources of the device, each with a list, as hbm=x1,x2,x4. May be given several times."

    def lists(self, schedules: tuple[str, ...]) -> dict[str, list]:
        """The axes by the names that the sweep knows them by. Raises UsageError."""
        from ...traces.answers import grid

        found: dict[str, list] = {
            "schedule": [name for each in schedules for name in grid.words(each)],
            "device": [name for each in self.device for name in grid.words(each)],
            "set": grid.settings(self.set_),
            "direction": grid.words(self.pass_),
            "causal": [_mask(word) for word in grid.words(self.mask)],
            "dtype": grid.words(self.dtype),
            "regime": grid.words(self.regime),
        }
        for name in ("seqlen", "seqlen_q", "seqlen_k", "batch", "heads", "kv_heads", "head_dim", "stages", "cluster"):
            if (given := getattr(self, name)) is not None:
                found[name] = grid.whole_numbers(given, f"--{name.replace('_', '-')}")
        if self.clock is not None:
            found["clock_mhz"] = grid.whole_numbers(self.clock, "--clock")
        if self.tile is not None:
            found["tile"] = grid.words(self.tile)
        if self.tokens is not None:
            if self.batch != next(each.default for each in fields(self) if each.name == "batch"):
                raise UsageError("--tokens decides the batch: give it, or --batch")
            found["tokens"] = grid.whole_numbers(self.tokens, "--tokens")
            del found["batch"]
        return found


_LISTS = Axes()
_USUAL = ("fa3",)


def sweep(
    schedule: Schedules = _USUAL,
    axes: Axes = _LISTS,
    *,
    out: Path | None = None,
    resume: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    csv: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    workers: int | None = None,
    dask: str | None = None,
    plot: str | None = None,
    x: str | None = None,
    y: str = "tflops",
    json: Json = False,
) -> int:
    """Predict at every crossing of lists of options: lengths, batches, heads, schedules, devices, tiles, clocks, what-ifs.

    The first line says who is fastest at how many of the shapes, or from where to where the rate goes; a table follows with the
    options that vary. --out keeps every row as it comes (CSV, JSON lines, or Parquet at the end), with time, rates, clock, power,
    energy, joules and kWh per million tokens, utilisations and bytes, units in the columns' names. Runs on all cores; Ctrl-C keeps
    what is done, and --resume goes on. A crossing that is not possible has the reason in its row. Predictions are kept by their
    content and shared with predict, published and compare.

    Example: fasim sweep fa3 pingpong --seqlen 512..2k --batch 1 --device h200

    Example: fasim sweep fa3 pingpong --seqlen 512..16k --tokens 16k --head-dim 64,128 --mask full,causal --device h200

    Example: fasim sweep fa3 --set hbm=x1,x2 --set sms=x1,x1.5 --out rows.csv

    Theory: one figure says how fast, a sweep says why: where the rate bends, another resource has become the bottleneck.

    Parameters
    ----------
    out
        File for the rows: .csv, .jsonl or .parquet (which needs pyarrow, `pip install 'fasim[tables]'`).
    resume
        Keep the rows that --out already holds, where nothing they follow from has changed.
    csv
        Print the rows as CSV, alone, on stdout.
    workers
        Processes. [default: one a core]
    dask
        Address of a Dask scheduler whose workers make the predictions, as tcp://scheduler:8786; or local, for one on this machine
        (`pip install 'fasim[cluster]'`).
    plot
        A picture of the rows, .svg or .png (`pip install 'fasim[plot]'`), or terminal, to draw there.
    x
        What it is plotted over. [default: the number that takes most values]
    y
        What is plotted, a column of the rows.
    """
    from ...traces.answers.sweep import COLUMNS, summary
    from ...traces.answers.table import Table

    if resume and out is None:
        raise UsageError("--resume goes on with the file of --out: give both")
    if csv and json:
        raise UsageError("--csv and --json both print alone on stdout: give one of them")
    suffix = _place(plot, csv or json)
    points = _points(axes, schedule)
    found: dict[int, dict] = {}
    try:
        for number, row in _made(points, out, resume, workers, dask):
            found[number] = row
    except KeyboardInterrupt:
        place = f"{len(found):,} of {len(points):,} rows are " + (f"in {out}" if out else "kept")
        output.note(f"stopped: {place}; the same command{' with --resume' if out else ''} goes on")
        raise
    if all(row["error"] for row in found.values()):
        raise UsageError(found[0]["error"])
    table = Table.of([found[number] for number in range(len(points))], COLUMNS)
    if plot is not None:
        from ...traces.answers.series import figure
        from ..plot import Chart, picture

        drawn = figure(table, x, y)
        if suffix:
            write_all({Path(plot): picture(drawn, suffix)})
    if json:
        output.emit_json(table.rows)
    elif csv:
        output.emit_text(table.to_csv().rstrip("\n"))
    else:
        from ..sweep_table import shown

        console = output.stdout()
        console.print(shown(table, summary(table), console.width))
        if plot is not None and not suffix:
            console.print("", Chart(drawn), sep="\n")
    return 0


def _place(plot: str | None, alone: bool) -> str:
    """The format of the picture, empty for the terminal or none. Raises UsageError before anything is predicted."""
    from ..plot import TERMINAL, suffix_of

    if plot is None:
        return ""
    if plot == TERMINAL:
        if alone:
            raise UsageError("--plot terminal draws where --csv and --json print alone: give a file")
        return ""
    output.check_file(Path(plot))
    return suffix_of(plot)


def _points(axes: Axes, schedule: tuple[str, ...]) -> list[Point]:
    from ...traces.answers.grid import points

    return points(axes.lists(schedule))


def _made(
    points: list[Point], out: Path | None, resume: bool, workers: int | None, dask: str | None
) -> Iterator[tuple[int, dict]]:
    """The rows as they come, each written to the file at once."""
    from ...simulator.compiling import COMPILES, heard
    from ...traces.answers.journal import Journal
    from ...traces.answers.sweep import rows
    from ...traces.predictions import processes

    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers} is none: give 1 or more")
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(out, resume))
        advance = stack.enter_context(output.progress("predicting", estimate=True))
        elsewhere = None
        if dask is not None:
            from ...traces.answers.cluster import connected

            elsewhere = stack.enter_context(connected(dask, workers))
        stack.enter_context(heard(lambda: advance(0, len(points), COMPILES)))
        for number, row in rows(points, advance, workers or processes(), elsewhere, journal.known):
            journal.add(number, row)
            yield number, row
        journal.finish()


def _mask(word: str) -> bool:
    if word not in ("full", "causal"):
        raise UsageError(f"--mask {word!r} is not known (full, causal)")
    return word == "causal"
