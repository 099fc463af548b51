"""A run written is the run read back; whatever else lies in a file is refused in one sentence."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fasim.simulator.errors import UsageError
from fasim.simulator.problem.workload import Workload
from fasim.simulator.results.run import Activity, Bottleneck, Bytes, Measurement, Run, Traffic
from fasim.traces import compare, store


@pytest.fixture
def measured_run() -> Run:
    """A kernel of PyTorch whose tile nobody knows, timed without counters."""
    taken = Measurement(
        kernel="torch-cudnn", implementation="pytorch", gpu="NVIDIA H200", driver="580", cuda="13.0", date="2026-11-21",
        regime="sustained", l2="cold", buffers=3, launch="stream", calls=100, time_s=1e-3, time_p10_s=0.9e-3,
        time_p90_s=1.1e-3, kernels=(("flash_fprop", 1_500_000.0), ("fill", None)), packages={"torch": "2.11.0"},
    )  # fmt: skip
    nothing = Bytes(None, None, None, None, None, None)
    return Run(
        origin="measured", workload=Workload(batch=1, heads=2, seqlen=512), schedule="torch-cudnn", tile=None, device="h200",
        cycles=1_500_000, sm_clock_hz=1.5e9, power_w=None, activity=Activity(132, None, None, None, None, None),
        traffic=Traffic({"all": nothing}, None, None), bottleneck=Bottleneck("unknown", "no counters"), measurement=taken,
    )  # fmt: skip


def same(a: Run, b: Run) -> bool:
    return np.array_equal(a.spans, b.spans) and replace(a, spans=b.spans) == b


@pytest.mark.parametrize("suffix", store.SUFFIXES)
@pytest.mark.parametrize("kind", ["pingpong_run", "measured_run"])
def test_a_run_comes_back_as_it_was(request, tmp_path, kind, suffix):
    run = request.getfixturevalue(kind)
    path = tmp_path / f"one{suffix}"
    store.save(run, path)
    assert same(store.load(path), run)
    assert store.load(path).to_dict() == run.to_dict()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_was_not_measured_is_none_in_the_report(measured_run):
    report = json.loads(json.dumps(measured_run.to_dict(), allow_nan=False))
    assert report["tensor_utilization"] is None and report["traffic"]["hbm_read_bytes"] is None and report["tile"] is None
    assert report["energy_j"] is None and report["measurement"]["time_s"] == report["time_s"] == 1e-3


def test_a_folder_gives_its_runs_by_name(tmp_path, pingpong_run, measured_run):
    for run in (pingpong_run, measured_run):
        store.save(run, tmp_path / store.file_name(run))
    (tmp_path / "plan.toml").write_text("not a run")
    assert list(store.load_folder(tmp_path)) == [
        "pingpong-h100-sxm-b4h16s8448d128-fp16",
        "torch-cudnn-pytorch-b1h2s512d128-fp16-sustained",
    ]


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, measured_run, monkeypatch):
    path = tmp_path / "one.run.json"
    store.save(measured_run, path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UsageError, match="No space left"):
        store.save(replace(measured_run, cycles=5), path)
    assert same(store.load(path), measured_run)
    assert [p.name for p in tmp_path.iterdir()] == ["one.run.json"]


def test_a_file_is_written_with_the_mode_any_program_gives_it_and_the_umask_is_left_alone(tmp_path, measured_run, monkeypatch):
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr("os.umask", None)  # it is the whole process's, other threads write meanwhile
            store.save(measured_run, tmp_path / "one.run.json")
    finally:
        os.umask(before)
    assert (tmp_path / "one.run.json").stat().st_mode & 0o777 == 0o640


def refused(path, match: str) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        store.load(path)
    text = str(caught.value)
    assert path.name in text and "\n" not in text and len(text.split()) > 5


def written(run, path) -> dict:
    store.save(run, path)
    return json.loads(path.read_text())


def test_a_missing_file_is_refused(tmp_path):
    refused(tmp_path / "none.run.json", "does not exist")


@pytest.mark.parametrize("suffix", store.SUFFIXES)
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.98])
def test_a_truncated_file_is_refused(tmp_path, pingpong_run, suffix, kept):
    path = tmp_path / f"cut{suffix}"
    store.save(pingpong_run, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    refused(path, "damaged or cut short")


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "other.run.json"
    for text in ('{"schema": "acme.profile/1"}', "[1, 2]", "{}", '{"schema": 7}', '{"schema": "fasim.recorded-run/new"}'):
        path.write_text(text)
        refused(path, "is not a run that fasim recorded")
    path.write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")
    refused(path, "damaged or no text")


def test_what_json_prints_is_told_from_a_recording(tmp_path, pingpong_run):
    path = tmp_path / "printed.run.json"
    path.write_text(json.dumps(pingpong_run.to_dict()))
    refused(path, "report that --json printed")


def test_a_file_of_a_newer_fasim_is_refused(tmp_path, measured_run):
    path = tmp_path / "new.run.json"
    document = written(measured_run, path) | {"schema": f"{store.SCHEMA}/{store.VERSION + 1}"}
    path.write_text(json.dumps(document))
    refused(path, "update fasim")


def test_a_figure_changed_by_hand_is_refused(tmp_path, measured_run):
    path = tmp_path / "edited.run.json"
    document = written(measured_run, path)
    document["run"]["cycles"] -= 1
    path.write_text(json.dumps(document))
    refused(path, "checksum")


def damage(body: dict, *keys: str, value: object) -> dict:
    """`body` with one field replaced, or left out where the value is None."""
    inner = body
    for key in keys[:-1]:
        inner = inner[key]
    if value is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    return body


@pytest.mark.parametrize(
    ("keys", "value", "match"),
    [
        (("cycles",), None, "no 'cycles'"),
        (("cycles",), "many", "run.cycles"),
        (("cycles",), 0, "run.cycles is 0, expected a whole number from 1"),
        (("cycles",), 10**39, "run.cycles is a number of 39 digits"),
        (("sm_clock_hz",), 0, "run.sm_clock_hz"),
        (("activity", "sms"), 0, "run.activity.sms is 0"),
        (("power_w",), -1, "run.power_w"),
        (("traffic", "l2_hit_rate"), 2.0, "l2_hit_rate"),
        (("workload", "causal"), "no", "causal is 'no', expected true or false"),
        (("workload", "batch"), 10**20, "batch"),
        (("workload", "dtype"), ["fp16"], "dtype is? ?=?a list|dtype=a list"),
        (("workload", "extra"), 1, "extra"),
        (("tile", "stages"), 10**9, "stages"),
        (("device",), "/any/path.toml", "run.device is '/any/path.toml', expected a name"),
        (("device",), "mine.toml", "not a path"),
        (("schedule",), "a\x1b[31mb", r"run.schedule has a character .* \(U\+001B\)"),
        (("warnings",), ["a\u202eb"], r"run.warnings .* \(U\+202E\)"),
        (("labels",), "abc", "run.labels is 'abc'"),
        (("spans", "start"), {"a": 1}, "columns"),
        (("spans", "start"), 7, "columns"),
        (("traffic", "by_tensor"), {"K\n": {}}, "U\\+000A"),
        (("sm_clock_hz",), True, "run.sm_clock_hz"),
        (("colour",), "red", "unknown field 'colour'"),
        (("workload", "head_dim"), -1, "head_dim"),
        (("workload",), 3, "workload"),
        (("activity", "sms"), None, "no 'sms'"),
        (("origin",), "guessed", "origin"),
        (("origin",), "measured", "measured"),
        (("spans", "lane"), [0], "of one length"),
        (("labels",), [], "label"),
        (("lanes",), [], "lane"),
        (("traffic", "by_tensor", "K", "hbm_read"), 1.5, "hbm_read"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused(tmp_path, pingpong_run, keys, value, match):
    path = tmp_path / "odd.run.json"
    document = written(pingpong_run, path)
    document["run"] = damage(document["run"], *keys, value=value)
    document["sha256"] = store._checksum(document["run"])
    path.write_text(json.dumps(document))
    refused(path, match)


@pytest.mark.parametrize(
    ("keys", "value", "match"),
    [
        (("measurement", "time_s"), 0, "run.measurement.time_s is 0"),
        (("measurement", "time_s"), -1.0, "run.measurement.time_s is -1.0"),
        (("measurement", "calls"), 0, "run.measurement.calls"),
        (("measurement", "gpu"), "H200\x1b]0;owned\x07", r"run.measurement.gpu has .* \(U\+001B\)"),
        (("measurement", "counters"), {"a": "5"}, r"run.measurement.counters\['a'\] is '5'"),
        (("measurement", "kernels"), [["k", 1, 2]], "run.measurement.kernels"),
        (("device",), "../h200", "not a path"),
    ],
)
def test_a_measurement_that_makes_no_sense_is_refused(tmp_path, measured_run, keys, value, match):
    path = tmp_path / "odd.run.json"
    document = written(measured_run, path)
    document["run"] = damage(document["run"], *keys, value=value)
    document["sha256"] = store._checksum(document["run"])
    path.write_text(json.dumps(document))
    refused(path, match)


def test_a_run_of_a_gpu_that_has_no_model_is_shown_and_not_looked_up(measured_run):
    with pytest.raises(UsageError, match="taken on b200, which has no device model"):
        compare.model_of("one", replace(measured_run, device="b200"))
    assert compare.model_of("one", measured_run) == "h200"
    assert compare.model_of("one", measured_run, "mine.toml") == "mine.toml"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_byte_gets_through(tmp_path, measured_run, data):
    path = tmp_path / f"flip{data.draw(st.sampled_from(store.SUFFIXES))}"
    store.save(measured_run, path)
    good = path.read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    path.write_bytes(good[:place] + bytes([good[place] ^ data.draw(st.integers(1, 255))]) + good[place + 1 :])
    try:
        run = store.load(path)
    except UsageError as error:
        assert "\n" not in str(error)
    else:  # a byte that carries nothing: white space, or gzip's header
        assert same(run, measured_run)


def test_names_that_are_no_run_files_are_refused(tmp_path, measured_run):
    with pytest.raises(UsageError, match=r"\.run\.json"):
        store.save(measured_run, tmp_path / "one.txt")
    with pytest.raises(UsageError, match="does not exist"):
        store.load_folder(tmp_path / "none")
    with pytest.raises(UsageError, match="holds no run"):
        store.load_folder(tmp_path)


def test_compression_is_seen_by_content_not_by_name(tmp_path, measured_run):
    path = tmp_path / "one.run.json"
    store.save(measured_run, path)
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert same(store.load(path), measured_run)
