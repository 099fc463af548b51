"""What the first papers teach holds at the defaults: who is bound by HBM, who gains from tiling; and extrapolation is said."""

from dataclasses import replace

import numpy as np
import pytest

from fasim.simulator.devices.device import load_device
from fasim.simulator.predict import predict
from fasim.simulator.problem.order import splits_that_fill, work_items
from fasim.simulator.problem.workload import Workload
from fasim.simulator.replay.extrapolation import beyond_recorded
from fasim.simulator.replay.l2 import ACCESS, ON_EXIT, STATIC
from fasim.simulator.replay.traffic import Launch
from fasim.simulator.results import metrics

DEFAULT = Workload(4, 16, 8448)
H100 = load_device("h100-sxm")


def seconds(workload, schedule, device=H100, regime="sustained"):
    return metrics.time_s(predict(workload, schedule, device, regime=regime))


def test_standard_attention_gains_from_hbm_and_flashattention_does_not():
    work = Workload(4, 16, 4096)
    faster = replace(H100, hbm_bytes_per_s=2 * H100.hbm_bytes_per_s)
    gain = {name: seconds(work, name, H100, "burst") / seconds(work, name, faster, "burst") for name in ("standard", "fa2", "fa3")}
    assert gain["standard"] > 1.15
    assert max(gain["fa2"], gain["fa3"]) < 1.02
    assert seconds(work, "standard") / seconds(work, "standard", faster) > 1.05, "less, where twice the bytes take the power too"


def test_standard_attention_moves_its_bytes_at_most_of_what_a_copy_reaches():
    run = predict(DEFAULT, "standard", H100)
    moved = run.traffic.total("hbm_read") + run.traffic.total("hbm_write")
    assert 0.8 < moved / metrics.time_s(run) / H100.hbm_achieved_bytes_per_s <= 1


def test_flashattention_as_shipped_beats_standard_and_one_cta_a_head_does_not():
    time = {name: seconds(DEFAULT, name) for name in ("standard", "fa1", "fa1-published", "fa2")}
    assert time["fa2"] < time["fa1-published"] < time["standard"] < time["fa1"]


@pytest.mark.parametrize(
    "work", [Workload(1, 2, 1000, 64), Workload(1, 2, 1000, 64, causal=True), Workload(1, 3, 700, 128, causal=True)]
)
def test_shares_of_a_head_move_what_the_whole_head_moves_and_k_and_v_once_each(work):
    whole, shared = (predict(work, name, H100).traffic.by_tensor for name in ("fa1", "fa1-published"))
    for name in "QOlm":
        assert shared[name].algorithmic_read == whole[name].algorithmic_read
        assert shared[name].algorithmic_write == whole[name].algorithmic_write
    for name in "KV":
        splits, rest = divmod(shared[name].algorithmic_read, whole[name].algorithmic_read)
        assert rest == 0 and splits > 1


def test_heads_are_shared_as_the_shipped_kernels_heuristic_says():
    assert splits_that_fill(48, 108, 3) == 2, "0.89 of the slots; three make a second wave, and 0.67"
    assert splits_that_fill(48, 108, 100) == 9, "four whole waves"
    assert splits_that_fill(108, 108, 100) == 1
    assert splits_that_fill(1, 108, 4) == 4, "no more than there are Q blocks"
    assert splits_that_fill(1, 10_000, 100) == 29, "30 at most, and 29 are within 5 % of as good"


def test_shares_come_behind_one_another_for_all_heads():
    items = work_items(Workload(1, 2, 512), 64, 128, "heads", splits=3)
    assert [tuple(item) for item in items[["q_head", "m"]]] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert (items["blocks"] == 4).all()


@pytest.mark.parametrize(
    ("work", "dealing", "warned"),
    [
        (Workload(1, 16, 32768), STATIC, False),
        (Workload(1, 1, 131072), STATIC, False),
        (Workload(1, 16, 65536), STATIC, True),
        (Workload(10_000, 16, 512), STATIC, True),
        (Workload(1, 1, 524_288), STATIC, True),
        (Workload(1, 16, 65536, causal=True), ON_EXIT, False),
        (Workload(1, 16, 131072, causal=True), ON_EXIT, True),
    ],
)
def test_what_walks_on_past_every_recorded_run_is_said(work, dealing, warned):
    items = work_items(work, 128, 128, "persistent" if dealing == STATIC else "longest-first")
    launch = Launch(items, np.zeros(0, ACCESS), 132, 128, 128, dealing=dealing)
    told = beyond_recorded([launch])
    assert len(told) == warned
    assert all("SMs drift apart" in text for text in told)


def test_a_prediction_carries_the_warning():
    device = replace(load_device("h200"), sms=1)  # all blocks on one SM
    assert any("extrapolated" in text for text in predict(Workload(1, 8, 8192), "fa3", device).warnings)
    assert not any("extrapolated" in text for text in predict(Workload(1, 1, 8192), "fa3", device).warnings)
