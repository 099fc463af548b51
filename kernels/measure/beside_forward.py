"""The forward at every length beside the peers: `python -m fasim.kernels.measure.beside_forward --out DIR [--deadline 240]`.

What "auto" takes, each of our kernels, FlashAttention-3's and FlashAttention-4's wheels, where they are there, and cuDNN, in one
process: microseconds of a call in a replayed CUDA graph, so that no host is in it, the median of rounds in shuffled turns with a
rest between, random normal bf16, 16k tokens, hidden size 2048, each O held to the fp64 oracle first. What "auto" takes by shape
(`kernels/cuda/fastest.py`) is held to this record. No row begins behind the deadline. `--head-dims`, `--lengths` and
`--kernels` take some only; `--compile-only` compiles and needs no GPU. Writes forward.json; the table goes to stdout.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial

import torch

from ...simulator.problem.workload import Workload
from .. import ops, reference
from ..compile import build
from ..cuda import config
from ..cuda.pairs import config as pairs
from . import peers, record
from .beside_decode import graph_of, in_turns

SCHEMA = "fasim.forward-times/1"
TOKENS, HIDDEN = 16 << 10, 2048
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 256, 128)
MOST_KEYS_OF_PAIRS = 4096
OTHERS = ("peer:fa3", "peer:fa4", "peer:cudnn")
ROUNDS, REST_S = 9, 0.01
TOLERANCE = 1e-2
"""Of O in bf16, relative to the oracle's norm."""


def ours(head_dim: int, length: int) -> tuple[str, ...]:
    """Our kernels for such rows, by the name that flash_attn_func takes."""
    shared = pairs.NAMES if head_dim == pairs.HEAD_DIM and length <= MOST_KEYS_OF_PAIRS else ()
    return (*config.SCHEDULES, *shared)


def configs(head_dims: Iterable[int]) -> list[config.KernelConfig]:
    """Of every kernel of ours that is timed."""
    alone = [each for each in config.variants() if each.dtype == "bf16" and each.head_dim in head_dims]
    return alone + [each for each in pairs.variants() if each.dtype == "bf16" and each.head_dim in head_dims]


def calls_of(workload: Workload, chosen: Iterable[str] | None, tensors: tuple) -> tuple[dict[str, Callable], dict[str, str]]:
    """What is timed by name, and why others are not."""
    calls: dict[str, Callable] = {}
    refused: dict[str, str] = {}
    for name in ("auto", *ours(workload.head_dim, workload.seqlen_k), *OTHERS):
        if chosen and name not in chosen:
            continue
        if name in OTHERS:
            try:
                attend = peers.prepare(name, workload)
            except Exception as error:  # a library that is not here, or refuses a shape, is a finding
                refused[name] = f"{type(error).__name__}: {error}"[:300]
                continue
            calls[name] = lambda _, attend=attend: record.output_of(attend(*tensors))
        else:
            calls[name] = lambda _, name=name: ops.flash_attn_func(*tensors, causal=workload.causal, schedule=name)
    return calls, refused


def row_of(head_dim: int, length: int, causal: bool, chosen: Iterable[str] | None = None) -> dict:
    """Errors, microseconds and TFLOP/s of every kernel on one row."""
    workload = Workload(TOKENS // length, HIDDEN // head_dim, length, head_dim, "bf16", causal)
    shape = (workload.batch, length, workload.heads, head_dim)
    tensors = tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    calls, refused = calls_of(workload, chosen, tensors)
    some = (slice(0, 1), slice(None), slice(0, 2))
    expected = reference.attention_forward(*(x[some] for x in tensors), causal=causal).o
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
    about = {"head_dim": head_dim, "seqlen": length, "causal": causal, "batch": workload.batch, "heads": workload.heads}
    tflops = {name: round(workload.paper_flops / each / 1e6, 1) for name, each in us.items()}
    return {**about, "relative_error": errors, "us": us, "tflops": tflops, "refused": refused}


def ratios(row: dict) -> tuple[float, float]:
    """Of "auto": the best peer's time over its own, and its own over our fastest schedule's."""
    us = row["us"]
    best = min((us[name] for name in OTHERS if name in us), default=float("nan"))
    return best / us["auto"], us["auto"] / min(time for name, time in us.items() if name not in OTHERS)


def means(rows: list[dict]) -> dict[int, float]:
    """By head_dim, the geometric mean over rows of the best peer's time over that of "auto"."""
    found: dict[int, list[float]] = {}
    for row in rows:
        found.setdefault(row["head_dim"], []).append(ratios(row)[0])
    return {head_dim: statistics.geometric_mean(each) for head_dim, each in found.items()}


def line_of(row: dict) -> str:
    """One row as a line: TFLOP/s of each kernel, and why others have none."""
    cells = [f"{name} {rate:.0f}" for name, rate in row["tflops"].items()]
    cells += [f"{name}: {why}" for name, why in row["refused"].items()]
    if "auto" in row["us"]:
        over, within = ratios(row)
        cells.append(f"auto over the best peer {over:.3f}, {100 * (within - 1):.1f} % behind our best")
    return f"d{row['head_dim']} {row['seqlen']} {'causal' if row['causal'] else 'full'}: {'; '.join(cells)}"


def main() -> None:
    """Measure, write DIR/forward.json as it grows, show the table and the means."""
    parser = record.parser(__doc__.splitlines()[0], "forward", 240.0)
    parser.add_argument("--head-dims", nargs="+", type=int, choices=HEAD_DIMS, default=HEAD_DIMS)
    parser.add_argument("--lengths", nargs="+", type=int, choices=LENGTHS, default=LENGTHS)
    parser.add_argument("--kernels", nargs="+", help="names as flash_attn_func takes them, auto, peer:fa3, ... [default: all]")
    parser.add_argument("--compile-only", action="store_true")
    given = parser.parse_args()
    if given.compile_only:
        for each in configs(given.head_dims):
            sys.stdout.write(f"{each.name}: {build.build(each.source).report.spill_bytes} bytes spilled\n")
        return
    if given.out is None:
        parser.error("--out is where forward.json goes")
    torch.manual_seed(0)
    build.build_all([each.source for each in configs(given.head_dims)])
    room = record.ROOT / "kernels" / "cuda"
    result = record.begun(SCHEMA, __file__, [*room.glob("*.cu*"), *(room / "pairs").glob("*.py"), room / "fastest.py"])
    result["protocol"] = {"rounds": ROUNDS, "rest_s": REST_S, "data": "normal", "statistic": "median"}
    cases = [(d, n, causal) for d in given.head_dims for n in given.lengths for causal in (True, False)]
    record.keep(result, given.out / "forward.json", cases, partial(row_of, chosen=given.kernels), line_of, given.deadline)
    if all("auto" in row["us"] for row in result["rows"]):
        lines = [f"d{head_dim}: {mean:.3f} of the best peer, geometric mean" for head_dim, mean in means(result["rows"]).items()]
        sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
