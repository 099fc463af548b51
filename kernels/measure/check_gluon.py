"""Every kernel in Gluon against fp64 and against itself: `python -m fasim.kernels.measure.check_gluon --out DIR`.

First all rungs and candidates, fp16 and bf16, head_dim 64, 128 and 256, full and causal, on shapes with edges; then each rung 50
times at each of the ten shapes of endurance.py while another stream keeps the GPU busy: the same bits each time, or a race. Kernels
are compiled a process a core; then each rung is checked in a process of its own, all at once, so that one that hangs or breaks its
context takes no other with it. What has not ended at the deadline is killed and listed. Writes DIR/check.json. `--compile-only`
needs no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ...simulator.reading import read_json
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
GRACE_S = 5


HANDS = ("named barriers", "mbarriers")
"""How a rung of gluon.QUEUED hands over; what is called by the rung's name does so by the first."""
PARTS = (
    *(schedule for schedule in gluon.SCHEDULES if schedule not in gluon.QUEUED),
    *(f"{schedule} {hands}" for schedule in gluon.QUEUED for hands in HANDS),
)
"""What is checked in a process of its own."""


def kernels_of(part: str, dtype: str, head_dim: int, causal: bool, seqlen_k: int) -> dict[str, gluon.GluonConfig]:
    """The kernel of a rung by its name; of QUEUED every candidate that hands over so."""
    if part in gluon.SCHEDULES:
        return {part: gluon.config_for(part, dtype, head_dim, causal, seqlen_k)}
    schedule, _, hands = part.partition(" ")
    forms = gluon.candidates(dtype, head_dim, causal, seqlen_k)
    return {name: config for name, config in forms.items() if config.schedule == schedule and name.endswith(hands)}


def cases(part: str, head_dims: Sequence[int]) -> Iterator[tuple[str, gluon.GluonConfig, tuple]]:
    """(name, kernel, shape) of every check."""
    for head_dim in head_dims:
        for dtype in gluon.DTYPES:
            for causal in (False, True):
                for shape in EDGES:
                    for name, config in kernels_of(part, dtype, head_dim, causal, shape[4]).items():
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
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--head-dims", nargs="+", type=int, choices=gluon.HEAD_DIMS, default=[128, 64, 256])
    parser.add_argument("--deadline", type=float, default=DEADLINE_S, help="seconds from the start")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--inside", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + given.deadline
    if given.inside:
        inside(given.inside, given.head_dims, end, given.out)
        return 0
    asked = {config: None for part in given.parts for _, config, _ in cases(part, given.head_dims)}
    refused = [why for why in build.build_all(asked).values() if why]
    sys.stdout.write(f"{len(asked) - len(refused)} kernels compiled, {len(refused)} refused\n")
    if given.compile_only:
        return int(bool(refused))
    result = {
        "schema": "fasim.gluon-check/1",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "packages": {name: importlib.metadata.version(name) for name in ("torch", "triton")},
        "kernel_sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(gluon.HERE.glob("*.py"))},
        "refused": refused,
        "parts": dict.fromkeys(given.parts, "killed at the deadline"),
        "rows": [],
        "runs": [],
    }
    left = str(max(1.0, end - time.monotonic()))
    same = ["--out", str(given.out), "--head-dims", *map(str, given.head_dims), "--deadline", left]
    module = [sys.executable, "-m", "fasim.kernels.measure.check_gluon"]
    side_by_side(given, end, result, lambda part: [*module, *same, "--inside", part])
    (given.out / "check.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    bad = [row for row in result["rows"] + result["runs"] if not row["passed"]]
    for row in bad:
        sys.stdout.write(f"FAILED {row}\n")
    for part, said in result["parts"].items():
        sys.stdout.write(f"{part}: {said}\n")
    sys.stdout.write(f"{len(result['rows'])} checks and {len(result['runs'])} repetitions, {len(bad)} failed\n")
    return int(bool(bad or refused) or any(said != "done" for said in result["parts"].values()))


def side_by_side(
    given: argparse.Namespace, end: float, result: dict, command: Callable[[str], list[str]], grace_s: float = GRACE_S
) -> None:
    """A process a part; what each had written is taken, whatever became of it."""
    running = {part: subprocess.Popen(command(part), stderr=subprocess.PIPE, text=True) for part in given.parts}
    for part, process in running.items():
        try:
            _, said = process.communicate(timeout=max(0.1, end + grace_s - time.monotonic()))
            result["parts"][part] = "done" if process.returncode == 0 else (said or str(process.returncode))[-300:]
        except subprocess.TimeoutExpired:
            process.kill()
        if (file := given.out / _file_of(part)).exists():
            found = read_json(file, "part")
            result["rows"] += found["rows"]
            result["runs"] += found["runs"]


def _file_of(part: str) -> str:
    return f"check-{part.replace(' ', '-')}.json"


def inside(part: str, head_dims: Sequence[int], end: float, out: Path) -> None:
    """Check one part; what is known is written as it becomes known. After an error of CUDA's nothing more is asked."""
    found: dict[str, list] = {"rows": [], "runs": []}

    def write() -> None:
        (out / _file_of(part)).write_text(json.dumps(found) + "\n", encoding="utf-8")

    for name, config, shape in cases(part, head_dims):
        if time.monotonic() > end:
            raise SystemExit("the deadline came before the last check")
        found["rows"].append({"kernel": name, "config": config.name, "shape": list(shape), "said": "did not end", "passed": False})
        write()
        found["rows"][-1] = check(name, config, shape)
    write()
    rung, _, hands = part.partition(" ")
    if hands in HANDS[1:]:
        return
    load = endurance.Load()
    for shape in endurance.SHAPES:
        if time.monotonic() > end:
            raise SystemExit("the deadline came before the last repetition")
        if shape[5] in head_dims:
            found["runs"].append(endurance.run(gluon.PREFIX + rung, shape, load, RUNS))
            write()


if __name__ == "__main__":
    sys.exit(main())
