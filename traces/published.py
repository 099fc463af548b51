"""The papers' tables: which row belongs to which schedule, and how far the prediction lies from it.

A bar is one published measurement. Rows are kept with their figure in `published/*.csv`. Published TFLOP/s use the
papers' FLOP count (`metrics.paper_tflops`). Bars whose implementation has no schedule here are left out and counted. A bar
of forward and backward together is the sum of two predictions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import exp, log
from pathlib import Path

from ..simulator.devices.device import Device
from ..simulator.errors import UsageError, did_you_mean
from ..simulator.problem.workload import DIRECTIONS, Workload
from ..simulator.reading import read_csv
from ..simulator.results import metrics
from ..simulator.results.run import Run
from ..simulator.schedules import BACKWARD
from .predictions import Advance, Predict, Question, predict_all

FOLDER = Path(__file__).parent / "published"

SCHEDULE_OF = {
    "FlashAttention-3": "fa3-published",
    "FlashAttention-3 (source of 2026-08, CUDA 13.0)": "fa3-published",
    "FlashAttention-2": "fa2",
    "FlashAttention-2 through torch 2.11 SDPA": "fa2-pytorch",
    "FlashAttention": "fa1-published",
    "Standard attention": "standard",
    "Pytorch": "standard",
}
"""Implementation -> schedule. cuDNN, xformers and the Triton kernels have none; our `fa3` is another program than theirs."""

BACKWARD_OF = {
    "FlashAttention-3": "fa3",
    "FlashAttention-3 (source of 2026-08, CUDA 13.0)": "fa3",
    "FlashAttention-2": "fa2",
    "FlashAttention-2 through torch 2.11 SDPA": "fa2",
    "cuDNN 9.19 through torch 2.11 SDPA": "cudnn",
    "Standard attention": "standard",
    "Pytorch": "standard",
}
"""The same of the backward; FlashAttention-1's has no schedule here, nor have cuDNN's of 2024 and, at head_dim 256, of today."""
BOTH = "forward + backward"

ABLATION_OF = {
    "warp specialisation + pingpong + GEMM-softmax overlap": "fa3-published",
    "warp specialisation without GEMM-softmax overlap": "pingpong-published",  # Table 2 keeps the pingpong of section 3.1
    "without pingpong": "warp-specialized-published",
    "with pingpong (620-640)": "pingpong-published",
}
"""Configuration of FlashAttention-3 Table 2 and section 3.1 -> schedule; overlap alone has none."""

DEVICE_OF = {"H100 80GB SXM5": "h100-sxm", "A100 80GB SXM4": "a100-sxm", "A100 40GB": "a100-sxm", "H200": "h200"}

PINNED_HZ = {"H100 80GB SXM5": 1830e6}
"""Clock the measurements were taken at; other devices ran free, so the power model decides."""

REGIME = {"H200": "burst"}
"""Where the clock ran free: our own H200 was measured in short benchmarks on a rested board; the papers do not say."""

FP8_LENGTH = {4096: 4224, 8192: 8448, 16384: 16896}
"""FlashAttention-3's FP8 bars of 4k and above were run at lengths divisible by 132 and labelled 4k, 8k, 16k."""


@dataclass(frozen=True)
class Bar:
    """One published measurement; `schedule` is None where none of ours belongs to it, `tflops` where memory ran out."""

    source: str
    figure: str
    gpu: str
    implementation: str
    schedule: str | None
    workload: Workload
    label: int  # sequence length as printed
    tflops: float | None
    time_s: float | None = None
    direction: str = "forward"  # or backward, or BOTH: then the workload is the forward's

    @property
    def device(self) -> str:
        """The device model of the GPU it ran on."""
        return DEVICE_OF[self.gpu]

    @property
    def clock_hz(self) -> float | None:
        """The SM clock it ran at, None where the clock was free."""
        return PINNED_HZ.get(self.gpu)

    @property
    def regime(self) -> str:
        """Whether the clock is that of a burst or of seconds of load, where it ran free."""
        return REGIME.get(self.gpu, "sustained")

    @property
    def out_of_memory(self) -> bool:
        """The paper prints no bar: the implementation ran out of memory."""
        return self.tflops is None


@dataclass(frozen=True)
class Row:
    """A bar with the prediction beside it; both None for what ran out of memory."""

    bar: Bar
    predicted_tflops: float | None

    @property
    def error(self) -> float | None:
        """Signed relative error of the prediction: +0.1 is ten percent too fast."""
        if self.predicted_tflops is None or self.bar.tflops is None:
            return None
        return self.predicted_tflops / self.bar.tflops - 1


@dataclass(frozen=True)
class Group:
    """Rows that share figure and implementation, and the one factor that would bring them to the published bars."""

    source: str
    figure: str
    implementation: str
    schedule: str
    rows: tuple[Row, ...]

    @property
    def measured(self) -> tuple[Row, ...]:
        """Rows with an error, i.e. not out of memory."""
        return tuple(row for row in self.rows if row.error is not None)

    @property
    def mape(self) -> float | None:
        """Mean absolute error of the prediction, as a fraction."""
        return mape(self.measured)

    @property
    def efficiency(self) -> float | None:
        """Implementation efficiency: geometric mean of published over predicted."""
        return efficiency(self.measured)

    @property
    def residual_mape(self) -> float | None:
        """Mean absolute error left after multiplying every prediction by the efficiency."""
        return mape(self.measured, self.efficiency or 1.0)


@dataclass(frozen=True)
class Family:
    """All rows of one implementation, dtype and paper: raw error, and the error left after factors."""

    source: str
    implementation: str
    schedule: str
    dtype: str
    device: str
    count: int
    mape: float
    worst: float
    residual_per_panel: float  # one factor per panel (5a, 5b, ...)
    residual_per_figure: float  # one factor for the whole numbered figure


@dataclass(frozen=True)
class Report:
    """Published bars with predictions: groups in the order of the papers, families, and what was left out."""

    groups: tuple[Group, ...]
    families: tuple[Family, ...]
    left_out: dict[str, int]  # implementation (and direction) -> bars


# -- reading ----------------------------------------------------------------------------------------------------------


def read_table(name: str) -> list[dict[str, str]]:
    """The rows of one file of the folder."""
    return read_csv(FOLDER / name, "table")


def workload_of(row: dict[str, str]) -> Workload:
    """The workload that a row was run at, FP8 at its real length."""
    dtype = {"fp8_e4m3": "e4m3"}.get(row["dtype"], row["dtype"])
    seqlen = int(row["seqlen"])
    if row["dtype"] == "fp8_e4m3":
        seqlen = FP8_LENGTH.get(seqlen, seqlen)
    return Workload(
        batch=int(row["batch"]),
        heads=int(row["heads"]),
        seqlen=seqlen,
        head_dim=int(row["head_dim"]),
        dtype=dtype,
        causal=row.get("causal") == "true",
        direction="backward" if row.get("direction") == "backward" else "forward",
    )


def _bar(row: dict[str, str], figure: str, implementation: str, schedule: str | None) -> Bar:
    if schedule and row.get("direction", "forward") != "forward":
        schedule = schedule if int(row["head_dim"]) in BACKWARD[schedule].head_dims else None
    milliseconds = row.get("time_ms") or row.get("median_ms")
    return Bar(
        source=row["source"],
        figure=figure,
        gpu=row["gpu"],
        implementation=implementation,
        schedule=schedule,
        workload=workload_of(row),
        label=int(row["seqlen"]),
        tflops=float(row["tflops"]) if row["tflops"] else None,
        time_s=float(milliseconds) / 1e3 if milliseconds else None,
        direction=row.get("direction", "forward"),
    )


@cache
def bars() -> tuple[Bar, ...]:
    """Every bar: the ablation, the papers' figures, then the kernels measured on an H200."""
    found = []
    for row in read_table("ablation.csv"):
        figure = row["source"].removeprefix("arXiv:2407.08608 ")
        found.append(_bar(row, figure, row["configuration"], ABLATION_OF.get(row["configuration"])))
    for row in read_table("attention_tflops.csv") + sorted(read_table("h200_tflops.csv"), key=_shape):
        back = row["direction"] != "forward"
        figure = row.get("figure") or f"H200 {row['dtype']}{' backward' if back else ''}"
        found.append(_bar(row, figure, row["implementation"], (BACKWARD_OF if back else SCHEDULE_OF).get(row["implementation"])))
    return tuple(found)


def _shape(row: dict[str, str]) -> tuple:
    return row["dtype"] == "e4m3", int(row["head_dim"]), row["causal"], int(row["seqlen"])


def match(workload: Workload, schedule: str, device: str) -> tuple[Bar, ...]:
    """The published bars of this very workload and device, of the schedule or of the papers' own program of it."""
    here = (b for b in bars() if (b.workload, b.device) == (workload, device) and b.direction != BOTH)
    return tuple(b for b in here if b.schedule in (schedule, f"{schedule}-published"))


@dataclass(frozen=True)
class Beside:
    """A published bar beside the same schedule predicted under the bar's own conditions, its clock above all."""

    bar: Bar
    predicted_tflops: float
    another: str | None  # the schedule that is the measured program, where it is another one than was predicted


def beside(run: Run, device: Device, predict: Predict | None = None) -> tuple[Beside, ...]:
    """The bars of a predicted run's workload, each with that schedule and tile predicted at the bar's clock or regime."""
    measured = [bar for bar in match(run.workload, run.schedule, run.device) if not bar.out_of_memory]
    asked = [Question(run.workload, run.schedule, device, run.tile, bar.clock_hz, bar.regime) for bar in measured]
    found = predict_all(asked, predict)
    return tuple(
        Beside(bar, metrics.paper_tflops(found[each]), bar.schedule if bar.schedule != run.schedule else None)
        for bar, each in zip(measured, asked, strict=True)
    )


def unmatched(workload: Workload, device: str) -> tuple[Bar, ...]:
    """Bars of the papers' ablation for this workload that no schedule of ours belongs to."""
    here = (b for b in bars() if b.schedule is None and b.figure == "Table 2")
    return tuple(b for b in here if (b.workload, b.device) == (workload, device))


def select(figure: str | None) -> tuple[Bar, ...]:
    """The bars of a figure: "5c", "5", "fa3-5c", "ablation", "h200", or None for all.

    A bare panel names that panel in every paper that has it; "fa2-" or "fa3-" before it picks one. Raises UsageError.
    """
    if figure is None:
        return bars()
    wanted = figure.lower().removeprefix("figure").strip()
    paper, _, panel = wanted.rpartition("-")
    found = tuple(b for b in bars() if _belongs(b, paper, panel))
    if not found:
        names = [*sorted({_panel(b) for b in bars()} - {""}), "ablation", "h200", "hbm"]
        raise UsageError(
            f"figure {figure!r} is not among the published tables ({', '.join(names)}; fa2- or fa3- before a panel "
            f"picks the paper){did_you_mean(wanted, names)}"
        )
    return found


def _panel(bar: Bar) -> str:
    return bar.figure.removeprefix("Figure ").lower() if bar.figure.startswith("Figure ") else ""


def _belongs(bar: Bar, paper: str, panel: str) -> bool:
    if paper and f"flashattention-{paper.removeprefix('fa')}" not in bar.source.lower():
        return False
    if panel == "ablation":
        return bar.figure in ("Table 2", "section 3.1")
    if panel == "h200":
        return bar.figure.startswith("H200")
    return bool(panel) and _panel(bar) in (panel, *(panel + letter for letter in "abcdef"))


# -- predicting -------------------------------------------------------------------------------------------------------


def report(
    figure: str | None = None, predict: Predict | None = None, advance: Advance | None = None, processes: int = 1
) -> Report:
    """Predict every bar of a figure (None: all) that has a schedule, as `predictions.predict_all` does.
    """
    chosen = select(figure)
    kept = [bar for bar in chosen if bar.schedule is not None]
    asked = (question for bar in kept if not bar.out_of_memory for question in questions(bar))
    runs = predict_all(asked, predict, advance, processes)
    rows = [Row(bar, None if bar.out_of_memory else _tflops([runs[each] for each in questions(bar)])) for bar in kept]
    groups = _groups(rows)
    return Report(groups, _families(groups), dict(_left_out(chosen)))


def questions(bar: Bar) -> tuple[Question, ...]:
    """What is to be predicted for a bar: its pass, or both."""
    passes = [bar.workload] if bar.direction != BOTH else [replace(bar.workload, direction=each) for each in DIRECTIONS]
    return tuple(Question(each, bar.schedule, bar.device, clock_hz=bar.clock_hz, regime=bar.regime) for each in passes)


def _tflops(runs: Sequence[Run]) -> float:
    """By the papers' count, of one or two passes."""
    return sum(run.workload.paper_flops for run in runs) / sum(map(metrics.time_s, runs)) / 1e12


def _groups(rows: list[Row]) -> tuple[Group, ...]:
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        bar = row.bar
        found.setdefault((bar.source, bar.figure, bar.implementation, bar.schedule), []).append(row)
    return tuple(Group(*key, tuple(members)) for key, members in found.items())


def _families(groups: Iterable[Group]) -> tuple[Family, ...]:
    found: dict[tuple, list[Group]] = {}
    for group in groups:
        bar = group.rows[0].bar
        if group.measured and bar.figure not in ("Table 2", "section 3.1"):
            passes = "" if bar.direction == "forward" else f" ({bar.direction})"
            key = (group.source, group.implementation, group.schedule + passes, bar.workload.dtype, bar.device)
            found.setdefault(key, []).append(group)
    return tuple(_family(*key, members) for key, members in found.items())


def _family(source: str, implementation: str, schedule: str, dtype: str, device: str, groups: list[Group]) -> Family:
    rows = [row for group in groups for row in group.measured]
    numbered: dict[str, list[Row]] = {}
    for group in groups:
        numbered.setdefault(group.figure.rstrip("abcdef"), []).extend(group.measured)
    return Family(
        source=source,
        implementation=implementation,
        schedule=schedule,
        dtype=dtype,
        device=device,
        count=len(rows),
        mape=mape(rows),
        worst=max((row.error for row in rows), key=abs),
        residual_per_panel=sum(g.residual_mape * len(g.measured) for g in groups) / len(rows),
        residual_per_figure=sum(mape(n, efficiency(n)) * len(n) for n in numbered.values()) / len(rows),
    )


def _left_out(chosen: Iterable[Bar]) -> Counter[str]:
    return Counter(
        bar.implementation + (f", {bar.direction}" if bar.direction != "forward" else "") for bar in chosen if bar.schedule is None
    )


def mape(rows: Iterable[Row], factor: float = 1.0) -> float | None:
    """Mean absolute relative error over rows, predictions multiplied by `factor` first; None without rows."""
    errors = [abs((1 + row.error) * factor - 1) for row in rows]
    return sum(errors) / len(errors) if errors else None


def efficiency(rows: Iterable[Row]) -> float | None:
    """Geometric mean of published over predicted; None without rows."""
    logs = [log(1 + row.error) for row in rows]
    return exp(-sum(logs) / len(logs)) if logs else None
