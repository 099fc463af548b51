"""Records the in-kernel trace: the kernel built with TRACE run once, the stamps of a few CTAs kept as spans of a Run.

What tracing costs is measured too: cycles of the traced build over those of the plain one, both timed the same way.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ...simulator.errors import UsageError
from ...simulator.results.run import Run
from ...traces.kernel_trace import BLOCKS, ROWS, SLOTS, recording
from ..cuda.config import SCHEDULES, config_for
from ..cuda.fp8 import config as fp8
from .plan import Entry

if TYPE_CHECKING:
    from .bench import Bench


class Traced:
    """f(q, k, v) -> (O, LSE) by a CUDA kernel built with TRACE, and what its CTAs stamped."""

    def __init__(self, entry: Entry) -> None:
        w = entry.workload
        if w.dtype == "e4m3":
            plain = fp8.config_for(entry.kernel, "bf16", w.head_dim, w.causal, w.seqlen_k)
            self.config = replace(plain, trace=True)
        else:
            self.config = config_for(entry.kernel, w.dtype, w.head_dim, w.causal, trace=True)
        self.plan = self.buffer = None

    def __call__(self, q, k, v) -> tuple:
        """Launch on q's device."""
        if self.plan is None:
            import torch

            self.plan = self._plan(q, k, v)
            self.buffer = torch.zeros((self.plan.grid, ROWS, BLOCKS, SLOTS), dtype=torch.int32, device=q.device)
        descales = ((None, None, None),) if isinstance(self.config, fp8.Fp8Config) else ()
        return self.plan.run(q, k, v, *descales, 1 / math.sqrt(q.shape[3]), trace=self.buffer)

    def _plan(self, q, k, v):
        shapes, strides, device = (tuple(q.shape), tuple(k.shape)), (q.stride(), k.stride(), v.stride()), q.get_device()
        if isinstance(self.config, fp8.Fp8Config):
            from ..cuda.fp8.launch import Plan

            return Plan(self.config, *shapes, strides, device)
        from ..cuda.launch import Plan, kernel_for

        return Plan(kernel_for(self.config, device), *shapes, strides, device)

    def stamps(self, q, k, v) -> np.ndarray:
        """What one call leaves: uint32 of (CTAs, ROWS, BLOCKS, SLOTS)."""
        self(q, k, v)
        self.buffer.zero_()
        self(q, k, v)
        return self.buffer.cpu().numpy().view(np.uint32)


def record(bench: Bench, entry: Entry) -> Run:
    """Measure the traced build, with the spans of the first, the middle and the last CTA, and what tracing costs.

    Raises UsageError for a kernel without a trace, and whatever `Bench.measure` does.
    """
    if entry.kernel not in SCHEDULES:
        raise UsageError(f"{entry.kernel} has no in-kernel trace, our CUDA kernels have ({', '.join(SCHEDULES)})")
    plain, traced = bench.measure(entry), Traced(entry)
    run = bench.measure(entry, traced)
    words = traced.stamps(*bench.inputs(entry.workload)[0])
    kept = recording(words, chosen(len(words)), run.tile.consumers)
    taken = replace(run.measurement, trace_overhead=run.cycles / plain.cycles - 1)
    return replace(run, lanes=kept.lanes, labels=kept.labels, spans=kept.spans, measurement=taken)


def chosen(count: int) -> list[int]:
    """Of `count` CTAs the first, the middle and the last."""
    return sorted({0, count // 2, count - 1})
