"""Runs under the roofline: each at its own clock, in the words that predict uses, and nothing hidden behind anything."""

import pytest
from rich.console import Console

from fasim.cli.loglog import LogLog
from fasim.cli.standing import standing as drawn
from fasim.simulator.devices.device import load_device
from fasim.simulator.predict import predict
from fasim.simulator.problem.workload import Workload
from fasim.traces.standing import RESOURCES, standing

DEVICE = load_device("h100-sxm")
WORKLOAD = Workload(1, 33, 2048)


@pytest.fixture(scope="module")
def runs():
    return [predict(WORKLOAD, name, DEVICE) for name in ("fa3", "standard", "warp-specialized")]


def plot(found, width: int = 80, colour: bool = False) -> str:
    console = Console(width=width, force_terminal=colour, color_system="standard" if colour else None)
    with console.capture() as captured:
        console.print(found)
    return captured.get()


def test_a_schedules_bound_does_not_depend_on_which_are_listed(runs):
    together = standing(runs, DEVICE)
    assert len({mark.roofline.clock_hz for mark in together.marks}) == 3
    for mark, run in zip(together.marks, runs, strict=True):
        alone = standing([run], DEVICE)
        assert alone.marks == (mark,)
        assert alone.roofline == together.roofline == standing(runs[::-1], DEVICE).roofline
        assert mark.roofline.clock_hz == run.sm_clock_hz
        assert 0 < mark.share_of_bound <= 1


def test_lines_are_at_the_boost_clock_or_the_one_that_was_asked_for(runs):
    assert standing(runs, DEVICE).roofline.clock_hz == DEVICE.max_clock_hz
    assert standing(runs, DEVICE, 1.2e9).roofline.clock_hz == 1.2e9


def test_standard_attention_stands_under_the_bytes_of_s_and_p_and_predict_agrees(runs):
    found = standing(runs, DEVICE).marks
    assert [mark.roofline.binding for mark in found] == ["tensor", "hbm", "tensor"]
    large = predict(Workload(1, 33, 4096), "standard", DEVICE)
    (mark,) = standing([large], DEVICE).marks
    assert RESOURCES[mark.roofline.binding] == large.bottleneck.resource == "HBM"


def test_where_predict_names_another_cause_it_says_what_share_the_bound_needs():
    decode = predict(Workload(2, 66, kv_heads=11, seqlen_q=1, seqlen_k=4096), "fa3", DEVICE)
    (mark,) = standing([decode], DEVICE).marks
    assert mark.roofline.binding == "hbm"
    assert f"HBM, which bounds this workload, needs {mark.share_of_bound:.0%} of the time" in decode.bottleneck.why


def test_l2_has_no_diagonal_over_hbm_bytes_but_a_height_at_the_bytes_a_run_asks_of_it(runs):
    found = standing(runs, DEVICE)
    for mark, run in zip(found.marks, runs, strict=True):
        moved = run.traffic.total("l2_read") + run.traffic.total("l2_write")
        seconds = moved / (DEVICE.l2_bytes_per_cycle * run.sm_clock_hz)
        assert mark.l2_flops_per_s == pytest.approx(WORKLOAD.flops / seconds)
    rows = plot(LogLog(found)).splitlines()
    diagonals = [row.count("\u2571") for row in rows[1:17]]
    assert max(diagonals) <= 6 and sum(diagonals) < 80, "one diagonal, a cell or a few a row"


def test_lines_of_one_height_are_both_to_be_seen():
    found = standing([predict(Workload(1, 33, 1024, 64), "fa3", DEVICE)], DEVICE)
    assert found.roofline.tensor_cycles == found.roofline.mufu_cycles
    drawn_lines = plot(LogLog(found), colour=True)
    line = next(line for line in drawn_lines.splitlines() if "\x1b[32m\u2500" in line)
    assert "\x1b[35m\u2500" in line
    assert "on one line" in drawn_lines


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_name_is_cut_and_no_line_is_too_long(width, runs):
    shown = plot(drawn(standing(runs, DEVICE)), width)
    assert "\u2026" not in shown
    assert all(len(line) <= width for line in shown.splitlines())
    assert all(name in shown for name in (*RESOURCES.values(), "warp-specialized", "standard", "A", "B", "C"))
