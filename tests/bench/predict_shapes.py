"""Prints the time to predict every forward shape of FlashAttention-3's figures in one warm process, and peak memory.

Run it by hand: python tests/bench/predict_shapes.py
"""

from __future__ import annotations

import resource
import sys
import time

from fasim.simulator.predict import predict
from fasim.traces.published import select


def main() -> None:
    started = time.perf_counter()
    bars = [b for b in (*select("fa3-5"), *select("fa3-7"), *select("fa3-9")) if b.schedule]
    questions = list(dict.fromkeys((b.workload, b.schedule, b.device, b.clock_hz) for b in bars))
    predict(bars[0].workload, "fa3")
    print(f"first prediction, imports and compilation: {time.perf_counter() - started:.2f} s")
    slowest = 0.0
    for workload, schedule, device, clock_hz in questions:
        started = time.perf_counter()
        predict(workload, schedule=schedule, device=device, clock_hz=clock_hz)
        seconds = time.perf_counter() - started
        slowest = max(slowest, seconds)
        print(f"{seconds:7.3f} s  {schedule:10} {workload}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"slowest of {len(questions)}: {slowest:.3f} s; peak memory {peak / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
