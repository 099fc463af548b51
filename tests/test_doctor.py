"""Doctor: what is found decides what can be done, and whatever is missing comes with its remedy."""

from __future__ import annotations

import json

import pytest

from fasim.kernels import doctor
from fasim.kernels.measure import board, counters
from fasim.kernels.validation import sanitize
from fasim.kernels.validation.check import MissingTool


@pytest.fixture
def bare(monkeypatch):
    """A machine with neither GPU nor tools."""

    def none(*_):
        raise MissingTool("NVML finds no NVIDIA GPU here")

    monkeypatch.setattr(doctor, "Board", none)
    monkeypatch.setattr(counters, "find", lambda: None)
    monkeypatch.setattr(sanitize, "find", lambda: None)
    monkeypatch.setattr(doctor, "_NVIDIA_PARAMETERS", doctor.Path("/nowhere"))


def test_without_a_gpu_it_says_what_is_missing_and_how_to_get_it(fasim, bare):
    status, out, err = fasim("doctor", "--json")
    answer = json.loads(out)
    assert (status, err) == (0, "")
    found = {each["name"]: each for each in answer["findings"]}
    assert not found["NVML"]["present"] and not found["compute-sanitizer"]["present"] and not found["Nsight Compute"]["present"]
    assert all(each["remedy"] for each in answer["findings"] if not each["present"])
    can = {each["command"]: each for each in answer["abilities"]}
    assert can["fasim predict, timeline, roofline, published, compare"]["possible"]
    assert not can["fasim measure"]["possible"]
    assert {"NVML", "Nsight Compute", "access to counters"} <= set(can["fasim measure --counters"]["missing"])


def test_the_table_names_every_remedy(fasim, bare):
    status, out, _ = fasim("doctor")
    assert status == 0
    assert "to get the rest" in out and "nsight-compute" in out and "fasim measure --counters" in out


def test_every_need_is_a_finding():
    names = {finding.name for finding in doctor.examine().findings}
    assert {need for _, needs in doctor.ABILITIES.values() for need in needs} <= names


@pytest.mark.parametrize(
    ("text", "root", "present", "found"),
    [
        ("RmProfilingAdminOnly: 0\n", False, True, "open to every user"),
        ("Other: 3\nRmProfilingAdminOnly: 1\n", True, True, "restricted to root, which this is"),
        ("RmProfilingAdminOnly: 1\n", False, False, "restricted to root"),
        ("Other: 3\n", False, False, "does not say"),
    ],
)
def test_the_right_to_read_counters_is_read_from_the_driver(tmp_path, monkeypatch, text, root, present, found):
    parameters = tmp_path / "params"
    parameters.write_text(text)
    monkeypatch.setattr(doctor, "_is_root", lambda: root)
    finding = doctor._permission(parameters)
    assert (finding.present, found in finding.found) == (present, True)
    assert present or finding.remedy


def test_a_program_that_does_not_start_is_a_finding(tmp_path):
    broken = tmp_path / "ncu"
    broken.write_text("not a program")
    broken.chmod(0o755)
    finding = doctor._program("Nsight Compute", str(broken), r"Version ([\d.]+)", "reinstall")
    assert not finding.present and "does not start" in finding.found


def test_nvml_is_missing_in_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    with pytest.raises(MissingTool, match="nvidia-ml-py"):
        board.Board()
