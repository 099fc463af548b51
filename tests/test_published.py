"""The papers' tables: every row that has a schedule is asked, in the units and lengths the papers used."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace

import pytest

from fasim.simulator.errors import UsageError
from fasim.simulator.predict import predict
from fasim.simulator.problem.workload import Workload
from fasim.simulator.results import metrics
from fasim.traces import hbm
from fasim.traces import published as book
from fasim.traces.predictions import Question


@pytest.fixture
def twice_as_fast(pingpong_run):
    """A predict that answers every published bar with exactly twice its TFLOP/s, and counts the questions."""
    asked = Counter()

    def answer(workload, schedule, device, clock_hz=None, tile=None, regime="sustained", why=False):
        question = Question(workload, schedule, device, tile, clock_hz, regime, why)
        asked[question] += 1
        bar = next(b for b in book.bars() if b.tflops and b.schedule and question in book.questions(b))
        run = replace(pingpong_run, workload=workload, schedule=schedule, device=device, sm_clock_hz=1e9)
        return replace(run, cycles=round(workload.paper_flops / (2 * bar.tflops * 1e12) * 1e9))

    answer.asked = asked
    return answer


def rows(name: str) -> list[dict]:
    with (book.FOLDER / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_row_keeps_its_source():
    for path in sorted(book.FOLDER.glob("*.csv")):
        table = rows(path.name)
        assert table and all(row["source"].strip() for row in table), path.name


def test_every_row_of_an_implemented_schedule_is_predicted(twice_as_fast):
    report = book.report(predict=twice_as_fast)
    known = {"forward": book.SCHEDULE_OF, "backward": book.BACKWARD_OF, book.BOTH: book.BACKWARD_OF}
    table = [r for r in rows("attention_tflops.csv") if r["implementation"] in known[r["direction"]]]
    wanted = Counter((r["source"], r["figure"]) for r in table)
    seen = Counter((g.source, g.figure) for g in report.groups for _ in g.rows if g.figure.startswith("Figure"))
    assert seen == wanted
    assert {
        "cuDNN",
        "Triton",
        "xformers",
        "FlashAttention Triton",
        "FlashAttention, backward",
        "FlashAttention, forward + backward",
        "cuDNN, backward",
        "cuDNN 9.19 through torch 2.11 SDPA, backward",  # at head_dim 256
    } <= report.left_out.keys()
    assert sum(count for name, count in report.left_out.items() if "backward" in name) == 24 + 48 + 48 + 12 + 48 + 2
    assert all((row.error is None) == row.bar.out_of_memory for g in report.groups for row in g.rows)
    assert sum(row.bar.out_of_memory for g in report.groups for row in g.rows) > 0
    assert set(twice_as_fast.asked.values()) == {1}  # equal questions are asked once


def test_a_constant_overshoot_is_all_implementation_efficiency(twice_as_fast):
    report = book.report("fa3-5c", predict=twice_as_fast)
    assert {g.implementation for g in report.groups} == {"Standard attention", "FlashAttention-2", "FlashAttention-3"}
    for group in report.groups:
        assert group.mape == pytest.approx(1.0, rel=1e-4)
        assert group.efficiency == pytest.approx(0.5, rel=1e-4)
        assert group.residual_mape == pytest.approx(0, abs=1e-4)
    for family in report.families:
        assert family.worst == pytest.approx(1.0, rel=1e-3)


def test_the_residual_is_not_blind_to_shape(twice_as_fast):
    """One factor cannot repair errors that differ from bar to bar."""

    def uneven(workload, **rest):
        run = twice_as_fast(workload, **rest)
        return replace(run, cycles=run.cycles * (2 if workload.seqlen_q >= 4096 else 1))

    group = next(g for g in book.report("fa3-5c", predict=uneven).groups if g.schedule == "fa3-published")
    assert group.residual_mape > 0.2


def test_a_bare_panel_names_it_in_every_paper_and_a_prefix_picks_one():
    assert {b.source for b in book.select("5c")} == {b.source for b in book.select("fa2-5c") + book.select("FA3-5c")}
    assert {b.figure for b in book.select("5")} == {f"Figure 5{letter}" for letter in "abcdef"}
    assert {b.figure for b in book.select("ablation")} == {"Table 2", "section 3.1"}
    assert {b.gpu for b in book.select("h200")} == {"H200"}


@pytest.mark.parametrize("figure", ["12z", "", "fa3-4a", "fa9-5c", "-"])
def test_an_unknown_figure_is_refused_with_what_there_is(figure):
    with pytest.raises(UsageError, match="ablation, h200, hbm"):
        book.select(figure)


def test_fp8_bars_are_asked_at_the_lengths_they_were_run_at():
    lengths = {
        b.label: b.workload.seqlen for b in book.bars() if b.gpu.startswith("H100") and b.workload.dtype == "e4m3"
    }
    assert lengths == {512: 512, 1024: 1024, 2048: 2048, 4096: 4224, 8192: 8448, 16384: 16896}


def test_h100_bars_are_asked_at_their_clock_and_others_run_free():
    for bar in book.bars():
        assert bar.clock_hz == (1830e6 if bar.gpu == "H100 80GB SXM5" else None)


def test_table_2_maps_to_the_schedules_that_it_ran():
    work = Workload(batch=4, heads=16, seqlen=8448, head_dim=128)
    assert [b.tflops for b in book.match(work, "fa3", "h100-sxm")] == [661]
    assert [b.tflops for b in book.match(work, "pingpong", "h100-sxm")] == [582]
    assert book.match(work, "fa3-published", "h100-sxm") == book.match(work, "fa3", "h100-sxm")
    assert [b.tflops for b in book.unmatched(work, "h100-sxm")] == [570]
    assert book.match(work, "fa3", "h200") == ()


def test_the_closed_form_is_the_papers_curve():
    """Figure 2 middle, in GB, as read off the plot to two decimals."""
    for row in rows("hbm_traffic.csv"):
        if row["block_kv"]:
            bytes_ = hbm.closed_form_bytes(Workload(batch=64, heads=16, seqlen=1024, head_dim=64), int(row["block_kv"]))
            assert bytes_ / 1e9 == pytest.approx(float(row["hbm_gb"]), abs=0.006)


@pytest.mark.parametrize("block_n", [64, 128, 256, 512])
def test_fa1_moves_exactly_the_bytes_of_the_closed_form(block_n):
    work = Workload(batch=64, heads=16, seqlen=1024, head_dim=64)
    counted = predict(work, "fa1", "a100-sxm", tile=hbm.fa1_tile(work, "a100-sxm", block_n)).traffic.by_tensor
    bytes_ = sum(counted[name].algorithmic_read + counted[name].algorithmic_write for name in "QKVO")
    assert bytes_ == hbm.closed_form_bytes(work, block_n)
    assert counted["l"].algorithmic_read > 0 and counted["m"].algorithmic_write > 0


def test_the_gpt2_rows_show_both_passes_and_the_forward_and_explain_the_ratio():
    report = hbm.hbm_report()
    standard, fa1, fa2 = report.left
    assert [row.published_bytes for row in report.left] == [40.3e9, 4.4e9, None]
    assert standard.hbm_bytes < 40.3e9
    assert standard.hbm_bytes > fa1.hbm_bytes > fa2.hbm_bytes
    passes = 64 * 16 * 1024**2 * 2  # of the scores: S, P there and back; P, dP and dS in the backward
    assert standard.both_hbm_bytes - standard.hbm_bytes == pytest.approx(7 * passes, rel=0.1)
    assert fa1.hbm_bytes + 1e9 < fa1.both_hbm_bytes < 4.4e9 and fa2.both_hbm_bytes < fa1.both_hbm_bytes
    assert standard.both_hbm_bytes / fa1.both_hbm_bytes > 5, "published: 9.2"
    assert "S and P" in report.why and report.why.count(".") >= 1
    assert len(report.middle) == 4


def test_a_published_bar_is_predicted_in_the_papers_flop_count():
    bar = next(b for b in book.select("fa3-5d") if b.schedule == "fa3-published" and b.label == 512)
    report = book.report("fa3-5d")
    row = next(r for g in report.groups for r in g.rows if r.bar == bar)
    run = predict(bar.workload, "fa3-published", "h100-sxm", clock_hz=1830e6)
    assert row.predicted_tflops == pytest.approx(metrics.paper_tflops(run))
    assert row.predicted_tflops < metrics.tflops(run)  # the causal half is a little less than the exact count


def test_a_bar_of_both_passes_is_two_predictions_one_after_the_other(twice_as_fast):
    report = book.report("fa2-4b", predict=lambda workload, **rest: replace(
        twice_as_fast(workload, **rest), cycles=round(workload.paper_flops / (2e14 if workload.backward else 1e14) * 1e9)
    ))  # fmt: skip
    for row in (row for group in report.groups for row in group.rows if row.predicted_tflops):
        assert row.predicted_tflops == pytest.approx(3.5 / (2.5 / 200 + 1 / 100), rel=1e-3), "2.5 times the FLOPs at twice the rate"


def test_a_backward_bar_stands_beside_a_backward_prediction_alone():
    work = Workload(1, 16, 16384, 128, direction="backward")
    assert [b.tflops for b in book.match(work, "fa3", "h100-sxm")] and not book.match(work, "pingpong", "h100-sxm")
    assert all(b.direction == "backward" for b in book.match(work, "fa3", "h100-sxm"))
    forward = replace(work, direction="forward")
    assert all(b.direction == "forward" for b in book.match(forward, "fa2", "a100-sxm") + book.match(forward, "fa2", "h100-sxm"))
