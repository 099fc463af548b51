"""Short rows at head_dim 64, beside cuDNN: `python -m fasim.kernels.measure.beside_pairs --out DIR [--deadline 120]`.

The kernels whose CTAs share an SM (`kernels/cuda/pairs`), fa3 on its other tiles, and what "auto" takes, with cuDNN and, where its
wheel is there, FlashAttention-3: microseconds of a call in a replayed CUDA graph, the median of rounds in which they take turns
with a rest between, random normal bf16, 16k tokens, hidden size 2048, each O held to the fp64 oracle first. Rows come in the order
of what they decide, and none begins behind the deadline. `--compile-only` compiles and needs no GPU. Writes pairs.json; the table
goes to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ...simulator.problem.tile import Tile
from ...simulator.problem.workload import Workload
from .. import ops, reference
from ..compile import build
from ..cuda import config
from ..cuda.pairs import config as pairs
from . import peers
from .beside_decode import graph_of, in_turns, version_of

SCHEMA = "fasim.pair-times/1"
HERE = Path(ops.__file__).parent
TOKENS, HEADS, HEAD_DIM = 16 << 10, 32, 64
ROWS = ((512, True), (1024, True), (512, False), (1024, False), (2048, True), (2048, False), (4096, True))
ROUNDS, REST_S = 9, 0.01
TOLERANCE = 1e-2
"""Of O in bf16, relative to the oracle's norm."""
OTHER_TILES = (Tile(128, 128, 3, 2), Tile(192, 96, 3, 3))
"""fa3's, recorded once in fp16 (tiles_h200.json): ahead of the table's at 1k."""


def kernels(causal: bool) -> dict[str, config.KernelConfig]:
    """Ours by name, but what "auto" takes."""
    found = {each.name: each for each in pairs.candidates("bf16", causal)}
    for tile in OTHER_TILES:
        found[f"fa3 {tile}, {tile.stages} stages"] = config.KernelConfig("fa3", "bf16", HEAD_DIM, causal, tile)
    return found


def calls_of(length: int, causal: bool) -> tuple[dict[str, Callable], dict[str, str], tuple[torch.Tensor, ...]]:
    """What is timed by name, why others are not, and q, k and v."""
    from ..cuda import launch
    from ..cuda.pairs import launch as shared

    shape = (TOKENS // length, length, HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    scale, refused = HEAD_DIM**-0.5, {}
    calls: dict[str, Callable] = {"auto": lambda _: ops.flash_attn_func(q, k, v, causal=causal)}
    for name, each in kernels(causal).items():
        try:
            if isinstance(each, pairs.PairConfig):
                plan = shared.plan_for(each, q, k, v)
                if shared.resident(plan) != each.tile.resident:
                    refused[name] = f"{shared.resident(plan)} CTAs are resident on an SM"
            else:
                plan = launch.Plan(launch.kernel_for(each, 0), shape, shape, (q.stride(),) * 3, 0)
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {error}"[:300]
            continue
        calls[name] = lambda _, plan=plan: plan.run(q, k, v, scale)[0]
    workload = Workload(shape[0], HEADS, length, HEAD_DIM, "bf16", causal)
    for name in ("peer:cudnn", "peer:fa3"):
        try:
            attend = peers.prepare(name, workload)
            calls[name] = lambda _, attend=attend: _output(attend(q, k, v))
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {error}"[:300]
    return calls, refused, (q, k, v)


def _output(answer: object) -> torch.Tensor:
    return answer[0] if isinstance(answer, tuple) else answer


def row_of(length: int, causal: bool) -> dict:
    """Errors and microseconds of every kernel on one row."""
    calls, refused, (q, k, v) = calls_of(length, causal)
    some = (slice(0, 1), slice(None), slice(0, 2))
    expected = reference.attention_forward(q[some], k[some], v[some], causal=causal).o
    errors, graphs = {}, {}
    for name, call in calls.items():
        try:
            errors[name] = float((call(0)[some].double() - expected).norm() / expected.norm())
            if not errors[name] <= TOLERANCE:
                refused[name] = f"its relative error {errors[name]:.1e} is above {TOLERANCE:.0e}"
                continue
            graphs[name] = graph_of(call, 1)
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {error}"[:300]
    us = in_turns(graphs, ROUNDS, REST_S)
    flop = Workload(q.shape[0], HEADS, length, HEAD_DIM, "bf16", causal).paper_flops
    tflops = {name: round(flop / each / 1e6, 1) for name, each in us.items()}
    about = {"seqlen": length, "causal": causal, "batch": q.shape[0], "heads": HEADS, "head_dim": HEAD_DIM}
    return {**about, "relative_error": errors, "us": us, "tflops": tflops, "refused": refused}


def report(deadline_s: float) -> Iterator[dict]:
    """The report as it grows, after every row."""
    torch.manual_seed(0)
    build.build_all([each.source for causal in (True, False) for each in kernels(causal).values()])
    sources = [*sorted((HERE / "cuda").glob("*.cu*")), *sorted((HERE / "cuda" / "pairs").glob("*.py"))]
    result = {
        "schema": SCHEMA,
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "packages": {name: version_of(name) for name in ("torch", "triton", "fa3-fwd")},
        "source": "kernels/measure/beside_pairs.py",
        "source_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "kernel_sha256": {str(path.relative_to(HERE.parent)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sources},
        "rows": [],
        "not_reached": [],
    }
    for length, causal in ROWS:
        if time.monotonic() - STARTED > deadline_s:
            result["not_reached"].append([length, causal])
        else:
            result["rows"].append(row_of(length, causal))
            sys.stderr.write(line_of(result["rows"][-1]) + "\n")
        result["seconds"] = round(time.monotonic() - STARTED, 1)
        yield result


def line_of(row: dict) -> str:
    """One row as a line: TFLOP/s of each kernel, and why others have none."""
    cells = [f"{name} {rate:.0f}" for name, rate in row["tflops"].items()]
    cells += [f"{name}: {why}" for name, why in row["refused"].items()]
    return f"d{row['head_dim']} {row['seqlen']} {'causal' if row['causal'] else 'full'}: {'; '.join(cells)}"


STARTED = time.monotonic()


def main() -> None:
    """Measure, write DIR/pairs.json as it grows, show the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for pairs.json")
    parser.add_argument("--deadline", type=float, default=120.0, help="seconds")
    parser.add_argument("--compile-only", action="store_true")
    given = parser.parse_args()
    if given.compile_only:
        for causal in (True, False):
            for name, each in kernels(causal).items():
                sys.stdout.write(f"{name}: {build.build(each.source).report.spill_bytes} bytes spilled\n")
        return
    if given.out is None:
        parser.error("--out is where pairs.json goes")
    given.out.mkdir(parents=True, exist_ok=True)
    for result in report(given.deadline):
        (given.out / "pairs.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write("\n".join(line_of(row) for row in result["rows"]) + "\n")


if __name__ == "__main__":
    main()
