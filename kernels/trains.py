"""Trains: calls that follow one another on one stream, each between two CUDA events, while NVML is read."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from .board import Board, Sample

IDLE_S, BURST_S = 0.2, 0.03
SETTLE_S, WINDOW_S = 0.5, 0.5
"""A sustained train runs SETTLE_S before the WINDOW_S that counts."""
BURSTS = 6
QUEUED_S = 0.01
"""Work enqueued between two looks at the board."""
GRAPH_S = 2e-3
"""Least length of a CUDA graph."""


class Gpu:
    """torch's current CUDA device, its events, and NVML's view of it."""

    name = "cuda"

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.board = Board(torch.cuda.current_device(), f"GPU-{self.properties.uuid}")

    def synchronize(self) -> None:
        """Wait until all that was enqueued is done."""
        self.torch.cuda.synchronize()

    def mark(self):
        """An event, recorded now."""
        event = self.torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def graph(self, call: Callable, count: int) -> Callable | None:
        """What replays calls 0 .. count - 1 from a CUDA graph; None where they cannot be captured."""
        try:
            graph = self.torch.cuda.CUDAGraph()
            with self.torch.cuda.graph(graph):
                for number in range(count):
                    call(number)
        except RuntimeError:
            self.synchronize()
            return None
        return lambda _: graph.replay()


@dataclass(frozen=True)
class Work:
    """What is enqueued again and again: one call, or a graph of many; `seconds` is a first estimate of one entry."""

    enqueue: Callable[[int], object]
    calls: int
    launch: str
    seconds: float


@dataclass(frozen=True)
class Train:
    """Entries that followed one another: seconds of a call in each, when each began, and the board meanwhile."""

    seconds: list[float]
    begins: list[float]
    samples: list[Sample]  # the first and the last of an idle GPU

    def within(self, first_s: float, last_s: float = math.inf) -> list[float]:
        """Seconds of a call, of the entries that began in this stretch of the train."""
        return [t for t, begin in zip(self.seconds, self.begins, strict=True) if first_s <= begin < last_s]

    def settled(self) -> list[float]:
        """Seconds of a call, of the entries that began in the window that counts."""
        return self.within(self.begins[-1] - WINDOW_S)

    @property
    def busy_samples(self) -> list[Sample]:
        """The board while the train ran."""
        return self.samples[1:-1] or self.samples[-1:]

    @property
    def settled_samples(self) -> list[Sample]:
        """The board in the window that counts."""
        busy = self.busy_samples
        return [s for s in busy if s.host_s >= self.samples[-1].host_s - WINDOW_S] or busy[-1:]

    @property
    def energy_j(self) -> float | None:
        """Joules of one call in the window that counts; None where the board does not count energy."""
        first, last = self.settled_samples[0], self.samples[-1]
        if first.energy_j is None or last.energy_j is None or last.host_s <= first.host_s:
            return None
        return (last.energy_j - first.energy_j) / (last.host_s - first.host_s) * statistics.fmean(self.settled())


def work_of(gpu: Gpu, call: Callable[[int], object], sets: int) -> Work:
    """call(0), call(1), .. as work to enqueue: one by one, or, where that takes longer than running them, as a graph.

    Each of the `sets` inputs is seen once before, so that kernels are compiled and tensor maps made.
    """
    for number in range(sets):
        call(number)
    gpu.synchronize()
    begin = time.perf_counter()
    call(0)
    gpu.synchronize()
    count = max(3, min(20, round(0.05 / (time.perf_counter() - begin))))
    marks, begin = [gpu.mark()], time.perf_counter()
    for number in range(count):
        call(number)
        marks.append(gpu.mark())
    host_s = (time.perf_counter() - begin) / count
    gpu.synchronize()
    device_s = statistics.median(a.elapsed_time(b) for a, b in pairwise(marks)) / 1e3
    if host_s > 0.7 * device_s:
        calls = sets * max(1, math.ceil(GRAPH_S / device_s / sets))
        if replay := gpu.graph(call, calls):
            return Work(replay, calls, "graph", device_s * calls)
    return Work(call, 1, "stream", device_s)


def burst_trains(gpu: Gpu, work: Work) -> list[Train]:
    """Several short trains, each on an idle GPU."""
    return [_train(gpu, work, BURST_S, 3) for _ in range(BURSTS)]


def sustained_train(gpu: Gpu, work: Work) -> Train:
    """One long train."""
    return _train(gpu, work, SETTLE_S + WINDOW_S, 6)


def _train(gpu: Gpu, work: Work, length_s: float, at_least: int) -> Train:
    """Enqueue entries for `length_s` on an idle GPU, never far ahead of it, and look at the board while it is busy."""
    gpu.synchronize()
    time.sleep(IDLE_S)
    samples = [gpu.board.sample()]
    batch = max(1, round(QUEUED_S / work.seconds))
    marks, looks, begin = [gpu.mark()], [], time.perf_counter()
    while time.perf_counter() - begin < length_s or len(marks) <= at_least:
        for _ in range(batch):
            work.enqueue(len(marks) - 1)
            marks.append(gpu.mark())
        looks.append(marks[-1])
        if len(looks) > 2:
            looks[-3].synchronize()
            samples.append(gpu.board.sample())
    marks[-1].synchronize()
    samples.append(gpu.board.sample())
    seconds = [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
    begins = [0.0, *itertools.accumulate(seconds[:-1])]
    return Train([t / work.calls for t in seconds], begins, samples)
