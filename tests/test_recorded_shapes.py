"""Few queries and packed sequences, counted: runs of the plan and of today's kernels, predicted to what is told."""

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


FEW = {name: run for name, run in RUNS.items() if run.measurement.kernel == "decode"}
PACKED = {name: run for name, run in RUNS.items() if run.workload.lengths}


def errors_of(runs):
    report = compare.compare_all(runs)
    return [{row.quantity.name: row.error for row in each.rows} for each in report.comparisons]


@pytest.fixture(scope="module")
def errors():
    return errors_of(FEW)


def test_they_are_of_the_plan_with_counters_of_the_kernels_that_stand_here():
    plan = pytest.importorskip("fasim.kernels.measure.plan")
    wanted = {(entry.kernel, entry.workload) for entry in plan.read(PLACE / "plan.toml")}
    assert {(run.measurement.kernel, run.workload) for run in RUNS.values()} == wanted and len(wanted) == 19
    assert len(FEW) == 10 and len(PACKED) == 9
    kernel = hashlib.sha256((ROOT / "kernels" / "decode" / "kernel.py").read_bytes()).hexdigest()
    for run in FEW.values():
        taken = run.measurement
        assert taken.counters and taken.sources["kernels/decode/kernel.py"] == kernel and taken.relative_error < 4e-3
        assert run.tile == parts.tile_for(run.workload, 132)
        assert [name for name, _ in taken.kernels] == ["_walk_part", "_combine"][: 1 + (run.tile.parts > 1)]


def test_twelve_more_were_predicted_to_the_readmes_percent_before_anyone_saw_them():
    plan = pytest.importorskip("fasim.kernels.measure.plan")
    runs = store.load_folder(PLACE / "next")
    assert {run.workload for run in runs.values()} == {entry.workload for entry in plan.read(PLACE / "next" / "plan.toml")}
    assert all(run.tile == parts.tile_for(run.workload, 132) for run in runs.values()) and len(runs) == 12
    found = errors_of(runs)
    for name, mean, worst in (("time", 0.045, 0.085), ("HBM read", 0.002, 0.005)):
        assert fmean(abs(each[name]) for each in found) < mean and max(abs(each[name]) for each in found) < worst, name


def test_the_nine_shapes_that_the_kernel_was_tuned_beside_are_counted_too():
    plan = pytest.importorskip("fasim.kernels.measure.plan")
    place = ROOT / "traces" / "recorded" / "decode"
    runs = store.load_folder(place)
    assert {run.workload for run in runs.values()} == {entry.workload for entry in plan.read(place / "plan.toml")}
    assert len(runs) == 9
    kernel = hashlib.sha256((ROOT / "kernels" / "decode" / "kernel.py").read_bytes()).hexdigest()
    for run in runs.values():
        work, taken = run.workload, run.measurement
        assert taken.counters and taken.sources["kernels/decode/kernel.py"] == kernel and run.tile == parts.tile_for(work, 132)
        cache = 4 * work.batch * work.seqlen_k * work.kv_heads * work.head_dim
        assert cache <= 256 << 20 or cache / taken.time_s > 4.1e12
    found = errors_of(runs)
    for name, mean, worst in (("time", 0.04, 0.075), ("HBM read", 0.003, 0.012)):
        assert fmean(abs(each[name]) for each in found) < mean and max(abs(each[name]) for each in found) < worst, name


def test_bytes_from_hbm_are_exact_and_time_is_off_by_what_the_readme_says(errors):
    assert fmean(abs(each["HBM read"]) for each in errors) < 0.002 and max(abs(each["HBM read"]) for each in errors) < 0.005
    assert fmean(abs(each["time"]) for each in errors) < 0.035 and max(abs(each["time"]) for each in errors) < 0.06


def test_what_one_sm_alone_reads_is_looked_up_once_and_a_half(errors):
    """In the half that is asked, and of every second line in the other half, which is its home."""
    for run in FEW.values():
        assert run.traffic.l2_lookup_bytes / run.traffic.total("l2_read") == pytest.approx(1.5, rel=0.002)
    assert max(abs(each["L2 lookups"]) for each in errors) < 0.01


def test_packed_sequences_are_predicted_to_the_readmes_percent():
    found = errors_of(PACKED)
    for name, mean, worst in (("time", 0.018, 0.035), ("HBM read", 0.01, 0.03), ("cycles", 0.03, 0.08)):
        assert fmean(abs(each[name]) for each in found) < mean and max(abs(each[name]) for each in found) < worst, name
