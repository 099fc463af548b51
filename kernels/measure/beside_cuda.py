"""Our CUDA kernels beside cuDNN, FlashAttention-2, FlexAttention: `python -m fasim.kernels.measure.beside_cuda --out DIR`.

The protocol is that of beside.py: bursts in shuffled turns, random normal data that rotates through buffers larger
than L2, the median over all calls between CUDA events, clock and power by NVML in mid-burst, every output held to the fp64
oracle first. Each burst is short and follows a rest, so that the clock is not yet at the power limit: only then does cuDNN
run at the rates it had beside FlashAttention-3. With --sustained there is no rest and the board draws all it may.

FlashAttention-3 cannot be in the process; cuDNN can, and both were measured once on one H200
(traces/published/h200_tflops.csv). "vs FA3" is thus our rate over FlashAttention-3's of then, times cuDNN's rate of then
over cuDNN's in this run. Writes cuda.json; the table goes to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from ...simulator.problem.workload import Workload
from ...traces.published import read_table
from ..compile import build
from ..cuda.config import HEAD_DIMS, HERE, available, config_for
from . import beside

LENGTHS = {64: (1024, 4096, 16384), 128: (512, 1024, 2048, 4096, 8192, 16384), 256: (1024, 4096, 16384)}
"""Those that h200_tflops.csv has."""
ABLATION = (4, 16, 8448)
"""Batch, heads and length of FlashAttention-3 Table 2, at head_dim 128, full."""
PEERS = ("cudnn", "fa2-pytorch")
REST_S, BURST_S = 0.1, 0.01
"""A pause, then a burst that ends before the power limit takes hold, 35 to 80 ms later (kernels/calibrate/NOTES.md)."""
ROUNDS = 6
TOLERANCE = {"fp16": 2e-3, "bf16": 1.6e-2}
"""Relative error of O above which a kernel is not timed; `fasim validate` judges finely."""
PUBLISHED = {"FlashAttention-3 (source of 2026-08, CUDA 13.0)": "fa3", "cuDNN 9.19 through torch 2.11 SDPA": "cudnn"}


def workloads(head_dims: Iterable[int], seqlens: Sequence[int] | None, dtype: str) -> list[Workload]:
    """The papers' setting at each length, full and causal: 16k tokens, hidden size 2048."""
    return [
        Workload(max(1, beside.TOKENS // seqlen), beside.HIDDEN // head_dim, seqlen, head_dim, dtype, causal)
        for head_dim in head_dims
        for causal in (False, True)
        for seqlen in seqlens or LENGTHS[head_dim]
    ]


def published_tflops() -> dict[tuple, dict[str, float]]:
    """(batch, heads, length, head_dim, causal) -> TFLOP/s of "fa3" and "cudnn" on the H200 of h200_tflops.csv, forward fp16."""
    found: dict[tuple, dict[str, float]] = {}
    for row in read_table("h200_tflops.csv"):
        name = PUBLISHED.get(row["implementation"])
        if name and (row["direction"], row["dtype"]) == ("forward", "fp16"):
            shape = (int(row["batch"]), int(row["heads"]), int(row["seqlen"]), int(row["head_dim"]), row["causal"] == "true")
            found.setdefault(shape, {})[name] = float(row["tflops"])
    return found


def versus_fa3(ours: float, cudnn: float, then: dict[str, float]) -> float:
    """Our rate over FlashAttention-3's, both in units of cuDNN's at the time."""
    return (ours / cudnn) / (then["fa3"] / then["cudnn"])


def run_case(workload: Workload, kernels: Sequence[str], meter: beside.Meter, rounds: int, sustained: bool) -> list[dict]:
    """One row per kernel; a kernel that is wrong, or that cannot run, says so and has no time."""
    case = beside.Case(False, workload)
    sets = beside.buffers(case)
    by_head = [tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in each) for each in sets] if "flex" in kernels else sets
    rows, calls = {}, {}
    for name in kernels:
        rows[name] = {"pass": "forward", **workload.to_dict(), "kernel": name}
        try:
            rows[name] |= resources_of(name, workload)
            call = beside.calls_of(name, case, by_head if name == "flex" else sets)
            error = rows[name]["relative_error"] = beside.error_of(call, case, sets[0])
            if not error <= TOLERANCE[workload.dtype]:
                rows[name]["refused"] = f"its relative error {error:.1e} is above {TOLERANCE[workload.dtype]:.1e}"
                continue
            rows[name]["host_us"] = round(host_us(call), 1)
        except Exception as error:  # a peer that refuses a shape is a finding, and so is a kernel that does not compile
            rows[name]["refused"] = f"{type(error).__name__}: {error}"[:300]
            continue
        calls[name] = call
    rest_s, burst_s = (0.0, beside.BURST_S) if sustained else (REST_S, BURST_S)
    timed = beside.in_turns(calls, case.flops, meter, rounds, burst_s, rest_s, seed=workload.seqlen)
    return compare([row | timed.get(name, {}) for name, row in rows.items()], workload)


def compare(rows: list[dict], workload: Workload) -> list[dict]:
    """The rows of one case, ours with their ratio to cuDNN in this run and, where it was measured, to FlashAttention-3."""
    shape = (workload.batch, workload.heads, workload.seqlen_q, workload.head_dim, workload.causal)
    then = published_tflops().get(shape)
    cudnn = next((row.get("tflops") for row in rows if row["kernel"] == "cudnn"), None)
    for row in rows:
        if cudnn and "tflops" in row and row["kernel"].startswith("fasim-"):
            row["vs_cudnn"] = round(row["tflops"] / cudnn, 4)
            if then:
                row["vs_fa3"] = round(versus_fa3(row["tflops"], cudnn, then), 4)
    return rows


def resources_of(name: str, workload: Workload) -> dict:
    """Tile and registers of a CUDA kernel of ours."""
    schedule = name.removeprefix("fasim-")
    if schedule not in available():
        return {}
    config = config_for(schedule, workload.dtype, workload.head_dim, workload.causal)
    report = build.build(config.source).report
    return {"tile": config.tile.to_dict(), "registers": report.registers, "spill_bytes": report.spill_bytes}


def host_us(call: beside.Call, count: int = 50) -> float:
    """Microseconds that the host needs to enqueue one call on an idle GPU."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for number in range(count):
        call(number % beside.BUFFERS)
    spent = time.perf_counter() - begin
    torch.cuda.synchronize()
    return spent / count * 1e6


def means_of(rows: Iterable[dict]) -> list[dict]:
    """Per kernel, dtype and head_dim: geometric means of what its rows have of vs_fa3 and vs_cudnn, and the worst row."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if "vs_cudnn" in row:
            groups.setdefault((row["kernel"], row["dtype"], row["head_dim"]), []).append(row)
    found = []
    for (kernel, dtype, head_dim), members in groups.items():
        entry = {"kernel": kernel, "dtype": dtype, "head_dim": head_dim, "rows": len(members)}
        for ratio in ("vs_cudnn", "vs_fa3"):
            values = [row[ratio] for row in members if ratio in row]
            if values:
                mean = round(statistics.geometric_mean(values), 4)
                entry[ratio] = {"geometric_mean": mean, "least": min(values), "rows": len(values)}
        found.append(entry)
    return found


def report(works: Sequence[Workload], kernels: Sequence[str], rounds: int, sustained: bool = False) -> dict:
    """All cases with their provenance."""
    meter = beside.Meter()
    ours = [schedule for schedule in available() if f"fasim-{schedule}" in kernels]
    build.build_all([config_for(name, w.dtype, w.head_dim, w.causal).source for w in works for name in ours])
    rows = []
    for workload in works:
        done = run_case(workload, kernels, meter, rounds, sustained)
        rows += done
        sys.stderr.write(line_of(done) + "\n")
    sources = [HERE.parent / "ops.py", HERE / "launch.py", HERE / "wgmma.py", *sorted(HERE.glob("*.cu*"))]
    return {
        "schema": beside.SCHEMA,
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "driver": meter.driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvrtc": build.compiler_version(),
        "packages": {name: importlib.metadata.version(name) for name in ("torch", "triton", "cuda-core", "nvidia-cuda-nvrtc")},
        "protocol": {
            "rounds": rounds,
            "rest_s": 0 if sustained else REST_S,
            "burst_s": beside.BURST_S if sustained else BURST_S,
            "buffers": beside.BUFFERS,
            "data": "normal",
            "statistic": "median",
            "vs_fa3": "(ours / cudnn, this run) / (fa3 / cudnn, traces/published/h200_tflops.csv)",
        },
        "source": "kernels/measure/beside_cuda.py",
        "source_sha256": _sha256(Path(__file__)),
        "kernel_sha256": {path.relative_to(HERE.parents[1]).as_posix(): _sha256(path) for path in sources},
        "rows": rows,
        "means": means_of(rows),
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def line_of(rows: list[dict]) -> str:
    """One case as a line: TFLOP/s of each kernel, ours with the ratio to FlashAttention-3 or else to cuDNN."""
    first = rows[0]
    shape = f"{first['batch']}x{first['heads']}x{first['seqlen_q']}"
    cells = [f"{first['dtype']} d{first['head_dim']:<3} {shape:10} {'causal' if first['causal'] else 'full':6}"]
    for row in rows:
        rate = f"{row['tflops']:.0f}" if "tflops" in row else "refused"
        ratio = next((f" ({row[key]:.3f} {key})" for key in ("vs_fa3", "vs_cudnn") if key in row), "")
        cells.append(f"{row['kernel'].removeprefix('fasim-')} {rate}{ratio}")
    return "  ".join(cells)


def table_of(result: dict) -> str:
    """The whole report as text: one line per case, then the means."""
    by_case: dict[tuple, list[dict]] = {}
    for row in result["rows"]:
        by_case.setdefault(tuple(row[k] for k in ("dtype", "head_dim", "causal", "batch", "seqlen_q")), []).append(row)
    lines = [line_of(rows) for rows in by_case.values()]
    for entry in result["means"]:
        ratios = [
            f"{key} {entry[key]['geometric_mean']:.3f} (least {entry[key]['least']:.3f}, {entry[key]['rows']} rows)"
            for key in ("vs_fa3", "vs_cudnn")
            if key in entry
        ]
        lines.append(f"geometric mean  {entry['kernel']} {entry['dtype']} d{entry['head_dim']}  " + "  ".join(ratios))
    refused = dict.fromkeys(f"{row['kernel']} d{row['head_dim']}: {row['refused']}" for row in result["rows"] if "refused" in row)
    return "\n".join([*lines, *refused]) + "\n"


def main() -> None:
    """Measure, write DIR/cuda.json, show the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for cuda.json")
    parser.add_argument("--schedules", nargs="+", choices=available(), default=available(), help="ours to time (default: all)")
    parser.add_argument("--head-dims", nargs="+", type=int, choices=HEAD_DIMS, default=[128, 64, 256])
    parser.add_argument("--seqlens", nargs="+", type=int, help="lengths (default: those FlashAttention-3 was measured at)")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="fp16")
    parser.add_argument("--ablation", action="store_true", help="only the shape of FlashAttention-3's ablation")
    parser.add_argument("--flex", action="store_true", help="FlexAttention too; its autotuner takes a minute per shape")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each kernel in a case")
    parser.add_argument("--sustained", action="store_true", help="no rest between bursts: at the power limit")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    works = workloads(given.head_dims, given.seqlens, given.dtype)
    if given.ablation:
        works = [Workload(*ABLATION, 128, given.dtype, False)]
    kernels = [*(f"fasim-{schedule}" for schedule in given.schedules), *PEERS, *(["flex"] if given.flex else [])]
    result = report(works, kernels, given.rounds, given.sustained)
    (given.out / "cuda.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table_of(result))


if __name__ == "__main__":
    main()
