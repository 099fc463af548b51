"""The bottleneck named is the cause: what costs most when it is there and saves most when it is gone."""

import pytest

from fasim.simulator.devices.device import load_device
from fasim.simulator.predict import predict
from fasim.simulator.problem.workload import Workload
from fasim.simulator.results.bottleneck import Facts, explain
from fasim.simulator.results.roofline import roofline

NATURES = {
    "wave tail": (Workload(1, 16, 4225), "fa3", "last wave", ["544 CTAs are 4.12 waves", "last 16 run"]),
    "just a wave": (Workload(1, 16, 4224), "fa3", "power limit", ["700 W"]),
    "grouped decode": (
        Workload(2, 32, kv_heads=8, seqlen_q=1, seqlen_k=8192), "fa3", "padding",
        ["127 of 128 query rows", "packing the 4 query heads", "split-KV", "HBM, which bounds this workload"],
    ),
    "decode": (Workload(4, 33, seqlen_q=1, seqlen_k=8192), "fa3", "HBM", ["twice the bandwidth"]),
    "short": (Workload(32, 16, 512), "fa3", "exposed softmax", ["4 K/V blocks a tile"]),
    "long": (Workload(1, 66, 8192), "fa3", "power limit", ["useful work", "1980 MHz"]),
    "d64": (Workload(4, 33, 4096, 64), "fa3", "exposed softmax", ["MUFU"]),
    "d256": (Workload(4, 33, 2048, 256), "fa3", "power limit", ["useful work"]),
    "free-running": (Workload(2, 33, 4096), "warp-specialized", "exposed softmax", ["more overlap"]),
    "mma.sync": (Workload(2, 33, 4096), "fa2", "exposed softmax", ["more overlap"]),
    "causal short": (Workload(33, 16, 384, causal=True), "fa3", "exposed softmax", ["2 K/V blocks a tile"]),
    "one head": (Workload(1, 1, 4096), "fa3", "idle SMs", ["32 CTAs leave 100 of 132 SMs idle"]),
    "one tile": (Workload(1, 1, 128), "fa3", "launch", ["CUDA graph"]),
    "whole heads": (Workload(1, 8, 1024), "fa1", "idle SMs", ["a CTA walks a whole head"]),
}  # fmt: skip


@pytest.mark.parametrize("nature", NATURES)
def test_the_cause_is_the_one_an_expert_would_name_and_the_breakdown_adds_up(nature):
    workload, schedule, resource, said = NATURES[nature]
    run = predict(workload, schedule)
    assert run.bottleneck.resource == resource, run.bottleneck.why
    assert all(words in run.bottleneck.why for words in said), run.bottleneck.why
    assert sum(run.breakdown.to_dict().values()) == pytest.approx(1.0, abs=0.001)


@pytest.mark.parametrize("nature", NATURES)
def test_useful_work_is_what_the_roofline_counts(nature):
    workload, schedule, _, _ = NATURES[nature]
    run = predict(workload, schedule)
    bound = roofline(workload, load_device("h100-sxm"), run.sm_clock_hz)
    assert run.breakdown.useful == pytest.approx(bound.tensor_cycles / run.cycles, rel=1e-6)


def test_a_unit_is_no_cause_for_being_busy():
    """Padding keeps the tensor cores busy, and HBM keeps up with them."""
    run = predict(Workload(2, 66, kv_heads=11, seqlen_q=1, seqlen_k=8192), "fa3")
    assert run.activity.tensor / run.cycles / run.activity.sms > 0.9
    assert run.bottleneck.resource not in ("tensor cores", "HBM")


def test_a_loss_that_hides_behind_a_full_hbm_is_not_called_useful_work():
    """Where bandwidth that doubles saves nothing and less padding neither, both are named."""
    device = load_device("h100-sxm")
    run = predict(Workload(4, 33, seqlen_q=1, seqlen_k=8192), "fa3", device)
    facts = Facts(kernel=None, ctas=132, slots=132, blocks=64.0, whole_heads=False)
    found = explain(run, device, lambda part: facts, time_with=lambda other: 1.0)
    assert found.resource == "HBM and padding" and "each hides behind the other" in found.why


def test_work_that_cannot_be_split_finer_is_not_told_to_be():
    """One tile of one block leaves 131 SMs idle, and nothing could give them a part of it."""
    assert predict(Workload(1, 1, 128), "fa3").breakdown.no_cta > 0.5
    assert predict(Workload(1, 1, 128), "fa3").bottleneck.resource != "idle SMs"


def test_a_few_idle_sms_are_not_the_bottleneck():
    run = predict(Workload(4, 32, head_dim=128, kv_heads=8, causal=True, seqlen_q=128, seqlen_k=4096), "fa3", "h200")
    assert run.bottleneck.resource not in ("idle SMs", "last wave")
