"""`fasim timeline` as a user types it: what it writes, what it refuses, what it says about what it does not show."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

import fasim as package
from fasim.simulator.errors import UsageError

HOME = Path(package.__file__).parent
SMALL = ("--batch", "1", "--heads", "4", "--seqlen", "1024")


def test_a_name_that_ends_in_gz_is_compressed_alike_every_time(fasim, tmp_path, assert_chrome_rules):
    for name in ("a", "b"):
        picture, trace = tmp_path / f"{name}.svgz", tmp_path / f"{name}.json.gz"
        assert fasim("timeline", *SMALL, "--svg", str(picture), "--trace", str(trace))[0] == 0
    assert_chrome_rules(json.loads(gzip.decompress((tmp_path / "a.json.gz").read_bytes())))
    assert gzip.decompress((tmp_path / "a.svgz").read_bytes()).startswith(b"<svg")
    for kind in ("svgz", "json.gz"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


@pytest.mark.parametrize("bad", ["no/such/x", "folder", "picture/x", "device"])
@pytest.mark.parametrize("which", ["--svg", "--trace"])
def test_a_picture_and_a_trace_are_written_both_or_neither(fasim, tmp_path, bad, which):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "device")
    (tmp_path / "picture").write_text("as it was")
    other = "--trace" if which == "--svg" else "--svg"
    status, out, err = fasim("timeline", *SMALL, which, str(tmp_path / bad), other, str(tmp_path / "picture"))
    assert (status, out) == (2, "") and err.startswith("fasim: cannot write") and len(err.splitlines()) == 1
    assert (tmp_path / "picture").read_text() == "as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device", "folder", "picture"]


def test_what_cannot_be_written_at_the_last_moment_leaves_nothing_behind(tmp_path, monkeypatch):
    from fasim.traces import files

    monkeypatch.setattr(files, "check_place", lambda path: None)
    with pytest.raises(UsageError, match="cannot write"):
        files.write_all({tmp_path / "good": b"x", tmp_path / "none" / "bad": b"y"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.svg", "./a.svg", "link"])
def test_a_picture_and_a_trace_in_one_file_are_refused(fasim, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("a.svg")
    status, _, err = fasim("timeline", *SMALL, "--svg", "a.svg", "--trace", name)
    assert status == 2 and "the same file" in err and [path.name for path in tmp_path.iterdir()] == ["link"]


def test_without_iterations_a_short_kernel_is_drawn_as_far_as_it_goes(fasim):
    status, out, err = fasim("timeline", "--seqlen", "128")
    assert status == 0 and "S0" in out and "iterations" not in err


def test_iterations_beyond_the_recording_say_what_is_there(fasim):
    status, _, err = fasim("timeline", *SMALL, "--iterations", "4000-4001")
    assert status == 2 and "it holds 0 to 7" in err
    status, out, err = fasim("timeline", *SMALL, "--iterations", "2-50")
    assert status == 0 and "tensor cores" in out and "it holds 0 to 7" in err


def test_cycles_beyond_the_recording_say_where_it_ends(fasim):
    status, out, err = fasim("timeline", *SMALL, "--cycles", "2000-999999999", "--json")
    assert status == 0 and "were not recorded" in err
    assert max(event["ts"] for event in json.loads(out)["traceEvents"]) < 10**5
    assert "the recording holds 0 to" in fasim("timeline", *SMALL, "--cycles", "900000000-999999999")[2]


@pytest.mark.parametrize("kernel", ["1", "scores", "values"])
def test_every_kernel_of_a_schedule_can_be_drawn(fasim, kernel):
    status, out, err = fasim("timeline", *SMALL, "--schedule", "standard", "--kernel", kernel)
    assert status == 0 and "tensor cores" in out and "3 kernels: 1 scores" in err
    status, out, _ = fasim("timeline", *SMALL, "--schedule", "standard", "--kernel", kernel, "--json")
    assert json.loads(out)["otherData"]["kernel"] == {"1": "scores"}.get(kernel, kernel)


def test_the_readmes_picture_is_what_the_command_prints(fasim):
    text = (HOME / "README.md").read_text(encoding="utf-8")
    command = "fasim timeline pingpong --iterations 1-3"
    picture = text.split(f"$ {command}\n")[1].split("\n```")[0]
    _, out, _ = fasim(*command.split()[1:], "--width", "80")
    assert picture == "\n".join(line.rstrip() for line in out.splitlines()), f"regenerate it: COLUMNS=80 NO_COLOR=1 {command}"


@pytest.mark.parametrize("schedule", ["fa3", "pingpong"])
def test_the_readmes_figures_are_what_the_command_draws(fasim, tmp_path, schedule):
    folder, drawn = HOME / "traces" / "recorded" / "timelines", tmp_path / "drawn.svg"
    recorded = folder / f"{schedule}-cuda-b4h16s4096d128-fp16-burst.run.json.gz"
    assert fasim("compare", "--timeline", str(recorded), "--iterations", "2-4", "--svg", str(drawn))[0] == 0
    assert drawn.read_bytes() == (folder / f"{schedule}.svg").read_bytes(), "regenerate it by the README's command"
