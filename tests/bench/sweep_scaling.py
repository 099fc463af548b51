"""Prints how a sweep's rate grows with its processes, and whether that is the sweep's doing or the machine's.

Run it by hand on a machine that does nothing else: python tests/bench/sweep_scaling.py [--workers 1 2 4] [--out DIR]

The predictions of 4k shapes are made anew each time. CPU-seconds a prediction that rise with the processes are the machine's
(caches, memory, clock, threads of one core); seconds that are not used are start-up and waiting. Last, one process is measured
beside others that only count, one on each further core: they share with it what cores share, and nothing of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

from fasim.traces import predictions
from fasim.traces.answers import grid, sweep

AXES = {
    "schedule": ["fa3", "pingpong", "overlap-2stage", "warp-specialized"], "device": "h200", "seqlen": 4096, "head_dim": [64, 128],
    "causal": [False, True], "batch": [1, 2, 3], "heads": [8, 12, 16, 20, 24, 28, 32, 36, 40, 48],
}  # fmt: skip


def _count() -> None:
    number = 0
    while True:
        number = (number * 5 + 1) % 65_537


def _cpu_seconds() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


def measured(points: list, workers: int, counting: int = 0) -> dict:
    """One sweep by so many processes, beside others that count."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FASIM_CACHE_DIR"] = folder
        others = [get_context("spawn").Process(target=_count, daemon=True) for _ in range(counting)]
        for each in others:
            each.start()
        used, began = _cpu_seconds(), time.perf_counter()
        rows = sum(1 for _ in sweep.rows(points, None, workers))
        seconds, used = time.perf_counter() - began, _cpu_seconds() - used
        for each in others:
            each.kill()
            each.join()
    return {
        "workers": workers, "others_counting": counting, "rows": rows, "seconds": round(seconds, 2),
        "rows_per_s": round(rows / seconds, 1), "cpu_s_per_row": round(used / rows, 4), "cores_used": round(used / seconds, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    points = grid.points(AXES)
    predictions.tried(points[0].question)  # compiles the engine
    cores = predictions.processes()
    found = []
    for workers, counting in [*((workers, 0) for workers in asked.workers), (1, cores - 1)]:
        found.append(measured(points, workers, counting))
        print(found[-1], flush=True)
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
        report = {"what": __doc__.splitlines()[0], "cpu": names[:1], "cores": os.cpu_count(), "python": sys.version.split()[0]}
        report["rows"] = found
        (asked.out / "sweep_scaling.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
