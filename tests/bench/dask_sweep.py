"""Sweeps 1,000 predictions over four Dask workers on the loopback, kills one in mid-sweep, and holds the rows to those made here.

Run it by hand: python tests/bench/dask_sweep.py (a minute or two on two cores). Exit status 1 where a row is missing, double or
other.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time

import distributed

from fasim.traces.answers import cluster, grid, sweep

AXES = {
    "schedule": ["fa3", "pingpong"], "device": "h200", "batch": 1, "heads": [1, 2], "head_dim": [64, 128], "causal": [False, True],
    "seqlen": [256, 512, 768, 1024, 1536], "clock_mhz": list(range(1000, 1625, 50)),
}  # fmt: skip
WORKERS, KILLED_AFTER = 4, 300


def main() -> int:
    points = grid.points(AXES)[:1000]
    with tempfile.TemporaryDirectory() as theirs, tempfile.TemporaryDirectory() as ours:
        os.environ["FASIM_CACHE_DIR"] = theirs
        with distributed.LocalCluster(n_workers=WORKERS, threads_per_worker=1, dashboard_address=None) as started:
            os.environ["FASIM_CACHE_DIR"] = os.path.join(theirs, "asker")
            address, found, began = started.scheduler_address, [], time.perf_counter()
            with cluster.connected(address) as elsewhere, distributed.Client(address) as client:
                victim = next(iter(client.run(os.getpid).values()))
                for number, row in sweep.rows(points, elsewhere=elsewhere):
                    found.append((number, row))
                    if len(found) == KILLED_AFTER:
                        os.kill(victim, signal.SIGKILL)
            there = time.perf_counter() - began
        os.environ["FASIM_CACHE_DIR"] = ours
        began = time.perf_counter()
        here = dict(sweep.rows(points))
    numbers = [number for number, _ in found]
    once = sorted(numbers) == list(range(len(points)))
    same = dict(found) == here
    print(f"{len(points):,} rows by {WORKERS} workers, one killed after {KILLED_AFTER}: {there:.1f} s; here by one process "
          f"{time.perf_counter() - began:.1f} s; every row once: {once}; all equal to those made here: {same}")  # fmt: skip
    return 0 if once and same else 1


if __name__ == "__main__":
    sys.exit(main())
