"""Schedules side by side: one axis and scale, what softmax hides under, and that the papers' ideas can be told apart."""

from __future__ import annotations

import functools
import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from rich.console import Console

from fasim.cli.beside import Beside
from fasim.cli.svg_beside import svg_beside
from fasim.simulator.predict import predict
from fasim.simulator.problem.workload import Workload
from fasim.traces.beside import EXPOSED, beside, by_clock, covers
from fasim.traces.window import SOFTMAX, by_iterations

FIGURES = ("warp-specialized", "pingpong", "overlap-2stage", "fa3")
SVG = "{http://www.w3.org/2000/svg}"
SMALL = ("--batch", "8", "--heads", "16", "--seqlen", "1024", "--device", "h200")


@functools.cache
def run_of(schedule: str, causal: bool = False):
    return predict(Workload(8, 16, 1024, 128, causal=causal), schedule, "h200")


@functools.cache
def panels_of(*schedules: str):
    return beside([run_of(name) for name in schedules])


def lines_of(panels, width: int, colours: str | None = None) -> list[str]:
    console = Console(width=width, color_system=colours, force_terminal=colours is not None, legacy_windows=False)
    return ["".join(part.text for part in line) for line in console.render_lines(Beside(panels), pad=False)]


# -- what hides under what -----------------------------------------------------------------------------------------------


def test_a_perfect_pingpong_hides_all_softmax_under_the_other_warpgroup(pingpong_run):
    (panel,) = beside([pingpong_run], 2, 3)
    assert (panel.window.start, panel.window.end, panel.blocks, panel.cycles_per_block) == (0, 2800, 2, 1400)
    assert panel.softmax == {"others": 1, "own": 0, "exposed": 0}
    # of 1,400 cycles a block a warpgroup has 600 of softmax and 700 of GEMMs
    assert panel.idle == pytest.approx(
        {"producer": 0.9714, "WG0": 1 / 14, "WG1": 1 / 14, "TMA": 1 - 620 / 1400, "tensor cores": 0, "MUFU": 1 / 7, "FMA": 1 / 7},
        abs=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("schedule", [*FIGURES, "overlap-3stage", "fa2", "fa1", "standard-online"])
def test_every_cycle_of_softmax_is_hidden_or_exposed_once(schedule):
    window = by_iterations(run_of(schedule), 1, 4)
    length = window.end
    gemms = np.full(length, EXPOSED)
    for row in window.rows:
        if row.name.startswith("tensor cores"):
            for span in row.spans:
                gemms[span.start : span.end] = span.group
    found = covers(window)
    for group in range(len(window.warpgroups)):
        softmax = np.zeros(length, bool)
        for span in (s for row in window.rows if row.kind == "warp" for s in row.spans):
            if span.kind == SOFTMAX and span.group == group:
                softmax[span.start : span.end] = True
        said = np.full(length, -2)
        for cover in found:
            if cover.group == group:
                assert (said[cover.start : cover.end] == -2).all()
                said[cover.start : cover.end] = cover.by
        assert (said == np.where(softmax, gemms, -2)).all()


def test_the_ideas_of_the_papers_figures_can_be_told_apart():
    free, turns, own, both = (panel.softmax for panel in panels_of(*FIGURES))
    assert free["exposed"] > 2 * turns["exposed"] > 4 * own["exposed"], "warp specialisation hides by luck, pingpong by order"
    assert turns["others"] > 0.6 and turns["own"] == 0, "Figure 1: under the other warpgroup's GEMMs"
    assert own["own"] > 0.3 and both["own"] > 0.3, "Figure 2: under the warpgroup's own PV"
    assert both["others"] > 0.3 and both["exposed"] < 0.05


def test_blocks_are_whole_and_the_rest_of_the_loop_repeats_them():
    for panel in panels_of(*FIGURES):
        (next_one,) = beside([panel.run], 4, 4)
        assert panel.blocks == 3 and next_one.cycles_per_block == pytest.approx(panel.cycles_per_block, rel=0.05)
    (short,) = beside([predict(Workload(1, 4, 128), "fa3", "h200")])
    assert short.blocks == 0 and short.cycles_per_block is None and short.window.end > 0


# -- drawn ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colours", [None, "truecolor"])
@pytest.mark.parametrize("width", [60, 80, 140])
def test_panels_have_one_scale_and_fit_the_terminal(width, colours):
    panels = panels_of(*FIGURES)
    lines = lines_of(panels, width, colours)
    assert all(len(line) <= width for line in lines)
    end = "|" if colours is None else "│"
    ends = [line.index(end) for line in lines if line.startswith("MUFU ") and end in line]
    gutter = len("tensor cores ")
    scale = (width - gutter - 5) / max(panel.window.end for panel in panels)
    assert ends == pytest.approx([gutter + panel.window.end * scale for panel in panels[1:]], abs=1)
    text = "\n".join(lines)
    for panel in panels:
        assert f"{panel.cycles_per_block:,.0f}" in text and panel.run.schedule in text


def test_under_a_warpgroup_stands_whose_gemm_hides_its_softmax():
    lines = lines_of(panels_of("pingpong"), 100)
    under = [line[13:95].strip() for line in lines if line.startswith("  under ")]
    assert len(under) == 2
    assert set(under[0]) <= set("1! ") and set(under[1]) <= set("0! ") and "1" in under[0] and "0" in under[1]


@pytest.mark.parametrize("width", [400, 1280])
def test_the_svg_underlines_every_stretch_to_scale_and_cuts_no_text(width):
    panels = panels_of(*FIGURES)
    root = ElementTree.fromstring(svg_beside(panels, width))
    titled = [(e.findtext(f"{SVG}title") or "", float(e.get("width"))) for e in root.iter(f"{SVG}rect")]
    strips = [(found, drawn) for said, drawn in titled if (found := re.match(r"softmax [ue].*: (\d+)-(\d+)$", said))]
    assert len(strips) == sum(len(panel.covers) for panel in panels)
    scales = {round(drawn / (int(at[2]) - int(at[1])), 2) for at, drawn in strips if int(at[2]) - int(at[1]) > 200}
    assert max(scales) - min(scales) <= 0.011, "one scale"
    height = float(root.get("height"))
    for text in root.iter(f"{SVG}text"):
        x, length = float(text.get("x")), 0.56 * float(text.get("font-size")) * len(text.text or "")
        left = x - {"start": 0, "middle": length / 2, "end": length}[text.get("text-anchor")]
        assert left >= 0 and left + length <= width and 0 < float(text.get("y")) < height, text.text


# -- the command ---------------------------------------------------------------------------------------------------------


def test_names_first_and_json_says_the_numbers_that_are_drawn(fasim):
    status, out, _ = fasim("timeline", "pingpong", "fa3", *SMALL, "--json")
    found = json.loads(out)
    assert status == 0 and [each["schedule"] for each in found] == ["pingpong", "fa3"]
    assert found == [panel.to_dict() for panel in panels_of("pingpong", "fa3")]
    assert fasim("timeline", "--schedule", "pingpong", "--schedule", "fa3", *SMALL, "--json")[1] == out


def test_cycles_are_counted_from_the_kernels_start(fasim):
    panels = by_clock([run_of("pingpong"), run_of("fa3")], 3000, 5000)
    assert [(panel.window.start, panel.window.end, panel.blocks) for panel in panels] == [(0, 2000, 0)] * 2
    status, out, _ = fasim("timeline", "pingpong", "fa3", *SMALL, "--cycles", "3000-5000")
    assert status == 0 and re.search(r"cycles per K/V block +- +-", out)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--trace", "x.json"), "--trace is of one schedule, and 2 were given"),
        (("--kernel", "1"), "--kernel is of one schedule, and 2 were given"),
        (("--iterations", "40"), "iterations 40 to 40 are not in the recorded window of 'pingpong' (it holds 0 to 7)"),
        (("--svg", "no/such/x.svg"), "cannot write"),
    ],
)
def test_what_is_not_possible_is_said_in_one_sentence(fasim, asked, said):
    status, out, err = fasim("timeline", "pingpong", "fa3", *SMALL, *asked)
    assert (status, out) == (2, "") and said in err and len(err.splitlines()) == 1
