"""A schedule from the user's file: it works wherever a schedule is named, and every mistake in it is one sentence with its line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fasim.simulator.predict import predict
from fasim.simulator.problem.workload import Workload
from fasim.simulator.schedules import template
from fasim.traces import predictions

SMALL = ("--batch", "1", "--heads", "2", "--seqlen", "1024")
TEMPLATE = Path(template.__file__).read_text(encoding="utf-8")


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Write ./mine.py, by default the template with one line changed."""
    monkeypatch.chdir(tmp_path)

    def write(old: str = "", new: str = "", text: str = TEMPLATE) -> str:
        assert old in text
        Path("mine.py").write_text(text.replace(old, new, 1), encoding="utf-8")
        return "./mine.py:my_schedule"

    return write


def test_a_template_works_at_once_and_overwrites_nothing(fasim, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fasim("schedules", "--new", "mine.py")[0] == 0
    status, out, _ = fasim("predict", "./mine.py:my_schedule", *SMALL, "--json")
    ours = predict(Workload(1, 2, 1024), "warp-specialized")
    assert status == 0 and json.loads(out)[0]["cycles"] == ours.cycles, "it starts out as warp specialisation"
    Path("mine.py").write_text("mine")
    status, _, err = fasim("schedules", "--new", "mine.py")
    assert status == 2 and "left as it is" in err and Path("mine.py").read_text() == "mine"
    assert fasim("schedules", "--new", "mine.txt")[0] == 2


@pytest.mark.parametrize("command", [("timeline",), ("roofline",), ("disasm",)])
def test_it_stands_wherever_a_schedule_is_named(command, fasim, mine):
    shape = SMALL if command != ("disasm",) else ()
    status, out, err = fasim(*command, "--schedule", mine(), *shape)
    assert status == 0 and out and not err


def test_a_changed_file_is_predicted_anew(fasim, mine, monkeypatch, tmp_path):
    monkeypatch.setenv("FASIM_CACHE_DIR", str(tmp_path / "cache"))
    asked = ("predict", mine(), *SMALL, "--json")
    before = json.loads(fasim(*asked)[1])[0]["cycles"]
    mine("            wg.rescale(j)\n", "            wg.rescale(j)\n            wg.normalize()\n")
    assert json.loads(fasim(*asked)[1])[0]["cycles"] > before
    assert predictions._place(predictions.Question(Workload(1, 1, 512), asked[1])) is None


GEMM = '            S = wg.gemm("S", Q[wg], K[j])'
WAIT = "            wg.wait(S)\n"
FREE = "            wg.free(V[j])\n"
DEF = "def my_schedule"
ON_X = '    X = cta.ring("X", 64, 2)\n    cta.producer().tma(X[0])\n    load = '
FOREVER = "            while True:\n                "
MISTAKES = {
    "deadlock": (FREE, "", "deadlock: producer waits to load V", DEF),
    "a later deadlock": (FREE, "            if j < 7:\n    " + FREE, "deadlock.*have not freed V.7.", DEF),
    "leak": ("    load = ", ON_X, "leak: X.0. is loaded and no warp", DEF),
    "race": (WAIT, "", "race.*wait for it first", DEF),
    "unknown verb": ("wg.softmax(j)", "wg.sofmax(j)", "no verb 'sofmax'.*did you mean 'softmax'", "sofmax"),
    "unknown verb of the cta": ("cta.staging", "cta.stagin", "cta has no verb 'stagin'.*did you mean 'staging'", "stagin("),
    "no such ring": ("load.tma(V[j])", "load.tma(W[j])", "'W' is not defined; a ring", "W[j]"),
    "endless recording": (WAIT, FOREVER + "wg.softmax(j)\n", "does not end.*instructions", None),
    "endless loads": (
        "        load.tma(V[j])",
        "        while True:\n            load.tma(V[j])",
        "does not end.*instructions",
        None,
    ),
    "syntax error": ("def my_schedule(cta, tile):", "def my_schedule(cta, tile)", "expected ':'", DEF),
    "indentation": (GEMM, "  " + GEMM, "indent", WAIT),
    "not a function": (DEF, "my_schedule = 3\n\ndef other", "not a plain function but a int", None),
    "no such function": (DEF, "def my_shedule", "no function 'my_schedule'.*did you mean 'my_shedule'", None),
    "wrong signature": ("(cta, tile)", "(cta)", "cannot be called with", DEF),
    "exception inside": ("last = tile", "last = 1 / 0\n    last = tile", "ZeroDivisionError", "1 / 0"),
    "exception on import": (DEF, "raise ValueError('no')\n\ndef my_schedule", "ValueError: no", "raise"),
    "exit": ("last = tile", "raise SystemExit\n    last = tile", "SystemExit", "raise"),
    "generator": ("wg.normalize()", "yield", "a generator", None),
    "no stages": ("tile.k_bytes, tile.stages", "tile.k_bytes, 0", "Error", "load.tma(K[j])"),
    "too large": ("tile.k_bytes, tile.stages", "10**12, 2", "no SM has room", DEF),
    "nothing said": ("    Q = cta.private", "    return\n    Q = cta.private", "no consumers", DEF),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_each_mistake_is_one_sentence_with_its_line(kind, fasim, mine):
    old, new, said, place = MISTAKES[kind]
    status, out, err = fasim("predict", mine(old, new), *SMALL)
    assert status == 2 and not out
    assert err.count("\n") == 1 and re.search(said, err), err
    written = Path("mine.py").read_text(encoding="utf-8")
    line = "" if place is None else f":{written[: written.index(place)].count(chr(10)) + 1}: "
    assert err.startswith(f"fasim: ./mine.py{line}"), err


DEAF = """class Deaf:
    def __del__(self):
        while True: pass

def my_schedule(cta, tile):
    Deaf()
    while True: pass
"""
"""Python ignores what is raised in a finalizer, so the first word to stop is lost."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("where", ["def my_schedule(cta, tile):\n    while True: pass\n", "while True: pass\n", DEAF])
def test_an_endless_loop_is_stopped(where, fasim, mine, monkeypatch):
    monkeypatch.setattr("fasim.simulator.schedules.own.SECONDS", 0.2)
    monkeypatch.setattr("fasim.simulator.schedules.own.SECONDS_A_STEP", 0.0)
    status, out, err = fasim("predict", mine(text=where), *SMALL)
    assert status == 2 and not out and re.match(r"fasim: \./mine\.py:\d: .* does not end", err)


@pytest.mark.parametrize("kind", ["endless recording", "endless loads"])
def test_what_is_recorded_has_an_end_however_long_it_takes(kind, fasim, mine, monkeypatch):
    monkeypatch.setattr("fasim.simulator.schedules.own.SECONDS", 1e9)
    old, new, said, _ = MISTAKES[kind]
    status, _, err = fasim("predict", mine(old, new), *SMALL)
    assert status == 2 and re.search(said, err)


def test_time_is_what_it_works_and_not_what_the_machine_is_busy_with(fasim, mine, monkeypatch):
    monkeypatch.setattr("fasim.simulator.schedules.own.SECONDS", 0.2)
    monkeypatch.setattr("fasim.simulator.schedules.own.SECONDS_A_STEP", 0.0)
    status, _, err = fasim("disasm", mine("last = tile", "import time\n    time.sleep(0.5)\n    last = tile"))
    assert status == 0, err
    monkeypatch.setattr("fasim.simulator.schedules.own.ASLEEP", 1)
    status, _, err = fasim("disasm", mine(text="import time\n\ndef my_schedule(cta, tile):\n    while True: time.sleep(0.01)\n"))
    assert status == 2 and "does not end" in err


def test_what_it_prints_is_no_result(fasim, mine):
    status, out, _ = fasim("predict", mine("last = tile", "print('hello')\n    last = tile"), *SMALL, "--json")
    assert status == 0 and json.loads(out)


def test_a_file_that_is_not_there_is_said(fasim, mine):
    mine()
    wanted = {
        "./nowhere.py:f": "cannot read",
        "./mine.py": "names no function: give one of its functions (my_schedule)",
        "fa9": "your own as",
    }
    for name, said in wanted.items():
        status, _, err = fasim("predict", name, *SMALL)
        assert status == 2 and said in err
