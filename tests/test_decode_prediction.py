"""The schedule "decode": what its kernels read and write, and its time beside the recorded kernel's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

import fasim
from fasim.simulator.devices.device import load_device
from fasim.simulator.errors import UsageError
from fasim.simulator.predict import default_tile, predict, programs
from fasim.simulator.problem import parts
from fasim.simulator.problem.tile import Tile
from fasim.simulator.problem.workload import Workload

RECORD = json.loads((Path(fasim.__file__).parent / "traces/recorded/kernels/decode_h200.json").read_text())
AHEAD = (load_device("h200").kernel_launch_cycles - load_device("h200").kernel_train_cycles) / load_device("h200").max_clock_hz
"""Of a call that is replayed behind others, seconds of its launch that lie under the call before."""


def workload_of(row):
    sizes = {"head_dim": row["head_dim"], "kv_heads": row["kv_heads"], "seqlen_q": row["queries"], "seqlen_k": row["keys"]}
    return Workload(row["batch"], row["heads"], dtype="bf16", causal=row["causal"], **sizes)


def rows():
    """One query against at least 32 MiB of K and V, but the two longest, whose replay takes seconds."""
    for row in RECORD["rows"]:
        nbytes = 4 * row["batch"] * row["keys"] * row["kv_heads"] * row["head_dim"]
        if row["queries"] == 1 and 32 << 20 <= nbytes < 8 << 30:
            yield row


def predicted(row):
    work = workload_of(row)
    assert default_tile(work, "decode", "h200").parts == row["parts"]
    return predict(work, "decode", "h200", regime="burst")


def test_one_query_is_predicted_to_5_percent_and_reads_k_and_v_once():
    errors = {}
    for row in rows():
        run = predicted(row)
        cache = 2 * run.workload.tensor_bytes["K"]
        assert cache <= run.traffic.total("hbm_read") < 1.03 * cache
        us = (run.cycles / run.sm_clock_hz - AHEAD) * 1e6
        errors[row["batch"], row["keys"]] = abs(us / row["kernels"]["fasim-decode"]["us"] - 1)
    brief = errors.pop((64, 128))  # 512 CTAs of two blocks: what comes once a CTA is most of it
    assert len(errors) >= 7 and fmean(errors.values()) < 0.05 and max(errors.values()) < 0.16 and brief < 0.25


def test_warps_that_share_a_blocks_keys_read_k_and_v_once_from_shared_memory():
    """By LDSM of the compiled kernel, 16 bytes a lane: 24 a warp and block at 16 rows of d128, for K, V and Q; P takes 4."""
    work = Workload(1, 4, kv_heads=1, seqlen_q=1, seqlen_k=4096)
    walk, _ = programs(work, "decode", "h200", Tile(16, 64, 4, 1, parts=2), kv_blocks=4)
    assert sum(int(each["k_steps"]) * int(each["smem_bytes"]) for each in walk.gemms) == 24 * 4 * 512


def test_every_block_of_every_head_is_walked_by_one_part():
    work = Workload(2, 8, kv_heads=2, seqlen_q=3, seqlen_k=64 * 21 + 5)
    tile = Tile(16, 64, 4, 1, parts=5)
    items = parts.part_items(work, tile)
    assert len(items) == 2 * 2 * 5 and sorted(set(items["blocks"].tolist())) == [4, 5]
    for head in range(4):
        mine = items[items["kv_head"] == head]
        walked = [n for item in mine for n in range(item["n"], item["n"] + item["blocks"])]
        assert sorted(walked) == list(range(22)) and sorted(mine["m"].tolist()) == list(range(5))
    assert parts.rows_of(work, tile) == 12 and parts.packed(work, tile).seqlen_q == 60


def test_parts_are_written_in_fp32_and_read_once_by_the_combine():
    run = predict(Workload(1, 32, kv_heads=8, seqlen_q=1, seqlen_k=8192, dtype="bf16"), "decode", "h200")
    count, rows = run.tile.parts, 32
    assert [name for name, _ in run.kernels] == ["walk_part", "combine"] and count > 1
    moved = run.traffic.by_tensor
    assert moved["Opart"].l2_write == moved["Opart"].l2_read == count * rows * 128 * 4
    assert moved["O"].l2_write == rows * 128 * 2
    alone = predict(run.workload, "decode", "h200", replace(run.tile, parts=1))
    assert [name for name, _ in alone.kernels] == ["walk_part"] and "Opart" not in alone.traffic.by_tensor
    assert alone.cycles > 2 * run.cycles


def test_the_order_of_the_walk_keeps_stages_less_one_on_their_way():
    work = Workload(1, 4, kv_heads=1, seqlen_q=1, seqlen_k=4096)
    tile = Tile(16, 64, 4, 1, parts=2)
    walk, combine = programs(work, "decode", "h200", tile, kv_blocks=6)
    said = [walk.describe(each) for each in walk.stream(0) if walk.describe(each).startswith(("load K", "S="))]
    first = next(i for i, each in enumerate(said) if each.startswith("S="))
    assert said[:first] == ["load K[0]", "load K[1]", "load K[2]"] and said[first + 1] == "load K[3]"
    assert {ring.tensor for ring in combine.rings} == {"Opart", "LSEpart"}


def test_a_schedule_of_tall_tiles_names_decode_where_queries_are_few():
    work = Workload(1, 32, kv_heads=8, seqlen_q=1, seqlen_k=8192)
    assert "--schedule decode does" in predict(work, "fa3", "h200").bottleneck.why
    few = predict(work, "decode", "h200")
    assert "--schedule decode" not in few.bottleneck.why and few.tile.parts == 16
    assert [note for note in few.warnings if "CTAs" in note] == ["only 128 CTAs for 132 SMs: 4 SMs stay idle"]


@pytest.mark.parametrize(
    ("schedule", "count", "message"),
    [
        ("fa3", 2, "'fa3' walks its keys in one part: give --schedule decode for --splits 2"),
        ("decode", 65, "65 parts of 64 blocks of 64 keys leave some without any: give --splits 64 or less"),
    ],
)
def test_parts_that_cannot_be_are_said_in_one_sentence(schedule, count, message):
    work = Workload(1, 4, kv_heads=1, seqlen_q=1, seqlen_k=4096)
    tile = replace(default_tile(work, schedule, "h200"), parts=count)
    with pytest.raises(UsageError, match=message):
        predict(work, schedule, "h200", tile)
