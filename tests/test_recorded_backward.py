"""The backwards recorded on an H200: every run of the plans is there, was right, was counted, and says what it was of."""

from __future__ import annotations

from pathlib import Path

import pytest

import fasim
from fasim.traces import nsight, store
from fasim.traces.compare import compare_all

pytest.importorskip("torch")

from fasim.kernels.measure import peers, plan

PLACE = Path(fasim.__file__).parent / "traces" / "recorded" / "backward"
RUNS = store.load_folder(PLACE)
THEIRS = {name: run for name, run in RUNS.items() if peers.is_peer(run.schedule)}


def test_every_run_of_the_plan_of_peers_is_there():
    wanted = {(entry.kernel, entry.workload) for entry in plan.read(PLACE / "plan.toml")}
    assert {(run.schedule, run.workload) for run in THEIRS.values()} == wanted and len(wanted) >= 40


@pytest.mark.parametrize("name", RUNS)
def test_a_run_was_right_and_says_where_and_of_what_it_is(name):
    run, taken = RUNS[name], RUNS[name].measurement
    assert run.workload.backward and taken.gpu == "NVIDIA H200" and taken.driver and taken.date
    assert taken.relative_error < 8e-3 and taken.sources and taken.packages["torch"]
    assert (taken.regime, taken.l2) == ("sustained", "cold") and name == store.file_name(run).removesuffix(".run.json")


@pytest.mark.parametrize("name", RUNS)
def test_all_kernels_of_a_call_were_counted_and_the_main_one_apart(name):
    run, taken = RUNS[name], RUNS[name].measurement
    counters, cycles = taken.counters, [each for _, each in taken.kernels]
    assert set(nsight.NEEDED) <= counters.keys() and {nsight.MAIN + metric for metric in nsight.NEEDED} <= counters.keys()
    assert len(cycles) > 1 and sum(cycles) == run.cycles == counters[nsight.CYCLES]
    assert max(cycles) == counters[nsight.MAIN + nsight.CYCLES] > run.cycles / 2
    assert counters[nsight.MAIN + nsight.HBM_READ] < counters[nsight.HBM_READ]


def test_flash_attentions_runs_have_the_tile_that_their_kernels_take():
    tiles = {(run.workload.head_dim, run.workload.causal): run.tile for run in THEIRS.values() if run.schedule == "peer:fa4"}
    assert {key: (tile.block_m, tile.block_n) for key, tile in tiles.items()} == {
        (64, False): (128, 128), (64, True): (128, 128), (128, False): (80, 128), (128, True): (64, 128),
        (256, False): (64, 48), (256, True): (64, 48),
    }  # fmt: skip
    for run in THEIRS.values():
        if run.schedule == "peer:fa2":
            (name,) = (each for each, cycles in run.measurement.kernels if cycles == max(c for _, c in run.measurement.kernels))
            assert run.tile == peers.tile_of(name) and run.tile.stages == 2


@pytest.mark.parametrize("mask", ["", "causal-"], ids=["full", "causal"])
def test_the_model_has_flash_attention_4s_main_kernel_and_its_bytes(mask):
    name = f"peer-fa4-peer-b3h10s3000d128-bf16-{mask}backward-sustained"
    (found,) = compare_all({name: RUNS[name]}).comparisons
    assert found.predicted.schedule == "fa3" and found.predicted.tile == RUNS[name].tile
    for quantity, allowed in (("main kernel", 0.06), ("time", 0.05), ("HBM read", 0.04), ("HBM written", 0.04), ("L2 read", 0.01)):
        assert abs(found.row(quantity).error) <= allowed, quantity
