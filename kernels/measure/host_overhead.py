"""What a call costs on the host beyond the launch itself: `python -m fasim.kernels.measure.host_overhead [--out DIR]`.

Host time of many calls on a small problem, less that of a bare cuLaunchKernel of the same kernel with the same arguments;
the GPU is never behind by more than a batch, so that a full launch queue does not count.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .. import ops
from ..cuda import launch
from ..cuda.config import available

BATCH = 100
"""Calls between two synchronisations; the driver's queue holds some thousand launches."""
ROUNDS = 60
SHAPE = (1, 128, 1, 128)


def host_us(call: Callable[[], object]) -> float:
    """Median microseconds of one call, over batches, the GPU idle before each."""
    for _ in range(BATCH):
        call()
    samples = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(BATCH):
            call()
        samples.append((time.perf_counter() - begin) / BATCH * 1e6)
    torch.cuda.synchronize()
    return statistics.median(samples)


def measure(schedule: str) -> dict:
    """Microseconds per call of the launch alone and of each way to call the kernel, with what each adds."""
    q, k, v = (torch.randn(SHAPE, dtype=torch.float16, device="cuda") for _ in range(3))
    fresh = [torch.randn_like(q) for _ in range(2 * launch.MAPS_KEPT)]
    plan = launch.plan_for(q.shape, k.shape, q.stride(), k.stride(), v.stride(), q.dtype, False, schedule, q.get_device())
    kept = plan.run(q, k, v, 0.1)  # its addresses are those the bare launch goes on using
    stream = torch._C._cuda_getCurrentRawStream(q.get_device())
    leaf = q.clone().requires_grad_()
    turn = iter(range(1 << 60))
    ways = {
        "launch alone": lambda: plan.launch(stream),
        "forward": lambda: launch.forward(q, k, v, 0.1, False, schedule),
        "flash_attn_func": lambda: ops.flash_attn_func(q, k, v, schedule=schedule),
        "flash_attn_func, auto": lambda: ops.flash_attn_func(q, k, v),
        "flash_attn_func, new addresses": lambda: ops.flash_attn_func(fresh[next(turn) % len(fresh)], k, v, schedule=schedule),
        "flash_attn_func, recording a gradient": lambda: ops.flash_attn_func(leaf, k, v, schedule=schedule),
        "torch.ops.fasim.attention": lambda: torch.ops.fasim.attention(q, k, v, 0.1, False, schedule),
    }
    found = {name: round(host_us(call), 2) for name, call in ways.items()}
    del kept
    added = {name: round(spent - found["launch alone"], 2) for name, spent in found.items() if name != "launch alone"}
    return {"schedule": schedule, "host_us": found, "beyond_the_launch_us": added}


def main() -> None:
    """Measure one schedule, show the table, write DIR/overhead.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedule", choices=available(), default=available()[-1])
    parser.add_argument("--out", type=Path, help="folder for overhead.json")
    given = parser.parse_args()
    result = {
        "schema": "fasim.host-overhead/1",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "protocol": {"shape": SHAPE, "calls_per_batch": BATCH, "batches": ROUNDS, "statistic": "median"},
        **measure(given.schedule),
    }
    for name, spent in result["host_us"].items():
        added = result["beyond_the_launch_us"].get(name)
        sys.stdout.write(f"{name:38} {spent:7.2f} us" + (f"  {added:+7.2f} beyond the launch\n" if added is not None else "\n"))
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "overhead.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
