"""A sweep on the workers of a Dask scheduler: the same rows, each once, whoever is lost."""

from __future__ import annotations

import os
import signal

import pytest

from fasim.simulator.errors import UsageError
from fasim.traces.answers import cluster, grid
from fasim.traces.answers.sweep import rows

distributed = pytest.importorskip("distributed")

CLOCKS = list(range(1000, 1024))
POINTS = {"batch": 1, "heads": 1, "seqlen": 256, "clock_mhz": CLOCKS, "device": "h200"}


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    """A scheduler and two workers on the loopback, which keep their predictions apart from ours."""
    before = os.environ.get("FASIM_CACHE_DIR")
    os.environ["FASIM_CACHE_DIR"] = str(tmp_path_factory.mktemp("workers"))
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as found:
        yield found
    os.environ.pop("FASIM_CACHE_DIR") if before is None else os.environ.update(FASIM_CACHE_DIR=before)


def test_every_row_once_and_as_here_though_a_worker_is_killed(scheduler):
    points = grid.points(POINTS)
    here = dict(rows(points[:6]))
    with cluster.connected(scheduler.scheduler_address) as elsewhere:
        with distributed.Client(scheduler.scheduler_address) as client:
            victim = next(iter(client.run(os.getpid).values()))
        found = []
        for number, row in rows(points, elsewhere=elsewhere):
            found.append((number, row))
            if len(found) == 8:  # six that are kept here, and two of theirs
                os.kill(victim, signal.SIGKILL)
    assert sorted(number for number, _ in found) == list(range(len(CLOCKS)))
    there = dict(found)
    assert {number: there[number] for number in here} == here
    assert all(row["error"] is None for row in there.values())
    assert [there[number]["sm_clock_mhz"] for number in range(len(CLOCKS))] == CLOCKS
    again = dict(rows(points))  # all of them are kept here now
    assert again == there


def test_the_command_takes_an_address(scheduler, fasim):
    asked = ("sweep", "--batch", "1", "--heads", "1", "--seqlen", "128,192", "--dask", scheduler.scheduler_address)
    status, out, err = fasim(*asked)
    assert status == 0 and out.startswith("From ") and "2 predictions" in out, err
    assert "start" in fasim(*asked, "--workers", "2")[2]


def test_a_worker_with_another_model_is_refused(scheduler, monkeypatch):
    monkeypatch.setattr(cluster, "simulator_hash", lambda: "another")
    with pytest.raises(UsageError, match="another model"), cluster.connected(scheduler.scheduler_address):
        pass
    with pytest.raises(RuntimeError, match="another model"):
        cluster.answer(grid.points({"seqlen": 128})[0].question, "one more")


def test_nobody_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(cluster, "TIMEOUT_S", 0.5)
    for address in ("tcp://127.0.0.1:1", "nonsense://x"):
        with pytest.raises(UsageError, match=r"^no Dask scheduler answers at [^\n]+$"), cluster.connected(address):
            pass
