"""Tables keep every name whole, at 60 columns as at 140."""

from __future__ import annotations

import io
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from fasim.cli.tables import house_table
from fasim.simulator.devices.device import DEVICE_NAMES, load_device
from fasim.simulator.schedules import SCHEDULES
from fasim.traces import store

PUBLISHED = ("warp-specialized-published", "pingpong-published", "fa3-published")
TINY = ("--batch", "1", "--heads", "1", "--seqlen", "128")
SAID = {
    ("schedules",): SCHEDULES,
    ("devices",): DEVICE_NAMES,
    ("devices", "h100-sxm"): load_device("h100-sxm").sources,
    ("predict", *PUBLISHED, "overlap-3stage", "fa2", *TINY): (*PUBLISHED, "overlap-3stage", "fa2"),
    ("roofline", *PUBLISHED, *TINY): PUBLISHED,
    ("published", "--figure", "ablation"): PUBLISHED,
    ("doctor",): ("compute-sanitizer", "fasim validate", "compute capability 9.0"),
    ("calibrate", "--recorded", str(store.RECORDED.parent / "calibration")): ("wgmma_beside_cycles", "issue_beside_wgmma_cycles"),
}


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("tokens", SAID, ids=lambda tokens: "-".join(tokens[:3]))
def test_every_name_is_whole(fasim, monkeypatch, tokens, width):
    monkeypatch.setenv("COLUMNS", str(width))
    status, out, err = fasim(*tokens)
    assert status == 0, err
    assert "…" not in out and max(map(len, out.splitlines())) <= width
    assert [name for name in SAID[tokens] if name not in out] == []


def test_every_name_of_the_kernels_is_whole(fasim, monkeypatch):
    pytest.importorskip("cuda.core")
    monkeypatch.setenv("COLUMNS", "60")
    out = fasim("kernels")[1]
    assert "…" not in out and all(name in out for name in ("warp-specialized", "overlap-3stage", "causal", "192x96"))


def test_every_name_of_compared_runs_is_whole(fasim, monkeypatch, tmp_path):
    names = ("warp-specialized-cuda-b16h16s1024d128-fp16-sustained", "torch-cudnn-pytorch-b1h16s512d128-fp16-sustained")
    for name in names:
        shutil.copy((store.PEERS if name.startswith("torch") else store.RECORDED) / f"{name}.run.json", tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    status, out, err = fasim("compare", str(tmp_path))
    assert status == 0, err
    assert "…" not in out and all(name in out for name in ("warp-specialized", "torch-cudnn", names[0]))


@pytest.mark.parametrize("columns", ["1", "20", "0", "-5", "many"])
def test_a_terminal_of_any_width_is_drawn_on(fasim, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    for tokens in (("schedules",), ("devices",), ("predict", "fa2", "fa3", *TINY), ("roofline", *TINY), ("timeline", *TINY)):
        status, out, err = fasim(*tokens)
        assert (status, err) == (0, "") and out


WORD = st.text("abcdefgh-", min_size=1, max_size=25)
CELL = st.lists(WORD, min_size=1, max_size=4).map(" ".join)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(CELL, CELL, CELL, WORD), min_size=1, max_size=4), st.integers(35, 140), st.integers(1, 2))
def test_no_word_is_cut_and_no_number_broken(rows, width, gap):
    screen = Console(width=width, file=io.StringIO())
    table = house_table("name", "what it is", ">figure", ">last", gap=gap)
    for name, prose, figure, last in rows:
        table.add_row(Text(name, "bold"), prose, figure, last)
    screen.print(table)
    lines = screen.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    shown = [word for line in lines for word in line.split()]
    for row in rows:
        for word in " ".join(row).split():
            assert word in shown
