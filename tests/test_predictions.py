"""Predictions kept between calls: the same answer, found again only while all it follows from is the same."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace

import numba
import pytest
from processes import have_ended

from fasim.simulator import compiling
from fasim.simulator import predict as room
from fasim.simulator.devices.device import load_device
from fasim.simulator.problem.tile import Tile
from fasim.simulator.problem.workload import Workload
from fasim.traces import predictions
from fasim.traces.predictions import Question, predict_all, predict_cached

SMALL = Question(Workload(batch=1, heads=1, seqlen=256), schedule="fa2", clock_hz=1.5e9)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "cache_folder", lambda kind: tmp_path / kind)
    return tmp_path / "predictions"


@pytest.fixture
def asked(monkeypatch):
    """The schedules that were simulated, not looked up."""
    found, simulate = [], room.predict

    def counting(workload, **rest):
        found.append(rest.get("schedule", "fa3"))
        return simulate(workload, **rest)

    monkeypatch.setattr(room, "predict", counting)
    return found


def test_the_second_answer_is_the_first_and_costs_no_simulation(folder, asked):
    question = replace(SMALL, why=True)
    first, second = predict_cached(question), predict_cached(question)
    assert asked == ["fa2"]
    whole = room.predict(**question.asked())
    assert first.to_dict() == second.to_dict() == whole.to_dict()
    for name in ("activity", "traffic", "bottleneck", "breakdown", "savings", "warnings", "tile"):
        assert getattr(first, name) == getattr(second, name) == getattr(whole, name)
    assert len(first.spans) == len(second.spans) == 0
    [file] = folder.iterdir()
    assert json.loads(file.read_text(encoding="utf-8"))["run"]["schedule"] == "fa2"


H100 = load_device("h100-sxm")
OTHER = {
    "workload": {"workload": Workload(batch=1, heads=1, seqlen=257)},
    "schedule": {"schedule": "fa1"},
    "device": {"device": "h200"},
    "a device's field": {"device": replace(H100, l2_bytes=H100.l2_bytes + 1)},
    "tile": {"tile": Tile(128, 64, 2, 2, 1)},
    "clock": {"clock_hz": 1.6e9},
    "regime": {"regime": "burst"},
    "why": {"why": True},
}


@pytest.mark.parametrize("name", OTHER)
def test_whatever_a_prediction_follows_from_asks_anew(folder, name):
    assert predictions._place(replace(SMALL, **OTHER[name])) != predictions._place(SMALL)


def test_a_name_and_its_device_are_the_same_question(folder):
    assert predictions._place(replace(SMALL, device=H100)) == predictions._place(SMALL)


def test_a_changed_source_asks_anew(folder, monkeypatch):
    before = predictions._place(SMALL)
    monkeypatch.setattr(predictions, "simulator_hash", lambda: "of other sources")
    assert predictions._place(SMALL) != before


@pytest.mark.parametrize("damage", [b"", b"{", b"\x00\xff", None, "other"])
def test_a_damaged_file_costs_time_and_not_the_answer(folder, asked, damage):
    right = predict_cached(SMALL).to_dict()
    [file] = folder.iterdir()
    if damage is None:
        file.write_bytes(file.read_bytes().replace(b'"cycles": ', b'"cycles": 1'))
    elif damage == "other":
        predict_cached(replace(SMALL, schedule="fa1"))
        [file.write_bytes(each.read_bytes()) for each in folder.iterdir() if each != file]
    else:
        file.write_bytes(damage)
    before = len(asked)
    assert predict_cached(SMALL).to_dict() == right and len(asked) == before + 1
    assert predict_cached(SMALL).to_dict() == right and len(asked) == before + 1


@pytest.mark.parametrize("nowhere", ["a file", "no home"])
def test_a_folder_that_cannot_be_written_costs_time_and_not_the_answer(tmp_path, monkeypatch, asked, nowhere):
    (tmp_path / "file").touch()
    monkeypatch.setattr(predictions, "cache_folder", lambda kind: tmp_path / "file" / kind if nowhere == "a file" else None)
    assert predict_cached(SMALL).to_dict() == predict_cached(SMALL).to_dict()
    assert len(asked) == 2


def test_the_folder_stays_small(folder, monkeypatch):
    monkeypatch.setattr(predictions, "MAX_KEPT", 4)
    run = predict_cached(SMALL)
    for clock in range(20):
        predictions._keep(replace(SMALL, clock_hz=1e9 + clock), run)
    assert len(list(folder.iterdir())) <= 4


def test_other_processes_give_the_same_answers_and_end_when_interrupted(tmp_path, monkeypatch):
    monkeypatch.setenv("FASIM_CACHE_DIR", str(tmp_path))
    before = set(multiprocessing.active_children())
    busy = predictions._in_processes([replace(SMALL, clock_hz=1e9 + 1e6 * n) for n in range(50)], 2)
    for question, run in (next(busy), next(busy)):
        assert run.to_dict() == predict_cached(question).to_dict()
    children = set(multiprocessing.active_children()) - before
    assert children
    with pytest.raises(KeyboardInterrupt):
        busy.throw(KeyboardInterrupt)
    assert have_ended(children)


def test_what_no_other_process_makes_is_made_here(folder, monkeypatch, asked):
    def fails_after_two(missing, _):
        for question in missing[:2]:
            yield question, predict_cached(question)
        raise OSError("no further process")

    monkeypatch.setattr(predictions, "_in_processes", fails_after_two)
    questions = [replace(SMALL, clock_hz=1e9 + 1e6 * n) for n in range(10)]
    heard = []
    found = predict_all(questions, advance=lambda done, total, _: heard.append((done, total)), processes=2)
    assert [found[each].sm_clock_hz for each in questions] == [each.clock_hz for each in questions]
    assert len(asked) == 10 and heard[0] == (0, 10) and heard[-1] == (9, 10)


def test_compiling_is_heard_once_and_running_what_is_compiled_is_not():
    heard = []
    function = numba.njit(lambda x: x + 1)
    for value, times in ((1, 1), (2, 1), (3.0, 2)):
        with compiling.heard(lambda: heard.append("compiles")):
            function(value)
        assert len(heard) == times
