"""The trace file keeps the rules of the Trace Event Format, so that Perfetto and chrome://tracing open it."""

from __future__ import annotations

import pytest

from fasim.simulator.errors import UsageError
from fasim.simulator.predict import predict
from fasim.simulator.problem.workload import Workload
from fasim.traces.perfetto import chrome_trace
from fasim.traces.window import by_cycles, by_iterations, whole


def test_trace_keeps_the_rules(pingpong_run, assert_chrome_rules):
    assert_chrome_rules(chrome_trace(pingpong_run))


def test_trace_keeps_every_span_and_its_cycles(pingpong_run):
    trace = chrome_trace(pingpong_run)
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert {e["name"] for e in events} >= {"S=QK^T [0]", "softmax [5]", "load V [3]", "setup"}
    assert sum(e["args"]["cycles"] for e in events) == int(
        (pingpong_run.spans["end"] - pingpong_run.spans["start"]).sum()
    )
    assert all(round(e["ts"] * 1000) == e["args"]["start_cycle"] for e in events)


def test_loads_in_flight_at_once_get_a_track_each(pingpong_run):
    names = [row.name for row in whole(pingpong_run).rows]
    assert names == ["producer", "WG0", "WG1", "TMA", "TMA (2)", "tensor cores", "MUFU", "FMA", "barriers"]


def test_the_window_of_iterations_is_where_the_consumers_work_on_them(pingpong_run):
    window = by_iterations(pingpong_run, 1, 2)
    assert (window.start, window.end) == (500 + 1400 + 700, 500 + 2800 + 1400 + 1400)
    assert all(window.start <= s.start < s.end <= window.end for row in window.rows for s in row.spans)


@pytest.mark.parametrize("ask", [lambda r: by_iterations(r, 40, 50), lambda r: by_cycles(r, 10**7, 10**8)])
def test_an_empty_window_is_refused_in_a_sentence(pingpong_run, ask):
    with pytest.raises(UsageError):
        ask(pingpong_run)


def test_arrows_lead_from_a_load_to_its_gemm_to_its_softmax_to_the_next_gemm(pingpong_run):
    events = chrome_trace(pingpong_run)["traceEvents"]
    spans = {(e["pid"], e["tid"], e["ts"]): e["name"] for e in events if e["ph"] == "X"}
    arrows: dict[int, list[dict]] = {}
    for event in events:
        if event["ph"] in "stf":
            arrows.setdefault(event["id"], []).append(event)
    for chain in arrows.values():
        assert "".join(e["ph"] for e in chain) == "s" + "t" * (len(chain) - 2) + "f"
        assert [e["ts"] for e in chain] == sorted(e["ts"] for e in chain)
    said = [tuple(spans[e["pid"], e["tid"], e["ts"]] for e in chain) for chain in arrows.values()]
    for j in range(6):
        for chain in [(f"load K [{j}]", f"S=QK^T [{j}]", f"softmax [{j}]", f"O+=PV [{j}]"), (f"load V [{j}]", f"O+=PV [{j}]")]:
            assert said.count(chain) == 2, "one of each warpgroup"
    assert len(said) == 24


@pytest.mark.parametrize("schedule", ["pingpong", "fa2", "standard"])
def test_the_counters_end_at_the_bytes_of_what_was_recorded(schedule, assert_chrome_rules):
    work = Workload(8, 16, 1024)
    run = predict(work, schedule, "h200")
    trace = chrome_trace(run)
    assert_chrome_rules(trace)
    counts = [e for e in trace["traceEvents"] if e["ph"] == "C"]
    for name in {e["name"] for e in counts}:
        for way in ("read", "written"):
            values = [e["args"][way] for e in counts if e["name"] == name]
            assert values == sorted(values) and values[0] == 0 < values[-1]
    ctas = len({lane.name.partition(" ")[0] for lane in run.lanes if lane.name.startswith("CTA")}) or 1
    tiles = int(run.spans["tile"].max()) + 1
    rows = run.tile.block_m * work.head_dim * work.element_bytes
    keys = run.sample.steps * run.tile.block_n * work.head_dim * work.element_bytes
    scores = run.tile.block_m * work.seqlen_k * work.element_bytes
    read, written = (3 * scores, scores) if schedule == "standard" else (rows + 2 * keys, rows + 4 * run.tile.block_m)
    last = [e for e in counts if e["name"] == "bytes between SM and L2"][-1]["args"]
    assert (last["read"], last["written"]) == (read * ctas * tiles, written * ctas * tiles)
    hbm = [e for e in counts if e["name"] == "bytes between L2 and HBM"][-1]["args"]
    assert hbm["read"] <= last["read"] and hbm["written"] <= last["written"]
