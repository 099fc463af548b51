"""Every kernel in Gluon against fp64 and against itself: `python -m fasim.kernels.measure.check_gluon --out DIR`.

First all rungs and candidates, fp16 and bf16, head_dim 64, 128 and 256, full and causal, on shapes with edges; then each rung 50
times at each of the ten shapes of endurance.py while another stream keeps the GPU busy: the same bits each time, or a race. Kernels
are compiled a process a core. Writes DIR/check.json and stops at the deadline; what was not reached is listed. `--compile-only`
needs no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from ...simulator.errors import UsageError
from .. import reference
from ..gluon import build
from ..gluon import config as gluon
from . import endurance

EDGES = (
    # batch, heads, K/V heads, queries, keys
    (1, 2, 2, 256, 256),
    (2, 4, 2, 128, 1024),
    (1, 4, 1, 333, 190),  # causal: rows that see no key
    (1, 2, 2, 1, 300),
    (2, 3, 3, 577, 577),
    (1, 2, 1, 70, 1),
    (3, 8, 2, 1000, 1000),
    (1, 40, 8, 2048, 2048),  # more tiles than programs
)
TOLERANCE = {"fp16": 2e-3, "bf16": 1.6e-2}
"""Relative error of O on N(0, 1) data; `fasim validate` judges finely."""
LSE_TOLERANCE = 1e-3
RUNS = 50
DEADLINE_S = 120


def kernels_of(schedule: str, dtype: str, head_dim: int, causal: bool, seqlen_k: int) -> dict[str, gluon.GluonConfig]:
    """The kernel of a rung by its name; of `persistent` every candidate."""
    if schedule == "persistent":
        return gluon.candidates(dtype, head_dim, causal, seqlen_k)
    return {schedule: gluon.config_for(schedule, dtype, head_dim, causal, seqlen_k)}


def cases(schedules: list[str], head_dims: list[int]) -> Iterator[tuple[str, gluon.GluonConfig, tuple]]:
    """(name, kernel, shape) of every check, the rung that nobody ran first."""
    for schedule in sorted(schedules, key=gluon.SCHEDULES.index, reverse=True):
        for head_dim in head_dims:
            for dtype in gluon.DTYPES:
                for causal in (False, True):
                    for shape in EDGES:
                        for name, config in kernels_of(schedule, dtype, head_dim, causal, shape[4]).items():
                            yield name, config, shape


def check(name: str, config: gluon.GluonConfig, shape: tuple) -> dict:
    """One kernel at one shape: errors of O and LSE."""
    from ..gluon.launch import forward_by

    batch, heads, kv_heads, seqlen_q, seqlen_k = shape
    dtype = getattr(torch, {"fp16": "float16", "bf16": "bfloat16"}[config.dtype])
    generator = torch.Generator(device="cuda").manual_seed(seqlen_q + seqlen_k)
    make = lambda *size: torch.randn(*size, config.head_dim, device="cuda", dtype=dtype, generator=generator)  # noqa: E731
    q, k, v = make(batch, seqlen_q, heads), make(batch, seqlen_k, kv_heads), make(batch, seqlen_k, kv_heads)
    row = {"kernel": name, "dtype": config.dtype, "head_dim": config.head_dim, "causal": config.causal, "shape": list(shape)}
    o, lse = forward_by(config, q, k, v)
    right = reference.attention_forward(q, k, v, causal=config.causal)
    error = float((o.double() - right.o).norm() / right.o.norm())
    seen = torch.isfinite(right.lse)
    lse_error = float((lse.double() - right.lse)[seen].abs().max()) if bool(seen.any()) else 0.0
    same_edges = bool((torch.isinf(lse) == torch.isinf(right.lse)).all())
    good = math.isfinite(error) and error <= TOLERANCE[config.dtype] and lse_error <= LSE_TOLERANCE and same_edges
    return row | {"error": error, "lse_error": lse_error, "passed": good}


def main() -> int:
    """Compile, check, run again and again, write DIR/check.json; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for check.json")
    parser.add_argument("--schedules", nargs="+", choices=gluon.SCHEDULES, default=list(gluon.SCHEDULES))
    parser.add_argument("--head-dims", nargs="+", type=int, choices=gluon.HEAD_DIMS, default=[128, 64, 256])
    parser.add_argument("--deadline", type=float, default=DEADLINE_S, help="seconds from the start")
    parser.add_argument("--compile-only", action="store_true")
    given = parser.parse_args()
    end = time.monotonic() + given.deadline
    asked = list(cases(given.schedules, given.head_dims))
    refused = {config: why for config, why in build.build_all(config for _, config, _ in asked).items() if why}
    result = {
        "schema": "fasim.gluon-check/1",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "refused": list(refused.values()),
        "compiled": len({config for _, config, _ in asked}) - len(refused),
        "rows": [],
        "runs": [],
        "not_reached": [],
    }
    sys.stdout.write(f"{result['compiled']} kernels compiled, {len(refused)} refused\n")
    if not given.compile_only:
        _run(given, [each for each in asked if each[1] not in refused], end, result)
    given.out.mkdir(parents=True, exist_ok=True)
    _write(given.out, result)
    bad = [row for row in result["rows"] + result["runs"] if not row["passed"]]
    for row in bad:
        sys.stdout.write(f"FAILED {row}\n")
    left = f", {len(result['not_reached'])} not reached" if result["not_reached"] else ""
    sys.stdout.write(f"{len(result['rows'])} checks and {len(result['runs'])} repetitions, {len(bad)} failed{left}\n")
    return int(bool(bad or refused))


def _run(given: argparse.Namespace, asked: list, end: float, result: dict) -> None:
    for name, config, shape in asked:
        if time.monotonic() > end:
            result["not_reached"].append(f"{name} {config.name} {shape}")
            continue
        try:
            row = check(name, config, shape)
        except Exception as error:  # after an illegal access every call fails: the file says where it began
            row = {"kernel": name, "config": config.name, "shape": list(shape), "said": str(error)[:200], "passed": False}
        result["rows"].append(row)
    given.out.mkdir(parents=True, exist_ok=True)
    _write(given.out, result)
    load = endurance.Load()
    for schedule in given.schedules:
        for shape in endurance.SHAPES:
            if shape[5] not in given.head_dims:
                continue
            if time.monotonic() > end:
                result["not_reached"].append(f"{schedule} {shape}, {RUNS} runs")
                continue
            try:
                result["runs"].append(endurance.run(gluon.PREFIX + schedule, shape, load, RUNS))
            except (UsageError, RuntimeError) as error:
                result["runs"].append({"schedule": schedule, "shape": list(shape), "said": str(error)[:200], "passed": False})


def _write(out: Path, result: dict) -> None:
    (out / "check.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
