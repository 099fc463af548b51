"""Traffic: exact algorithmic bytes, HBM never below compulsory, and an L2 that equals a plain one."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_l2 import plain_replay

from fasim.simulator.devices.device import load_device
from fasim.simulator.problem.order import work_items
from fasim.simulator.problem.workload import LSE_BYTES, Workload
from fasim.simulator.replay import traffic as traffic_module
from fasim.simulator.replay.l2 import ACCESS, KV, ON_EXIT, PAIR, ROW, STATIC
from fasim.simulator.replay.traffic import Launch, TensorLayout, replay_traffic

H200 = load_device("h200")
NAMES = [TensorLayout(name) for name in ("Q", "K", "V", "O", "LSE")]
Q, K, V, O, LSE = range(5)


def accesses(*rows):
    """ACCESS from (tensor, mode, m_offset, block, step, elements, element_bytes, write, multicast)."""
    return np.array(list(rows), ACCESS)


def forward(workload, block_m, block_n, order="persistent", slots=132, cluster=1, descending=True):
    """The launch of a FlashAttention-2 or -3 forward kernel."""
    items = work_items(workload, block_m, block_n, order)
    d, e = workload.head_dim, workload.element_bytes
    loop = [(t, KV, 0, j, j, d, e, 0, cluster > 1) for j in range(items["blocks"].max()) for t in (K, V)]
    rows = accesses(
        (Q, ROW, 0, 0, -1, d, e, 0, 0), *loop,
        (O, ROW, 0, 0, -1, d, workload.output_bytes, 1, 0), (LSE, ROW, 0, 0, -1, 1, LSE_BYTES, 1, 0),
    )  # fmt: skip
    return Launch(items, rows, slots, block_m, block_n, cluster, descending)


def fa1(workload, block_m, block_n):
    """FlashAttention-1: keys outside, queries inside, O and its statistics read and rewritten at every step."""
    d, e = workload.head_dim, workload.element_bytes
    rows = []
    for j in range(-(-workload.seqlen_k // block_n)):
        rows += [(K, KV, 0, j, -1, d, e, 0, 0), (V, KV, 0, j, -1, d, e, 0, 0)]
        for i in range(-(-workload.seqlen_q // block_m)):
            rows += [(t, ROW, i, 0, len(rows), d, e, write, 0) for t, write in ((Q, 0), (O, 0), (O, 1))]
            rows += [(LSE, ROW, i, 0, len(rows), 1, LSE_BYTES, write, 0) for write in (0, 1)]
    return Launch(work_items(workload, block_m, block_n, "heads"), accesses(*rows), 108, block_m, block_n)


def published_fa1_rows():
    root = Path(traffic_module.__file__).parents[2] / "traces" / "published" / "hbm_traffic.csv"
    with root.open() as file:
        return [row for row in csv.DictReader(file) if row["block_kv"]]


@pytest.mark.parametrize("block_kv", [64, 128, 256, 512])
def test_fa1_moves_the_closed_forms_bytes(block_kv):
    work = Workload(batch=64, heads=16, seqlen=1024, head_dim=64)
    traffic, *_ = replay_traffic(work, [fa1(work, 64, block_kv)], NAMES, load_device("a100-sxm"))
    of = traffic.by_tensor
    n, d, heads = 1024, 64, 64 * 16
    assert sum(of[name].algorithmic_read + of[name].algorithmic_write for name in "QKVO") == (
        2 * ((n // block_kv) * 3 * n * d + 2 * n * d) * heads
    )
    assert of["LSE"].algorithmic_read == of["LSE"].algorithmic_write == (n // block_kv) * n * 4 * heads


def test_fa1s_closed_form_is_the_published_one():
    rows = published_fa1_rows()
    assert [int(row["block_kv"]) for row in rows] == [64, 128, 256, 512]
    for row in rows:
        n, d, heads = 1024, 64, 64 * 16
        nbytes = 2 * ((n // int(row["block_kv"])) * 3 * n * d + 2 * n * d) * heads
        assert nbytes / 1e9 == pytest.approx(float(row["hbm_gb"]), abs=0.006)


def test_fa1s_rewrites_of_o_stay_in_l2_while_it_holds_the_heads_in_flight():
    work = Workload(batch=64, heads=16, seqlen=1024, head_dim=64)
    launch = replace(fa1(work, 64, 64), slots=16)
    traffic, *_ = replay_traffic(work, [launch], NAMES, load_device("a100-sxm"))
    assert traffic.by_tensor["O"].hbm_write == work.tensor_bytes["O"]
    assert traffic.by_tensor["O"].l2_write == 16 * work.tensor_bytes["O"]


@st.composite
def shapes(draw):
    kv_heads = draw(st.integers(1, 3))
    work = Workload(
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        seqlen_q=draw(st.integers(1, 1500)),
        seqlen_k=draw(st.integers(1, 1500)),
        head_dim=draw(st.sampled_from([64, 128])),
        dtype=draw(st.sampled_from(["fp16", "e4m3"])),
        causal=draw(st.booleans()),
    )
    launch = forward(
        work,
        draw(st.sampled_from([64, 128])),
        draw(st.sampled_from([64, 176])),
        draw(st.sampled_from(["grid", "persistent", "longest-first"])),
        draw(st.integers(1, 20)),
        draw(st.sampled_from([1, 2])),
        draw(st.booleans()),
    )
    launch = replace(launch, dealing=draw(st.sampled_from([ON_EXIT, STATIC])))
    device = replace(
        H200,
        l2_bytes=draw(st.integers(10_000, 4_000_000)),
        l2_spread=draw(st.sampled_from([0.0, 0.3])),
        l2_partitions=draw(st.sampled_from([1, 2])),
    )
    return work, launch, device


@given(shapes())
@settings(max_examples=60, deadline=None)
def test_bytes_shrink_from_algorithmic_over_l2_to_hbm_and_never_below_compulsory(shape):
    work, launch, device = shape
    traffic, hits, *_ = replay_traffic(work, [launch], NAMES, device)
    assert 0.0 <= traffic.l2_hit_rate <= 1.0
    assert all(0.0 <= hit <= 1.0 for hit in hits.values())
    for name in "QKV":
        moved = traffic.by_tensor[name]
        assert moved.algorithmic_read >= moved.l2_read >= moved.hbm_read
        assert moved.hbm_read >= work.tensor_bytes[name]
    for name in ("O", "LSE"):
        moved = traffic.by_tensor[name]
        assert moved.algorithmic_write == moved.l2_write == moved.hbm_write == work.tensor_bytes[name]


@given(shapes())
@settings(max_examples=25, deadline=None)
def test_the_replay_equals_a_plain_one(shape):
    work, launch, device = shape
    traffic, *_ = replay_traffic(work, [launch], NAMES, device)
    expected = plain_replay(work, launch, len(NAMES), device)
    assert [list(vars(traffic.by_tensor[tensor.name]).values()) for tensor in NAMES] == expected.tolist()


def test_a_rewritten_tensor_equals_the_plain_replay_when_l2_is_too_small():
    work = Workload(batch=1, heads=3, seqlen=640, head_dim=64)
    launch = replace(fa1(work, 64, 128), slots=2)
    device = replace(H200, l2_bytes=300_000, l2_spread=0.5)
    traffic, *_ = replay_traffic(work, [launch], NAMES, device)
    expected = plain_replay(work, launch, len(NAMES), device)
    assert [list(vars(traffic.by_tensor[tensor.name]).values()) for tensor in NAMES] == expected.tolist()
    assert traffic.by_tensor["O"].hbm_write > work.tensor_bytes["O"], "evicted and rewritten"


def standard(work, block):
    """S = Q K^T, P = softmax(S) row tile by row tile, O = P V: three kernels that share S and P."""
    d, e = work.head_dim, work.element_bytes
    s, p = 5, 6
    tiles = work_items(work, block, block, "tiles")
    rows = work_items(work, block, block, "persistent")
    blocks = range(-(-work.seqlen_k // block))
    gemm1 = accesses(
        (Q, ROW, 0, 0, -1, d, e, 0, 0), (K, KV, 0, 0, -1, d, e, 0, 0), (s, PAIR, 0, 0, -1, 0, e, 1, 0)
    )  # fmt: skip
    softmax = accesses(*[(t, PAIR, 0, j, j, 0, e, write, 0) for j in blocks for t, write in ((s, 0), (p, 1))])
    loads = [(p, PAIR, 0, j, j, 0, e, 0, 0) for j in blocks], [(V, KV, 0, j, j, d, e, 0, 0) for j in blocks]
    gemm2 = accesses(*[row for pair in zip(*loads, strict=True) for row in pair], (O, ROW, 0, 0, -1, d, e, 1, 0))
    kernels = (tiles, gemm1), (rows, softmax), (rows, gemm2)
    return [Launch(items, reads, 132, block, block) for items, reads in kernels]


@pytest.mark.parametrize(("seqlen", "through_hbm"), [(1000, False), (8192, True)])
def test_kernels_of_one_call_hand_s_over_in_l2_only_while_it_fits(seqlen, through_hbm):
    work = Workload(batch=1, heads=4, seqlen=seqlen, head_dim=64)
    names = [*NAMES, TensorLayout("S"), TensorLayout("P")]
    traffic, hits, *_ = replay_traffic(work, standard(work, 128), names, H200)
    scores = 4 * seqlen * seqlen * 2
    for name in "SP":
        moved = traffic.by_tensor[name]
        assert moved.algorithmic_read == moved.algorithmic_write == moved.l2_read == moved.hbm_write == scores
        assert moved.hbm_read == (pytest.approx(scores, rel=0.15) if through_hbm else 0)
        assert hits[name] == pytest.approx(1 - moved.hbm_read / scores)


def test_heads_that_hand_more_than_l2_to_each_other_move_alike(monkeypatch):
    """What four of them move says what twelve do: to the byte where the algorithm says it, in HBM within a thousandth."""
    work = Workload(batch=2, heads=6, seqlen=4096, head_dim=64)
    device = replace(H200, l2_bytes=6 << 20)
    launches = standard(work, 128)
    assert traffic_module.alike_heads(work, launches, device) == 12
    tensors = [*NAMES, TensorLayout("S"), TensorLayout("P")]
    few, hits, _, moved = replay_traffic(work, launches, tensors, device)
    monkeypatch.setattr(traffic_module, "ALIKE_HEADS", 100)
    whole, whole_hits, _, whole_moved = replay_traffic(work, launches, tensors, device)
    for name in whole.by_tensor:
        a, b = few.by_tensor[name], whole.by_tensor[name]
        assert (a.algorithmic_read, a.l2_read, a.l2_write) == (b.algorithmic_read, b.l2_read, b.l2_write)
    assert few.total("hbm_read") == pytest.approx(whole.total("hbm_read"), rel=2e-3)
    assert few.total("hbm_write") == whole.total("hbm_write") and few.dirty_bytes == pytest.approx(whole.dirty_bytes, rel=0.1)
    assert few.l2_lookup_bytes == pytest.approx(whole.l2_lookup_bytes, rel=0.02)
    assert hits == pytest.approx(whole_hits, abs=0.01)
    assert [each.l2 for each in moved] == [each.l2 for each in whole_moved]


def test_heads_are_not_alike_where_l2_holds_what_they_hand_over_or_they_are_walked_together():
    work = Workload(batch=1, heads=12, seqlen=4096, head_dim=64)
    device = replace(H200, l2_bytes=6 << 20)
    assert traffic_module.alike_heads(work, standard(work, 128), H200) == 0
    assert traffic_module.alike_heads(work, [forward(work, 128, 128)], device) == 0
    mixed = [replace(each, items=np.roll(each.items, 5)) for each in standard(work, 128)]
    assert traffic_module.alike_heads(work, mixed, device) == 0
    shared = replace(work, kv_heads=6)
    assert traffic_module.alike_heads(shared, standard(shared, 128), device) == 0


def test_what_each_launch_moves_adds_up_to_the_call():
    work = Workload(batch=1, heads=4, seqlen=2048, head_dim=64)
    launches = standard(work, 128)
    traffic, *_, moved = replay_traffic(work, launches, [*NAMES, TensorLayout("S"), TensorLayout("P")], H200)
    total = traffic.total
    assert len(moved) == len(launches)
    assert sum(each.l2 for each in moved) == total("l2_read") + total("l2_write")
    assert sum(each.hbm for each in moved) == total("hbm_read") + total("hbm_write")
    assert sum(each.lookups for each in moved) == traffic.l2_lookup_bytes + total("l2_write")
    assert moved[0].l2 > 0 and moved[-1].hbm >= traffic.dirty_bytes > 0


def test_kernels_that_cut_a_shared_tensor_differently_are_refused():
    work = Workload(batch=1, heads=1, seqlen=512)
    with pytest.raises(ValueError, match="is cut as"):
        replay_traffic(work, [forward(work, 128, 128), forward(work, 128, 64)], NAMES, H200)


def test_a_cluster_fetches_keys_once_for_its_ctas():
    work = Workload(batch=1, heads=4, seqlen=2048, head_dim=128)
    alone, *_ = replay_traffic(work, [forward(work, 128, 128)], NAMES, H200)
    pairs, *_ = replay_traffic(work, [forward(work, 128, 128, cluster=2)], NAMES, H200)
    for name in "KV":
        assert pairs.by_tensor[name].algorithmic_read == alone.by_tensor[name].algorithmic_read
        assert 2 * pairs.by_tensor[name].l2_read == alone.by_tensor[name].l2_read
    assert pairs.by_tensor["Q"] == alone.by_tensor["Q"]


def test_a_cluster_across_two_heads_fetches_for_each():
    work = Workload(batch=1, heads=2, seqlen=384, head_dim=128)  # three query tiles: the second pair has both heads
    traffic, *_ = replay_traffic(work, [forward(work, 128, 128, cluster=2)], NAMES, H200)
    assert traffic.by_tensor["K"].l2_read == 4 * 384 * 128 * 2  # tiles 0+1, 2 | head 1: 0, 1+2


def test_a_ragged_problem_moves_only_valid_rows():
    work = Workload(batch=1, heads=1, seqlen_q=130, seqlen_k=300, head_dim=64)
    of = replay_traffic(work, [forward(work, 128, 176)], NAMES, H200)[0].by_tensor
    assert of["Q"].algorithmic_read == 130 * 64 * 2
    assert of["K"].algorithmic_read == 2 * 300 * 64 * 2
    assert of["O"].hbm_write == 130 * 64 * 2
    assert of["LSE"].hbm_write == 130 * 4


def test_rows_that_see_no_key_still_write_zeros():
    work = Workload(batch=1, heads=1, seqlen_q=512, seqlen_k=128, head_dim=64, causal=True)
    launch = forward(work, 128, 128)
    assert list(launch.items["blocks"]) == [0, 0, 0, 1]
    of = replay_traffic(work, [launch], NAMES, H200)[0].by_tensor
    assert of["O"].hbm_write == work.tensor_bytes["O"]
    assert of["LSE"].hbm_write == work.tensor_bytes["LSE"]
    assert of["K"].algorithmic_read == work.tensor_bytes["K"]


def test_who_walks_with_the_first_to_ask_waits_for_hbm_too():
    work = Workload(batch=1, heads=1, seqlen=1024, head_dim=128)  # eight tiles of queries
    _, hits, late, _ = replay_traffic(work, [forward(work, 128, 128)], NAMES, H200)
    assert hits["K"] == pytest.approx(7 / 8) and late["K"] == pytest.approx(1.0)  # all eight at once
    _, hits, late, _ = replay_traffic(work, [forward(work, 128, 128, slots=2)], NAMES, H200)
    assert hits["K"] == pytest.approx(7 / 8) and late["K"] == pytest.approx(1 / 4)  # two, then two who find it all in L2
    assert late["Q"] == 1.0 and hits["Q"] == 0.0


def test_equal_inputs_give_equal_traffic():
    work = Workload(batch=2, heads=4, seqlen=4096, causal=True)
    launch = forward(work, 128, 128, "longest-first")
    assert replay_traffic(work, [launch], NAMES, H200) == replay_traffic(work, [launch], NAMES, H200)


def test_tma_delivers_the_rows_of_a_box_that_lie_beyond_the_tensor():
    """As an H200 counts them between L2 and SMs, zeros as well; HBM and the algorithm know nothing of them."""
    work = Workload(1, 1, 1000, 64)
    plain = forward(work, 192, 192)
    found = {boxes: replay_traffic(work, [replace(plain, boxes=boxes)], NAMES, H200)[0].by_tensor for boxes in (False, True)}
    row, tiles = 64 * 2, 6
    assert found[False]["K"].l2_read == tiles * 1000 * row and found[True]["K"].l2_read == tiles * tiles * 192 * row
    assert found[False]["Q"].l2_read == 1000 * row and found[True]["Q"].l2_read == tiles * 192 * row
    for name in "QKVO":
        bare, boxed = found[False][name], found[True][name]
        assert (bare.hbm_read, bare.algorithmic_read, bare.l2_write) == (boxed.hbm_read, boxed.algorithmic_read, boxed.l2_write)
