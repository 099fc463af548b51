"""Where the tensor cores' time goes: parts that add up, each where its cause is and nowhere else."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from test_predict import runs

from fasim.simulator.devices.device import load_device
from fasim.simulator.language.program import trace
from fasim.simulator.predict import default_tile, predict
from fasim.simulator.problem.order import work_items
from fasim.simulator.problem.tile import Tile
from fasim.simulator.problem.workload import Workload
from fasim.simulator.replay import account
from fasim.simulator.replay.engine import U_TENSOR, Memory, replay
from fasim.simulator.replay.idle import Pieces
from fasim.simulator.results import metrics
from fasim.simulator.results.breakdown import REASONS, Breakdown, of_cycles
from fasim.simulator.schedules import SCHEDULES

H200 = load_device("h200")
MEMORY = Memory(37.0, 18.0, {"K": 0.3, "Q": 1.0}, {"O": 0.5})


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(runs())
def test_the_parts_add_up_for_any_workload(case):
    workload, schedule, device = case
    run = predict(workload, schedule, device)
    parts = run.breakdown.to_dict()
    assert sum(parts.values()) == pytest.approx(1.0, abs=0.001) and min(parts.values()) >= 0
    executed = sum(parts[name] for name in ("useful", "padding", "masked", "slow_gemms"))
    assert executed == pytest.approx(metrics.tensor_utilization(run), abs=0.001)


def test_the_parts_add_up_where_gemms_leave_no_gap():
    """Three consumers at d128: the few tiles that are replayed end closer together than their GEMMs take, which no SM keeps up."""
    run = predict(Workload(1, 16, 16384, causal=True), "fa3", H200, Tile(192, 64, 2, 3), spans=False)
    assert sum(run.breakdown.to_dict().values()) == pytest.approx(1.0, abs=0.001)


def test_parts_that_do_not_add_up_are_an_error():
    with pytest.raises(ValueError, match="add up"):
        of_cycles({"useful": 40.0, "tail": 50.0}, 100.0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_idle_cycle_of_a_replay_has_one_reason(name):
    """Gaps between the spans of the tensor cores, counted another way: cycles less what they execute."""
    kernel, workload = SCHEDULES[name].kernels[0], Workload(1, 1, 512, 64)
    tile = default_tile(workload, name, H200)
    program = trace(kernel, workload, tile, [(3, 1), (1, 0), (2, 0)])
    found = replay([program], H200, MEMORY, max_spans=200_000)
    pieces = Pieces(program, found, int(found.busy[0, U_TENSOR]))
    whole = pieces.within(0, found.cycles)
    assert whole.sum() == pytest.approx(found.cycles - found.busy[0, U_TENSOR], rel=1e-6)
    middle = found.cycles // 3
    assert np.allclose(whole, pieces.within(0, middle) + pieces.within(middle, found.cycles))


def reasons(schedule, device=H200, memory=MEMORY, loops=((12, 0), (12, 0))):
    workload = Workload(1, 1, 4096)
    kernel = SCHEDULES[schedule].kernels[0]
    program = trace(kernel, workload, default_tile(workload, schedule, H200), list(loops))
    found = replay([program], device, memory, max_spans=200_000)
    idle = Pieces(program, found, int(found.busy[0, U_TENSOR])).within(0, found.cycles)
    return dict(zip(REASONS, idle / found.cycles, strict=True))


def test_what_takes_longer_is_the_reason_that_grows():
    """Each change makes one cause longer, and its part grows by most of what the replay got longer by."""
    base = reasons("warp-specialized")
    slower = {
        "softmax": reasons("warp-specialized", replace(H200, mufu_cycles=16, mufu_spacing_cycles=18)),
        "memory": reasons("warp-specialized", memory=replace(MEMORY, hbm=6.0, l2=9.0)),
        "prologue": reasons("warp-specialized", replace(H200, setup_cycles=H200.setup_cycles + 5000)),
        "epilogue": reasons("warp-specialized", replace(H200, tma_store_latency_cycles=9000)),
        "latency": reasons("warp-specialized", replace(H200, wgmma_latency_cycles=600)),
    }
    for name, found in slower.items():
        grown = {reason: found[reason] - base[reason] for reason in REASONS}
        assert max(grown, key=grown.get) == name, (name, grown)


def test_what_lies_before_a_tiles_first_gemm_is_prologue_and_behind_its_last_epilogue():
    """Short tiles of CTAs that follow one another: waits for Q are no waits amid a tile, O's way out is no softmax."""
    base, late = (reasons("fa2", replace(H200, hbm_latency_cycles=c), loops=[(1, 0)] * 4) for c in (700, 4000))
    grown = {reason: late[reason] - base[reason] for reason in REASONS}
    assert max(grown, key=grown.get) == "prologue" and grown["memory"] < grown["prologue"] / 10
    assert base["epilogue"] > base["softmax"] / 4


def test_rows_beyond_the_length_are_padding_and_pairs_above_the_diagonal_masked():
    tile = Tile(128, 64)
    for workload, executed, inside in (
        (Workload(1, 1, seqlen_q=1, seqlen_k=200), 128 * 256, 200),
        (Workload(1, 1, 256), 256 * 256, 256 * 256),
        (Workload(1, 1, 256, causal=True), 128 * 128 + 128 * 256, 128 * 128 + 128 * 256),
        (Workload(1, 1, causal=True, seqlen_q=300, seqlen_k=100), 128 * 64 + 128 * 128, 128 * 64 + 44 * 100),
    ):
        items = work_items(workload, tile.block_m, tile.block_n, "grid")
        assert account.pairs(items, workload, tile, "rows") == (executed, inside), workload


def test_whole_heads_and_tiles_of_scores_count_their_pairs_too():
    tile, causal = Tile(64, 128, 1, 1), Workload(1, 2, 300, causal=True)
    heads = work_items(causal, 64, 128, "heads")
    assert account.pairs(heads, causal, tile, "heads") == (2 * (5 + 3 + 1) * 64 * 128, 2 * (300 * 128 + 172 * 128 + 44 * 44))
    tiles = work_items(replace(causal, causal=False), 64, 128, "tiles")
    assert account.pairs(tiles, causal, tile, "tiles") == (2 * 5 * 3 * 64 * 128, 2 * 300 * 300)


def test_one_cta_too_many_is_a_wave_that_most_sms_idle_through():
    full, over = (predict(Workload(1, 33, seqlen_q=s, seqlen_k=4096), "fa3") for s in (512, 640))
    assert full.breakdown.tail < 0.01
    assert 0.3 < over.breakdown.tail < 0.4, "165 CTAs: 99 of 132 SMs idle through the second of two waves"
    assert predict(Workload(1, 1, 512), "fa3").breakdown.no_cta > 0.6


def test_a_measured_run_has_no_breakdown_and_a_predicted_one_keeps_it_in_json():
    run = predict(Workload(1, 2, 512), "fa3", why=True)
    plain = run.to_dict()
    assert Breakdown(**plain["breakdown"]) == run.breakdown
    assert [each["resource"] for each in plain["savings"]] == [each.resource for each in run.savings]
    assert replace(run, breakdown=None, savings=None).to_dict()["breakdown"] is None


