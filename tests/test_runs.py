"""The recorded runs: of today's kernels, by their hashes, and within the errors that the model is held to."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

import fasim
from fasim.kernels.compile import build
from fasim.kernels.measure.plan import read
from fasim.kernels.measure.renew import found, stale
from fasim.simulator.predict import default_tile
from fasim.simulator.results.run import Run
from fasim.traces import store
from fasim.traces.compare import Report, compare_all

ROOT = Path(fasim.__file__).parent
AIM = {
    "cycles": (0.05, 0.12), "SM clock": (0.03, None), "time": (0.06, None), "HBM read": (0.05, None), "HBM written": (0.08, None),
    "tensor cores": (0.03, None), "MUFU": (0.03, None), "issue slots": (0.03, None),
}  # fmt: skip
"""Mean and worst error over the runs of our kernels that the model is to reach; shares in points."""
REACHED = {
    "cycles": (0.0225, 0.095), "SM clock": (0.023, 0.077), "time": (0.02, 0.1), "HBM read": (0.029, 0.67),
    "HBM written": (0.06, 0.21), "L2 read": (0.0001, 0.001), "L2 hit rate": (0.005, None), "tensor cores": (0.022, None),
    "MUFU": (0.011, None), "issue slots": (0.0175, None),
}  # fmt: skip
"""What it has reached: no change may fall behind it."""


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    return store.load_folder(store.RECORDED)


@pytest.fixture(scope="module")
def report(runs) -> Report:
    """Of every other workload, under all schedules that were recorded; `fasim compare` takes all."""
    workloads = list(dict.fromkeys(run.workload for run in runs.values()))[::2]
    return compare_all({name: run for name, run in runs.items() if run.workload in workloads})


@pytest.fixture(scope="module")
def blind() -> Report:
    return compare_all(store.load_folder(store.BLIND), after=store.names_in(store.BLIND))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.skipif(build.compiler_version() is None, reason="NVRTC is not installed")
@pytest.mark.parametrize("folder", [store.RECORDED, store.BLIND, store.TIMELINES], ids=lambda folder: folder.name)
def test_every_recorded_run_is_of_todays_kernel(folder):
    assert {name: stale(run) for name, run in store.load_folder(folder).items() if stale(run)} == {}


def test_a_run_of_ours_without_its_sources_would_not_go_unnoticed(runs):
    assert all(run.measurement.sources for run in runs.values() if run.measurement.implementation in ("cuda", "triton"))


def test_a_stale_run_is_found(runs):
    run = next(iter(runs.values()))
    path = "kernels/cuda/fa3.cu"
    now = replace(run, measurement=replace(run.measurement, sources={path: _sha256(ROOT / path)}))
    assert stale(now) == []
    changed = replace(run, measurement=replace(run.measurement, sources={path: "0" * 64, "kernels/cuda/gone.cu": "0" * 64}))
    assert stale(changed) == [path, "kernels/cuda/gone.cu"]
    other = replace(now, tile=replace(run.tile, stages=run.tile.stages + 1))
    assert stale(other) == ["tile"]


def test_a_stale_run_is_listed_with_its_folder_to_be_taken_again(tmp_path, runs):
    """A timeline first, since it is short; a run of today's kernel is left alone."""
    (name, fresh), *_ = runs.items()
    (other, drawn), *_ = store.load_folder(store.TIMELINES).items()
    tile = replace(fresh.tile, block_n=fresh.tile.block_n // 2)
    for stem, run in ((f"a-{name}", fresh), (f"b-{name}", replace(fresh, tile=tile)), (f"c-{other}", replace(drawn, tile=tile))):
        store.save(run, tmp_path / f"{stem}.run.json{'.gz' * bool(len(run.spans))}")
    listed = found([tmp_path])
    assert [(folder, len(run.spans) > 0) for folder, run in listed] == [(tmp_path, True), (tmp_path, False)]
    assert all("tile" in stale(run) for _, run in listed)


def test_every_recorded_run_has_its_name_its_counters_and_a_right_output(runs):
    for name, run in runs.items():
        assert store.file_name(run).startswith(name + ".run.json")
        assert run.origin == "measured" and run.measurement.counters and run.warnings == ()
        assert run.measurement.relative_error < 2e-2
        assert run.measurement.clock_from == "SM cycle counters"


def test_the_plan_of_the_recording_covers_what_it_must():
    entries = read(store.RECORDED / "plan.toml")
    workloads = [entry.workload for entry in entries]
    assert len(entries) >= 250
    assert {entry.kernel for entry in entries} == {"warp-specialized", "pingpong", "overlap-2stage", "overlap-3stage", "fa3"}
    assert {w.head_dim for w in workloads} == {64, 128, 256} and {w.causal for w in workloads} == {False, True}
    assert {32768, 65536, 131072} <= {w.seqlen_k for w in workloads} and {w.heads_per_kv for w in workloads} >= {1, 4, 32}


# -- kernels of PyTorch: the bytes of the same tile are the same ---


def test_bytes_that_the_sms_read_from_l2_are_exact_where_the_tile_is_the_kernels():
    """FlashAttention-2 takes our fa2's 128 queries to a tile; at 512 it splits the keys."""
    name = "torch-fa2-pytorch-b1h16s32768d128-fp16-sustained"
    (found,) = compare_all({name: store.load(store.PEERS / f"{name}.run.json")}).comparisons
    assert found.predicted.tile.block_m == 128
    assert abs(found.row("L2 read").error) < 1e-3
    assert abs(found.row("HBM read").error) < 0.03  # past the cliff: 1.6 times the compulsory bytes
    assert found.measured.traffic.total("hbm_read") > 1.4 * found.measured.workload.compulsory_read_bytes


def test_hbm_writes_of_a_kernel_that_writes_o_once_are_those_of_the_l2_model():
    """cuDNN's, beside a schedule of another order: O is written once whatever the order."""
    runs = {name: run for name, run in store.load_folder(store.PEERS).items() if run.schedule == "torch-cudnn"}
    written = [c.row("HBM written") for c in compare_all(runs, schedule="fa3-published").comparisons]
    assert len(written) == 4 and all(abs(row.error) < 0.10 for row in written)


SHORT = 2304
"""Keys up to which the runs of other people's kernels are predicted here; `fasim compare` takes all."""
THEIRS = {"cycles": (0.07, 0.17), "HBM read": (0.06, 0.15), "L2 read": (0.001, 0.002), "tensor cores": (0.035, 0.08)}
"""Mean and worst error that the model has reached on them; no constant was chosen by them."""


@pytest.fixture(scope="module")
def theirs() -> Report:
    runs = {name: run for name, run in store.load_folder(store.PEERS).items() if run.workload.seqlen_k <= SHORT}
    return compare_all({name: run for name, run in runs.items() if run.schedule in ("peer:fa3", "peer:fa2")})


@pytest.mark.parametrize("name", THEIRS)
def test_other_peoples_kernels_are_predicted_as_well_as_they_were(theirs, name):
    assert len(theirs.of("others")) >= 18
    assert within(theirs, name, "others", *THEIRS[name])


def test_every_run_of_others_says_whose_kernel_it_was_and_what_was_counted():
    runs = store.load_folder(store.PEERS)
    peers = [run for run in runs.values() if run.measurement.implementation == "peer"]
    assert len(peers) == len(read(store.PEERS / "plan.toml")) >= 60
    for run in peers:
        taken = run.measurement
        assert run.warnings == () and taken.cycles_from != "time x clock" and taken.clock_from == "SM cycle counters"
        assert taken.kernels[0][0] and taken.counters["launch__registers_per_thread"] > 0
        assert taken.packages and all(len(digest) == 64 for digest in taken.sources.values()) and taken.sources
        assert (run.tile is not None) == (run.schedule in ("peer:fa3", "peer:fa2"))


def test_the_tile_of_flash_attention_3_is_the_default_of_its_schedule():
    """Both the wheel's kernel names and the table say which; a cluster only where the table has one and the Q tiles pair up."""
    for run in store.load_folder(store.PEERS).values():
        if run.schedule == "peer:fa3":
            assert run.tile == default_tile(run.workload, "fa3-published", "h200")


# -- kernels of ours: the error budget ---


def within(report: Report, name: str, which: str, mean: float, worst: float | None) -> bool:
    """Whether a quantity's errors over a group of runs are, every run having been compared."""
    column = next(column for column in report.columns(which) if column.quantity.name == name)
    assert column.count == len(report.of(which)) > 0
    return column.mape <= mean and (worst is None or abs(column.worst) <= worst)


def of_more_output_than_l2_keeps(report: Report) -> Report:
    """Without the runs most of whose O is still in L2 at their end, of which hardware writes a little and the model nothing."""

    left = {each.name: each.predicted.traffic for each in report.comparisons}
    kept = {name for name, moved in left.items() if 2 * moved.dirty_bytes > moved.total("hbm_write")}
    return replace(report, comparisons=tuple(each for each in report.comparisons if each.name not in kept))


@pytest.mark.parametrize("name", REACHED)
def test_the_errors_of_our_kernels_are_no_larger_than_they_were(report, name):
    assert within(of_more_output_than_l2_keeps(report) if name == "HBM written" else report, name, "beside", *REACHED[name])


@pytest.mark.parametrize("name", AIM)
def test_the_errors_of_our_kernels_are_as_small_as_they_are_to_be(report, name):
    assert within(of_more_output_than_l2_keeps(report) if name == "HBM written" else report, name, "beside", *AIM[name])


def test_schedules_rank_as_on_the_hardware(report):
    """But for three with overlap-3stage, which settles in one of two alignments at d128 and is 4 % ahead of pingpong at d256."""
    assert report.ranking.pairs >= 130 and len(report.ranking.reversed) <= 3
    assert all("overlap-3stage" in pair for pair in report.ranking.reversed)


MET = AIM | {"cycles": (0.0205, 0.075), "HBM written": (0.18, None)}
"""What the model met on the runs recorded when it was finished (cycles 1.92 %), and 2.03 since a refuted rate is gone;
of O that fits L2 hardware writes a little where the model writes nothing."""


@pytest.mark.parametrize("name", MET)
def test_runs_recorded_after_the_model_was_finished_are_predicted_as_well(blind, name):
    assert len(blind.of("after")) == len(read(store.BLIND / "plan.toml")) == 56
    assert within(blind, name, "after", *MET[name])


def test_schedules_of_those_runs_rank_as_on_the_hardware(blind):
    """But for overlap-3stage at d256, full, 2.2 % ahead of pingpong there."""
    assert blind.ranking.pairs >= 67 and len(blind.ranking.reversed) <= 1
    assert all("overlap-3stage" in pair for pair in blind.ranking.reversed)
