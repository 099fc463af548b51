"""The table of the forward beside its peers: which kernels a row has, what its ratios say, and how a record is kept."""

from __future__ import annotations

import json
import time

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from fasim.kernels.cuda import config  # noqa: E402
from fasim.kernels.measure import beside_forward, record  # noqa: E402
from fasim.simulator.problem.workload import Workload  # noqa: E402


def test_a_row_has_auto_all_of_ours_for_its_shape_and_the_peers_that_are_asked_for():
    short, long = (Workload(1, 32, length, 64, "bf16") for length in (1024, 8192))
    calls, refused = beside_forward.calls_of(short, None, ())
    assert {"auto", "pairs-overlap-2stage", *config.SCHEDULES} <= calls.keys()
    assert calls.keys() | refused.keys() >= set(beside_forward.OTHERS)
    calls, _ = beside_forward.calls_of(long, None, ())
    assert "pairs-overlap-2stage" not in calls and config.SCHEDULES[0] in calls
    assert list(beside_forward.calls_of(long, ("fa3", "auto"), ())[0]) == ["auto", "fa3"]
    assert {each.head_dim for each in beside_forward.configs((64,))} == {64}


def test_ratios_are_to_the_best_peer_and_to_our_fastest_and_means_are_geometric():
    def row(head_dim, **us):
        return {"head_dim": head_dim, "us": {name.replace("_", ":"): each for name, each in us.items()}}

    first = row(64, auto=10.0, fa3=8.0, peer_fa3=12.0, peer_cudnn=11.0)
    assert beside_forward.ratios(first) == (1.1, 1.25)
    second = row(64, auto=10.0, peer_fa3=4.0)
    found = beside_forward.means([first, second, row(128, auto=1.0, peer_fa4=2.0)])
    assert found == pytest.approx({64: (1.1 * 0.4) ** 0.5, 128: 2.0})


def test_a_record_keeps_each_row_as_it_comes_and_says_what_it_did_not_reach(tmp_path, capsys, monkeypatch):
    path, seen = tmp_path / "new" / "times.json", []
    monkeypatch.setattr(record, "STARTED", time.monotonic())

    def row_of(name, size):
        if seen:
            assert len(json.loads(path.read_text())["rows"]) == len(seen)
        seen.append(name)
        if name == "b":
            monkeypatch.setattr(record, "STARTED", time.monotonic() - 100)
        return {"name": name, "size": size}

    record.keep({"rows": [], "not_reached": []}, path, [("a", 1), ("b", 2), ("c", 3)], row_of, lambda row: row["name"], 50.0)
    kept = json.loads(path.read_text())
    assert kept["rows"] == [{"name": "a", "size": 1}, {"name": "b", "size": 2}] and kept["not_reached"] == [["c", 3]]
    assert kept["seconds"] >= 100 and capsys.readouterr().out == "a\nb\n"
