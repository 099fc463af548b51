"""Many backwards beside other work: the same bits each time, or a race: `python -m fasim.kernels.measure.endurance_backward`.

As endurance.py for the forward: every CUDA backward, in both modes, RUNS times in a row at each of ten shapes, while another stream
keeps the tensor cores and HBM busy. dK and dV of every run, and dQ of a deterministic one, are compared bit for bit with those
of the first; a dQ that is added in any order is held to stay near it, and the first of all to the fp64 oracle.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import sys
import time
from pathlib import Path

import torch

from .. import reference
from ..backward import head_dims
from ..cuda.backward import launch
from ..cuda.backward.config import HERE, SCHEDULES
from ..ops import flash_attn_func
from .endurance import RUNS, Load

TOLERANCE = 3e-3
"""Relative error of each gradient in fp16 on N(0, 1) data against the oracle; `fasim validate` judges finely."""
NEAR = 1e-3
"""What the order of dQ's adds may change: its rounding to fp16, relative to its norm."""
SHAPES = (
    # batch, heads, kv heads, S_q, S_k, head_dim, causal
    (2, 8, 8, 512, 512, 128, False),
    (2, 8, 8, 512, 512, 128, True),
    (1, 16, 4, 1000, 1000, 128, True),
    (2, 16, 16, 2048, 2048, 128, False),
    (2, 16, 16, 2048, 2048, 128, True),
    (2, 16, 16, 1024, 1024, 64, True),
    (2, 16, 2, 777, 1555, 64, False),
    (4, 16, 16, 2048, 2048, 64, True),
    (1, 8, 1, 300, 2100, 128, True),
    (4, 16, 16, 1, 4096, 128, True),
    (2, 8, 8, 1024, 1024, 256, True),
    (1, 8, 1, 300, 2100, 256, False),
)


def run(schedule: str, shape: tuple, deterministic: bool, load: Load) -> dict:
    """One backward at one shape: how many of RUNS differ from the first, how far its dQ strays, and the first's errors."""
    batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, causal = shape
    generator = torch.Generator(device="cuda").manual_seed(seqlen_q + seqlen_k + head_dim)
    q, do = torch.randn(2, batch, seqlen_q, heads, head_dim, device="cuda", dtype=torch.float16, generator=generator)
    k, v = torch.randn(2, batch, seqlen_k, kv_heads, head_dim, device="cuda", dtype=torch.float16, generator=generator)
    o, lse = flash_attn_func(q, k, v, causal=causal, return_lse=True)

    def backward() -> tuple[torch.Tensor, ...]:
        how = {"causal": causal, "scale": None, "schedule": schedule, "deterministic": deterministic}
        return launch.backward(q, k, v, o, lse, do, **how)

    first = backward()
    differ, strays = torch.zeros((), dtype=torch.int64, device="cuda"), torch.zeros((), device="cuda")
    for _ in range(RUNS):
        load.top_up()
        dq, dk, dv = backward()
        other = (dk != first[1]).any() | (dv != first[2]).any()
        if deterministic:
            other |= (dq != first[0]).any()
        differ += other
        strays = torch.maximum(strays, (dq - first[0]).float().norm() / first[0].float().norm())
    expected = reference.attention_backward(q, k, v, do, None, causal)
    errors = {
        name: float((ours.double() - theirs).norm() / theirs.norm())
        for name, ours, theirs in zip(("dQ", "dK", "dV"), first, expected, strict=True)
    }
    return {
        "schedule": schedule,
        "deterministic": deterministic,
        "shape": dict(zip(("batch", "heads", "kv_heads", "seqlen_q", "seqlen_k", "head_dim", "causal"), shape, strict=True)),
        "runs": RUNS,
        "differ": int(differ),
        "dq_strays": float(strays),
        "errors": errors,
        "passed": int(differ) == 0 and float(strays) <= NEAR and all(error <= TOLERANCE for error in errors.values()),
    }


def main() -> int:
    """Run every backward at every shape it takes, write DIR/endurance_backward.json, one line per kernel; 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES)
    parser.add_argument("--out", type=Path, help="folder for endurance_backward.json")
    given = parser.parse_args()
    load, rows, began = Load(), [], time.perf_counter()
    sources = sorted(HERE.glob("*.cu*")) + [HERE / f"{part}.py" for part in ("config", "launch", "wgmma")]
    result = {
        "schema": "fasim.endurance/1",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "kernel_sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources},
        "rows": rows,
    }
    for schedule in given.schedules:
        for deterministic in (False, True):
            mine = [run(schedule, shape, deterministic, load) for shape in SHAPES if shape[5] in head_dims(schedule)]
            rows += mine
            bad = [row for row in mine if not row["passed"]]
            mode = "deterministic" if deterministic else "any order"
            said = f"FAILED {bad}" if bad else "all right"
            sys.stdout.write(f"{schedule}, {mode}: {len(mine)} shapes x {RUNS} runs, {said}\n")
            sys.stdout.flush()
            if given.out:
                given.out.mkdir(parents=True, exist_ok=True)
                result["seconds"] = round(time.perf_counter() - began, 1)
                (given.out / "endurance_backward.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(not all(row["passed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
