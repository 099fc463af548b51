"""The H200's device file is made from the recordings, by formulas that anyone can run again."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import pytest

import fasim.simulator
import fasim.traces
from fasim.kernels.calibrate import device_file, profiler, recorder
from fasim.simulator.devices.device import load_device
from fasim.simulator.errors import UsageError
from fasim.simulator.reading import read_json

RECORDED = Path(fasim.traces.__file__).parent / "recorded" / "calibration"
H200 = Path(fasim.simulator.__file__).parent / "devices" / "h200.toml"


@pytest.fixture(scope="module")
def fields():
    return device_file.derive(device_file.read(RECORDED))


def test_the_h200s_calibrated_fields_are_what_the_recordings_give(fields):
    """`fasim calibrate --recorded traces/recorded/calibration --write simulator/devices/h200.toml` changes nothing."""
    text = H200.read_text(encoding="utf-8")
    assert device_file.update(text, fields) == text


def test_every_field_that_names_a_recording_has_a_formula(fields):
    device = load_device("h200")
    naming = {name for name, (_, source) in device.sources.items() if device_file.PLACE in source}
    assert naming == {each.field for each in fields}


def test_a_launch_is_as_long_as_all_but_empty_kernels_are_beside_other_peoples_calls():
    """Where a call of FlashAttention-3 has a kernel of one CTA that writes one integer before its own, within a twentieth."""
    taken = []
    for path in (RECORDED.parent / "peers").glob("*.run.json"):
        kernels = read_json(path, "run")["run"]["measurement"]["kernels"] or ()
        taken += [cycles for name, cycles in kernels if "FillFunctor<int>" in name]
    assert len(taken) >= 26
    assert statistics.median(taken) == pytest.approx(load_device("h200").kernel_launch_cycles, rel=0.05)


def test_every_source_says_recording_device_date_and_how(fields):
    for each in fields:
        (derivation,) = (d for d in device_file.DERIVATIONS if d.field == each.field)
        assert all(f"{device_file.PLACE}/{name}.json" in each.source for name in derivation.recordings)
        assert ", H200, 2026-" in each.source and len(each.source.split(": ", 1)[1]) > 10


def test_every_recording_belongs_to_a_microbenchmark():
    assert {path.stem for path in RECORDED.glob("*.json")} == set(recorder.BENCHMARKS)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_correlation_that_does_not_exist_is_recorded_as_null(tmp_path):
    np = pytest.importorskip("numpy")
    from fasim.kernels.calibrate import harness, pace

    steady = np.tile(100 * np.arange(512), (4, 2, 1))  # every SM the same: nothing varies
    found = pace.drift(lambda *_, **__: steady, "plain", 64, False)
    assert np.isnan(found["correlation_of_the_two_halves"])
    path = tmp_path / "pace.json"
    path.write_text(harness.as_json({"drift": found, "rows": np.array([[1.0, np.inf]]), "pair": (np.float32("nan"), np.int64(2))}))
    record = read_json(path, "recording")
    assert record["drift"]["correlation_of_the_two_halves"] is None
    assert record["drift"]["cycles_per_block"] == found["cycles_per_block"]
    assert record["rows"] == [[1.0, None]] and record["pair"] == [None, 2]


def test_a_recording_changed_changes_its_field_and_no_other(tmp_path, fields):
    folder = tmp_path / "recorded"
    shutil.copytree(RECORDED, folder)
    path = folder / "launch.json"
    record = json.loads(path.read_text())
    record["results"]["cta_succession"]["cta_stamps_200kb"]["gap_cycles"]["median"] = 1000.0
    path.write_text(json.dumps(record))
    changed = {each.field: each.value for each in device_file.derive(device_file.read(folder))}
    before = {each.field: each.value for each in fields}
    assert changed.pop("cta_launch_cycles") == 1000
    del before["cta_launch_cycles"]
    assert changed == before


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda path: path.unlink(), "pipes.json is missing"),
        (lambda path: path.write_text("{"), "is damaged or cut short"),
        (lambda path: path.write_text('{"schema": "other/1"}'), "not a calibration recording"),
        (
            lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"results": {}})),
            "fma_cycles cannot be derived from pipes",
        ),
    ],
)
def test_a_broken_recording_is_refused_in_one_sentence(tmp_path, damage, match):
    folder = tmp_path / "recorded"
    shutil.copytree(RECORDED, folder)
    damage(folder / "pipes.json")
    with pytest.raises(UsageError, match=match) as caught:
        device_file.derive(device_file.read(folder))
    assert "\n" not in str(caught.value)


def test_a_new_device_file_starts_from_a_built_in_one(fasim, tmp_path):
    path = tmp_path / "mine.toml"
    status, _, err = fasim("calibrate", "--recorded", str(RECORDED), "--write", str(path))
    assert status == 0 and "mine.toml" in err
    mine, h200 = load_device(str(path)), load_device("h200")
    assert mine.name == "mine" and mine.wgmma_issue_cycles == h200.wgmma_issue_cycles
    status, _, _ = fasim("calibrate", "--recorded", str(RECORDED), "--write", str(path))  # a second time: updated in place
    assert status == 0 and load_device(str(path)) == mine


def test_the_command_shows_value_and_source_of_every_field(fasim, fields):
    status, out, _ = fasim("calibrate", "--recorded", str(RECORDED), "--json")
    assert status == 0
    assert json.loads(out) == [dict(vars(each)) for each in fields]
    _, table, _ = fasim("calibrate", "--recorded", str(RECORDED))
    assert all(each.field in table for each in fields)


@pytest.mark.parametrize(
    "tokens",
    [
        (),
        ("--out", "x", "--recorded", "y"),
        ("--recorded", "nowhere"),
        ("--recorded", str(RECORDED), "--write", "no/such/f.toml"),
        ("--recorded", str(RECORDED), "--write", "new.toml", "--base", "h300"),
    ],
)
def test_bad_options_are_one_sentence(fasim, tmp_path, monkeypatch, tokens):
    monkeypatch.chdir(tmp_path)
    status, out, err = fasim("calibrate", *tokens)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_device_file_is_left_alone(fasim, tmp_path):
    path = tmp_path / "notes.toml"
    path.write_text("hello = 1\n")
    status, _, err = fasim("calibrate", "--recorded", str(RECORDED), "--write", str(path))
    assert status == 2 and "does not give hbm_efficiency" in err
    assert path.read_text() == "hello = 1\n"


def test_without_a_gpu_recording_exits_3_and_leaves_nothing(fasim, tmp_path):
    try:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
    except ImportError:
        pass
    out = tmp_path / "recordings"
    status, printed, err = fasim("calibrate", "--out", str(out))
    assert (status, printed, err.count("\n")) == (3, "", 1) and not out.exists()


def test_help_teaches(fasim):
    _, out, _ = fasim("calibrate", "--help")
    assert "Example: fasim calibrate" in out and "Theory:" in out


def test_a_profiled_benchmark_hands_over_its_launches_in_base_units(tmp_path, monkeypatch):
    tool = tmp_path / "ncu"
    tool.write_text("#!/bin/sh\nenv | grep ^FASIM_CHILD >&2\necho '==PROF== noise'\n"
                    "printf '%s\\n' '\"ID\",\"Kernel Name\",\"bytes\",\"sectors\"' '\"\",\"\",\"Kbyte\",\"sector\"' "
                    "'\"0\",\"k\",\"1,024.5\",\"7\"' '\"1\",\"k\",\"2\",\"8\"'\n")  # fmt: skip
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    seen = profiler.counters("some.module", "FASIM_CHILD", "kernel", ["bytes", "sectors"])
    assert seen == [{"bytes": 1_024_500.0, "sectors": 7.0}, {"bytes": 2_000.0, "sectors": 8.0}]


def test_a_kernel_keeps_the_shared_memory_that_it_was_allowed_for_when_another_launch_asks_for_less():
    from types import SimpleNamespace

    from fasim.kernels.calibrate import harness

    allowed = []
    driver = SimpleNamespace(
        CUfunction_attribute=SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared"),
        cuModuleGetFunction=lambda handle, name: (0, name),
        cuFuncSetAttribute=lambda function, attribute, value: (allowed.append(value) or 0,),
    )
    module = harness.Module.__new__(harness.Module)
    module.driver, module.handle, module.functions = driver, None, {}
    for size in (98304, 119808, 98304, 0, 119808):
        assert module.function("walk_3", size) == b"walk_3" and allowed[-1] >= size
    assert allowed == [98304, 119808]
