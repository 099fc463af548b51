"""What several tests share: the command line in process, and a small made-up run for everything that only draws."""

from __future__ import annotations

import functools
import itertools
import json
import os
from contextlib import suppress

import numpy as np
import pytest

from fasim.cli.main import run as run_command
from fasim.simulator.problem.tile import Tile
from fasim.simulator.problem.workload import Workload
from fasim.simulator.results.run import SPAN, Activity, Bottleneck, Bytes, Lane, Run, Traffic

LANES = ("producer", "WG0", "WG1", "TMA", "tensor cores", "MUFU", "FMA", "barriers")
LABELS = ("setup", "load K", "load V", "S=QK^T", "softmax", "O+=PV", "take turn", "store O")


def pytest_configure():
    """One thread of torch a process, before torch is there: two workers of two threads on two cores spin seven times as long
    as they work."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def fasim(capsys, monkeypatch):
    """Run one command line in process: (exit status, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "140")

    def call(*tokens: str) -> tuple[int, str, str]:
        status = run_command(list(tokens))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def code_of():
    """A function, a cubin to the machine code of its one kernel, which it disassembles once for all tests of a file."""
    from fasim.kernels.compile import disassemble

    try:
        disassemble.tool("nvdisasm")
    except disassemble.MissingDisassembler as missing:
        pytest.skip(str(missing))

    @functools.cache
    def code(cubin: bytes):
        (kernel,) = disassemble.of_cubin(cubin)
        return kernel

    return code


@pytest.fixture
def pingpong_run() -> Run:
    """Six K/V blocks of two warpgroups that alternate perfectly, 1400 cycles apart; two loads in flight at once."""
    spans = []

    def add(lane: str, label: str, warp: str, step: int, start: int, end: int, wait: int = 0) -> None:
        spans.append((LANES.index(lane), LABELS.index(label), LANES.index(warp), step, 0, wait, start, end))

    for warp in LANES[:3]:
        add(warp, "setup", warp, -1, 0, 400)
    for j in range(6):
        base = 500 + 1400 * j
        for tensor, late in (("K", 0), ("V", 20)):
            add("producer", f"load {tensor}", "producer", j, base + late, base + late + 20)
            add("TMA", f"load {tensor}", "producer", j, base + late, base + late + 600)
        for warp, late in (("WG0", 700), ("WG1", 1400)):
            t = base + late
            for lane in (warp, "tensor cores"):
                add(lane, "S=QK^T", warp, j, t, t + 350)
                add(lane, "O+=PV", warp, j, t + 1050, t + 1400)
            for lane in (warp, "MUFU", "FMA"):
                add(lane, "softmax", warp, j, t + 350, t + 950)
            for lane in (warp, "barriers"):
                add(lane, "take turn", warp, j, t + 950, t + 1050, wait=1)
    add("WG0", "store O", "WG0", -1, 10_500, 10_900)
    workload = Workload(batch=4, heads=16, seqlen=8448, head_dim=128)
    size = workload.tensor_bytes
    by_tensor = {name: Bytes(48 * size[name], 0, 24 * size[name], 0, size[name], 0) for name in ("K", "V")}
    by_tensor |= {"Q": Bytes(size["Q"], 0, size["Q"], 0, size["Q"], 0)}
    by_tensor |= {name: Bytes(0, size[name], 0, size[name], 0, size[name]) for name in ("O", "LSE")}
    cycles, sms = 6_000_000, 132
    return Run(
        origin="predicted",
        workload=workload,
        schedule="pingpong",
        tile=Tile(128, 176, 2, 2, 2),
        device="h100-sxm",
        cycles=cycles,
        sm_clock_hz=1.7e9,
        power_w=650.0,
        activity=Activity(sms, tensor=0.8 * cycles * sms, mufu=0.4 * cycles * sms, issue=0.3 * cycles * sms),
        traffic=Traffic(by_tensor, l2_hit_rate=0.96, smem_bytes=10**11),
        bottleneck=Bottleneck("tensor cores", "they are busy most of the time"),
        lanes=tuple(Lane(name, "warp" if index < 3 else "unit") for index, name in enumerate(LANES)),
        labels=LABELS,
        spans=np.array(spans, SPAN),
    )


@pytest.fixture
def assert_chrome_rules():
    """A function that holds a trace to the Trace Event Format."""
    return _assert_chrome_rules


def _tracks(trace: dict) -> dict[tuple[int, int], list[dict]]:
    found: dict[tuple[int, int], list[dict]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            found.setdefault((event["pid"], event["tid"]), []).append(event)
    return found


def _assert_chrome_rules(trace: dict) -> None:
    """JSON object format: required fields per phase, named and sorted threads, no overlap within a thread."""
    trace = json.loads(json.dumps(trace, allow_nan=False))
    assert isinstance(trace["traceEvents"], list)
    assert trace["displayTimeUnit"] in ("ms", "ns")
    named = {"process_name": set(), "thread_name": set()}
    for event in trace["traceEvents"]:
        assert event["ph"] in ("X", "M", "C", "s", "t", "f")
        assert {"name", "pid", "tid", "ts", "args"} <= event.keys()
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        if event["ph"] == "X":
            assert isinstance(event["cat"], str) and event["name"]
            assert event["ts"] >= 0 and event["dur"] > 0
        elif event["ph"] == "C":
            assert all(isinstance(value, (int, float)) for value in event["args"].values())
        elif event["ph"] in "stf":
            assert event["id"] and event["cat"] == "flow" and (event["ph"] != "f" or event["bp"] == "e")
        elif event["name"] in named:
            assert event["args"]["name"]
            named[event["name"]].add((event["pid"], event["tid"]))
        else:
            assert isinstance(event["args"]["sort_index"], int)
    for (pid, tid), events in _tracks(trace).items():
        assert (pid, tid) in named["thread_name"]
        assert pid in {process for process, _ in named["process_name"]}
        ordered = sorted(events, key=lambda e: e["ts"])
        for before, after in itertools.pairwise(ordered):
            assert before["ts"] + before["dur"] <= after["ts"] + 1e-9, (before, after)


@pytest.fixture(scope="session", autouse=True)
def _predictions_of_this_session_alone(tmp_path_factory):
    """No test finds a prediction that another session made; what one test asks, in whichever process, the others find.

    Compiled kernels stay where they are kept: a cubin follows from its source and from nothing else.
    """
    from fasim.traces.files import cache_folder

    base, cubins = tmp_path_factory.getbasetemp(), cache_folder("cubin")
    kept = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "kept"
    kept.mkdir(exist_ok=True)
    if cubins is not None:
        with suppress(OSError):  # another worker was first, or none can be kept there
            cubins.mkdir(parents=True, exist_ok=True)
            (kept / "cubin").symlink_to(cubins, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASIM_CACHE_DIR", str(kept))
        yield
