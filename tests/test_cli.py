"""The commands as a user types them."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from fasim.simulator.devices.device import DEVICE_NAMES
from fasim.simulator.devices.doubling import RESOURCES
from fasim.simulator.predict import predict as predict_run
from fasim.simulator.problem.workload import Workload
from fasim.simulator.schedules import BACKWARD, SCHEDULES

SMALL = ("--batch", "1", "--heads", "4", "--seqlen", "1024")
KEYS = (
    "schema origin workload pass schedule tile device cycles sm_clock_hz time_s flops tflops tensor_utilization "
    "mufu_utilization issue_utilization power_w energy_j joules_per_million_tokens kwh_per_million_tokens traffic kernels "
    "breakdown savings bottleneck warnings"
).split()
TRAFFIC_KEYS = (
    "hbm_read_bytes hbm_write_bytes l2_read_bytes l2_write_bytes l2_hit_rate smem_bytes algorithmic_read_bytes "
    "algorithmic_write_bytes by_tensor"
).split()
COMMANDS = ("predict", "timeline", "roofline", "published", "schedules", "devices", "disasm")


def test_predict_json_has_exactly_the_promised_keys(fasim):
    status, out, err = fasim("predict", *SMALL, "--json")
    [answer] = json.loads(out)
    assert (status, err) == (0, "")
    assert list(answer) == KEYS
    assert list(answer["traffic"]) == TRAFFIC_KEYS
    assert answer["schema"] == "fasim.run/1" and answer["origin"] == "predicted" and answer["schedule"] == "fa3"
    assert all(0 <= answer[name] <= 1 for name in KEYS if name.endswith("utilization"))


def test_python_and_the_command_give_the_same_object(fasim):
    run = predict_run(Workload(batch=1, heads=4, seqlen=1024, head_dim=128), schedule="pingpong", device="h200")
    _, out, _ = fasim("predict", *SMALL, "--schedule", "pingpong", "--device", "h200", "--json")
    assert json.loads(out) == [json.loads(json.dumps(run.to_dict()))]


def test_several_schedules_give_one_table_and_one_json_list(fasim):
    names = ("warp-specialized", "pingpong", "fa3")
    tokens = [token for name in names for token in ("--schedule", name)]
    status, out, _ = fasim("predict", *SMALL, *tokens)
    assert status == 0
    for sign, name in zip("ABC", names, strict=True):
        assert any(line.startswith(f"{sign} {name}, tile") for line in out.splitlines())
    _, out, _ = fasim("predict", *SMALL, *tokens, "--json")
    assert [run["schedule"] for run in json.loads(out)] == list(names)


def test_the_default_shows_the_published_figure_beside_the_prediction(fasim):
    status, out, _ = fasim("predict")
    assert status == 0
    assert "661 TFLOP/s" in out and "1830 MHz" in out and "Table 2" in out
    assert "GEMM-softmax overlap without warp specialisation" in out  # no schedule of ours: only a note
    assert "bottleneck" in out


def test_a_published_figure_stands_beside_a_prediction_at_its_own_clock(fasim):
    """`pingpong` at its sustained clock seems 9 % above the paper's bar; at the bar's clock it is far above it."""
    _, out, _ = fasim("predict", "--schedule", "pingpong")
    words = " ".join(out.split())
    _, pinned, _ = fasim("predict", "--schedule", "pingpong", "--clock", "1830", "--json")
    there = json.loads(pinned)
    there = there[0] if isinstance(there, list) else there
    assert "582 TFLOP/s, 4.02 ms at 1830 MHz (arXiv:2407.08608 Table 2)" in words
    assert f"; pingpong is predicted {there['tflops']:.0f} there" in words
    assert "another program, see pingpong-published" in words
    _, out, _ = fasim("predict", "--schedule", "pingpong-published")
    assert "582 TFLOP/s" in out and "another program" not in out


@pytest.mark.parametrize("columns", ["60", "80", "120"])
def test_no_name_is_cut_at_any_width(fasim, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    several = [token for name in ("warp-specialized-published", "standard", "fa2") for token in ("--schedule", name)]
    for asked in (SMALL, (*SMALL, "--why"), (*SMALL, *several, "--why"), ()):
        _, out, _ = fasim("predict", *asked)
        assert "…" not in out
        assert max(map(len, out.splitlines())) <= int(columns)


def test_why_says_what_each_resource_twice_as_fast_would_save(fasim):
    _, out, _ = fasim("predict", *SMALL, "--why")
    assert all(name in out for name in RESOURCES)
    _, out, _ = fasim("predict", *SMALL, "--why", "--json")
    answer = json.loads(out)
    answer = answer[0] if isinstance(answer, list) else answer
    assert [each["resource"] for each in answer["savings"]] == list(RESOURCES)
    assert all(set(each) == {"resource", "changed", "time_s", "saved"} for each in answer["savings"])


def test_a_workload_the_papers_did_not_run_shows_no_published_figure(fasim):
    _, out, _ = fasim("predict", *SMALL)
    assert "published" not in out


def test_the_clock_option_pins_the_clock(fasim):
    _, out, _ = fasim("predict", *SMALL, "--clock", "1200", "--json")
    [answer] = json.loads(out)
    assert answer["sm_clock_hz"] == 1.2e9
    assert answer["time_s"] == pytest.approx(answer["cycles"] / 1.2e9)


def test_tile_stages_and_cluster_reach_the_prediction(fasim):
    _, out, _ = fasim("predict", *SMALL, "--tile", "128x64", "--stages", "3", "--cluster", "1", "--json")
    tile = json.loads(out)[0]["tile"]
    assert (tile["block_m"], tile["block_n"], tile["stages"], tile["cluster"]) == (128, 64, 3, 1)


def test_split_lengths_and_grouped_heads_reach_the_prediction(fasim):
    _, out, _ = fasim(
        "predict", "--batch", "1", "--heads", "8", "--kv-heads", "2", "--seqlen-q", "256", "--seqlen-k", "777", "--json"
    )
    workload = json.loads(out)[0]["workload"]
    assert (workload["kv_heads"], workload["seqlen_q"], workload["seqlen_k"]) == (2, 256, 777)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_every_schedule_predicts_and_disassembles(fasim, schedule):
    assert fasim("predict", *SMALL, "--schedule", schedule)[0] == 0
    status, out, _ = fasim("disasm", schedule, "--kv-blocks", "2")
    assert status == 0 and out.strip()


@pytest.mark.parametrize("schedule", ["pingpong", "fa3", "fa2", "standard"])
def test_timeline_draws_and_writes_a_picture_and_a_trace(fasim, tmp_path, assert_chrome_rules, schedule):
    svg, trace = tmp_path / "run.svg", tmp_path / "run.json"
    status, out, err = fasim(
        "timeline", *SMALL, "--schedule", schedule, "--iterations", "0-2", "--svg", str(svg), "--trace", str(trace)
    )
    assert status == 0, err
    assert "cycles" in out and ("tensor cores" in out) == (schedule != "standard") == ("--kernel" not in err)
    assert svg.read_text(encoding="utf-8").startswith("<svg")
    assert_chrome_rules(json.loads(trace.read_text(encoding="utf-8")))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json", "run.svg"]


def test_timeline_json_is_the_trace_of_the_window(fasim, assert_chrome_rules):
    status, out, _ = fasim("timeline", *SMALL, "--iterations", "1-2", "--json")
    assert status == 0
    assert_chrome_rules(json.loads(out))


def test_timeline_keeps_to_the_width_asked_for(fasim):
    _, out, _ = fasim("timeline", *SMALL, "--width", "90")
    assert all(len(line) <= 90 for line in out.splitlines())


def test_roofline_draws_and_names_what_binds(fasim):
    status, out, _ = fasim("roofline", *SMALL, "--schedule", "standard", "--schedule", "fa3")
    assert status == 0 and "binds" in out and "FLOP per HBM byte" in out
    _, out, _ = fasim("roofline", *SMALL, "--json")
    answer = json.loads(out)
    assert answer["binding"] in ("tensor", "mufu", "hbm", "l2")
    assert all(0 < run["share_of_bound"] <= 1 for run in answer["runs"])


def test_published_prints_bars_errors_and_groups(fasim):
    status, out, _ = fasim("published", "--figure", "ablation")
    assert status == 0 and "661" in out and "570" in out and "%" in out
    _, out, _ = fasim("published", "--figure", "ablation", "--json")
    assert {g["schedule"] for g in json.loads(out)["groups"]} == {
        "fa3-published",
        "pingpong-published",
        "warp-specialized-published",
    }


def test_schedules_and_devices_list_what_there_is(fasim):
    _, out, _ = fasim("schedules")
    assert all(name in out for name in SCHEDULES)
    assert all(name in out for name in BACKWARD)
    listed = json.loads(fasim("schedules", "--json")[1])
    for direction, there in (("forward", SCHEDULES), ("backward", BACKWARD)):
        assert [row["name"] for row in listed if row["pass"] == direction] == list(there)
    assert set(json.loads(fasim("devices", "--json")[1])) == set(DEVICE_NAMES)
    fields = json.loads(fasim("devices", "h200", "--json")[1])["h200"]
    assert all(entry["source"] and entry["unit"] for entry in fields.values())


# -- help and bad input ---


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(fasim, command):
    status, out, err = fasim(command, "--help")
    assert (status, err) == (0, "")
    assert f"Example: fasim {command}" in out
    assert "Theory:" in out


BAD = {
    "unknown schedule": ("predict", "--schedule", "flash"),
    "unknown device": ("predict", "--device", "h300"),
    "head_dim 80": ("predict", "--head-dim", "80"),
    "unknown dtype": ("predict", "--dtype", "fp4"),
    "kv-heads that do not divide": ("predict", "--heads", "16", "--kv-heads", "3"),
    "zero batch": ("predict", "--batch", "0"),
    "negative seqlen": ("predict", "--seqlen", "-5"),
    "zero kv-heads": ("predict", "--kv-heads", "0"),
    "not a number": ("predict", "--batch", "many"),
    "a number missing": ("predict", "--batch"),
    "both seqlen forms": ("predict", "--seqlen", "512", "--seqlen-q", "512"),
    "half a pair of seqlens": ("predict", "--seqlen-q", "512"),
    "tile of another form": ("predict", "--tile", "128"),
    "tile that does not fit": ("predict", "--tile", "128x512"),
    "tile not on the grid": ("predict", "--tile", "128x100"),
    "zero stages": ("predict", "--stages", "0"),
    "odd cluster": ("predict", "--cluster", "3"),
    "zero clock": ("predict", "--clock", "0"),
    "negative clock": ("predict", "--clock", "-1830"),
    "clock not a number": ("predict", "--clock", "nan"),
    "Hopper schedule on an A100": ("predict", "--device", "a100-sxm", "--schedule", "fa3"),
    "device file not there": ("predict", "--device", "./nowhere.toml"),
    "unknown option": ("predict", "--sequence", "5"),
    "unknown command": ("prophesy",),
    "an argument too many": ("predict", "fa3", "pingpong", "more"),
    "unknown figure": ("published", "--figure", "17q"),
    "unknown schedule to disassemble": ("disasm", "flash"),
    "nothing to disassemble": ("disasm",),
    "zero blocks": ("disasm", "fa3", "--kv-blocks", "0"),
    "unknown device to list": ("devices", "h300"),
    "iterations not a range": ("timeline", "--iterations", "a-b"),
    "iterations backwards": ("timeline", "--iterations", "4-1"),
    "iterations beyond the recording": ("timeline", "--iterations", "4000-4001"),
    "cycles and iterations": ("timeline", "--cycles", "10-20", "--iterations", "1-2"),
    "a width without a drawing": ("timeline", "--json", "--width", "90"),
    "iterations of 5,000 digits": ("timeline", "--iterations", "9" * 5000),
    "no such kernel": ("timeline", "--schedule", "standard", "--kernel", "4"),
    "a timeline's options without one": ("compare", "--svg", "x", "--cta", "CTA9", "--iterations", "zz"),
    "a table's options beside a timeline": ("compare", "--timeline", "--markdown"),
    "one file for both of a recorded timeline": ("compare", "--timeline", "--svg", "a", "--trace", "a"),
    "iterations beside JSON": ("compare", "--timeline", "--json", "--iterations", "1-2"),
    "empty cycle window": ("timeline", "--cycles", "0-0"),
    "width zero": ("timeline", "--width", "0"),
    "svg into no folder": ("timeline", "--svg", "./no/such/folder/x.svg"),
    "trace onto a folder": ("timeline", "--trace", "."),
}


def assert_one_sentence(status: int, out: str, err: str) -> None:
    assert status == 2
    assert out == ""
    assert err.startswith("fasim: ") and err.endswith("\n") and err.count("\n") == 1
    assert "Traceback" not in err and len(err.split()) > 3


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_on_stderr_and_exit_2(fasim, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert_one_sentence(*fasim(*BAD[name]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "this is not TOML [",
        'base = "h300"',
        'base = "h200"\nsms = 132',
        'base = "h200"\n[chip]\nsms = {value = "many", unit = "count", source = "a test"}',
        'base = "h200"\n[chip]\nsms = {value = -1, unit = "count", source = "a test"}',
        'base = "h200"\n[chip]\nsms = {value = 100, unit = "count"}',
        'base = "h200"\n[chip]\nflux = {value = 1, unit = "count", source = "a test"}',
        "",
    ],
)
def test_a_broken_device_file_is_one_sentence_that_names_it(fasim, tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    status, out, err = fasim("predict", "--device", str(path))
    assert_one_sentence(status, out, err)
    assert "mine.toml" in err


def test_a_users_own_device_file_is_read(fasim, tmp_path):
    path = tmp_path / "half.toml"
    path.write_text('base = "h200"\n[chip]\nsms = {value = 66, unit = "count", source = "a test"}\n', encoding="utf-8")
    whole = json.loads(fasim("predict", "--device", "h200", "--clock", "1500", "--json")[1])[0]
    half = json.loads(fasim("predict", "--device", str(path), "--clock", "1500", "--json")[1])[0]
    assert half["cycles"] > 1.8 * whole["cycles"]


# -- the process ---


def spawn(*tokens: str, **rest) -> subprocess.Popen:
    command = [sys.executable, "-m", "fasim.cli", *tokens]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **rest)


def test_no_colour_and_no_escape_codes_where_none_are_wanted():
    environment = {**os.environ, "NO_COLOR": "1", "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    for env in (environment, {k: v for k, v in environment.items() if k != "FORCE_COLOR"}):
        out, _ = spawn("timeline", *SMALL, env=env).communicate(timeout=120)
        assert "\x1b[38" not in out and "\x1b[48" not in out
    assert "\x1b" not in out


def test_a_closed_pipe_is_clean():
    process = spawn("timeline", *SMALL, "--json")
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=120)
    assert process.returncode == 141
    assert "Traceback" not in err and "BrokenPipe" not in err


def test_ctrl_c_is_clean_and_leaves_no_file(tmp_path):
    place, kept = tmp_path / "place", tmp_path / "kept"
    place.mkdir()
    process = spawn("published", cwd=place, env=os.environ | {"FASIM_CACHE_DIR": str(kept)})
    deadline = time.monotonic() + 120
    while not list(kept.glob("predictions/*.run.json")) and time.monotonic() < deadline:
        time.sleep(0.1)  # until the first of many predictions is made
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert list(place.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    from fasim.cli import output

    path = tmp_path / "run.json"
    path.write_text("old", encoding="utf-8")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        output.write_file(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_progress_goes_to_stderr_only(capsys):
    from fasim.cli import output

    with output.progress("predicting") as advance:
        advance(1, 2, "fa3")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert isinstance(sys.stderr, io.TextIOBase) or captured.err == ""
