"""The ladder in Gluon beside FlashAttention-3 and ours: `python -m fasim.kernels.measure.beside_gluon --out DIR`.

Kernel time, since the wheel's host code takes longer than a short kernel: each implementation's calls are captured in a CUDA graph
over buffers larger than L2, and graphs are replayed in bursts, in shuffled turns after a rest (beside.py); the median over replays.
Every output is held to the fp64 oracle first. `--candidates` times every form that gluon.QUEUED might have, `--schedules` no
rung but those named. Writes DIR/gluon.json after every case and stops at the deadline; the table goes to stdout, more to stderr.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from ...simulator.problem.workload import Workload
from .. import ops
from ..gluon import build
from ..gluon import config as gluon
from . import beside, peers
from .beside_cuda import BURST_S, REST_S, TOLERANCE

LENGTHS = (1024, 4096, 16384)
PEER = "peer:fa3"
OURS = ("fa2", "fa3")
"""Our Triton kernel and our fastest in CUDA."""
FLOPS_A_GRAPH = 4e12
"""Some 6 ms at full speed."""
MAX_LAUNCHES = 24
ROUNDS = 4
DEADLINE_S = 150


def workloads(head_dims: Iterable[int], seqlens: Sequence[int], dtype: str) -> list[Workload]:
    """The papers' setting: 16k tokens, hidden size 2048."""
    return [
        Workload(max(1, beside.TOKENS // seqlen), beside.HIDDEN // head_dim, seqlen, head_dim, dtype, causal)
        for head_dim in head_dims
        for causal in (False, True)
        for seqlen in seqlens
    ]


def candidate(kernel: str, workload: Workload) -> gluon.GluonConfig | None:
    """A form of a rung of QUEUED by its name, where there is one for the workload."""
    return gluon.candidates(workload.dtype, workload.head_dim, workload.causal, workload.seqlen_k).get(kernel)


def config_of(kernel: str, workload: Workload) -> gluon.GluonConfig | None:
    """The kernel in Gluon by its name; None where it is none."""
    if kernel in gluon.NAMES:
        rung = kernel.removeprefix(gluon.PREFIX)
        return gluon.config_for(rung, workload.dtype, workload.head_dim, workload.causal, workload.seqlen_k)
    return candidate(kernel, workload)


def attention_of(kernel: str, workload: Workload) -> Callable:
    """f(q, k, v) -> O or (O, LSE). Raises MissingTool where a peer is not installed."""
    if config := candidate(kernel, workload):
        from ..gluon.launch import forward_by

        return lambda q, k, v: forward_by(config, q, k, v)
    if peers.is_peer(kernel):
        return peers.prepare(kernel, workload)
    return lambda q, k, v: ops.flash_attn_func(q, k, v, causal=workload.causal, schedule=kernel)


def run_case(
    workload: Workload,
    kernels: Sequence[str],
    meter: beside.Meter,
    rounds: int,
    attention: Callable[[str, Workload], Callable] | None = None,
    resources: Callable[[str, Workload], dict] | None = None,
) -> list[dict]:
    """One row per kernel; one that is wrong, or cannot run, says so and has no time. By default kernels are those of this file."""
    attention, resources = attention or attention_of, resources or resources_of
    case = beside.Case(False, workload)
    sets = [each[:3] for each in beside.buffers(case)]
    launches = min(MAX_LAUNCHES, beside.BUFFERS * max(1, round(FLOPS_A_GRAPH / workload.paper_flops / beside.BUFFERS)))
    rows, graphs = {}, {}
    for name in kernels:
        rows[name] = {"pass": "forward", **workload.to_dict(), "kernel": name} | resources(name, workload)
        try:
            attend = attention(name, workload)
            error = rows[name]["relative_error"] = beside.error_of(lambda i, f=attend: _o(f(*sets[i])), case, beside_do(sets[0]))
            if not error <= TOLERANCE[workload.dtype]:
                rows[name]["refused"] = f"its relative error {error:.1e} is above {TOLERANCE[workload.dtype]:.1e}"
                continue
            graphs[name] = graph_of(attend, sets, launches)
        except Exception as error:  # a peer that refuses a shape, or is not here, is a finding
            rows[name]["refused"] = f"{type(error).__name__}: {error}"[:300]
    timed = in_turns(graphs, meter, rounds, seed=workload.seqlen)
    for name, (times, clock, power) in timed.items():
        median = statistics.median(times) / launches
        rows[name] |= {
            "median_ms": round(median, 5),
            "replays": len(times),
            "launches": launches,
            "tflops": round(workload.paper_flops / median / 1e9, 1),
            "sm_clock_mhz": clock,
            "power_w": power,
        }
    base = rows.get(PEER, {}).get("tflops")
    for row in rows.values():
        if base and "tflops" in row:
            row["vs_fa3"] = round(row["tflops"] / base, 4)
    return list(rows.values())


def _o(out: object) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def beside_do(tensors: tuple) -> tuple:
    """q, k, v and a place for dO, which a forward has not."""
    return (*tensors, tensors[0])


def graph_of(attend: Callable, sets: Sequence[tuple], launches: int) -> torch.cuda.CUDAGraph:
    """A graph of `launches` calls that rotate through the buffers."""
    for each in sets:
        attend(*each)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(launches):
            attend(*sets[number % len(sets)])
    graph.replay()
    torch.cuda.synchronize()
    return graph


def in_turns(
    graphs: dict[str, torch.cuda.CUDAGraph], meter: beside.Meter, rounds: int, seed: int
) -> dict[str, tuple[list[float], float, float]]:
    """Milliseconds of each replay but a burst's first, and the medians of clock and power, by kernel."""
    replays = {}
    for name, graph in graphs.items():
        times, _, _ = meter.burst(lambda _, g=graph: g.replay(), 3)
        replays[name] = max(3, math.ceil(BURST_S * 1000 / statistics.median(times)))
    found: dict[str, tuple[list, list, list]] = {name: ([], [], []) for name in graphs}
    order = random.Random(seed)
    for _ in range(rounds):
        for name in order.sample(list(graphs), len(graphs)):
            torch.cuda.synchronize()
            time.sleep(REST_S / 2)
            times, clock, power = meter.burst(lambda _, g=graphs[name]: g.replay(), replays[name])
            found[name][0].extend(times[1:])
            found[name][1].append(clock)
            found[name][2].append(power)
    return {
        name: (times, statistics.median(clocks), round(statistics.median(powers), 1))
        for name, (times, clocks, powers) in found.items()
    }


def resources_of(name: str, workload: Workload) -> dict:
    """Tile and shared memory of a rung."""
    config = config_of(name, workload)
    if config is None:
        return {}
    built = build.build(config)
    return {
        "tile": {"block_m": config.block_m, "block_n": config.block_n, "stages": config.stages, "consumers": config.consumers},
        "named": config.named and config.schedule in gluon.QUEUED,
        "smem_bytes": built.smem_bytes,
        "compiler": built.compiler,
    }


def report(works: Sequence[Workload], named: Callable[[Workload], list[str]], rounds: int, end: float) -> Iterator[dict]:
    """What is known after each case, with its provenance; until `end`, as time.monotonic() has it."""
    meter = beside.Meter()
    rows = []
    for workload in works:
        if time.monotonic() > end:
            sys.stderr.write(f"not reached: {workload}\n")
            continue
        done = run_case(workload, named(workload), meter, rounds)
        rows += done
        sys.stderr.write(line_of(done) + "\n")
        torch.cuda.empty_cache()
        yield _record(rows, meter, rounds)


def _record(rows: list[dict], meter: beside.Meter, rounds: int) -> dict:
    versions = {}
    for name in ("torch", "triton", "fa3-fwd"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "schema": beside.SCHEMA,
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "driver": meter.driver(),
        "cuda": torch.version.cuda,
        "packages": versions,
        "protocol": {"rounds": rounds, "rest_s": REST_S / 2, "burst_s": BURST_S, "buffers": beside.BUFFERS, "data": "normal",
                     "statistic": "median of replays of a CUDA graph"},
        "source": "kernels/measure/beside_gluon.py",
        "source_sha256": _sha256(Path(__file__)),
        "kernel_sha256": {
            path.relative_to(gluon.HERE.parents[1]).as_posix(): _sha256(path) for path in sorted(gluon.HERE.glob("*.py"))
        },
        "rows": rows,
    }  # fmt: skip


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def line_of(rows: list[dict]) -> str:
    """One case as a line: TFLOP/s of each kernel and its share of FlashAttention-3's."""
    first = rows[0]
    cells = [f"{first['dtype']} d{first['head_dim']:<3} {first['seqlen_q']:5} {'causal' if first['causal'] else 'full':6}"]
    for row in rows:
        rate = f"{row['tflops']:.0f}" if "tflops" in row else f"refused ({row['refused'][:80]})"
        share = f" ({row['vs_fa3']:.3f})" if "vs_fa3" in row else ""
        cells.append(f"{row['kernel']} {rate}{share}")
    return "  ".join(cells)


def main() -> None:
    """Measure, write DIR/gluon.json, show the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gluon.json")
    parser.add_argument("--schedules", nargs="*", choices=gluon.SCHEDULES, default=gluon.SCHEDULES, help="rungs (default: all)")
    parser.add_argument("--head-dims", nargs="+", type=int, choices=gluon.HEAD_DIMS, default=[128, 64, 256])
    parser.add_argument("--seqlens", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--dtype", choices=gluon.DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each kernel in a case")
    parser.add_argument("--candidates", action="store_true", help="every form of those in gluon.QUEUED too")
    parser.add_argument("--deadline", type=float, default=DEADLINE_S, help="seconds from the start; a case begun is ended")
    parser.add_argument("--compile-only", action="store_true", help="needs no GPU")
    given = parser.parse_args()
    end = time.monotonic() + given.deadline
    given.out.mkdir(parents=True, exist_ok=True)
    works = workloads(given.head_dims, given.seqlens, given.dtype)

    def named(workload: Workload) -> list[str]:
        forms = gluon.candidates(workload.dtype, workload.head_dim, workload.causal, workload.seqlen_k) if given.candidates else ()
        return [PEER, *OURS, *(gluon.PREFIX + schedule for schedule in given.schedules), *forms]

    configs = (config_of(name, workload) for workload in works for name in named(workload))
    refused = build.build_all(config for config in configs if config)
    sys.stderr.write(f"{len(refused)} kernels compiled; {[why for why in refused.values() if why]}\n")
    if given.compile_only:
        return
    for result in report(works, named, given.rounds, end):
        (given.out / "gluon.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write("\n".join(line_of(list(rows)) for rows in _cases(result["rows"])) + "\n")


def _cases(rows: Sequence[dict]) -> Iterable[list[dict]]:
    """The rows of each case."""
    cases: dict[tuple, list[dict]] = {}
    for row in rows:
        cases.setdefault((row["head_dim"], row["causal"], row["seqlen_q"]), []).append(row)
    return cases.values()


if __name__ == "__main__":
    main()
