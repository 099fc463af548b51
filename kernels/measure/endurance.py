"""Many runs beside other work: bitwise the same each time, or a race: `python -m fasim.kernels.measure.endurance --out DIR`.

Each kernel runs RUNS times in a row at each of ten shapes while another stream keeps the tensor cores and HBM busy with
matrix products and copies. O and LSE of every run are compared, bit for bit, with those of the first, and the first with
the fp64 oracle. A launch that never ends is a hang; the caller's patience decides, so run it under a time limit.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .. import reference
from ..cuda import launch
from ..cuda.config import HERE, available
from ..gluon import config as gluon

RUNS = 200
TOLERANCE, TOLERANCE_FP8 = 5e-3, 0.25
"""Largest error of O in fp16 on N(0, 1) data against the oracle; `fasim validate` judges finely. In FP8 a row with one key is V in
three bits."""
FP8 = {"fp8": {}, "fp8-approximate": {"approximate": True}, "fp8-two-level": {"two_level": 4}}
"""`flash_attn_fp8`, quantiser and kernel; the choices beside the first have no head_dim 256."""
SHAPES = (
    # batch, heads, kv heads, S_q, S_k, head_dim, causal
    (2, 8, 8, 512, 512, 128, False),
    (2, 8, 8, 512, 512, 128, True),
    (1, 16, 4, 1000, 1000, 128, True),
    (4, 16, 16, 2048, 2048, 128, False),
    (4, 16, 16, 2048, 2048, 128, True),
    (2, 16, 16, 1024, 1024, 64, True),
    (2, 16, 2, 777, 1555, 64, False),
    (2, 8, 8, 1024, 1024, 256, True),
    (1, 8, 1, 300, 2100, 256, False),
    (8, 16, 16, 1, 4096, 128, True),
)


class Load:
    """Matrix products and copies on a stream of their own, topped up so that it never runs dry."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.a = torch.randn(2048, 2048, device="cuda", dtype=torch.float16)
        self.b = torch.empty(1 << 26, device="cuda", dtype=torch.uint8)
        self.c = torch.empty_like(self.b)
        self.mark = torch.cuda.Event()
        self.mark.record(self.stream)

    def top_up(self) -> None:
        """Add work unless some is still waiting."""
        if not self.mark.query():
            return
        with torch.cuda.stream(self.stream):
            for _ in range(8):
                torch.mm(self.a, self.a)
                self.c.copy_(self.b)
            self.mark.record(self.stream)


def forward_of(schedule: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """f(q, k, v, scale, causal) -> (O, LSE): a kernel in CUDA, one in Gluon by "gluon-" and its schedule, or one of FP8."""
    if schedule in FP8:
        from ..ops import flash_attn_fp8

        return lambda *given: flash_attn_fp8(*given, **FP8[schedule], return_lse=True)
    if schedule in gluon.NAMES:
        from ..gluon.launch import forward

        return lambda *given: forward(*given, schedule.removeprefix(gluon.PREFIX))
    return lambda *given: launch.forward(*given, schedule)


def run(schedule: str, shape: tuple, load: Load, runs: int = RUNS) -> dict:
    """One kernel at one shape: how many of `runs` differ from the first, and the first's error."""
    batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, causal = shape
    generator = torch.Generator(device="cuda").manual_seed(seqlen_q + seqlen_k + head_dim)
    q = torch.randn(batch, seqlen_q, heads, head_dim, device="cuda", dtype=torch.float16, generator=generator)
    k, v = torch.randn(2, batch, seqlen_k, kv_heads, head_dim, device="cuda", dtype=torch.float16, generator=generator)
    scale = head_dim**-0.5
    forward = forward_of(schedule)
    first_o, first_lse = forward(q, k, v, scale, causal)
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(runs):
        load.top_up()
        o, lse = forward(q, k, v, scale, causal)
        differ += (o != first_o).any() | (lse != first_lse).any()
    expected = reference.attention_forward(q, k, v, scale, causal).o
    error = (first_o.double() - expected).abs().max().item()
    return {
        "schedule": schedule,
        "shape": dict(zip(("batch", "heads", "kv_heads", "seqlen_q", "seqlen_k", "head_dim", "causal"), shape, strict=True)),
        "runs": runs,
        "differ": int(differ),
        "error": error,
        "passed": int(differ) == 0 and error <= (TOLERANCE_FP8 if schedule in FP8 else TOLERANCE),
    }


def main() -> int:
    """Run every kernel at every shape, write DIR/endurance.json, one line per kernel; 1 where a run differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedules", nargs="+", choices=[*available(), *FP8], default=available())
    parser.add_argument("--out", type=Path, help="folder for endurance.json")
    given = parser.parse_args()
    load, rows, began = Load(), [], time.perf_counter()
    for schedule in given.schedules:
        mine = [run(schedule, shape, load) for shape in SHAPES if not FP8.get(schedule) or shape[5] != 256]
        rows += mine
        bad = [row["shape"] for row in mine if not row["passed"]]
        sys.stdout.write(f"{schedule}: {len(mine)} shapes x {RUNS} runs, {'all the same' if not bad else f'FAILED {bad}'}\n")
    result = {
        "schema": "fasim.endurance/1",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - began, 1),
        "kernel_sha256": {
            path.relative_to(HERE).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((*HERE.glob("*.cu*"), *(HERE / "fp8").rglob("*.cu*")))
        },
        "rows": rows,
    }
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "endurance.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(not all(row["passed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
