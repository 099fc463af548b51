"""Tile order: every item exactly once, in the order of the real kernel, with the right loop length and masks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasim.simulator.errors import UsageError
from fasim.simulator.problem.order import ITEM, ORDERS, SECTION_BYTES, SHIPPED_SECTION_BYTES, work_items
from fasim.simulator.problem.workload import Workload
from fasim.simulator.schedules import SCHEDULES

BLOCKS = st.sampled_from([(64, 64), (128, 128), (128, 176), (64, 256), (192, 128)])


@st.composite
def workloads(draw):
    kv_heads = draw(st.integers(1, 3))
    return Workload(
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        seqlen_q=draw(st.integers(1, 700)),
        seqlen_k=draw(st.integers(1, 700)),
        head_dim=64,
        causal=draw(st.booleans()),
    )


def mask(workload):
    """(query, key) pairs that are computed, from the definition."""
    q = np.arange(workload.seqlen_q)[:, None]
    k = np.arange(workload.seqlen_k)[None, :]
    seen = np.ones((workload.seqlen_q, workload.seqlen_k), bool)
    return seen & (k <= q + workload.seqlen_k - workload.seqlen_q) if workload.causal else seen


@given(workload=workloads(), blocks=BLOCKS, order=st.sampled_from(["grid", "persistent", "longest-first"]))
def test_each_query_tile_comes_once_with_the_blocks_its_mask_asks_for(workload, blocks, order):
    block_m, block_n = blocks
    items = work_items(workload, block_m, block_n, order)
    m_tiles = -(-workload.seqlen_q // block_m)
    assert items.dtype == ITEM
    assert sorted(zip(items["q_head"], items["m"], strict=True)) == [
        (head, m) for head in range(workload.batch * workload.heads) for m in range(m_tiles)
    ]
    seen = mask(workload)
    for item in items[items["q_head"] == 0]:
        tile = seen[item["m"] * block_m : (item["m"] + 1) * block_m]
        visible = [tile[:, n : n + block_n].any() for n in range(0, workload.seqlen_k, block_n)]
        whole = [
            tile[:, n : n + block_n].all() and n + block_n <= workload.seqlen_k
            for n in range(0, workload.seqlen_k, block_n)
        ]
        assert item["blocks"] == sum(visible)
        assert item["masked"] == sum(v and not w for v, w in zip(visible, whole, strict=True))
        assert not any(whole[item["blocks"] - item["masked"] : item["blocks"]]), "masked blocks are the last ones"


@given(workload=workloads(), blocks=BLOCKS, order=st.sampled_from(ORDERS))
def test_a_query_head_reads_its_groups_key_head(workload, blocks, order):
    items = work_items(workload, *blocks, order)
    batch, head = np.divmod(items["q_head"], workload.heads)
    assert np.array_equal(items["kv_head"], batch * workload.kv_heads + head // workload.heads_per_kv)


def sequence(order, fields=("q_head", "m"), **sizes):
    items = work_items(Workload(**{"batch": 2, "heads": 2, "seqlen": 256, **sizes}), 128, 128, order)
    return [tuple(int(item[field]) for field in fields) for item in items]


def test_grid_runs_query_tiles_then_batch_then_heads():
    assert sequence("grid") == [(0, 0), (0, 1), (2, 0), (2, 1), (1, 0), (1, 1), (3, 0), (3, 1)]


def test_persistent_runs_query_tiles_then_heads_then_batch():
    assert sequence("persistent") == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]


def test_longest_first_takes_the_last_query_tiles_of_a_section_first():
    assert sequence("longest-first", causal=True) == [
        (0, 1), (1, 1), (2, 1), (3, 1), (0, 0), (1, 0), (2, 0), (3, 0)
    ]  # fmt: skip


def test_a_section_holds_a_power_of_two_of_heads_whose_keys_and_values_fit():
    workload = Workload(batch=1, heads=7, seqlen=8192, head_dim=128, causal=True)  # 4 MiB a head: four fit 16 MiB
    assert 4 * 2 * 8192 * 128 * 2 == SECTION_BYTES
    items = work_items(workload, 128, 128, "longest-first")
    assert list(items["q_head"][:5]) == [0, 1, 2, 3, 0]
    assert list(items["q_head"][4 * 64 : 4 * 64 + 4]) == [4, 5, 6, 4], "the last section is what is left"
    shipped = work_items(workload, 128, 128, "longest-first", section_bytes=SHIPPED_SECTION_BYTES)
    assert list(shipped["q_head"][:8]) == [0, 1, 2, 3, 4, 5, 6, 0], "eight fit FlashAttention-3's"
    longer = Workload(
        batch=1, heads=2, seqlen=131072, head_dim=128, causal=True
    )  # one head is 64 MiB: still one a section
    assert list(work_items(longer, 128, 128, "longest-first")["q_head"][:2]) == [0, 0]
    grouped = Workload(batch=1, heads=8, kv_heads=2, seqlen=65536, head_dim=128, causal=True)  # 32 MiB a K/V head
    assert list(work_items(grouped, 128, 128, "longest-first")["q_head"][:5]) == [0, 1, 2, 3, 0]


def test_heads_gives_one_item_per_head_with_every_block():
    items = work_items(Workload(batch=2, heads=3, seqlen=300), 64, 128, "heads")
    assert len(items) == 6
    assert set(items["blocks"]) == {3}
    assert set(items["m"]) == {0}


def test_tiles_gives_every_pair_of_tiles():
    assert sequence("tiles", ("q_head", "m", "n"), batch=1) == [
        (h, m, n) for h in range(2) for m in range(2) for n in range(2)
    ]
    items = work_items(Workload(batch=1, heads=1, seqlen=256, causal=True), 128, 128, "tiles")
    assert list(items["masked"]) == [1, 1, 0, 1]
    assert set(items["blocks"]) == {1}


def test_an_unknown_order_is_refused():
    with pytest.raises(UsageError, match="'zigzag' is not known.*grid"):
        work_items(Workload(batch=1, heads=1, seqlen=128), 64, 64, "zigzag")


def test_each_kernel_walks_the_sections_of_its_source():
    walked = {name: schedule.kernels[0].section_bytes for name, schedule in SCHEDULES.items() if schedule.kernels[0].persistent}
    assert {size for name, size in walked.items() if name.endswith("published")} == {SHIPPED_SECTION_BYTES}
    assert {size for name, size in walked.items() if not name.endswith("published")} == {SECTION_BYTES}
