"""The bottleneck named is the one the run's numbers show."""

import pytest

from fasim.simulator.predict import predict
from fasim.simulator.tile import Tile
from fasim.simulator.workload import Workload

CASES = [
    (Workload(4, 16, 8448), "fa3", None, "tensor cores", "exposed softmax"),
    (Workload(1, 4, 1024), "fa3", None, "parallelism", "idle"),
    (Workload(1, 17, 1024), "fa3", Tile(128, 128), "wave quantisation", "waves"),
    (Workload(4, 16, 8448), "warp-specialized", None, "latency and dependencies", "no unit is saturated"),
]


@pytest.mark.parametrize(("workload", "schedule", "tile", "resource", "says"), CASES, ids=lambda v: str(v)[:30])
def test_the_bottleneck_is_named_with_its_reason(workload, schedule, tile, resource, says):
    found = predict(workload, schedule, "h200", tile).bottleneck
    assert found.resource == resource
    assert says in found.why


def test_standard_attention_is_held_back_by_hbm_on_an_a100():
    found = predict(Workload(2, 16, 8192), "standard", "a100-sxm").bottleneck
    assert found.resource == "HBM"
    assert "IO-awareness" in found.why


def test_a_few_idle_sms_are_not_the_bottleneck():
    run = predict(Workload(4, 32, head_dim=128, kv_heads=8, causal=True, seqlen_q=128, seqlen_k=4096), "fa3", "h200")
    assert run.bottleneck.resource != "parallelism"
