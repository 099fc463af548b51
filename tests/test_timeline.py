"""The timeline as a picture: it reads like the papers' figures, in any width, and says what it does not show."""

from __future__ import annotations

import functools
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from rich.console import Console

from fasim.cli.legend import entries
from fasim.cli.palette import colour, letter
from fasim.cli.svg import svg
from fasim.cli.timeline import Timeline
from fasim.simulator.predict import default_tile, predict
from fasim.simulator.problem.workload import Workload
from fasim.simulator.results.run import Run
from fasim.simulator.schedules import SCHEDULES
from fasim.traces.figure import figure
from fasim.traces.overlay import overlay
from fasim.traces.window import GEMM, ON_GEMM, ON_TURN, by_cycles, by_iterations, remarks

KERNELS = [(name, kernel.name) for name, schedule in SCHEDULES.items() for kernel in schedule.kernels]
TEXT = "{http://www.w3.org/2000/svg}text"


@functools.cache
def run_of(schedule: str, kernel: str | None = None, head_dim: int = 128, seqlen: int = 1024) -> Run:
    work, tile = Workload(8, 16, seqlen, head_dim), None
    if SCHEDULES[schedule].packs:  # whose combine is there where keys are in parts
        tile = replace(default_tile(work, schedule, "h200"), parts=4)
    return predict(work, schedule, "h200", tile, kernel=kernel)


def lines_of(window, width: int, colours: str | None = None) -> list[str]:
    console = Console(width=width, color_system=colours, force_terminal=colours is not None, legacy_windows=False)
    return ["".join(part.text for part in line) for line in console.render_lines(Timeline(window), pad=False)]


# -- lanes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "kernel"), KERNELS)
def test_every_unit_that_has_a_lane_is_in_use_and_copies_are_named_by_what_moves_them(schedule, kernel):
    window = by_iterations(run_of(schedule, kernel))
    names = {row.name for row in window.rows}
    assert all(any(not span.wait for span in row.spans) for row in window.rows if row.kind == "unit")
    assert ("TMA" in names) == SCHEDULES[schedule].hopper and not ("TMA" in names and "cp.async" in names)
    exponentials = {"softmax", "row sum", "row max and sum", "combine"}
    assert ("MUFU" in names) == any(span.label in exponentials for row in window.rows for span in row.spans)


def test_an_a100_has_no_tma():
    run = predict(Workload(1, 4, 1024), "fa2", "a100-sxm")
    assert "TMA" not in {lane.name for lane in run.lanes} and "cp.async" in {lane.name for lane in run.lanes}


def test_pingpong_reads_like_figure_1_with_gemm_softmax_gemm_in_one_row():
    window = by_iterations(run_of("pingpong"), 2, 3)
    rows = {row.name: row for row in figure(window).rows}
    assert "WG0 GEMM" not in rows
    for name in ("WG0", "WG1"):
        work = [span.short for span in rows[name].spans if span.kind in (GEMM, "softmax") and not span.label.startswith("skip")]
        order = " ".join(dict.fromkeys(work))
        assert "S3 P3 O3" in order, order
        assert not any(a.end > b.start for a, b in zip(rows[name].spans, rows[name].spans[1:], strict=False))
    (cores,) = (row for row in window.rows if row.name == "tensor cores")
    executed = {(span.label, span.step): span for span in cores.spans if span.group == 0}
    gemm = next(span for span in rows["WG0"].spans if span.kind == GEMM and span.short == "S3")
    assert (gemm.start, gemm.end) == (executed["S=QK^T", 3].start, executed["S=QK^T", 3].end)


@pytest.mark.parametrize("schedule", ["overlap-2stage", "overlap-3stage", "fa3"])
def test_overlap_reads_like_figure_2_with_gemms_above_the_softmax_that_runs_under_them(schedule):
    rows = {row.name: row for row in figure(by_iterations(run_of(schedule))).rows}
    for name in ("WG0", "WG1"):
        assert all(span.kind == GEMM for span in rows[f"{name} GEMM"].spans)
        assert GEMM not in {span.kind for span in rows[name].spans}
        softmax = next(span for span in rows[name].spans if span.short == "P2")
        assert any(box.start < softmax.end and softmax.start < box.end for box in rows[f"{name} GEMM"].spans)


def test_waits_for_a_gemm_a_turn_and_a_load_are_told_apart():
    kinds = {span.kind for row in figure(by_iterations(run_of("fa3"), 1, 3)).rows for span in row.spans if span.wait}
    assert {ON_GEMM, ON_TURN} <= kinds
    text = "\n".join(lines_of(by_iterations(run_of("fa3"), 1, 3), 120))
    assert ": issues or waits for a GEMM" in text and "_ waits for its turn" in text and ". waits for a load" in text


def test_the_gemms_of_fa1_are_inside_its_loop_over_q_blocks():
    window = by_iterations(run_of("fa1"))
    gemms = [span for row in window.rows for span in row.spans if span.kind == GEMM]
    assert gemms and all(span.step >= 0 for span in gemms)
    text = "\n".join(lines_of(window, 100))
    assert "Q block of " in text and "K/V block" not in text


def test_three_passes_are_drawn_one_after_another():
    window = by_iterations(run_of("standard"))
    (row, *_) = (row for row in window.rows if row.name.endswith("WG0"))
    first = {label: [s.start for s in row.spans if s.label == label] for label in ("row max", "row sum", "probabilities")}
    assert max(first["row max"]) < min(first["row sum"]) <= max(first["row sum"]) < min(first["probabilities"])


# -- letters, shades, legends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6])
def test_no_two_warpgroups_share_a_shade_or_a_letter(groups):
    for step in (-1, 0, 5):
        assert len({colour(step, group, groups) for group in range(groups)}) == groups
        assert len({letter(step, group) for group in range(groups)}) == groups


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize(("schedule", "kernel"), KERNELS)
def test_names_and_legend_are_whole_from_60_columns_up(schedule, kernel, width):
    window = by_iterations(run_of(schedule, kernel))
    for colours in (None, "truecolor"):
        lines = lines_of(window, width, colours)
        assert all(len(line) <= width for line in lines)
        drawn = figure(window)
        for row in drawn.rows:
            assert any(line.startswith(f"{row.name} ") for line in lines)
        legend = " ".join(" ".join(lines[-12:]).split())
        said = [name for kind, name in entries(drawn).items() if kind != "work"]
        for text in (*said, *(window.warpgroups[group] for group in drawn.groups)):
            assert text in legend, text
        assert "blank is idle" in legend


@pytest.mark.parametrize("width", [60, 120])
def test_every_letter_of_three_warpgroups_is_explained(width):
    text = " ".join("\n".join(lines_of(by_iterations(run_of("fa3", head_dim=64)), width)).split())
    for group, letters in enumerate(("0 1 2", "a b c", "A B C")):
        assert f"{letters} K/V block of WG{group}" in text


def test_a_column_that_holds_several_things_says_so(pingpong_run):
    wide, narrow = by_iterations(pingpong_run, 1, 1), by_cycles(pingpong_run, 0, 11_000)
    assert "several in one column" not in "\n".join(lines_of(wide, 120))
    assert "+" in "".join(lines_of(narrow, 30)) and "several in one column" in " ".join(" ".join(lines_of(narrow, 40)).split())


def test_the_share_of_the_time_that_a_unit_is_busy_stands_beside_it(pingpong_run):
    line = next(line for line in lines_of(by_cycles(pingpong_run, 1200, 2600), 100) if line.startswith("tensor cores"))
    assert line.endswith(" 75%")  # 350 of 1400 cycles are idle


@pytest.mark.parametrize("colours", [None, "truecolor"])
def test_the_two_warpgroups_alternate_on_the_tensor_cores(pingpong_run, colours):
    text = lines_of(by_iterations(pingpong_run, 1, 4), 120, colours)
    tensor = next(line for line in text if line.startswith("tensor cores"))
    if colours is None:
        turns = [c for i, c in enumerate(tensor[13:-5]) if i == 0 or tensor[12 + i] != c]
        owners = ["WG0" if c.isdigit() else "WG1" for c in turns if c.strip()]
        assert "WG1" in owners and owners.count("WG0") >= 4
    else:
        assert "S3" in tensor and "O3" in tensor


# -- SVG -----------------------------------------------------------------------------------------------------------------


def test_the_svg_is_wellformed_and_draws_every_span(pingpong_run):
    window = by_iterations(pingpong_run, 1, 4)
    root = ElementTree.fromstring(svg(window))
    boxes = [e for e in root.iter("{http://www.w3.org/2000/svg}rect") if e.find("{http://www.w3.org/2000/svg}title") is not None]
    assert len(boxes) == sum(not span.wait for row in figure(window).rows for span in row.spans)
    assert {"WG0", "tensor cores", "S3", "P3", "O3"} <= {e.text for e in root.iter(TEXT)}


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("schedule", ["pingpong", "fa3", "standard", "fa1", "both"])
def test_no_text_of_the_svg_is_cut(schedule, width):
    if schedule == "both":
        run = run_of("fa3")
        window = by_iterations(overlay(run, run))
    else:
        window = by_iterations(run_of(schedule))
    root = ElementTree.fromstring(svg(window, width))
    height, rows = float(root.get("height")), {row.name for row in figure(window).rows}
    names = set()
    for text in root.iter(TEXT):
        em = 0.65 if text.text in rows else 0.56  # the mean of a wide bold font, of Helvetica in sentences
        x, length = float(text.get("x")), em * float(text.get("font-size")) * len(text.text)
        left = x - {"start": 0, "middle": length / 2, "end": length}[text.get("text-anchor")]
        assert left >= 0 and left + length <= width and 0 < float(text.get("y")) < height, text.text
        names.add(text.text)
    assert rows <= names


# -- what is not shown ---------------------------------------------------------------------------------------------------


def test_a_picture_says_which_kernel_it_is_of_and_how_much_of_the_loop():
    run = predict(Workload(1, 2, 4096), "standard", "h200")
    assert "kernel 2 of 3 (softmax_three_pass)" in by_iterations(run).title
    several, cut = remarks(run)
    assert "1 scores, 2 softmax_three_pass (drawn), 3 values" in several and "--kernel" in several
    assert f"10 of the {4096 // run.tile.block_n} steps" in cut
    assert not remarks(run_of("fa2", seqlen=256))


@pytest.mark.parametrize("seqlen", [1, 128, 300])
@pytest.mark.parametrize("schedule", ["pingpong", "fa2", "fa1", "standard"])
def test_the_usual_window_is_what_there_is(schedule, seqlen):
    window = by_iterations(run_of(schedule, seqlen=seqlen))
    assert window.end > window.start and any(row.spans for row in window.rows)
