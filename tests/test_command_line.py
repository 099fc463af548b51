"""The command line as such: names nearly right, and outputs that are closed, full or not UTF-8."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from fasim.cli.main import BROKEN_PIPE, USAGE
from fasim.cli.plain import fall_back

NEARLY = {
    "schedule in capitals": (("predict", "--schedule", "PINGPONG"), "'pingpong'"),
    "schedule cut short": (("disasm", "ping"), "'pingpong' or 'pingpong-published'"),
    "device without its form factor": (("predict", "--device", "h100"), "'h100-sxm' or 'h100-pcie'"),
    "device to list": (("devices", "H200"), "'h200'"),
    "dtype in capitals": (("predict", "--dtype", "BF16"), "'bf16'"),
    "dtype by its family": (("predict", "--dtype", "fp8"), "'e4m3'"),
    "dtype as torch calls it": (("timeline", "--dtype", "float16"), "'fp16'"),
    "regime": (("predict", "--seqlen", "128", "--batch", "1", "--heads", "1", "--regime", "bursts"), "'burst'"),
    "figure": (("published", "--figure", "ablaton"), "'ablation'"),
    "command": (("predcit",), "'predict'"),
    "command in capitals": (("Predict",), "'predict'"),
    "option": (("predict", "--seqlne", "5"), "'--seqlen'"),
    "option with its value": (("predict", "--SEQLEN=5"), "'--seqlen'"),
}


@pytest.mark.parametrize("name", NEARLY)
def test_what_is_nearly_right_is_told_what_is_right(fasim, name):
    tokens, right = NEARLY[name]
    status, out, err = fasim(*tokens)
    assert (status, out) == (USAGE, "")
    assert err.startswith("fasim: ") and err.endswith(f"; did you mean {right}?\n") and err.count("\n") == 1


def test_a_kernel_is_suggested_too(fasim):
    pytest.importorskip("torch")
    status, _, err = fasim("validate", "FA2")
    assert status == USAGE and err.endswith("did you mean 'fa2'?\n")


def test_what_resembles_nothing_is_not_guessed(fasim):
    assert "did you mean" not in fasim("predict", "--schedule", "quixotic")[2]


# -- the process ---


def python(*tokens: str, **rest) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", *tokens], stderr=subprocess.PIPE, text=True, **rest)


def test_python_m_fasim_is_the_command(tmp_path):
    done = python("fasim", "--version", stdout=subprocess.PIPE, cwd=tmp_path)
    import fasim

    assert done.communicate(timeout=120)[0].strip() == fasim.__version__
    assert done.returncode == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("tokens", [("schedules",), ("schedules", "--json"), ("--help",)])
def test_a_full_disk_is_one_sentence(tokens):
    with open("/dev/full", "w") as full:
        process = python("fasim", *tokens, stdout=full)
        _, err = process.communicate(timeout=120)
    assert process.returncode == USAGE
    assert err.startswith("fasim: cannot write to stdout: ") and err.count("\n") == 1


@pytest.mark.parametrize("tokens", [("schedules",), ("schedules", "--json"), ("--help",)])
def test_a_reader_that_leaves_ends_the_command_in_silence(tokens):
    reading, writing = os.pipe()
    os.close(reading)
    process = python("fasim", *tokens, stdout=writing)
    os.close(writing)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (BROKEN_PIPE, "")


@pytest.mark.skipif(os.name != "posix", reason="needs a shell that closes files")
def test_a_closed_stdout_is_one_sentence_and_a_closed_stderr_none():
    command = f"{sys.executable} -m fasim schedules >&-; echo $?; {sys.executable} -m fasim nope 2>&-; echo $?"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["2", "2"]
    assert done.stderr.startswith("fasim: stdout is closed") and done.stderr.count("\n") == 1


def test_a_terminal_that_is_not_utf8_shows_the_nearest_characters_in_the_same_columns():
    text = "█▌·µ×─│┴└╱…é☃"
    for encoding, shown in (("ascii", "##.ux-|++/.e?"), ("latin-1", None), ("utf-8", text)):
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding=encoding)
        fall_back(stream)
        stream.write(text)
        stream.flush()
        written = raw.getvalue().decode(encoding)
        assert len(written) == len(text) and shown in (None, written)


def test_every_character_the_tables_draw_has_an_equal_in_ascii(fasim):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "100"}
    tokens = ("fasim", "predict", "--batch", "1", "--heads", "4", "--seqlen", "1024")
    out, err = python(*tokens, stdout=subprocess.PIPE, env=environment).communicate(timeout=120)
    assert err == "" and "#" in out and "?" not in out and out.isascii()
