"""Somebody's own measurement, from a stopwatch or from Nsight Compute, beside its prediction."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fasim.simulator.errors import UsageError
from fasim.simulator.predict import predict
from fasim.simulator.problem.workload import Workload
from fasim.traces import nsight
from fasim.traces.answers import own_run
from fasim.traces.predictions import Question

RECORDED = Path(__file__).parent / "data" / "ncu_h200.csv"
SMALL = Question(Workload(1, 1, 256), "fa3", "h200")
LARGE = Question(Workload(4, 16, 4096), "fa3", "h200")
HEAD = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",'
    '"Section Name","Metric Name","Metric Unit","Metric Value","Rule Name","Rule Type","Rule Description",'
    '"Estimated Speedup Type","Estimated Speedup"'
)


def details(*rows: tuple[str, str, str, str, str]) -> str:
    """--page details: (ID, kernel, metric, unit, value), a row each that ends behind its value, or a rule's."""
    lines = [
        f'"{number}","7","python3","host","{kernel}","1","7","(128, 1, 1)","(132, 1, 1)","0","9.0","A section","{name}","{unit}",'
        f'"{value}",' + ("" if name else '"SOLBottleneck","OPT","Low, ""very"" low: 1,234.5","global","50"')
        for number, kernel, name, unit, value in rows
    ]
    return "==PROF== Connected to process 7\n" + "\n".join([HEAD, *lines]) + "\n"


# -- a time -----------------------------------------------------------------------------------------------------------


def test_a_time_at_its_clock_is_cycles_beside_the_prediction_at_that_clock():
    run, notes = own_run.of_time(SMALL, 16e-6, 1.5e9)
    assert (run.cycles, run.sm_clock_hz, run.origin, notes) == (24_000, 1.5e9, "measured", [])
    found = own_run.beside_prediction(SMALL, run)
    assert found.comparison.predicted.cycles == predict(SMALL.workload, "fa3", "h200", clock_hz=1.5e9).cycles
    gap = 24_000 / found.comparison.predicted.cycles - 1
    assert found.sentence.startswith("Your kernel takes 24,000 cycles (16.0 µs at 1,500 MHz), ")
    assert f"{gap:.1%} more than fa3 is predicted to" in found.sentence
    assert found.expected_hz == predict(SMALL.workload, "fa3", "h200").sm_clock_hz


def test_what_would_take_as_long_is_named():
    slow = replace(SMALL, schedule="warp-specialized", clock_hz=1.5e9)
    wrong = replace(SMALL, device=own_run.change(own_run.load_device("h200"), ["mufu=x0.5"]).device, clock_hz=1.5e9)
    for question, says in ((slow, "the order of 'warp-specialized'"), (wrong, "exponentials at half the rate")):
        cycles = predict(question.workload, question.schedule, question.device, clock_hz=1.5e9).cycles
        found = own_run.beside_prediction(SMALL, own_run.of_time(SMALL, cycles / 1.5e9, 1.5e9)[0])
        assert any(name.startswith(says) and abs(off) < 1e-3 for name, off in found.suspects)


def test_as_predicted_is_said_so_and_what_nothing_explains_too():
    cycles = predict(SMALL.workload, "fa3", "h200", clock_hz=1.5e9).cycles
    same = own_run.beside_prediction(SMALL, own_run.of_time(SMALL, cycles / 1.5e9, 1.5e9)[0])
    assert same.sentence.endswith("as predicted, within what the model can tell.")
    far = own_run.beside_prediction(SMALL, own_run.of_time(SMALL, 1e-3, 1.5e9)[0])
    assert far.sentence.endswith("counters would (--ncu).")
    assert " times as many as fa3 " in far.sentence and f"was it on {SMALL.workload}?" in far.sentence
    fast = own_run.beside_prediction(LARGE, own_run.of_time(LARGE, 512e-6, 1.7e9)[0])
    assert "fewer than any kernel needs for 4 x 16 x 4096" in fast.sentence and "1,016,801" in fast.sentence


def test_without_a_clock_the_predicted_one_is_taken_and_said():
    run, notes = own_run.of_time(SMALL, 20e-6, None)
    assert run.sm_clock_hz == predict(SMALL.workload, "fa3", "h200").sm_clock_hz and "no clock was given" in notes[0]


# -- Nsight Compute ---------------------------------------------------------------------------------------------------


def test_the_recorded_report_of_other_programs_kernels_is_read():
    run, notes = own_run.of_report(LARGE, RECORDED, "_forward")
    assert (run.cycles, run.traffic.total("hbm_read")) == (1_689_661, 201_410_816)
    assert "the middle one by cycles of its 2 launches" in notes[-1]
    found = own_run.beside_prediction(LARGE, run, notes)
    assert found.suspects == () and "busy cycles per SM" in found.sentence
    with pytest.raises(UsageError, match="several kernels 'flash_fwd'"):
        own_run.of_report(LARGE, RECORDED, "flash_fwd")
    with pytest.raises(UsageError, match="has no kernel 'mine'"):
        own_run.of_report(LARGE, RECORDED, "mine")
    _, notes = own_run.of_report(LARGE, RECORDED)
    assert "the longest of" in notes[0]


def test_the_page_of_details_is_read_and_what_it_lacks_is_said(tmp_path):
    path = tmp_path / "report.csv"
    path.write_text(details(
        ("0", "mine(int)", "Elapsed Cycles", "cycle", "1,234,567"),
        ("0", "mine(int)", "Duration", "us", "800.50"),
        ("0", "mine(int)", "SM Active Cycles", "cycle", "1,111,110.3"),
        ("0", "mine(int)", "L2 Hit Rate", "%", "88.1"),
        ("0", "mine(int)", "Issue Slots Busy", "%", "50"),
        ("0", "mine(int)", "Issued Ipc Active", "inst/cycle", "2"),
        ("0", "mine(int)", "Cluster Scheduling Policy", "", "PolicySpread"),
        ("0", "mine(int)", "Memory Throughput", "Tbyte/s", "1.2"),
        ("0", "mine(int)", "dram__bytes_read.sum", "Mbyte", "201.5"),
        ("0", "mine(int)", "", "", ""),
    ))  # fmt: skip
    run, notes = own_run.of_report(LARGE, path)
    assert (run.cycles, run.traffic.total("hbm_read")) == (1_234_567, 201_500_000)
    assert run.measurement.time_s == pytest.approx(800.5e-6) and run.sm_clock_hz == pytest.approx(1_234_567 / 800.5e-6)
    assert run.measurement.counters[nsight.L2_HIT_RATE] == 88.1 and run.activity.tensor is None
    assert run.measurement.counters[nsight.ISSUE] == pytest.approx(45)  # half of the cycles with work, which are nine tenths
    assert notes[-1].startswith("not in the report, so not compared: dram__bytes_write.sum")


FOREIGN = [RECORDED.parent / f"ncu_{page}_h200.csv" for page in ("details", "details_plain", "raw")]
"""`--set full` of cuDNN's and FlashAttention-2's attention and a matrix product, as ncu 2025.3 exports it: each page, with and
without separators between thousands; rows and columns cut out."""


@pytest.mark.parametrize("path", FOREIGN, ids=lambda path: path.stem)
def test_a_report_of_another_programs_kernels_says_the_same_on_either_page(path):
    causal = replace(LARGE, workload=replace(LARGE.workload, causal=True, dtype="bf16"))
    run, notes = own_run.of_report(causal, path, "fprop")
    assert run.measurement.time_s == pytest.approx(478.59e-6, abs=1e-8) and abs(run.cycles - 832_895) < 6_000
    assert run.measurement.counters[nsight.ISSUE] == pytest.approx(37.5, abs=0.3)
    assert run.measurement.counters[nsight.L2_HIT_RATE] == pytest.approx(84.8, abs=0.01)
    said = own_run.beside_prediction(causal, run, notes).sentence
    has_tensor = run.activity.tensor is not None
    assert has_tensor == ("raw" in path.stem) and ("busy cycles per SM" in said) == has_tensor
    assert has_tensor or ("tensor cores nothing says where they go" in said and "--page raw" in said)


def test_a_summary_has_no_launches():
    with pytest.raises(UsageError, match="without --print-summary"):
        own_run.of_report(LARGE, RECORDED.parent / "ncu_summary_h200.csv")


def test_cycles_alone_take_the_predicted_clock(tmp_path):
    path = tmp_path / "report.csv"
    path.write_text(details(("0", "mine", "Elapsed Cycles", "cycle", "30,000")))
    run, notes = own_run.of_report(SMALL, path)
    assert run.cycles == 30_000 and "has no duration: the predicted clock is taken" in notes[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "wrote no table"),
        ("==ERROR== no permission\n", "no permission"),
        (HEAD + "\n", "holds no kernel"),
        (details(("0", "mine", "Achieved Occupancy", "%", "50")), "neither cycles nor a time"),
        (details(("0", "mine", "Duration", "furlong", "50")), "its unit is 'furlong', expected second"),
        (details(("0", "mine", "Elapsed Cycles", "cycle", "1.234.567"), ("0", "mine", "Duration", "us", "1.5")), "is no figure"),
        (details(("0", "mine", "Elapsed Cycles", "cycle", "5"), ("0", "mine", "Duration", "s", "5")), "is no clock"),
        (HEAD.replace('"Metric Value"', '"Average"') + "\n", "without --print-summary"),
        (details(("0", "mine", "Duration", "us", "5")).replace(',"us","5",', ',"us"'), "cut short"),
        ('"ID","Metric Name"\n', "no column 'Kernel Name'"),
    ],
)
def test_a_report_that_says_too_little_is_a_sentence(tmp_path, text, says):
    path = tmp_path / "report.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match="^[^\n]+$") as found:
        own_run.of_report(SMALL, path)
    assert says in str(found.value)


# -- the command ------------------------------------------------------------------------------------------------------

TINY = ("--batch", "1", "--heads", "1", "--seqlen", "256", "--device", "h200")


def test_the_command_says_it_first(fasim):
    status, out, _ = fasim("compare", "--time-us", "20", "--clock", "1500", "--schedule", "pingpong", *TINY)
    assert status == 0 and out.startswith("Your kernel takes 30,000 cycles (20.0 µs at 1,500 MHz), ")
    assert "one thing gone wrong" in out and "the model expects" in out and "missing" in out
    found = json.loads(fasim("compare", "--time-us", "20", "--clock", "1500", *TINY, "--json")[1])
    assert found["comparison"]["schedule"] == "fa3" and found["sentence"] and found["suspects"]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("--time-us", "20", "--ncu", "x.csv"), "give it alone"),
        (("--time-us", "20", "--kernel", "mine"), "give --ncu"),
        (("--time-us", "0"), "microseconds above zero"),
        (("--time-us", "20", "--clock", "99999"), "is not possible on h200"),
        (("--time-us", "20", "--clock", "nan"), "is not possible on h200"),
        (("--ncu", "nowhere.csv"), "does not exist"),
        (("--ncu", "mine.ncu-rep"), "ncu --import mine.ncu-rep --page raw --csv"),
        (("--time-us", "20", "--markdown"), "compared without --ncu"),
        (("--clock", "1500"), "give --ncu or --time-us"),
        ((), "give --ncu or --time-us"),
        (("--time-us", "20", "--schedule", "fa33"), "did you mean 'fa3'"),
    ],
)
def test_what_is_not_possible_is_a_sentence(fasim, asked, says):
    status, out, err = fasim("compare", *asked, *TINY)
    assert (status, out) == (2, "") and says in err and err.count("\n") == 1
