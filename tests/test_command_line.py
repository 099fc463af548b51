"""The command line as such: names nearly right, and outputs that are closed, full or not UTF-8."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import fasim as fasim_package
from fasim.cli.main import BROKEN_PIPE, USAGE, app
from fasim.cli.plain import fall_back
from fasim.traces import store

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
    assert done.communicate(timeout=120)[0].strip() == fasim_package.__version__
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


# -- what the help says ---

ROOT = Path(fasim_package.__file__).parent
COMMANDS = [name for name in app if not name.startswith("-")]
ONLY_PARSED = {
    "kernels": "its example compiles every kernel",
    "validate": "its example is the reader's own kernel",
    "advise": "its example is the reader's own model",
    "tune": "its example predicts a hundred tiles",
}


def example(command: str, help_text: str) -> list[str]:
    """The tokens of the example in a command's help, which is wrapped."""
    found = re.search(r"^Example: fasim (.*?)\n\s*\n", help_text, re.MULTILINE | re.DOTALL)
    tokens = shlex.split(" ".join(found[1].split()))
    assert tokens[0] == command
    return tokens


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_in_the_help_runs(fasim, monkeypatch, tmp_path, command):
    tokens = example(command, fasim(command, "--help")[1])
    if command in ONLY_PARSED:
        app.parse_args(tokens, exit_on_error=False, print_error=False)
        return
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copy(next(iter(sorted(store.RECORDED.glob("fa3-cuda-b16h16s1024d128*.run.json")))), folder)
    for recordings in ("RECORDED", "BLIND", "PEERS"):
        monkeypatch.setattr(store, recordings, folder)
    (tmp_path / "traces").symlink_to(ROOT / "traces")
    monkeypatch.chdir(tmp_path)
    status, _, err = fasim(*tokens)
    assert status == 0 or (status == 3 and command in ("measure", "validate")), err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_eighty_columns(command):
    screen = Console(width=80, file=io.StringIO())
    app.help_print([command], console=screen)
    assert 40 < max(map(len, screen.file.getvalue().splitlines())) <= 80


def test_every_command_line_of_the_readme_parses():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line.removeprefix("$ ").partition(" | ")[0] for line in text.splitlines() if re.match(r"(\$ )?fasim ", line)]
    assert len(lines) > 5
    for line in lines:
        app.parse_args(shlex.split(line)[1:], exit_on_error=False, print_error=False)


# -- one way to say it, one shape to answer ---

TINY = ("--batch", "1", "--heads", "1", "--seqlen", "128")


@pytest.mark.parametrize(
    "tokens",
    [
        ("predict", "pingpong", "fa2", *TINY),
        ("predict", *TINY, "--schedule", "pingpong", "fa2"),
        ("predict", *TINY, "--schedule", "pingpong", "--schedule", "fa2"),
    ],
)
def test_schedules_are_named_first_or_after_the_option(fasim, tokens):
    status, out, err = fasim(*tokens, "--json")
    assert (status, err) == (0, "")
    assert [run["schedule"] for run in json.loads(out)] == ["pingpong", "fa2"]


@pytest.mark.parametrize(("command", "option"), [("disasm", "--schedule"), ("validate", "--kernel"), ("measure", "--kernel")])
def test_what_a_command_is_about_is_its_first_argument_or_its_option(command, option):
    if command != "disasm":
        pytest.importorskip("torch")
    first, named = (
        app.parse_args(tokens, exit_on_error=False, print_error=False)[1].arguments
        for tokens in ([command, "fa3"], [command, option, "fa3"])
    )
    assert first == named and "fa3" in first.values()


def test_json_has_the_same_shape_for_one_and_for_several(fasim):
    one, two = (json.loads(fasim("predict", *names, *TINY, "--json")[1]) for names in (("fa2",), ("fa2", "fa3")))
    assert [run["schedule"] for run in one] == ["fa2"] and one[0] == two[0]
    all_devices = json.loads(fasim("devices", "--json")[1])
    assert json.loads(fasim("devices", "h200", "--json")[1]) == {"h200": all_devices["h200"]}


NO_EFFECT = {
    "the clock of a listing": ("disasm", "fa3", "--clock", "1500"),
    "the batch of a listing": ("disasm", "fa3", "--batch", "3"),
    "a regime beside a clock": ("predict", *TINY, "--clock", "1500", "--regime", "burst"),
    "a workload beside a plan": ("measure", "--plan", "plan.toml", "--out", "runs", "--heads", "3"),
    "the length of a burst": ("measure", "fa3", "--regime", "burst", "--seconds", "3"),
    "a choice of nothing": ("calibrate", "--recorded", "traces/recorded/calibration", "--only", "pipes"),
}


@pytest.mark.parametrize("name", NO_EFFECT)
def test_an_option_without_effect_is_refused(fasim, name):
    status, out, err = fasim(*NO_EFFECT[name])
    assert (status, out) == (USAGE, "") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [("--seqlen", "300"), ("--head-dim", "64"), ("--dtype", "e4m3"), ("--causal", None), ("--tile", "128x64"), ("--kv-blocks", "2"),
     ("--stages", "3"), ("--cluster", "1")],
)  # fmt: skip
def test_every_option_of_a_listing_changes_it(fasim, option, value):
    plain = fasim("disasm", "pingpong-published")[1]
    status, out, err = fasim("disasm", "pingpong-published", option, *([value] if value else []))
    assert status == 0, err
    assert out != plain


def test_an_endless_listing_is_refused(fasim):
    status, out, err = fasim("disasm", "pingpong", "--kv-blocks", "100000000")
    assert (status, out) == (USAGE, "") and "1,000" in err


@pytest.mark.parametrize("tokens", [("predict", "--schedule"), ("predict", "--schedule", "--json"), ("roofline", "--schedule")])
def test_no_schedule_at_all_is_refused(fasim, tokens):
    assert fasim(*tokens)[2] == "fasim: --schedule needs a name, such as fa3\n"


def test_a_shell_can_complete_the_commands():
    script = app.generate_completion(shell="bash")
    assert all(name in script for name in (*COMMANDS, "--seqlen", "--install-completion"))
