"""The ladder in Gluon as recorded on an H200, as tables for the documentation."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from ..simulator.problem.order import work_items
from ..simulator.problem.workload import Workload
from ..simulator.reading import read_json
from ..simulator.results import metrics
from ..simulator.results.run import Run
from ..simulator.schedules import SCHEDULES

SMS = 132
"""Of the H200 that the record is of."""
RECORDED = Path(__file__).parent / "recorded" / "kernels"
PEER, CUDA, PREFIX = "peer:fa3", "fa3", "gluon-"
FIRST = "Triton 3.6.0"
"""Beside the PyTorch that the record is of."""
TITLES = {PEER: "FlashAttention-3's wheel", CUDA: "`fa3` in CUDA, ours", "fa2": "`fa2` in Triton, ours"}


QUEUED = ("gluon-persistent", "gluon-bounded")
"""The last two rungs, which a record of their own has."""


def rates(name: str = "gluon_h200") -> dict:
    """A record of rates (kernels/measure/beside_gluon.py): of the first five rungs, or "gluon_queued_h200", of the last two."""
    return read_json(RECORDED / f"{name}.json", "record")


def _all_rungs() -> list[dict]:
    """The rows of the first record, and of the last two rungs."""
    return [*rates()["rows"], *(row for row in rates("gluon_queued_h200")["rows"] if row["kernel"] in QUEUED)]


def last_rungs() -> str:
    """As `ladder`, the rungs whose tiles come from a queue, with what they are beside."""
    return ladder("gluon_queued_h200", (PEER, CUDA, "fa2", PREFIX + "fa3", *QUEUED))


def ladder(name: str = "gluon_h200", kernels: Sequence[str] = ()) -> str:
    """A table for each head dim: TFLOP/s of all kernels of a record, or of `kernels`, and in brackets the share of
    FlashAttention-3's in the same process."""
    record = rates(name)
    record["rows"] = [row for row in record["rows"] if row["kernel"] in (kernels or [row["kernel"]])]
    parts = []
    for head_dim in sorted({row["head_dim"] for row in record["rows"]}, key=(128, 64, 256).index):
        parts.append(f"## head_dim {head_dim}\n\n" + _table([row for row in record["rows"] if row["head_dim"] == head_dim]))
    said = record["protocol"]
    parts.append(
        f"{record['device']}, driver {record['driver']}, {_versions(record['packages'])}, {record['date']}; bf16, 16k tokens,"
        f" hidden size 2048. Kernel time by CUDA graphs, in shuffled bursts of {said['burst_s'] * 1e3:.0f} ms after"
        f" {said['rest_s'] * 1e3:.0f} ms of rest. In brackets the share of FlashAttention-3's rate; the mean is"
        f" geometric, over the shapes that are there. Checked: {said['checked']}."
    )
    return "\n\n".join(parts)


def _table(rows: Sequence[dict]) -> str:
    cases = sorted({(row["causal"], row["seqlen_q"]) for row in rows})
    heads = [f"{seqlen // 1024}k {'causal' if causal else 'full'}" for causal, seqlen in cases]
    lines = ["| kernel | " + " | ".join(heads) + " | mean of FlashAttention-3 |", "|---" * (len(cases) + 2) + "|"]
    for kernel, compiler in dict.fromkeys((row["kernel"], row.get("compiler", "")) for row in rows):
        its = [row for row in rows if (row["kernel"], row.get("compiler", "")) == (kernel, compiler)]
        there = {(row["causal"], row["seqlen_q"]): row for row in its}
        shares = [row["vs_fa3"] for row in there.values() if "vs_fa3" in row]
        cells = [_cell(there.get(case, {}), kernel != PEER) for case in cases]
        mean = f"{statistics.geometric_mean(shares):.3f}" if shares else "-"
        title = TITLES.get(kernel, f"`{kernel}`") + (f", {compiler}" if compiler else "")
        lines.append(f"| {title} | " + " | ".join(cells) + f" | {mean} |")
    return "\n".join(lines)


def _cell(row: dict, share: bool) -> str:
    if "tflops" not in row:
        return "missing"
    return f"{row['tflops']:.0f}" + (f" ({row['vs_fa3']:.2f})" if share and "vs_fa3" in row else "")


def predicted(predict: Callable[[Workload, str], Run]) -> str:
    """Rates of the rungs at head_dim 128 and 4k, full, beside what their schedules are predicted to make on the same tile."""
    shape = (128, 4096, False)
    rows = [row for row in rates()["rows"] if (row["head_dim"], row["seqlen_q"], row["causal"]) == shape]
    rows = [row for row in rows if row.get("compiler", FIRST) == FIRST]
    lines = ["| rung | measured | predicted | |", "|---|---|---|---|"]
    for row in rows:
        schedule = row["kernel"].removeprefix(PREFIX)
        if row["kernel"].startswith(PREFIX) and schedule in SCHEDULES and "median_ms" in row:
            workload = Workload(row["batch"], row["heads"], row["seqlen_q"], 128, row["dtype"], False)
            time_ms = metrics.time_s(predict(workload, schedule)) * 1e3
            rate = workload.paper_flops / time_ms / 1e9
            lines.append(
                f"| `{schedule}` | {row['tflops']:.0f} | {rate:.0f} | {100 * (time_ms / row['median_ms'] - 1):+.1f} % of time |"
            )
    return "\n".join(lines)


def code() -> str:
    """Instructions of a warp for a block of 64 rows and 128 keys, by what they do (kernels/measure/code_of_gluon.py)."""
    read = read_json(RECORDED / "gluon_code.json", "record")["rows"]
    rows = [row for row in read if row["head_dim"] == 128 and not row["causal"]]
    rows = [row for row in rows if row["kernel"] in TITLES or row["compiler"] == FIRST]
    groups = list(rows[0]["groups"])
    lines = ["| kernel | " + " | ".join([*groups, "in all", "cycles to issue"]) + " |", "|---" * (len(groups) + 3) + "|"]
    for row in sorted(rows, key=lambda row: row["stalls"]):
        cells = [f"{row['groups'][group]:.0f}" for group in groups] + [f"{row['instructions']:.0f}", f"{row['stalls']:.0f}"]
        lines.append(f"| {TITLES.get(row['kernel'], '`' + row['kernel'].removeprefix(PREFIX) + '`')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tiles() -> str:
    """What a tile of 128 queries takes on an SM by the recorded rates: each block, and all besides."""
    rows = [row for row in _all_rungs() if row["head_dim"] == 128 and row.get("compiler", FIRST) == FIRST and "median_ms" in row]
    lines = [
        "| kernel | us a block of 128 keys | us a tile besides, full | us a tile besides, causal at 1k |",
        "|---|---|---|---|",
    ]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        us = {(row["seqlen_q"], row["causal"]): _us_a_tile(row) for row in rows if row["kernel"] == kernel}
        short, block = us[1024, False], (us[16384, False] - us[1024, False]) / 120
        causal = us[1024, True] - 4.5 * block
        lines.append(f"| {TITLES.get(kernel, f'`{kernel}`')} | {block:.2f} | {short - 8 * block:.1f} | {causal:.1f} |")
    return "\n".join(lines)


def _us_a_tile(row: dict) -> float:
    return row["median_ms"] * 1e3 * SMS / (row["batch"] * row["heads"] * (row["seqlen_q"] // 128))


def stalls() -> str:
    """Where the warps of kernels wait at 4k, head_dim 128, by Nsight Compute (kernels/measure/stalls.py)."""
    rows = read_json(RECORDED / "gluon_stalls_h200.json", "record")["rows"]
    reasons = ("barrier", "wait", "dispatch_stall", "long_scoreboard", "not_selected", "gmma")
    heads = " | ".join(reason.replace("_", " ") for reason in reasons)
    lines = [f"| kernel | | cycles | tensor cores busy, % | issue slots, % | {heads} |", "|---" * (5 + len(reasons)) + "|"]
    for row in rows:
        title = TITLES.get(row["kernel"], f"`{row['kernel'].removeprefix(PREFIX)}`")
        cells = [f"{row['cycles']:,.0f}", f"{row['tensor_pct']:.1f}", f"{row['issue_pct']:.1f}"]
        cells += [f"{row['stalls'][reason]:.2f}" for reason in reasons]
        lines.append(f"| {title} | {'causal' if row['causal'] else 'full'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def forms() -> str:
    """Of `fa2` in Triton the fastest tile for each shape, by each block's maximum and by the maximum so far; a star where the text
    has changed since without a change of what it says."""
    rows = read_json(RECORDED / "triton_forms_h200.json", "record")["rows"]
    lines = ["| head_dim | | keys | from each block's maximum | from the maximum so far |", "|---" * 5 + "|"]
    shapes = dict.fromkeys((row["head_dim"], row["causal"], row["seqlen_q"]) for row in rows)
    for head_dim, causal, seqlen in sorted(shapes, key=lambda shape: ((128, 64, 256).index(shape[0]), *shape[1:])):
        its = [row for row in rows if (row["head_dim"], row["causal"], row["seqlen_q"]) == (head_dim, causal, seqlen)]
        cells = [_best([row for row in its if row.get("bounded") is bounded and "tflops" in row]) for bounded in (False, True)]
        lines.append(f"| {head_dim} | {'causal' if causal else 'full'} | {seqlen} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _best(rows: Sequence[dict]) -> str:
    if not rows:
        return "missing"
    best = max(rows, key=lambda row: row["tflops"])
    return f"{_cell(best, True)}{'*' * bool(best.get('earlier_text'))}, {best['kernel'].replace(', bounded', '')}"


def hand_overs() -> str:
    """Which hand-overs racecheck follows (kernels/validation/hand_overs.py)."""
    record = read_json(RECORDED.parent / "validation" / "hand_overs.json", "record")
    lines = ["| written or read, then | right | reported |", "|---|---|---|"]
    for row in record["rows"]:
        said = row["hand_over"].replace("_", " ")
        lines.append(f"| {said} | {'yes' if row['right'] else 'no'} | {'yes' if row['reported'] else 'no'} |")
    return "\n".join(lines)


def dealt() -> str:
    """How long the program with most work is, over the mean, causal: with tiles in a fixed stride, and from a queue."""
    lines = ["| causal, head_dim 128 | in a fixed stride | from a queue |", "|---|---|---|"]
    for seqlen in (1024, 4096, 16384):
        blocks = work_items(Workload(16384 // seqlen, 16, seqlen, 128, "bf16", True), 128, 128, "longest-first")["blocks"]
        mean = blocks.sum() / SMS
        stride = max(int(blocks[program::SMS].sum()) for program in range(SMS))
        queue = [0] * SMS
        for each in blocks:
            queue[queue.index(min(queue))] += int(each)
        lines.append(f"| {seqlen // 1024}k | {stride / mean:.2f} | {max(queue) / mean:.2f} |")
    return "\n".join(lines)


def _versions(packages: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items())
