"""Run -> Chrome trace JSON, which Perfetto and chrome://tracing open: one track per lane, no overlap within a track.

One SM cycle is written as one nanosecond (`ts` and `dur` are microseconds by the Trace Event Format), so that the
viewer's "ns" read as cycles whatever the clock.
"""

from __future__ import annotations

from ..simulator.run import Run
from .window import Window, whole

_CYCLES_PER_MICROSECOND = 1000
_KINDS = (("warp", "warps"), ("unit", "units"))


def chrome_trace(run: Run, window: Window | None = None) -> dict:
    """The trace of a window (default: all that was recorded) as a JSON object of the Trace Event Format.

    Warps and hardware units are two processes, lanes are their threads. Work and waits are complete events ("X").
    """
    window = window or whole(run)
    events: list[dict] = []
    for pid, (kind, title) in enumerate(_KINDS, start=1):
        events.append(_meta("process_name", pid, 0, name=f"{title} of one SM"))
        events.append(_meta("process_sort_index", pid, 0, sort_index=pid))
        for tid, row in enumerate((row for row in window.rows if row.kind == kind), start=1):
            events.append(_meta("thread_name", pid, tid, name=row.name))
            events.append(_meta("thread_sort_index", pid, tid, sort_index=tid))
            events.extend(_complete(pid, tid, span) for span in row.spans)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": {
            "title": window.title,
            "origin": run.origin,
            "schedule": run.schedule,
            "device": run.device,
            "workload": str(run.workload),
            "tile": str(run.tile),
            "sm_clock_hz": str(run.sm_clock_hz),
            "time": "1 ns in this trace is 1 SM cycle",
        },
    }


def _meta(kind: str, pid: int, tid: int, **args: object) -> dict:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "ts": 0, "args": args}


def _complete(pid: int, tid: int, span) -> dict:
    args = {"step": span.step, "tile": span.tile, "start_cycle": span.start, "cycles": span.end - span.start}
    if span.group >= 0:
        args["warpgroup"] = span.group
    return {
        "ph": "X",
        "name": span.label if span.step < 0 else f"{span.label} [{span.step}]",
        "cat": "wait" if span.wait else "work",
        "pid": pid,
        "tid": tid,
        "ts": span.start / _CYCLES_PER_MICROSECOND,
        "dur": (span.end - span.start) / _CYCLES_PER_MICROSECOND,
        "args": args,
    }
