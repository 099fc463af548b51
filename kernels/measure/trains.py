"""Trains: calls that follow one another on one stream, each between two CUDA events, while NVML is read."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

from ..validation.check import MissingTool
from .board import Board, Sample
from .clock_probe import ClockProbe

IDLE_S, BURST_S = 0.2, 0.03
SUSTAINED_S, SETTLE_SHARE = 1.5, 1 / 3
"""Length of a sustained train, whose last two thirds count: at its limit the board swings about once a second."""
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
        try:
            self.probe = ClockProbe(self.properties.multi_processor_count)
        except MissingTool:
            self.probe = None

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
class Look:
    """A look at the board between two batches of a train: seconds since the train began, and the SMs' clock up to the next."""

    at_s: float
    sample: Sample
    clock_hz: float | None  # None without a probe


@dataclass(frozen=True)
class Train:
    """Entries that followed one another: seconds of a call in each, when each began, and looks at the board meanwhile."""

    seconds: list[float]
    begins: list[float]
    looks: list[Look]  # while the GPU was busy
    end: Sample  # when it was done
    settle_s: float = 0.0  # what counts begins then

    def within(self, first_s: float, last_s: float = math.inf) -> list[float]:
        """Seconds of a call, of the entries that began in this stretch of the train."""
        return [t for t, begin in zip(self.seconds, self.begins, strict=True) if first_s <= begin < last_s]

    def looks_within(self, first_s: float, last_s: float = math.inf) -> list[Look]:
        """Looks in this stretch; the nearest one where it has none."""
        middle = min((first_s + min(last_s, self.begins[-1])) / 2, self.begins[-1])
        return [look for look in self.looks if first_s <= look.at_s < last_s] or [
            min(self.looks, key=lambda look: abs(look.at_s - middle))
        ]

    @property
    def energy_j(self) -> float | None:
        """Joules of one call in the window that counts; None where the board does not count energy."""
        first, last = self.looks_within(self.settle_s)[0].sample, self.end
        if first.energy_j is None or last.energy_j is None or last.host_s <= first.host_s:
            return None
        return (last.energy_j - first.energy_j) / (last.host_s - first.host_s) * statistics.fmean(self.within(self.settle_s))


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


def sustained_train(gpu: Gpu, work: Work, length_s: float = SUSTAINED_S) -> Train:
    """One long train."""
    train = _train(gpu, work, length_s, 6)
    return replace(train, settle_s=train.begins[-1] * SETTLE_SHARE)


def _train(gpu: Gpu, work: Work, length_s: float, at_least: int) -> Train:
    """Enqueue entries for `length_s` on an idle GPU, never far ahead of it, and look at the board while it is busy.

    Entries come in batches with a stamp of the SMs' clock before and after; at each look two batches are still queued.
    """
    gpu.synchronize()
    time.sleep(IDLE_S)
    size = max(1, round(QUEUED_S / work.seconds))
    batches, stamps, samples, number, begin = [], [], [], 0, time.perf_counter()
    while time.perf_counter() - begin < length_s or number < at_least or not samples:
        stamps.append(gpu.probe.stamp() if gpu.probe else 0)
        marks = [gpu.mark()]
        for _ in range(size):
            work.enqueue(number)
            marks.append(gpu.mark())
            number += 1
        batches.append(marks)
        if len(batches) > 2:
            batches[-3][-1].synchronize()
            samples.append(gpu.board.sample())
    stamps.append(gpu.probe.stamp() if gpu.probe else 0)
    gpu.synchronize()
    end = gpu.board.sample()
    first = batches[0][0]
    starts = [first.elapsed_time(marks[0]) / 1e3 for marks in batches]
    clocks = gpu.probe.clocks_hz(stamps) if gpu.probe else [None] * len(batches)
    # the sample taken when batch k was done belongs to batch k + 1, which the GPU was then at
    looks = [Look(*each) for each in zip(starts[1:], samples, clocks[1:], strict=False)]
    seconds, begins = [], []
    for marks, start in zip(batches, starts, strict=True):
        spent = [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
        seconds += [t / work.calls for t in spent]
        begins += [start + t for t in itertools.accumulate(spent[:-1], initial=0.0)]
    return Train(seconds, begins, looks, end)
