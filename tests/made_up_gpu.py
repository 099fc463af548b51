"""A GPU that is none, for what measures: every call takes the same time of a clock of its own."""

from __future__ import annotations

import time
from types import SimpleNamespace

from fasim.kernels.measure.board import Sample


class MadeUpGpu:
    """Every call takes 50 ms of a clock of its own; board and events read that clock. Calls run on the CPU."""

    name = "cpu"
    call_s = 0.05
    probe = None

    def __init__(self, torch):
        self.torch = torch
        self.now = 0.0
        self.properties = SimpleNamespace(name="NVIDIA H200", multi_processor_count=132, L2_cache_size=60 << 20)
        self.board = SimpleNamespace(
            driver="580", sample=lambda: Sample(time.perf_counter(), 1.5e9, 690.0, 690.0 * time.perf_counter())
        )

    def synchronize(self):
        pass

    def mark(self):
        self.now += self.call_s
        return MadeUpEvent(self.now)

    def graph(self, call, count):
        return None  # cannot be captured


class MadeUpEvent:
    def __init__(self, at: float):
        self.at = at

    def elapsed_time(self, other) -> float:
        return (other.at - self.at) * 1e3

    def synchronize(self):
        pass
