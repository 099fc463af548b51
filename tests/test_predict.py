"""Predictions as a whole: bounds that no schedule may beat, ranking, determinism, memory limits."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fasim.simulator.devices.device import load_device
from fasim.simulator.errors import UsageError
from fasim.simulator.predict import default_tile, predict
from fasim.simulator.problem.tile import Tile
from fasim.simulator.problem.workload import Workload
from fasim.simulator.results import metrics
from fasim.simulator.results.roofline import roofline
from fasim.simulator.schedules import SCHEDULES

ABLATION = Workload(4, 16, 8448)


@st.composite
def runs(draw):
    """Any schedule on any device that can run it, any workload of modest size."""
    schedule = draw(st.sampled_from(sorted(SCHEDULES)))
    hopper = SCHEDULES[schedule].hopper
    device = draw(st.sampled_from(["h200", "h100-sxm", "h100-pcie"] + ([] if hopper else ["a100-sxm"])))
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    longest = 700 if schedule in ("fa1", "standard", "standard-online") else 3000
    workload = Workload(
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.sampled_from([1, 2, 4])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([64, 128, 256])),
        dtype=draw(st.sampled_from(SCHEDULES[schedule].dtypes)),
        causal=draw(st.booleans()),
        seqlen_q=draw(st.integers(1, longest)),
        seqlen_k=draw(st.integers(1, longest)),
    )
    return workload, schedule, device


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(runs())
def test_no_prediction_beats_the_roofline_or_moves_less_than_compulsory(case):
    workload, schedule, device = case
    run = predict(workload, schedule, device)
    bound = roofline(workload, load_device(device), run.sm_clock_hz)
    assert run.cycles >= bound.bound_cycles
    assert run.traffic.total("hbm_read") >= workload.compulsory_read_bytes
    assert run.traffic.total("hbm_write") >= workload.compulsory_write_bytes
    assert 0 <= run.traffic.l2_hit_rate <= 1
    for share in (metrics.tensor_utilization, metrics.mufu_utilization, metrics.issue_utilization):
        assert 0 <= share(run) <= 1
    assert run.power_w > 0


def test_the_same_question_has_the_same_answer():
    first, second = (predict(Workload(2, 4, 1000, causal=True), "fa3", "h200") for _ in range(2))
    assert first.to_dict() == second.to_dict()
    assert (first.spans == second.spans).all()


def test_schedules_rank_as_on_the_hardware():
    speed = {name: metrics.tflops(predict(ABLATION, name, "h200")) for name in SCHEDULES if SCHEDULES[name].hopper}
    assert speed["warp-specialized"] < speed["pingpong"]
    assert speed["warp-specialized"] < speed["overlap-2stage"]
    assert speed["fa3"] >= 0.98 * max(speed["pingpong"], speed["overlap-2stage"])


def test_io_aware_schedules_move_fewer_bytes_than_standard_attention():
    moved = {}
    for name in ("standard", "standard-online", "fa1", "fa2", "fa3"):
        run = predict(Workload(2, 16, 4096), name, "h200")
        moved[name] = run.traffic.total("hbm_read") + run.traffic.total("hbm_write")
    assert moved["standard"] > 10 * max(moved["fa2"], moved["fa3"])
    assert moved["standard"] > moved["fa1"], "fa1 rewrites O, some of it past what L2 holds"
    assert moved["standard-online"] <= moved["standard"]


def test_grouped_heads_share_their_keys_and_values():
    many, one = (predict(Workload(1, 16, 4096, kv_heads=kv), "fa3", "h200") for kv in (16, 1))
    for name in ("K", "V"):
        assert many.traffic.by_tensor[name].hbm_read == pytest.approx(16 * one.traffic.by_tensor[name].hbm_read, rel=0.01)
        assert one.traffic.by_tensor[name].algorithmic_read == many.traffic.by_tensor[name].algorithmic_read


def test_a_cluster_halves_what_l2_is_asked_for():
    shared, alone = (predict(ABLATION, "fa3", "h200", Tile(128, 128, 2, 2, c)) for c in (2, 1))
    assert shared.traffic.by_tensor["K"].l2_read * 2 == alone.traffic.by_tensor["K"].l2_read
    assert shared.traffic.by_tensor["K"].algorithmic_read == alone.traffic.by_tensor["K"].algorithmic_read


def test_a_pinned_clock_changes_seconds_and_not_the_work():
    pinned = predict(ABLATION, "fa3", "h100-sxm", clock_hz=1.83e9)
    free = predict(ABLATION, "fa3", "h100-sxm")
    assert pinned.sm_clock_hz == 1.83e9
    assert abs(pinned.cycles / free.cycles - 1) < 0.02
    device = load_device("h100-sxm")
    assert free.power_w <= device.power_limit_w * device.power_limit_overshoot * (1 + 1e-9)
    assert any("limit" in warning for warning in pinned.warnings)


@pytest.mark.parametrize(
    ("workload", "schedule", "device", "tile", "says"),
    [
        (Workload(1, 1, 128, 80), "pingpong", "h200", None, "64, 128, 256"),
        (Workload(1, 1, 128), "flash", "h200", None, "not known"),
        (Workload(1, 1, 128), "pingpong", "a100-sxm", None, "--schedule fa2"),
        (Workload(1, 1, 128, dtype="e4m3"), "fa2", "h200", None, "fp16, bf16"),
        (Workload(1, 1, 128), "fa3", "h200", Tile(128, 240), "shared memory: Q 32768 \\+ K 122880"),
        (Workload(1, 1, 128), "fa3", "h200", Tile(128, 176, 1), "registers: S 88 \\+ P 88 \\+ O 64"),
        (Workload(1, 1, 128), "fa3", "h200", Tile(64, 64), "64 query rows"),
        (Workload(1, 1, 384), "fa3", "h200", Tile(128, 128, cluster=2), "does not divide the 3"),
        (Workload(4, 16, 10**8), "fa3", "h200", None, "tile loads"),
        (Workload(1, 1, 512, causal=True), "fa3", "h200", Tile(128, 128, cluster=2), "causal"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(workload, schedule, device, tile, says):
    with pytest.raises(UsageError, match=says):
        predict(workload, schedule, device, tile)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_every_default_tile_fits_its_device(schedule, head_dim, causal):
    for dtype in SCHEDULES[schedule].dtypes:
        workload = Workload(1, 2, 300, head_dim, dtype, causal)
        device = "h200" if SCHEDULES[schedule].hopper else "a100-sxm"
        run = predict(workload, schedule, device)
        assert run.tile == default_tile(workload, schedule, device)


@pytest.mark.parametrize("cluster", [1, 2])
def test_what_e4m3_leaves_out_is_said_whatever_the_tile(cluster):
    run = predict(Workload(1, 2, 512, dtype="e4m3"), "pingpong", "h200", Tile(128, 128, cluster=cluster))
    assert any("transposition of V" in warning for warning in run.warnings)
    for schedule in ("fa3", "fa3-published"):
        shipped = predict(Workload(1, 2, 512, dtype="e4m3"), schedule, "h200", Tile(128, 128))
        assert not any("transposition of V" in warning for warning in shipped.warnings)


@pytest.mark.parametrize(("asked", "number"), [(None, 2), ("scores", 1), ("3", 3)])
def test_any_kernel_of_a_schedule_can_be_the_one_whose_spans_are_kept(asked, number):
    run = predict(Workload(1, 4, 1024), "standard", "h200", kernel=asked)
    assert run.sample.kernels[number - 1] == ("scores", "softmax_three_pass", "values")[number - 1]
    assert run.sample.number == number
    busy = {run.lanes[span].name for span in np.unique(run.spans["lane"])}
    assert ("tensor cores" in busy) == (number != 2) and ("MUFU" in busy) == (number == 2)
    assert {"cp.async"} <= busy and "TMA" not in {lane.name for lane in run.lanes}


@pytest.mark.parametrize("asked", ["softmax", "0", "4", "²", "9" * 5000])
def test_a_kernel_that_is_not_there_is_refused_with_those_there_are(asked):
    with pytest.raises(UsageError, match="1 scores, 2 softmax_three_pass, 3 values"):
        predict(Workload(1, 4, 1024), "standard", "h200", kernel=asked)
