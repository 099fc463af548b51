"""Sweeps: every crossing once, as predict would say it; kept while it runs, taken up again, the same from Python."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from fasim import sweep
from fasim.simulator.errors import UsageError
from fasim.simulator.predict import predict
from fasim.simulator.problem.workload import Workload
from fasim.traces import predictions
from fasim.traces.answers import grid
from fasim.traces.answers.journal import Journal
from fasim.traces.answers.sweep import COLUMNS, rows, summary
from fasim.traces.answers.table import Table, read_rows

TINY = {"batch": 1, "heads": 1}
ASKED = ("--batch", "1", "--heads", "1", "--seqlen", "128,256")


def test_lists_and_ranges():
    assert grid.whole_numbers("1,2,4", "--batch") == [1, 2, 4]
    assert grid.whole_numbers("512..4k", "--seqlen") == [512, 1024, 2048, 4096]
    assert grid.whole_numbers("512..2k+512,1m", "--seqlen") == [512, 1024, 1536, 2048, 1 << 20]
    assert grid.whole_numbers("64..5000x4", "--seqlen") == [64, 256, 1024, 4096]
    assert grid.settings(["hbm=x1,x2", "sms=66"]) == ["hbm=x1;sms=66", "hbm=x2;sms=66"]
    for wrong in ("", "many", "4..2", "0..8", "1..8x1", "1..8+0", "1.5", "1..999999999999+1", "-4"):
        with pytest.raises(UsageError, match="^[^\n]+$"):
            grid.whole_numbers(wrong, "--seqlen")
    with pytest.raises(UsageError, match="in a sweep also hbm=x1,x2,x4"):
        grid.settings(["hbm"])


def test_every_row_is_what_predict_says():
    table = sweep(schedule=["fa3", "fa2"], seqlen=[128, 256], device="h200", set=["", "hbm=x2"], causal=True, **TINY)
    assert list(table) == list(COLUMNS) and table.count == 8 == len({*table["content"]})
    row = next(row for row in table.rows if (row["schedule"], row["seqlen_k"], row["set"]) == ("fa2", 256, None))
    run = predict(Workload(1, 1, 256, causal=True), "fa2", "h200")
    assert (row["time_s"], row["cycles"], row["power_w"]) == (run.cycles / run.sm_clock_hz, run.cycles, run.power_w)
    assert row["joules_per_million_tokens"] == pytest.approx(row["energy_j"] / 256 * 1e6)
    assert row["kwh_per_million_tokens"] == pytest.approx(row["joules_per_million_tokens"] / 3.6e6)
    assert (row["tile"], row["batch"], row["error"], row["causal"]) == (str(run.tile), 1, None, True)


def test_a_crossing_that_is_not_possible_has_the_reason_and_stops_nothing():
    table = sweep(tile=["128x128", "128x512", "half"], seqlen=128, kv_heads=[1, 3], **TINY)
    assert [bool(error) for error in table["error"]] == [False, True, True, True, True, True]
    assert "at most 256 wide" in table["error"][1] and "does not divide" in table["error"][3]
    assert table["time_s"][1] is None
    with pytest.raises(UsageError, match="at most 256 wide"):
        sweep(tile="128x512", seqlen=128, **TINY)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"schedules": "fa3"}, "did you mean 'schedule'"),
        ({"schedule": "fa33"}, "did you mean 'fa3'"),
        ({"device": ["h200", "h201"]}, "did you mean 'h200'"),
        ({"set": ["hbmm=x2"]}, "did you mean 'hbm'"),
        ({"regime": "bursts"}, "did you mean 'burst'"),
        ({"direction": "backwards"}, "did you mean 'backward'"),
        ({"batch": []}, "empty list"),
        ({"seqlen": 128, "seqlen_q": 1}, "give it alone"),
        ({"batch": range(1, 2000), "heads": range(1, 2000)}, "more than is possible"),
    ],
)
def test_what_no_row_could_answer_is_said_at_once(asked, says):
    with pytest.raises(UsageError, match="^[^\n]+$") as found:
        sweep(**asked)
    assert says in str(found.value)


def test_tokens_decide_the_batch():
    found = grid.points({"tokens": 1024, "seqlen": [256, 2048]})
    assert [point.question.workload.batch for point in found] == [4, 1]


def test_a_question_asked_twice_is_predicted_once_and_both_rows_have_it(monkeypatch, tmp_path):
    monkeypatch.setattr(predictions, "cache_folder", lambda kind: tmp_path / kind)
    made = []
    monkeypatch.setattr(predictions, "_made", lambda question, real=predictions._made: made.append(question) or real(question))
    points = grid.points({"seqlen": 128, "kv_heads": [None, 1], **TINY})
    found = dict(rows(points))
    assert len(made) == 1 and found[0]["cycles"] == found[1]["cycles"]
    assert dict(rows(points)) == found and len(made) == 1  # found again


@pytest.fixture
def table() -> Table:
    return sweep(seqlen=[128, 256], set=["", "l2=x2"], **TINY)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_file_gives_back_the_rows(tmp_path, table, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"rows{suffix}"
    with Journal(path) as journal:
        for number, row in reversed(list(enumerate(table.rows))):
            journal.add(number, row)
            assert suffix == ".parquet" or len(read_rows(path)) == table.count - number  # there at once
        journal.finish()
    assert [row["content"] for row in read_rows(path)] == table["content"]
    again = Journal(path, resume=True)
    assert [again.known[content] for content in table["content"]] == table.rows


def test_a_line_that_was_cut_short_is_made_again(tmp_path, table):
    for suffix, text in ((".csv", table.to_csv()), (".jsonl", table.to_jsonl())):
        path = tmp_path / f"rows{suffix}"
        path.write_text(text[:-40], encoding="utf-8")
        assert len(Journal(path, resume=True).known) == table.count - 1


def test_rows_of_before_are_taken_and_nothing_else_is(tmp_path, table, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text(table.to_jsonl().split("\n")[0] + "\n", encoding="utf-8")
    monkeypatch.setattr(predictions, "cache_folder", lambda kind: None)
    asked = []
    monkeypatch.setattr(predictions, "tried", lambda question, real=predictions.tried: asked.append(question) or real(question))
    points = grid.points({"seqlen": [128, 256], "set": ["", "l2=x2"], **TINY})
    known = Journal(path, resume=True).known
    assert [row for _, row in sorted(rows(points, known=known))] == table.rows
    assert len(asked) == 3


def test_the_sentence(table):
    said = summary(table)
    assert " are level, within " in said and " of the fastest at all 2 shapes: none leads; the highest rate is " in said
    lengths = sweep(seqlen=[128, 256], **TINY)
    said = summary(lengths)
    assert said.startswith("From ") and "at seqlen 128 to " in said and "2 predictions of fa3" in said
    rivals = [row | {"schedule": name, "time_s": row["time_s"] * by} for row in lengths.rows for name, by in (("a", 1), ("b", 2))]
    two = Table.of(rivals, COLUMNS)
    assert summary(two).startswith("The fastest by more than 2%: a at 2 of 2 shapes; the highest rate is ")
    gaps = (("a", 1), ("b", 1.01), ("far", 3))
    level = Table.of([row | {"schedule": name, "time_s": by} for row in lengths.rows for name, by in gaps], COLUMNS)
    assert summary(level).startswith("a and b are level, within 1.0% of the fastest at all 2 shapes: none leads; ")


# -- the command ----------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_sentence_and_what_varies(fasim):
    status, out, _ = fasim("sweep", "fa3", "fa2", *ASKED)
    first, _, head, *body = out.splitlines()
    assert status == 0 and ("of 2 shapes" in first or "are level" in first)
    assert head.split()[:4] == ["schedule", "seqlen", "time", "TFLOP/s"] and len(body) == 4


def test_devices_are_a_list_or_given_several_times(fasim):
    lists = (("--device", "h200,h100-sxm"), ("--device", "h200", "--device", "h100-sxm"))
    found = [json.loads(fasim("sweep", "--seqlen", "128", "--heads", "1", *asked, "--json")[1]) for asked in lists]
    assert found[0] == found[1] and [row["device"] for row in found[0]] == ["h200", "h100-sxm"]


def test_the_same_rows_as_json_csv_and_file(fasim, tmp_path):
    status, out, _ = fasim("sweep", *ASKED, "--json")
    found = json.loads(out)
    assert status == 0 and [row["seqlen_q"] for row in found] == [128, 256] and list(found[0]) == list(COLUMNS)
    _, out, _ = fasim("sweep", *ASKED, "--csv")
    assert [float(row["time_s"]) for row in csv.DictReader(io.StringIO(out))] == [row["time_s"] for row in found]
    path = tmp_path / "rows.jsonl"
    assert fasim("sweep", *ASKED, "--out", str(path))[0] == 0
    assert [json.loads(line) for line in path.read_text().splitlines()] == found
    assert fasim("sweep", *ASKED, "--out", str(path), "--resume")[0] == 0
    assert [json.loads(line) for line in path.read_text().splitlines()] == found


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("--seqlen", "512", "--seqlen", "1k"), "several are a list, as --seqlen a,b"),
        (("--set", "mufu=x2,hbm=x2"), "give each its own --set"),
        (("--resume",), "give both"),
        (("--csv", "--json"), "give one of them"),
        (("--out", "rows.txt"), "ends in .csv, .jsonl or .parquet"),
        (("--out", "/nowhere/rows.csv"), "cannot write"),
        (("--mask", "diagonal"), "(full, causal)"),
        (("--tokens", "1k", "--batch", "2"), "decides the batch"),
        (("--workers", "0"), "give 1 or more"),
        (("--tile", "128x512"), "at most 256 wide"),
    ],
)
def test_what_is_not_possible_is_a_sentence(fasim, asked, says):
    status, out, err = fasim("sweep", "--seqlen", "128", "--heads", "1", *asked)
    assert (status, out) == (2, "") and says in err and err.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupt_keeps_what_is_done_and_resume_goes_on(tmp_path):
    path = tmp_path / "rows.csv"
    asked = [sys.executable, "-m", "fasim", "sweep", "--batch", "1", "--heads", "1", "--seqlen", "128..8192+64", "--out", str(path)]
    there = os.environ | {"FASIM_CACHE_DIR": str(tmp_path / "kept")}
    process = subprocess.Popen([*asked, "--workers", "1"], env=there, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if path.exists() and path.read_text().count("\n") > 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    kept = read_rows(path)
    assert 3 <= len(kept) < 127
    assert "rows are in" in err and "--resume goes on" in err
    assert {row["content"] for row in kept} <= Journal(path, resume=True).known.keys()
