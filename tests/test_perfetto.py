"""The trace file keeps the rules of the Trace Event Format, so that Perfetto and chrome://tracing open it."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from fasim.cli.svg import svg
from fasim.cli.timeline import Timeline
from fasim.simulator.errors import UsageError
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


def test_the_svg_is_wellformed_and_draws_every_work_span(pingpong_run):
    window = by_iterations(pingpong_run, 1, 4)
    root = ElementTree.fromstring(svg(window))
    boxes = [
        e
        for e in root.iter("{http://www.w3.org/2000/svg}rect")
        if e.find("{http://www.w3.org/2000/svg}title") is not None
    ]
    assert len(boxes) == sum(not s.wait for row in window.rows for s in row.spans)
    texts = {e.text for e in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"WG0", "tensor cores", "S3", "P3", "O3"} <= texts


@pytest.mark.parametrize("colour", [None, "truecolor"])
def test_the_terminal_timeline_shows_alternation_and_fits_its_width(pingpong_run, colour):
    from rich.console import Console

    console = Console(width=120, color_system=colour, force_terminal=colour is not None, legacy_windows=False)
    lines = console.render_lines(Timeline(by_iterations(pingpong_run, 1, 4)), pad=False)
    text = ["".join(segment.text for segment in line) for line in lines]
    assert all(len(line) <= 120 for line in text)
    tensor = next(line for line in text if line.startswith("tensor cores"))
    if colour is None:
        runs = [c for i, c in enumerate(tensor[13:]) if i == 0 or tensor[12 + i] != c]
        shades = ["WG0" if c.isdigit() else "WG1" for c in runs if c.strip()]
        assert "WG1" in shades and shades.count("WG0") >= 4  # the turn passes between the two
    else:
        assert "S3" in tensor and "O3" in tensor
