"""What would cost too much is one sentence before any of it is spent; what is allowed stays within the stated memory."""

from __future__ import annotations

import tracemalloc

import pytest

from fasim.simulator import layout, limits, predict
from fasim.simulator.devices.device import load_device
from fasim.simulator.errors import UsageError
from fasim.simulator.problem.tile import Tile
from fasim.simulator.problem.workload import Workload
from fasim.simulator.schedules import find_schedule


@pytest.mark.parametrize(
    ("workload", "schedule", "match"),
    [
        (Workload(1, 1, 800_000), "fa1", "6,250 tiles of Q"),
        (Workload(1, 1, 150_000, 256), "fa1", "GB to predict"),
        (Workload(3_000_000, 64, 1), "fa3", "GB to predict"),
        (Workload(1 << 24, 1 << 20, 1), "fa3", "tile loads"),
        (Workload(1, 1, seqlen_q=64, seqlen_k=100_000_000), "fa3", "a loop of 781,250 K/V blocks"),
        (Workload(1, 1, seqlen_q=1 << 31, seqlen_k=1), "fa2", "GB to predict"),
        (Workload(1, 1, seqlen_q=1 << 31, seqlen_k=1), "fa1", "tiles of Q"),
        (Workload(64, 64, 8192), "standard", "GB to predict"),
        (Workload(1 << 24, 1 << 20, 1 << 31, 256, causal=True), "overlap-3stage", "tile loads"),
    ],
)
def test_too_much_is_refused_before_anything_is_spent(monkeypatch, workload, schedule, match):
    for room, name in ((predict, "trace"), (predict, "recorded"), (layout, "work_items")):  # whoever records or lists fails
        monkeypatch.setattr(room, name, None)
    with pytest.raises(UsageError, match=match) as caught:
        predict.predict(workload, schedule)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(("workload", "schedule"), [(Workload(1500, 64, 1), "fa3"), (Workload(1, 4, 6144), "standard")])
def test_a_prediction_takes_no_more_memory_than_was_worked_out(workload, schedule):
    device, chosen = load_device("h100-sxm"), find_schedule(schedule)
    tile = predict.default_tile(workload, schedule, device)
    predict.predict(Workload(1, 1, 256), schedule)  # compiles
    tracemalloc.start()
    predict.predict(workload, schedule, device)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    worked_out = limits.cost(chosen.kernels, workload, tile, device.l2_partitions).nbytes
    recorded = 8_000_000  # loops of up to 64 blocks, whatever the workload
    assert worked_out / 5 < peak < worked_out + recorded


def test_a_recording_is_cut_to_a_loop_that_fits():
    with pytest.raises(UsageError, match="100,000,000 K/V blocks"):
        predict.programs(Workload(1, 1, 8448), "pingpong", "h100-sxm", kv_blocks=100_000_000)
    with pytest.raises(UsageError, match="that are recorded"):
        predict.programs(Workload(1, 1, 8448), "fa1", "h100-sxm", kv_blocks=100)


def test_no_tile_is_larger_than_several_sms():
    for fields in ({"stages": 1_000_000}, {"block_n": 16 * 10**9}, {"block_m": 1 << 40}, {"consumers": 1 << 40}, {"stages": True}):
        with pytest.raises(UsageError, match="tile: "):
            Tile(**{"block_m": 128, "block_n": 128} | fields)
    with pytest.raises(UsageError, match="fits no SM"):
        Tile.parse("128x16000000000")
    with pytest.raises(UsageError, match="not of the form"):
        Tile.parse(f"128x{'9' * 5000}")
    with pytest.raises(UsageError, match="not of the form"):
        Tile.parse("١٢٨x128")


def test_no_size_is_beyond_exact_arithmetic():
    for fields in ({"batch": 10**30}, {"heads": 1 << 21}, {"seqlen": 1 << 32}, {"head_dim": 1 << 40}, {"batch": 10**5000}):
        with pytest.raises(UsageError, match="more than is possible"):
            Workload(**{"batch": 1, "heads": 1, "seqlen": 1} | fields)
    with pytest.raises(UsageError, match="causal is 'no'"):
        Workload(1, 1, 1, causal="no")
