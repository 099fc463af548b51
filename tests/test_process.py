"""The process of a command: Ctrl-C ends it whatever holds it, warnings are a line, and odd surroundings change nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fasim
from fasim.cli.main import run as run_command
from fasim.simulator.predict import predict
from fasim.simulator.problem.workload import Workload
from fasim.simulator.replay import chip, engine, traffic

ROOT = str(Path(fasim.__file__).parent.parent)
SMALL = ("predict", "--batch", "1", "--heads", "2", "--seqlen", "256")

STUCK = """
import ctypes, threading
from fasim.cli import process
process.prepare()
libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(lock)
threading.Timer(1, print, ("stuck",), {"flush": True}).start()
libc.pthread_mutex_lock(lock)  # for ever, in C, where no Python handler runs
"""


def test_ctrl_c_ends_what_never_comes_back_from_compiled_code():
    process = subprocess.Popen([sys.executable, "-c", STUCK], env={**os.environ, "PYTHONPATH": ROOT}, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"stuck\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130


@pytest.mark.parametrize(("module", "loop"), [(traffic, "walk"), (engine, "_replay"), (chip, "deal")])
def test_ctrl_c_is_heard_between_two_slices_of_a_jitted_loop(monkeypatch, module, loop):
    """A signal that arrives during the first slice ends the replay before the second."""
    work, calls, inner = Workload(2, 4, 2048), [], getattr(module, loop)
    monkeypatch.setattr(module, "SLICE", 200)

    def counted(*arguments):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return inner(*arguments)

    monkeypatch.setattr(module, loop, counted)
    at = 0
    predict(work, "fa3")
    assert len(calls) > 5, "the loop takes many slices"
    calls, at = [], 2
    with pytest.raises(KeyboardInterrupt):
        predict(Workload(2, 4, 2047), "fa3")  # another one: what was replayed is remembered
    assert len(calls) == 2


def spawned(*tokens: str, cwd: Path | None = None, **changes: str | None) -> subprocess.CompletedProcess:
    env = {name: value for name, value in {**os.environ, "PYTHONPATH": ROOT, **changes}.items() if value is not None}
    return subprocess.run([sys.executable, "-m", "fasim", *tokens], env=env, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "changes",
    [
        {"COLUMNS": "abc", "LINES": "-3"},
        {"COLUMNS": "99999999999"},
        {"COLUMNS": "\u00b2"},
        {"HOME": None, "TMPDIR": "/nowhere", "XDG_CACHE_HOME": "/dev/null"},
        {"FASIM_CACHE_DIR": "/dev/null"},
        {"TERM": "\x1b[31m", "NO_COLOR": ""},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_odd_variables_of_the_environment_change_nothing(changes):
    done = spawned("devices", **changes)
    assert done.returncode == 0 and "h100-sxm" in done.stdout
    assert done.stderr == ""


def test_odd_variables_of_numba_are_a_line_each():
    """Where numba would show a traceback, or refuse to be imported."""
    script = "from fasim.cli import process; process.prepare(); import fasim.simulator.replay.engine"
    odd = {"NUMBA_OPT": "much", "NUMBA_CACHE_LOCATOR_CLASSES": "nosuch.Class", "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, **odd}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and all(line.startswith("fasim: ") for line in lines)
    assert "NUMBA_OPT" in lines[0] and "NUMBA_CACHE_DIR" in lines[1]


def test_a_working_folder_that_has_been_deleted_is_no_matter(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"import os, sys; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); from fasim.cli.main import main; main()"
    env = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", script, *SMALL], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr and done.stderr == ""


@pytest.mark.parametrize(
    "tokens",
    [
        ("predict", "--schedule", "\x1b[31mred"),
        ("predict", "--device", "\x1b]0;title\x07.toml"),
        ("predict", "--tile", "\x9b31m"),
        ("predict", "--dtype", "\u202efp16"),
        ("predict", "--regime", "\x1b[2J"),
        ("predict", "\x1b[2Jx"),
        ("\x1b[2J",),
        ("devices", "\x1b[2J"),
        ("disasm", "\x1b[2J"),
        ("timeline", "--iterations", "\x1b[2J"),
        ("timeline", "--svg", "/\x1b[2J/x.svg", *SMALL[1:]),
        ("compare", "/\x1b[2J.run.json"),
        ("published", "--figure", "\x1b[2J"),
        ("predict", "--batch", "\x1b[2J"),
        ("predict", "--batch", "\udcff"),
        ("compare", "\0"),
        ("compare", "x" * 5000),
    ],
    ids=ascii,
)
def test_nothing_of_the_command_line_is_obeyed_by_the_terminal(capsys, tokens):
    assert run_command(list(tokens)) == 2
    said = "".join(capsys.readouterr())
    assert said.count("\n") <= 2
    assert said.replace("\n", "").isprintable() and "Traceback" not in said


def test_nothing_of_a_device_file_or_a_table_is_obeyed_by_the_terminal(monkeypatch, capsys):
    from rich.table import Table
    from rich.text import Text

    from fasim.cli import output

    table = Table("a\x1b[31mb")
    table.add_row(Text("c\x9b\u202ed"), "e")
    output.stdout(60).print(table)
    output.stdout(60).print("plain \x1b]0;x\x07", markup=False)
    output.emit_text("line\n\x1b[2Jline")
    output.note("note \x1b[2J")
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "\u202e" not in out and "\x9b" not in out and "\x07" not in out
    assert "a?[31mb" in out or "a[31mb" in out


BEGUN_AMID_AN_INTERRUPT = """
import os, signal, sys
from multiprocessing import resource_tracker, util
from fasim.traces import workers

begin = util.spawnv_passfds
begun = []

def interrupted(*of_what):  # Ctrl-C when the child exists and has not been told what it is for
    begun.append(begin(*of_what))
    signal.raise_signal(signal.SIGINT)
    return begun[-1]

if __name__ == "__main__":
    resource_tracker.ensure_running()
    util.spawnv_passfds = interrupted
    try:
        with workers.spawned(1) as pool:
            pool.submit(abs, -1)
    except KeyboardInterrupt:
        print("interrupted")
    try:
        os.waitpid(begun[0], 0)
    except ChildProcessError:
        pass  # it was ended, and has been waited for
"""


def test_an_interrupt_while_a_worker_starts_ends_it_without_a_word(tmp_path):
    path = tmp_path / "begun.py"
    path.write_text(BEGUN_AMID_AN_INTERRUPT, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(path)], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")
