"""Run -> Chrome trace JSON, which Perfetto and chrome://tracing open: one track per lane, no overlap within a track.

One SM cycle is written as one nanosecond (`ts` and `dur` are microseconds by the Trace Event Format), so that the
viewer's "ns" read as cycles whatever the clock.

Arrows (flow events) go from a load to the GEMM that it feeds, from there to its softmax and on to the next GEMM. Counters
count the bytes that the SM has had moved since the start: each load when it is through, each store when it is handed over.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..simulator.results.run import Run
from .flows import Flow, flows
from .window import AHEAD, Span, Window, whole

_CYCLES_PER_MICROSECOND = 1000
_KINDS = (("warp", "warps"), ("unit", "units"))
_BYTES = len(_KINDS) + 1
"""Process of the counters."""


def chrome_trace(run: Run, window: Window | None = None) -> dict:
    """The trace of a window (default: all that was recorded) as a JSON object of the Trace Event Format.

    Warps and hardware units are two processes, lanes are their threads. Work and waits are complete events ("X"), arrows
    flow events ("s", "t", "f"), and a predicted run has counters ("C") in a third process.
    """
    window = window or whole(run)
    events: list[dict] = []
    places: dict[int, tuple[int, int]] = {}  # row of the window -> process and thread
    for pid, (kind, title) in enumerate(_KINDS, start=1):
        events.append(_meta("process_name", pid, 0, name=f"{title} of one SM"))
        events.append(_meta("process_sort_index", pid, 0, sort_index=pid))
        rows = [(number, row) for number, row in enumerate(window.rows) if row.kind == kind]
        for tid, (number, row) in enumerate(rows, start=1):
            places[number] = (pid, tid)
            events.append(_meta("thread_name", pid, tid, name=row.name))
            events.append(_meta("thread_sort_index", pid, tid, sort_index=tid))
            events.extend(_complete(pid, tid, span) for span in row.spans)
    for number, flow in enumerate(flows(window), start=1):
        events.extend(_arrow(number, flow, places))
    events.extend(_counters(run, window))
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
            **_kernel(run),
            "sm_clock_hz": str(run.sm_clock_hz),
            "time": "1 ns in this trace is 1 SM cycle",
        },
    }


def _meta(kind: str, pid: int, tid: int, **args: object) -> dict:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "ts": 0, "args": args}


def _complete(pid: int, tid: int, span: Span) -> dict:
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


def _kernel(run: Run) -> dict:
    found = run.sample
    if found is None:
        return {}
    return {"kernel": found.kernels[found.number - 1], "kernels": ", ".join(found.kernels), "loop_step": found.step}


def _arrow(number: int, flow: Flow, places: dict[int, tuple[int, int]]) -> Iterator[dict]:
    """One event in each span of a flow, at its start, which binds to the span there."""
    for at, (row, span) in enumerate(flow.spans):
        pid, tid = places[row]
        phase = "s" if at == 0 else "f" if at == len(flow.spans) - 1 else "t"
        event = {"ph": phase, "id": number, "name": flow.name, "cat": "flow", "pid": pid, "tid": tid, "args": {}}
        yield event | {"ts": span.start / _CYCLES_PER_MICROSECOND} | ({"bp": "e"} if phase == "f" else {})


def _counters(run: Run, window: Window) -> Iterator[dict]:
    """Bytes since the window's start, by level and way. What misses L2 is a mean over the whole kernel."""
    copies = {each.label: each for each in run.sample.copies} if run.sample else {}
    if not copies:
        return
    moved: list[tuple[int, str]] = []
    for row in window.rows:
        if row.kind == "unit" and row.name.partition(" (")[0] in AHEAD:
            moved += [(span.end, span.label) for span in row.spans if span.label in copies and not span.wait]
        elif row.kind == "warp":
            last = {(s.label, s.tile, s.step): s.end for s in row.spans if s.label in copies and copies[s.label].way == "written"}
            moved += [(end, label) for (label, _, _), end in last.items()]
    yield _meta("process_name", _BYTES, 0, name="bytes of one SM")
    yield _meta("process_sort_index", _BYTES, 0, sort_index=_BYTES)
    totals = {"SM and L2": {"read": 0.0, "written": 0.0}, "L2 and HBM": {"read": 0.0, "written": 0.0}}
    for end, label in [(window.start, None), *sorted(moved)]:
        if label is not None:
            copy = copies[label]
            totals["SM and L2"][copy.way] += copy.l2
            totals["L2 and HBM"][copy.way] += copy.hbm
        for between, total in totals.items():
            args = {way: round(value) for way, value in total.items()}
            yield {
                "ph": "C", "name": f"bytes between {between}", "cat": "bytes", "pid": _BYTES, "tid": 0,
                "ts": end / _CYCLES_PER_MICROSECOND, "args": args,
            }  # fmt: skip
