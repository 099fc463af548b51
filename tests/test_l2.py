"""L2: what stays, how long, and what it costs to share it with what a compiler spills; held to what an H200 counted."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_l2 import plain_replay
from test_traffic import H200, NAMES, accesses, forward

from fasim.simulator.predict import laid_out
from fasim.simulator.problem.order import ITEM
from fasim.simulator.problem.workload import Workload
from fasim.simulator.replay import traffic as traffic_module
from fasim.simulator.replay.l2 import KV, OWN, STATIC, WEIGHTS
from fasim.simulator.replay.traffic import Launch, TensorLayout, paces, replay_traffic, stripe_bytes
from fasim.traces import store

SPILL = len(NAMES)
FLASHATTENTION_2 = sorted(store.PEERS.glob("peer-fa2-*.run.json"))


def test_the_cliff_comes_when_the_keys_outgrow_l2():
    def per_compulsory(seqlen):
        work = Workload(batch=1, heads=1, seqlen=seqlen, head_dim=128)
        read = replay_traffic(work, [forward(work, 128, 128)], NAMES, H200)[0].total("hbm_read")
        return read / sum(work.tensor_bytes[name] for name in "QKV")

    assert per_compulsory(16384) == pytest.approx(1.0, abs=0.01)
    ratios = [per_compulsory(s) for s in (32768, 49152, 65536, 131072)]
    assert ratios[0] < 1.1, "half of L2: few sets have too many lines"
    assert ratios == sorted(ratios)
    assert 5 < ratios[-1] < 6  # over 5 on an H200


def test_two_heads_of_32k_in_flight_do_not_fit():
    """Sixteen heads of 32k: HBM reads are 1.6 to 1.7 times compulsory on an H200, whatever the kernel."""
    work = Workload(batch=1, heads=16, seqlen=32768, head_dim=128)
    read = replay_traffic(work, [forward(work, 128, 176, cluster=2)], NAMES, H200)[0].total("hbm_read")
    assert read / sum(work.tensor_bytes[name] for name in "QKV") == pytest.approx(1.6, abs=0.1)


def swept(mebibytes, groups, passes):
    """HBM bytes when `groups` of 132 SMs each read their share of a buffer again and again, all together; its size."""
    tiles = mebibytes * 2**20 // 16384 // groups
    work = Workload(batch=1, heads=132, seqlen_q=1, seqlen_k=64 * tiles, head_dim=128)
    items = np.zeros(132, ITEM)
    items["kv_head"] = np.arange(132) % groups
    items["blocks"] = 1
    rows = [(0, KV, 0, t, p * tiles + t, 128, 2, 0, 0) for p in range(passes) for t in range(tiles)]
    launch = Launch(items, accesses(*rows), 132, 1, 64)
    return replay_traffic(work, [launch], [TensorLayout("K")], H200, scattered=False)[0].total("hbm_read"), groups * tiles * 16384


@pytest.mark.parametrize(("pattern", "groups"), [("same", 1), ("four_groups", 4)])
@pytest.mark.parametrize("mebibytes", [16, 24, 28, 32, 36, 44, 64])
def test_a_sweep_reads_hbm_as_the_recorded_microbenchmark(pattern, groups, mebibytes):
    """HBM bytes per warm pass over a buffer, over its size: 0 where it stays in L2, 1 where nothing of it does."""
    path = Path(traffic_module.__file__).parents[2] / "traces" / "recorded" / "calibration" / "l2_capacity.json"
    recorded = json.loads(path.read_text())["results"][f"{mebibytes}MiB_{pattern}"]["warm_hbm_bytes_over_buffer"]
    (few, size), (many, _) = swept(mebibytes, groups, 2), swept(mebibytes, groups, 4)
    assert (many - few) / 2 / size == pytest.approx(recorded, abs=0.12)


def test_data_that_one_sm_reads_alone_may_take_more_of_l2():
    """An H200 keeps 40 MiB when each SM has its own slice: only lines of the far partition are there twice."""
    for mebibytes in (32, 40):
        (few, _), (many, _) = swept(mebibytes, 132, 2), swept(mebibytes, 132, 4)
        assert many - few < 0.05 * 2 * mebibytes * 2**20


def test_scattered_lines_leave_l2_before_it_is_full():
    """Lines that fall into sets at random: of its ways in the mean, half the sets keep data as old as L2 is large."""
    stripes = stripe_bytes(H200) / H200.l2_bytes
    assert list(stripes) == sorted(stripes)
    middle = np.interp(0.5, (np.cumsum(WEIGHTS) - np.array(WEIGHTS) / 2) / sum(WEIGHTS), stripes)
    assert middle == pytest.approx(1 - 1 / 3 / H200.l2_ways, abs=0.01), "the median of a sum of so many arrivals"
    assert stripes[0] < 0.55
    sharp = stripe_bytes(H200, scattered=False) / H200.l2_bytes
    assert sharp[-1] - sharp[0] < 0.2


@pytest.mark.parametrize(
    ("measured", "work"),
    [
        (1.01, Workload(batch=1, heads=8, seqlen=16384, head_dim=256, causal=True)),
        (1.01, Workload(batch=4, heads=8, seqlen=4096, head_dim=256, causal=True)),
        (1.01, Workload(batch=2, heads=32, kv_heads=8, seqlen=8192, head_dim=128, causal=True)),
        (1.00, Workload(batch=4, heads=16, seqlen=4096, head_dim=128, causal=True)),
    ],
    ids=str,
)
def test_causal_tiles_drawn_one_by_one_in_small_sections_read_little_more_than_once(measured, work):
    """As counted on an H200; drawn a tile ahead and in sections of 32 MiB it was 1.1 to 2.8."""
    launch = forward(work, 128, 64 if work.head_dim == 256 else 128, "longest-first")
    read = replay_traffic(work, [launch], NAMES, H200)[0].total("hbm_read")
    assert read / work.compulsory_read_bytes == pytest.approx(measured, abs=0.02)


def with_spills(work, each_block, each_tile):
    """What a warpgroup of 128 threads stores to local memory: once a tile behind its first loads, and behind each block's."""
    launch = forward(work, 128, 64, "grid", slots=264)
    rows = launch.accesses
    ends = np.flatnonzero(np.append(rows["step"][1:] != rows["step"][:-1], False))
    stored = [(SPILL, OWN, int(rows["step"][end] < 0), 0, int(rows["step"][end]), 0, 4, 1, 0) for end in ends]
    stored = accesses(*stored)
    stored["elements"] = 128 * np.where(stored["step"] < 0, each_tile, each_block)
    return replace(launch, accesses=np.insert(rows, ends + 1, stored))


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 4), st.booleans())
@settings(max_examples=10, deadline=None)
def test_spills_go_to_l2_whenever_they_are_stored_and_the_replay_equals_a_plain_one(each_block, each_tile, heads, causal):
    work = Workload(batch=1, heads=heads, seqlen=640, head_dim=128, causal=causal)
    launch, device = replace(with_spills(work, each_block, each_tile), slots=3), replace(H200, l2_bytes=400_000)
    tensors = [*NAMES, TensorLayout("spilled")]
    traffic, *_ = replay_traffic(work, [launch], tensors, device)
    expected = plain_replay(work, launch, len(tensors), device)
    assert [list(vars(traffic.by_tensor[tensor.name]).values()) for tensor in tensors] == expected.tolist()
    spilled = traffic.by_tensor["spilled"]
    blocks = int(launch.items["blocks"].sum())
    assert spilled.l2_write == 128 * 4 * (blocks * each_block + len(launch.items) * each_tile) and spilled.l2_read == 0


@pytest.mark.parametrize("path", FLASHATTENTION_2, ids=lambda path: path.name.split("-")[4])
def test_flashattention_2_writes_what_its_compiler_spilled(path):
    """Counted on an H200: up to 57 times what it has to write."""
    run = store.load(path)
    seen = laid_out(run.workload, "fa2-pytorch", H200, run.tile).traffic
    written = seen.total("l2_write") / run.traffic.total("l2_write")
    assert written == pytest.approx(1.0, abs=0.02 if run.workload.head_dim < 256 else 0.1)
    assert seen.total("hbm_read") == pytest.approx(run.traffic.total("hbm_read"), rel=0.1)


def test_lines_that_a_copy_lost_are_no_use_of_the_whole_tile_at_its_home():
    """Every stripe of L2 as an L2 of its own, all of it alike: FlashAttention-2 loses as many of its lines as they do together."""
    work = Workload(batch=4, heads=16, seqlen=4096, head_dim=128, causal=True)
    launch = forward(work, 128, 64, "grid", slots=264)

    def read(device, scattered):
        return replay_traffic(work, [launch], NAMES, device, scattered)[0].total("hbm_read") / work.compulsory_read_bytes

    sharp = replace(H200, l2_effective_fraction=1.0, l2_spread=0.0)
    alone = [read(replace(sharp, l2_bytes=int(each)), False) for each in stripe_bytes(H200)]
    assert read(H200, True) == pytest.approx(np.average(alone, weights=WEIGHTS), abs=0.01)


def test_sms_differ_in_pace_by_the_measured_spread():
    pace = paces(132)
    assert pace.max() == 1.0
    assert pace.std() == pytest.approx(traffic_module.SM_SPREAD, rel=0.03)
    assert np.array_equal(paces(132), pace)


def test_sms_that_drift_apart_read_more(monkeypatch):
    work = Workload(batch=1, heads=2, seqlen=131072, head_dim=128)  # 64 MiB of keys and values a head
    launch = replace(forward(work, 128, 128), dealing=STATIC)

    def read(spread):
        monkeypatch.setattr(traffic_module, "SM_SPREAD", spread)
        return replay_traffic(work, [launch], NAMES, H200)[0].total("hbm_read")

    together, apart = read(1e-9), read(0.01)
    assert apart > 1.5 * together
