"""No command line gives a traceback, a hang or more than 2 GB."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
from fuzz import ODD, command_line, examples
from hypothesis import given
from hypothesis import strategies as st

import fasim
from fasim.simulator.schedules import SCHEDULES

SIZES = ("--batch", "--heads", "--kv-heads", "--seqlen", "--seqlen-q", "--seqlen-k", "--head-dim", "--stages", "--cluster")
WORDS = {
    "--dtype": ("fp16", "bf16", "e4m3"), "--device": ("h200", "a100-sxm"), "--clock": ("1500", "900.5"), "--regime": ("burst",),
    "--tile": ("128x128", "64x64", "128x64"), "--schedule": tuple(SCHEDULES), "--iterations": ("1-2", "0"), "--cycles": ("0-900",),
    "--width": ("60", "90"), "--svg": ("a.svg",), "--trace": ("a.json", "a.json.gz"), "--kv-blocks": ("1", "3"),
}  # fmt: skip
SHARED = ("--dtype", "--device", "--clock", "--regime", "--tile")
FLAGS = ("--json", "--causal", "--nosuch")
DRAWN = ("--iterations", "--cycles", "--width", "--svg", "--trace")
PREDICTING = {"predict": (), "roofline": (), "timeline": DRAWN, "disasm": ("--kv-blocks",)}
OTHERS = {
    "compare": ("--schedule", "--device", "--cta", "--iterations", "--width", "--timeline", "--markdown"),
    "devices": ("--json",),
    "schedules": ("--json",),
    "published": ("--json",),
    "calibrate": ("--base", "--json", "--recorded"),
}
BASE = ("--batch", "1", "--heads", "2", "--seqlen", "300")


@pytest.fixture(autouse=True)
def cheap(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with fuzz.cheap(monkeypatch):
        yield


@st.composite
def predicting(draw) -> list[str]:
    command = draw(st.sampled_from(sorted(PREDICTING)))
    tokens = [command]
    if command == "disasm" or draw(st.booleans()):
        tokens.append(draw(st.one_of(st.sampled_from(tuple(SCHEDULES)), st.sampled_from(tuple(SCHEDULES)), st.sampled_from(ODD))))
    options = draw(st.lists(st.sampled_from((*SIZES, *SHARED, *FLAGS, *PREDICTING[command])), max_size=3, unique=True))
    if not {"--seqlen-q", "--seqlen-k"} & set(options):
        tokens += [token for k in range(0, 6, 2) if BASE[k] not in options for token in BASE[k : k + 2]]
    for option in options:
        tokens.append(option)
        if option not in FLAGS:
            good = st.sampled_from(WORDS[option]) if option in WORDS else st.integers(1, 300).map(str)
            tokens.append(draw(st.one_of(good, good, good, st.sampled_from(ODD))))
    return tokens


@st.composite
def listing(draw) -> list[str]:
    command = draw(st.sampled_from(sorted(OTHERS)))
    plain = command in ("devices", "schedules") and draw(st.booleans())
    tokens = [command] if plain else [command, draw(st.sampled_from(ODD[40:]))]
    for option in draw(st.lists(st.sampled_from(OTHERS[command]), max_size=3, unique=True)):
        tokens += [option] if option in ("--json", "--timeline", "--markdown") else [option, draw(st.sampled_from(ODD))]
    return tokens


@examples(450)
@given(tokens=predicting())
def test_no_prediction_that_is_asked_for_is_more_than_a_sentence(tokens):
    command_line("predictions", tokens)


@examples(250)
@given(tokens=listing())
def test_no_other_command_line_is_more_than_a_sentence(tokens):
    command_line("other command lines", tokens)


def test_the_counts_of_command_lines(capsys):
    fuzz.told(capsys)


# -- the true limits, in a process that may have no more than 2 GB ------------------------------------------------------

CHILD = """
import contextlib, io, resource, sys
from fasim.cli.main import run
run("predict --batch 1 --heads 1 --seqlen 128".split())
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 30),) * 2)
for line in sys.stdin.read().splitlines():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(line.split())
    print("said", status, " ".join(err.getvalue().split()))
"""
HEAVY = {
    "predict fa1 --batch 1 --heads 1 --seqlen 400000": 2,
    "predict --batch 3000000 --heads 64 --seqlen 1": 2,
    "predict --batch 1 --heads 1 --seqlen-q 64 --seqlen-k 100000000": 2,
    "predict --stages 1000000": 2,
    "predict --stages 256": 2,
    "predict --tile 128x16000000000": 2,
    "predict fa2 --tile 16000000000x128": 2,
    "predict fa2 --tile 1024x4096": 2,
    "predict standard --batch 64 --heads 64 --seqlen 8192": 2,
    "disasm pingpong --kv-blocks 100000000": 2,
    "timeline --iterations 1-99999999999999 --batch 1 --heads 1 --seqlen 512": 0,
    "predict --batch 20000 --heads 8 --seqlen 1": 0,
}


def test_the_heaviest_command_lines_stay_within_two_gigabytes():
    env = {**os.environ, "PYTHONPATH": str(Path(fasim.__file__).parent.parent)}
    heavy = "\n".join(HEAVY)
    done = subprocess.run([sys.executable, "-c", CHILD], env=env, input=heavy, capture_output=True, text=True, timeout=1200)
    lines = [line for line in done.stdout.splitlines() if line.startswith("said")]
    assert len(lines) == len(HEAVY), done.stderr
    for said, (line, status) in zip(lines, HEAVY.items(), strict=True):
        assert said.split()[1] == str(status) and "memory for it" not in said, (line, said)
