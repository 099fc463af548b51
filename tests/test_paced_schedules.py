"""The engine beside the paced loops of the hardware: our schedules with a memory that answers at once, cycles a block."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

import fasim.traces
from fasim.simulator.device import load_device
from fasim.simulator.engine import Memory, replay
from fasim.simulator.predict import default_tile, programs
from fasim.simulator.workload import Workload

RECORDED = Path(fasim.traces.__file__).parent / "recorded" / "calibration" / "pace.json"
PACE = json.loads(RECORDED.read_text())["results"]["alignment"]
ORDER = {"warp-specialized": "plain", "pingpong": "pingpong", "overlap-2stage": "two_stage", "fa3": "both"}
ORDER |= {"overlap-3stage": "three_stage"}
BLOCKS, SETTLED = 96, 40
UNSETTLED = {("warp-specialized", 64)}
"""Three free-running warpgroups fall into step on hardware and stay; the model keeps what they start with."""


def cycles_per_block(schedule: str, head_dim: int) -> float:
    """Of warpgroup 0's blocks from SETTLED on."""
    device = replace(load_device("h200"), l2_hit_latency_cycles=1, tma_latency_cycles=0, tma_issue_cycles=1)
    device = replace(device, l2_bytes_per_cycle_per_sm=1e6)
    workload = Workload(1, 1, 4096, head_dim)
    (program,) = programs(workload, schedule, device, default_tile(workload, schedule, device), BLOCKS)
    run = replay([program], device, Memory(1e7, 1e7, {}, {}), max_spans=200_000)
    lane = next(n for n, lane in enumerate(run.lanes) if lane.name == "WG0")
    spans = run.spans[(run.spans["lane"] == lane) & (run.spans["label"] == run.labels.index("softmax"))]
    ends = {step: spans["end"][spans["step"] == step].max() for step in (SETTLED, BLOCKS - 6)}
    return (ends[BLOCKS - 6] - ends[SETTLED]) / (BLOCKS - 6 - SETTLED)


def error(schedule: str, head_dim: int) -> float:
    """Against all warpgroups started at once, with the barriers of a ring."""
    measured = PACE[f"{ORDER[schedule]}_d{head_dim}_ring"]["0"]["cycles_per_block"]["median"]
    return cycles_per_block(schedule, head_dim) / measured - 1


@pytest.fixture(scope="module")
def errors() -> dict[tuple[str, int], float]:
    return {(schedule, head_dim): error(schedule, head_dim) for schedule in ORDER for head_dim in (64, 128, 256)}


def test_schedules_without_memory_take_the_cycles_of_the_paced_loops(errors):
    assert fmean(map(abs, errors.values())) < 0.045
    assert max(abs(off) for case, off in errors.items() if case not in UNSETTLED) < 0.1


@pytest.mark.xfail(reason="three free-running warpgroups: 2,161 cycles a block on hardware, 1,770 in the model", strict=True)
def test_three_free_running_warpgroups_fall_into_step(errors):
    assert all(abs(errors[case]) < 0.1 for case in UNSETTLED)
