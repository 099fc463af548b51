"""Our backward beside FlashAttention-4's for Hopper and cuDNN's in one process: `python -m fasim.kernels.measure.beside_backward`.

At 16k tokens and hidden size 2048 in bf16, each head dim, length and mask: short bursts in shuffled turns, each after a rest, on
random normal data that rotates through buffers larger than L2; the median over all calls between CUDA events, clock and power
by NVML in mid-burst (beside.py). The forward is done before: a call is all that its library launches for dQ, dK and dV, called
as its own autograd function calls it. Each call's gradients are first held to the fp64 oracle. Writes DIR/backward.json as it
grows; the table goes to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from ...simulator.problem.workload import Workload
from . import beside, gradients, peers
from .bench import TOLERANCE, calls_of, largest_error
from .beside_cuda import BURST_S, REST_S, host_us
from .gradients import SAME_BITS
from .names import accept, packages_of, sources_of, subject_of

LENGTHS = {128: (1024, 2048, 4096, 8192, 16384), 64: (1024, 4096, 16384), 256: (1024, 4096, 16384)}
PEERS = ("peer:fa4", "peer:cudnn")
ROUNDS = 6
HOST_CALLS = 12


def workloads(head_dims: Iterable[int], seqlens: Sequence[int] | None = None) -> list[Workload]:
    """The papers' setting at each length, full and causal."""
    return [
        Workload(max(1, beside.TOKENS // seqlen), beside.HIDDEN // head_dim, seqlen, head_dim, "bf16", causal, direction="backward")
        for head_dim in head_dims
        for causal in (False, True)
        for seqlen in seqlens or LENGTHS[head_dim]
    ]


def taking(kernels: Sequence[str], workload: Workload) -> list[str]:
    """Those of the kernels that have the head dim: of ours not every schedule has each."""
    return [
        name for name in kernels if peers.is_peer(name) or workload.head_dim in subject_of(name, direction="backward").head_dims
    ]


def run_case(workload: Workload, kernels: Sequence[str], meter: beside.Meter, rounds: int) -> list[dict]:
    """One row per kernel; a kernel that is wrong, or that cannot run, says so and has no time."""
    sets = beside.buffers(beside.Case(True, workload))
    right = gradients.expected(sets[0], workload)
    rows, calls = {}, {}
    for name in taking(kernels, workload):
        rows[name] = {"pass": "backward", **workload.to_dict(), "kernel": name}
        try:
            subject = subject_of(name, direction="backward")
            accept(subject, workload)
            each = calls_of(subject, workload, sets)
            error = rows[name]["relative_error"] = largest_error(gradients.compared(each[0](), right, workload))
            if not error <= TOLERANCE[workload.dtype]:
                rows[name]["refused"] = f"its relative error {error:.1e} is above {TOLERANCE[workload.dtype]:.1e}"
                continue
            calls[name] = lambda i, each=each: each[i]()
            rows[name]["host_us"] = round(host_us(calls[name], HOST_CALLS), 1)
        except Exception as error:  # a peer that refuses a shape is a finding, and so is a kernel that does not compile
            rows[name]["refused"] = f"{type(error).__name__}: {error}"[:300]
    timed = beside.in_turns(calls, workload.paper_flops, meter, rounds, BURST_S, REST_S, seed=workload.seqlen)
    return compare([row | timed.get(name, {}) for name, row in rows.items()])


def compare(rows: list[dict]) -> list[dict]:
    """The rows of one case, ours with their rate over the better peer's, and a deterministic one over its own in any order; None
    of it where the other was not timed."""
    timed = {row["kernel"]: row["tflops"] for row in rows if "tflops" in row}
    best = max((rate for kernel, rate in timed.items() if peers.is_peer(kernel)), default=None)
    for row in rows:
        if row["kernel"] not in timed or peers.is_peer(row["kernel"]):
            continue
        default = row["kernel"].removesuffix(SAME_BITS)
        if default != row["kernel"]:  # its price; beside peers that are not deterministic it has no place
            row |= {"vs_any_order": round(row["tflops"] / timed[default], 4)} if default in timed else {}
        elif best:
            row["vs_best_peer"] = round(row["tflops"] / best, 4)
    return rows


def means_of(rows: Iterable[dict]) -> list[dict]:
    """Per kernel of ours and head dim: the geometric mean of its rates over the better peer's, and the least."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        if "vs_best_peer" in row:
            groups.setdefault((row["kernel"], row["head_dim"]), []).append(row["vs_best_peer"])
    return [
        {"kernel": kernel, "head_dim": head_dim, "rows": len(found), "least": min(found),
         "geometric_mean": round(statistics.geometric_mean(found), 4)}
        for (kernel, head_dim), found in groups.items()
    ]  # fmt: skip


def report(works: Sequence[Workload], kernels: Sequence[str], rounds: int, seconds: float = math.inf) -> Iterator[dict]:
    """The report as it grows, after every case, with its provenance. No case is begun behind `seconds`; those left are named."""
    meter, began = beside.Meter(), time.perf_counter()
    result = {
        "schema": beside.SCHEMA,
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "driver": meter.driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "packages": {name: found for kernel in kernels for name, found in packages_of(kernel).items()}
        | {"torch": torch.__version__},
        "protocol": {
            "rounds": rounds, "rest_s": REST_S, "burst_s": BURST_S, "buffers": beside.BUFFERS,
            "data": "normal", "statistic": "median",
        },
        "source": "kernels/measure/beside_backward.py",
        "kernel_sha256": {
            name: digest
            for kernel in kernels
            for name, digest in sources_of(subject_of(kernel, direction="backward"), _first(works, kernel)).items()
        },
        "rows": [],
    }  # fmt: skip
    for number, workload in enumerate(works):
        if time.perf_counter() - began > seconds:
            result["not_begun"] = [work.to_dict() for work in works[number:]]
            yield result
            return
        done = run_case(workload, kernels, meter, rounds)
        torch.cuda.empty_cache()
        result["rows"] += done
        result |= {"means": means_of(result["rows"]), "seconds": round(time.perf_counter() - began, 1)}
        sys.stderr.write(line_of(done) + "\n")
        yield result


def _first(works: Sequence[Workload], kernel: str) -> Workload:
    """The first workload that a kernel takes."""
    return next((work for work in works if taking([kernel], work)), works[0])


def line_of(rows: list[dict]) -> str:
    """One case as a line: TFLOP/s of each kernel, ours with its ratio to the better peer."""
    first = rows[0]
    shape = f"{first['batch']}x{first['heads']}x{first['seqlen_q']}"
    cells = [f"d{first['head_dim']:<3} {shape:10} {'causal' if first['causal'] else 'full':6}"]
    for row in rows:
        ratio = next((f" ({row[key]:.3f})" for key in ("vs_best_peer", "vs_any_order") if key in row), "")
        cells.append(f"{row['kernel']} {row['tflops']:.0f}{ratio}" if "tflops" in row else f"{row['kernel']} {row['refused'][:80]}")
    return "  ".join(cells)


def table_of(result: dict) -> str:
    """The whole report as text: one line per case, then the means."""
    by_case: dict[tuple, list[dict]] = {}
    for row in result["rows"]:
        by_case.setdefault(tuple(row[key] for key in ("head_dim", "causal", "seqlen_q")), []).append(row)
    lines = [line_of(rows) for rows in by_case.values()]
    for mean in result["means"]:
        lines.append(
            f"{mean['kernel']} d{mean['head_dim']}: {mean['geometric_mean']:.3f} of the better peer as geometric mean, "
            f"{mean['least']:.3f} at least, {mean['rows']} rows"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write DIR/backward.json, show the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for backward.json")
    parser.add_argument("--kernels", nargs="+", default=["fa2"], help="ours to time, by schedule")
    parser.add_argument("--peers", nargs="*", default=list(PEERS))
    parser.add_argument("--head-dims", nargs="+", type=int, choices=tuple(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--seqlens", nargs="+", type=int)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each kernel in a case")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case behind so many")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    result = {"rows": [], "means": []}
    if not torch.cuda.is_available():
        sys.stderr.write("no GPU here: it needs an H100 or H200\n")
        sys.exit(3)
    works, kernels = workloads(given.head_dims, given.seqlens), [*given.kernels, *given.peers]
    for result in report(works, kernels, given.rounds, given.seconds):
        (given.out / "backward.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table_of(result))
    sys.exit(int("not_begun" in result))


if __name__ == "__main__":
    main()
