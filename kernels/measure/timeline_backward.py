"""What each warpgroup of our backward did when: `python -m fasim.kernels.measure.timeline_backward --kernel NAME --out DIR`.

The kernel built with TRACE runs once; the stamps of the first, the middle and the last CTA become the spans of a measured run
(DIR/*.run.json.gz), timed without them as any run; and how long each phase of a steady block takes is printed. What tracing
costs is kept too: the time of a call so built over one built as usual, medians of CUDA events in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...simulator.errors import UsageError
from ...simulator.problem.workload import Workload
from ...traces import store
from ...traces.gradient_trace import phases, recording
from ...traces.kernel_trace import BLOCKS, ROWS, SLOTS
from ..cuda.backward.config import config_for
from .plan import Entry
from .timeline import chosen

TOKENS, HIDDEN = 16384, 2048
CALLS = 20
APART = ("apart",)
"""Schedules in which one more warpgroup, which forms dQ, stamps."""


def workload_of(head_dim: int, seqlen: int, causal: bool) -> Workload:
    """The papers' setting: 16k tokens, hidden size 2048, bf16."""
    batch, heads = max(1, TOKENS // seqlen), HIDDEN // head_dim
    return Workload(batch, heads, seqlen, head_dim, "bf16", causal, direction="backward")


def stamps(kernel: str, workload: Workload) -> tuple[np.ndarray, float]:
    """What one call's CTAs stamped, uint32 of (CTAs, ROWS, BLOCKS, SLOTS), and what tracing costs, as a share."""
    import torch

    from ..cuda.backward.launch import Plan
    from ..ops import flash_attn_func

    shape = (workload.batch, workload.seqlen_q, workload.heads, workload.head_dim)
    q, k, v, do = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    o, lse = flash_attn_func(q, k, v, causal=workload.causal, return_lse=True)
    config = config_for(kernel, workload.dtype, workload.head_dim, workload.causal, trace=True)
    strides = tuple(x.stride() for x in (q, k, v, o, do))
    plans = [Plan(each, shape, shape, strides, q.get_device()) for each in (replace(config, trace=False), config)]
    buffer = torch.zeros((plans[1].ctas, ROWS, BLOCKS, SLOTS), dtype=torch.int32, device="cuda")
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(CALLS):
        for plan, taken, trace in zip(plans, times, (None, buffer), strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            plan.run(q, k, v, o, lse, do, None, workload.head_dim**-0.5, trace=trace)
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end))
    buffer.zero_()
    plans[1].run(q, k, v, o, lse, do, None, workload.head_dim**-0.5, trace=buffer)
    plain, traced = map(statistics.median, times)
    return buffer.cpu().numpy().view(np.uint32), traced / plain - 1


def main() -> int:
    """Record, keep, and show the phases; 3 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", required=True, help="a schedule of the CUDA backward")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=4096)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--out", type=Path, required=True, help="folder for the run")
    given = parser.parse_args()
    import torch

    workload = workload_of(given.head_dim, given.seqlen, given.causal)
    try:
        config_for(given.kernel, workload.dtype, workload.head_dim, workload.causal)
    except UsageError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        sys.stderr.write("no GPU here: it needs an H100 or H200\n")
        return 3
    from .bench import Bench

    words, overhead = stamps(given.kernel, workload)
    run = Bench("burst", "cold").measure(Entry(given.kernel, workload))
    multiplying = run.tile.consumers + (given.kernel in APART)
    found = recording(words, chosen(len(words)), multiplying)
    taken = replace(run.measurement, trace_overhead=overhead)
    run = replace(run, lanes=found.lanes, labels=found.labels, spans=found.spans, measurement=taken)
    given.out.mkdir(parents=True, exist_ok=True)
    store.save(run, given.out / store.file_name(run))
    for lane, rows in phases(found).items():
        sys.stdout.write(f"{lane}: " + ", ".join(f"{label} {cycles:.0f}" for label, cycles in rows) + "\n")
    sys.stdout.write(f"tracing costs {overhead:.1%}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
