"""What was recorded of our FP8 kernels: every run of the plans, with counters, of the sources that stand here."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import fasim
from fasim.kernels.measure import plan
from fasim.traces import store
from fasim.traces.conformance import conforms

ROOT = Path(fasim.__file__).parent
PLACE = ROOT / "traces" / "recorded" / "fp8"
FOLDERS = {folder.name: folder for folder in (PLACE, PLACE / "blind", PLACE / "later", PLACE / "timelines")}
COUNTED = ("fp8", "blind", "later")


@pytest.fixture(scope="module")
def recorded():
    return {name: list(store.load_folder(folder).values()) for name, folder in FOLDERS.items()}


@pytest.mark.parametrize("name", FOLDERS)
def test_every_run_of_the_plan_is_there_and_no_other(recorded, name):
    wanted = {entry.workload for entry in plan.read(FOLDERS[name] / "plan.toml")}
    assert {run.workload for run in recorded[name]} == wanted and len(recorded[name]) == len(wanted)
    assert {(run.schedule, run.workload.dtype, run.measurement.implementation) for run in recorded[name]} == {
        ("fa3", "e4m3", "cuda")
    }


@pytest.mark.parametrize("name", FOLDERS)
def test_they_are_of_the_sources_that_stand_here_on_the_tile_of_the_kernel(recorded, name):
    from fasim.kernels.measure.names import tile_of

    for run in recorded[name]:
        assert run.tile == tile_of("fa3", run.workload)
        sources = run.measurement.sources
        assert "kernels/cuda/fp8/softmax_fp8.cuh" in sources
        for path, digest in sources.items():
            assert hashlib.sha256((ROOT / path).read_bytes()).hexdigest() == digest, path


@pytest.mark.parametrize("name", COUNTED)
def test_counters_stand_beside_time_and_the_output_was_right(recorded, name):
    for run in recorded[name]:
        assert not run.warnings and run.measurement.counters and run.activity.tensor and run.activity.mufu
        assert run.measurement.relative_error < 0.04 and run.traffic.by_tensor["all"].hbm_read


def test_the_timelines_are_in_the_schedules_order(recorded):
    """K is handed back before it is loaded anew; V's readers, the warps that transpose it, leave no stamps."""
    for run in recorded["timelines"]:
        found = conforms(run)
        assert found.holds and found.frees > 500, found.differences


def test_no_shape_of_the_blind_sets_was_seen_before(recorded):
    seen, blind, later = ({run.workload for run in recorded[name]} for name in COUNTED)
    assert not blind & seen and not later & (seen | blind)
