"""FlashAttention Figure 2: the bytes that cross HBM, as published, by the paper's closed form and as we count them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..simulator.problem.tile import Tile
from ..simulator.problem.workload import Workload
from ..simulator.results.run import Run
from .predictions import Advance, Predict, Question, predict_all
from .published import DEVICE_OF, read_table, workload_of

SCHEDULE_OF_2022 = {"standard": "standard", "FlashAttention": "fa1"}
"""Implementation in the first paper's Figure 2 -> schedule: its kernels had one CTA a head."""
BACKWARD_OF_2022 = {"fa1": "fa2"}
"""Schedule whose backward walks as this one's did: FlashAttention's Algorithm 4 has K/V outside and Q inside, as Algorithm 2 of
FlashAttention-2. Others have their own."""


@dataclass(frozen=True)
class HbmRow:
    """One row of FlashAttention Figure 2 with our bytes beside it. Bytes are of the forward pass, unless said."""

    source: str
    implementation: str
    schedule: str
    tile: str
    published_bytes: float | None  # as plotted; forward + backward on the left panel
    closed_form_bytes: int | None  # the paper's formula, middle panel only
    algorithmic_bytes: int  # Q, K, V, O (and S, P)
    statistics_bytes: int  # l and m, or LSE
    hbm_bytes: int  # what misses in L2 and what is written back
    both_algorithmic_bytes: int | None = None  # of forward and backward, everything; left panel only
    both_hbm_bytes: int | None = None


@dataclass(frozen=True)
class HbmReport:
    """Both panels and the sentence that explains the ratio."""

    left: tuple[HbmRow, ...]
    middle: tuple[HbmRow, ...]
    why: str


def closed_form_bytes(workload: Workload, block_n: int) -> int:
    """FlashAttention's forward HBM bytes (arXiv:2205.14135 Theorem 2): Q and O anew per K/V block, K and V once.

    bytes = element * ((N / Bc) * 3 N d + 2 N d), summed over heads and batch.
    """
    n, d = workload.seqlen_q, workload.head_dim
    per_head = -(-workload.seqlen_k // block_n) * 3 * n * d + 2 * workload.seqlen_k * d
    return workload.element_bytes * per_head * workload.heads * workload.batch


def fa1_tile(workload: Workload, device: str, block_n: int) -> Tile:
    """The tile of Figure 2's middle panel: 64 queries by `block_n` keys, otherwise fa1's own."""
    from ..simulator.predict import default_tile

    return replace(default_tile(workload, "fa1", device), block_m=64, block_n=block_n)


def hbm_report(predict: Predict | None = None, advance: Advance | None = None) -> HbmReport:
    """FlashAttention Figure 2: our bytes of GPT-2 medium, and fa1 at the four block sizes."""
    table = read_table("hbm_traffic.csv")
    left = [row for row in table if row["direction"] != "forward"]
    middle = [row for row in table if row["direction"] == "forward"]
    published = {SCHEDULE_OF_2022.get(r["implementation"], r["implementation"]): r for r in left}
    jobs = [("standard", None), ("fa1", None), ("fa2", None)] + [("fa1", r) for r in middle]
    sources = [row or published.get(schedule) or left[-1] for schedule, row in jobs]
    questions = [_question(schedule, row, source) for (schedule, row), source in zip(jobs, sources, strict=True)]
    back = {
        each: replace(each, workload=replace(each.workload, direction="backward"), schedule=BACKWARD_OF_2022.get(name, name))
        for (name, row), each in zip(jobs, questions, strict=True)
        if row is None
    }
    runs = predict_all([*questions, *back.values()], predict, advance)
    rows = []
    for (schedule, row), source, question in zip(jobs, sources, questions, strict=True):
        run = runs[question]
        printed = float(source["hbm_gb"]) * 1e9 if row or schedule in published else None
        found = _hbm_row(source, schedule, run, printed, int(row["block_kv"]) if row else None)
        both = [run, runs[back[question]]] if question in back else []
        rows.append(_with_backward(found, both) if both else found)
    return HbmReport(tuple(rows[:3]), tuple(rows[3:]), _explain(rows[:3]))


def _question(schedule: str, row: dict[str, str] | None, source: dict[str, str]) -> Question:
    workload, device = workload_of(source), DEVICE_OF[source["gpu"]]
    return Question(workload, schedule, device, fa1_tile(workload, device, int(row["block_kv"])) if row else None)


def _hbm_row(source: dict[str, str], schedule: str, run: Run, printed: float | None, block_n: int | None) -> HbmRow:
    statistics = {"LSE", "l", "m"}
    parts = run.traffic.by_tensor.items()
    counted = {name: b.algorithmic_read + b.algorithmic_write for name, b in parts}
    return HbmRow(
        source=source["source"],
        implementation=source["implementation"] if printed is not None else "",
        schedule=schedule,
        tile=str(run.tile),
        published_bytes=printed,
        closed_form_bytes=closed_form_bytes(run.workload, block_n) if block_n else None,
        algorithmic_bytes=sum(n for name, n in counted.items() if name not in statistics),
        statistics_bytes=sum(n for name, n in counted.items() if name in statistics),
        hbm_bytes=run.traffic.total("hbm_read") + run.traffic.total("hbm_write"),
    )


def _with_backward(row: HbmRow, both: list[Run]) -> HbmRow:
    """The row with the bytes of both passes."""
    counted, crossed = (
        sum(run.traffic.total(f"{level}_{way}") for run in both for way in ("read", "write")) for level in ("algorithmic", "hbm")
    )
    return replace(row, both_algorithmic_bytes=counted, both_hbm_bytes=crossed)


def _explain(rows: list[HbmRow]) -> str:
    standard, fa1, fa2 = rows
    counted = [row.algorithmic_bytes + row.statistics_bytes for row in rows]
    kept = [max(0.0, 1 - row.hbm_bytes / total) for row, total in zip(rows, counted, strict=True)]
    return (
        f"Counted without a cache, standard attention moves {counted[0] / counted[1]:.1f} times the bytes of fa1 and "
        f"{counted[0] / counted[2]:.1f} times those of fa2, because S and P cross HBM and the others never store them; "
        f"behind L2 it is {standard.hbm_bytes / fa1.hbm_bytes:.1f} and {standard.hbm_bytes / fa2.hbm_bytes:.1f} times, "
        f"because L2 keeps {kept[0]:.0%} of standard's bytes from HBM, {kept[1]:.0%} of fa1's (Q and O, walked "
        f"anew for each K/V block) and {kept[2]:.0%} of fa2's (K and V, which the Q tiles of a head share). Forward and backward "
        f"together cross HBM with {standard.both_hbm_bytes / 1e9:.1f} GB, {fa1.both_hbm_bytes / 1e9:.1f} and "
        f"{fa2.both_hbm_bytes / 1e9:.1f}: the published runs also made dropout, masks and their gradients, in passes of their own."
    )
