"""Few queries with counters: the runs are of the plan and of today's kernel, and what the model says of them is as is told."""

from __future__ import annotations

import hashlib
from pathlib import Path
from statistics import fmean

import pytest

import fasim
from fasim.simulator.problem import parts
from fasim.traces import compare, store

ROOT = Path(fasim.__file__).parent
PLACE = ROOT / "traces" / "recorded" / "shapes"
RUNS = store.load_folder(PLACE)


@pytest.fixture(scope="module")
def errors():
    report = compare.compare_all(RUNS)
    return [{row.quantity.name: row.error for row in each.rows} for each in report.comparisons]


def test_they_are_of_the_plan_with_counters_of_the_kernel_that_stands_here():
    plan = pytest.importorskip("fasim.kernels.measure.plan")
    wanted = {entry.workload for entry in plan.read(PLACE / "plan.toml") if entry.kernel == "decode"}
    assert {run.workload for run in RUNS.values()} == wanted and len(RUNS) == len(wanted) == 10
    kernel = hashlib.sha256((ROOT / "kernels" / "decode" / "kernel.py").read_bytes()).hexdigest()
    for run in RUNS.values():
        taken = run.measurement
        assert taken.counters and taken.sources["kernels/decode/kernel.py"] == kernel and taken.relative_error < 4e-3
        assert run.tile == parts.tile_for(run.workload, 132)
        assert [name for name, _ in taken.kernels] == ["_walk_part", "_combine"][: 1 + (run.tile.parts > 1)]


def test_bytes_from_hbm_are_exact_and_time_is_off_by_what_the_readme_says(errors):
    assert fmean(abs(each["HBM read"]) for each in errors) < 0.002 and max(abs(each["HBM read"]) for each in errors) < 0.005
    assert fmean(abs(each["time"]) for each in errors) < 0.07 and max(abs(each["time"]) for each in errors) < 0.18
