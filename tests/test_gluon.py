"""Every rung in Gluon, compiled without a GPU: its instructions, and that nothing spills where it counts."""

from __future__ import annotations

import csv
import ctypes
import io
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton.experimental.gluon")

import torch

from fasim.kernels import ops
from fasim.kernels.cuda import driver
from fasim.kernels.gluon import config as gluon
from fasim.kernels.launch.arguments import ArgumentBlock
from fasim.kernels.measure import beside_gluon, check_gluon, names, stalls
from fasim.simulator.code.pipeline import Pipeline
from fasim.simulator.errors import UsageError
from fasim.simulator.language.ops import Op
from fasim.simulator.predict import predict, programs
from fasim.simulator.problem.workload import Workload
from fasim.simulator.schedules import adopt, find_schedule

CONFIGS = [
    gluon.config_for("tma", "bf16", 128, True),
    gluon.config_for("warp-specialized", "fp16", 64, False),
    gluon.config_for("pingpong", "bf16", 64, True),
    gluon.config_for("overlap-2stage", "fp16", 256, False),
    gluon.config_for("fa3", "bf16", 128, True),
    gluon.config_for("persistent", "bf16", 128, True),
    gluon.config_for("bounded", "bf16", 128, True),
    gluon.candidates("fp16", 64, True, 64)["bounded 128x128 mbarriers"],
    gluon.candidates("fp16", 64, False, 64)["persistent 192x64 mbarriers"],
]
each = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name.replace(" ", "-"))

# In a process of its own: Triton's interpreter, once chosen for other tests, is chosen for Gluon's library too.
COMPILE = """
import json, sys
from collections import Counter
from fasim.kernels.compile import disassemble
from fasim.kernels.gluon import build, config
from fasim.kernels.measure import code_of_gluon
from fasim.simulator.code import loop_reader, sass
for given in sys.argv[1:]:
    asked = config.GluonConfig(**json.loads(given))
    built = build.build(asked)
    (code,) = disassemble.of_cubin(built.cubin)
    opcodes = [each.name for each in code.instructions]
    # Over K and V: a block's two GEMMs. Around them lies the loop over tiles.
    loops = [loop for loop in sass.loops(code) if loop.scores and sum(point.what == "gemm" for point in loop.points) == 2]
    local = sum(opcode in ("LDL", "STL") for loop in loops for opcode in opcodes[loop.start : loop.end + 1])
    steps = [[point.steps for point in loop.points if point.what == "gemm"] for loop in loops]
    hands = [opcode for loop in loops for opcode in opcodes[loop.start : loop.end + 1] if opcode in ("BAR", "SYNCS")]
    print(json.dumps({"name": asked.name, "opcodes": Counter(opcodes), "local": local, "steps": steps,
                      "row": code_of_gluon.row_of("gluon-" + asked.schedule, built.compiler, asked.head_dim, asked.causal, code),
                      "hands": [hands.count(what) / len(loops) for what in ("BAR", "SYNCS")],
                      "threads": [built.threads, code.threads], "smem": built.smem_bytes,
                      "pipeline": loop_reader.read(code).to_dict()}))
"""


def said_by(*command: str) -> list[dict]:
    """What another Python says, line by line."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled():
    """Name -> what its code is made of."""
    return {found["name"]: found for found in said_by("-c", COMPILE, *(json.dumps(asdict(config)) for config in CONFIGS))}


@pytest.fixture(scope="module")
def limits():
    """What is seen of Gluon's limits."""
    (found,) = said_by(str(Path(__file__).with_name("gluon_limits.py")))
    return found


MENDED = "this Triton mends it: take the detour out of kernels/gluon, and the sentence out of docs/triton.md"


def test_a_gemm_in_flight_where_a_loop_turns_is_serialised(limits):
    """So each step of the ladder waits for all that it issues."""
    assert limits["fences"] == limits["gemms"], MENDED


def test_exponentials_sink_behind_the_wait_that_they_are_written_before(limits):
    """So kernels.gluon.verbs.made_here holds them."""
    assert limits["behind"] > limits["exponentials"] // 2, MENDED


def test_an_arrival_takes_a_barrier_of_the_whole_partition(limits):
    assert limits["barriers"] == 5, MENDED


def test_a_barrier_of_the_whole_partition_stands_between_two_waits_for_an_mbarrier(limits):
    """A wait only reads; Triton takes it for a write."""
    assert limits["between waits"] == 4, MENDED


def test_tiles_have_powers_of_two(limits):
    assert limits["columns"] == "powers of two", MENDED


@each
def test_it_loads_by_tma_multiplies_by_wgmma_and_spills_nothing_in_its_walk(compiled, config):
    found = compiled[config.name]
    assert found["opcodes"]["HGMMA"] and found["opcodes"]["UTMALDG"] and found["opcodes"]["UTMASTG"]
    assert "HMMA" not in found["opcodes"] and found["local"] == 0
    assert found["smem"] <= 227 * 1024


@each
def test_its_gemms_are_issued_whole_two_a_block(compiled, config):
    """A WGMMA that is a group of its own was serialised by the assembler."""
    steps = compiled[config.name]["steps"]
    scores, values = config.head_dim // 16, config.block_n // 16
    loops = 1 if config.one_partition else config.consumers * (1 + config.masked)  # with a mask and without
    assert len(steps) >= loops
    assert all(each == [scores, values] for each in steps)


@each
def test_its_partitions_have_the_threads_it_is_launched_with(compiled, config):
    threads = 256 if config.one_partition else 128 * (1 + config.consumers)
    assert compiled[config.name]["threads"] == [threads, threads]
    assert ("USETMAXREG" in compiled[config.name]["opcodes"]) is not config.one_partition


def adopted(found: dict) -> tuple[str, Pipeline]:
    pipeline = Pipeline.from_dict(found["pipeline"])
    return adopt(f"gluon {found['name']}", pipeline).name, pipeline


@each
def test_its_order_is_its_schedules_wait_by_wait(compiled, config):
    """From a tile's first wait to its last product, with what is handed back; but Q goes back where O has left, and consumers
    of two rungs wait for K and V before they take their turn."""
    name, pipeline = adopted(compiled[config.name])
    tile = find_schedule(name).tile
    assert pipeline.persistent == (not config.one_partition)
    if config.one_partition:
        return
    assert (tile.block_m, tile.block_n, tile.stages) == (config.block_m, config.block_n, config.stages)

    def said(way: str) -> list[str]:
        workload = Workload(1, 1, 2048, config.head_dim, config.dtype, config.causal)
        (program,) = programs(workload, way, "h200", tile=tile, kv_blocks=5)
        rows = [row for row in program.stream(program.warps.index("WG0")) if row["op"] not in (Op.SETUP, Op.COMPUTE)]
        return [line for line in map(program.describe, rows) if not re.search(r"free Q|store|claim", line)]

    found, expected = " | ".join(said(name)), " | ".join(said(ORDERS.get(config.schedule, config.schedule)))
    assert found == re.sub(*TURN_BEHIND_WAITS.get(config.schedule, ("$", "")), expected)


ORDERS = dict.fromkeys(gluon.QUEUED, "fa3")
TURN_BEHIND_WAITS = {
    "pingpong": (r"take turn \| (wait V\S+)", r"\1 | take turn"),
} | dict.fromkeys(gluon.QUEUED, (r"take turn \| (wait K\S+)", r"\1 | take turn"))
RECORDED = json.loads((Path(__file__).parents[1] / "traces/recorded/kernels/gluon_two_compilers_h200.json").read_text())


ONCE_A_TILE = "+10.9 %: what a kernel without a producer executes once a tile, read from Triton's fa2, is too much of it (was +6.5)"


@pytest.mark.parametrize("config", [
    pytest.param(CONFIGS[0], id="tma", marks=pytest.mark.xfail(reason=ONCE_A_TILE, strict=True)),
    pytest.param(CONFIGS[4], id="fa3"),
])  # fmt: skip
def test_its_machine_code_predicts_the_recorded_time(compiled, config):
    """Causal, 16 x 16 x 1024 at head_dim 128, by Triton 3.9: tiles of unlike length, dealt as CTAs end or in a fixed stride."""
    name, _ = adopted(compiled[config.name])
    asked = ("gluon-" + config.schedule, "Triton 3.9.0", 128, True)
    (row,) = (row for row in RECORDED["rows"] if (row["kernel"], row.get("compiler"), row["head_dim"], row["causal"]) == asked)
    workload = Workload(row["batch"], row["heads"], row["seqlen_q"], row["head_dim"], row["dtype"], row["causal"])
    found = predict(workload, name, "h200", regime="burst", spans=False)
    assert 1e3 * found.cycles / found.sm_clock_hz == pytest.approx(row["median_ms"], rel=0.08)


def test_named_barriers_take_the_place_of_mbarriers_and_of_the_barriers_before_them(compiled):
    """A step of `fa3` has three arrivals behind a barrier each, and awaits K, V and the turn; else it awaits K and V alone.

    As Triton 3.6 compiles it there are four barriers (`gluon_code.json`).
    """
    fa3 = compiled["fa3 bf16 d128 causal"]
    assert fa3["hands"] == [4 if fa3["row"]["compiler"].startswith("Triton 3.6") else 3, 6]
    assert compiled["persistent bf16 d128 causal"]["hands"] == [5, 2]


def test_what_a_block_costs_is_as_recorded(compiled):
    """Where this Triton is one of those that the record is of."""
    recorded = json.loads((names.ROOM.parent / "traces" / "recorded" / "kernels" / "gluon_code.json").read_text())["rows"]
    rows = [compiled[f"{rung} bf16 d128 causal"]["row"] for rung in ("tma", "fa3", "persistent")]
    assert rows[1]["instructions"] > 400 and all(sum(row["groups"].values()) == row["instructions"] for row in rows)
    if any(row["compiler"] == rows[0]["compiler"] for row in recorded):
        assert all(row in recorded for row in rows)


def test_pairs_are_carried_as_they_are(compiled):
    """16-bit elements would be unpacked and packed at the loop's edge, element by element."""
    assert not compiled["persistent bf16 d128 causal"]["opcodes"].get("PRMT", 0) > 8


def test_the_argument_block_is_tritons(monkeypatch):
    """Four tensor maps, each with four sizes and strides, LSE, whole numbers and the scale, two pointers to scratch memory."""
    monkeypatch.setattr(driver, "library", lambda: SimpleNamespace(cuLaunchKernel=SimpleNamespace()))
    signature = [(name, "tensordesc<bf16[1,1,64,128],NVMMASharedLayout(..)>") for name in "qkvo"]
    block = ArgumentBlock([*signature, ("lse", "*fp32"), ("heads", "i32"), ("stride", "i64"), ("scale_log2", "fp32")])
    assert block.maps == {"q": 0, "k": 9, "v": 18, "o": 27} and len(block.pointers) == 4 * 9 + 4 + 2
    block.values["stride"].value = 1 << 40
    assert ctypes.c_int64.from_address(block.pointers[38]).value == 1 << 40


def test_a_backend_is_asked_for_by_name():
    q = torch.zeros(1, 4, 1, 64).half()
    for schedule in (*gluon.SCHEDULES, "auto"):
        with pytest.raises(UsageError, match="the Gluon kernels run on an H100 or H200"):
            ops.flash_attn_func(q, q, q, schedule=schedule, backend="gluon")
    with pytest.raises(UsageError, match="backend='mojo' is not known \\(auto, triton, cuda, gluon\\)"):
        ops.flash_attn_func(q, q, q, backend="mojo")
    for backend, schedule in (("gluon", "fa1"), ("cuda", "fa2"), ("triton", "tma")):
        with pytest.raises(UsageError, match=f"schedule='{schedule}' has no kernel in backend='{backend}'"):
            ops.flash_attn_func(q, q, q, schedule=schedule, backend=backend)


@pytest.mark.parametrize("schedule", gluon.SCHEDULES)
def test_its_files_and_its_tile_are_known_to_the_measurement(schedule):
    name = gluon.PREFIX + schedule
    assert names.implementation_of(name) == "gluon"
    assert all(path.is_file() for path in gluon.sources_of(schedule))
    tile = names.tile_of(name, Workload(1, 4, 1024, 128, "bf16", True))
    assert (tile.block_m, tile.block_n, tile.stages, tile.consumers) == (128, 128, 2, 2)


def test_every_form_that_there_might_be_is_checked_and_timed():
    workload = Workload(1, 32, 1024, 64, "bf16", False)
    forms = gluon.candidates("bf16", 64, False, 1024)
    assert len(forms) == 8 and gluon.config_for("persistent", "bf16", 64, False, 1024) in forms.values()
    assert all(beside_gluon.config_of(name, workload) == config for name, config in forms.items())
    checked = {config for part in check_gluon.PARTS for _, config, _ in check_gluon.cases(part, gluon.HEAD_DIMS)}
    assert {*forms.values(), *gluon.variants()} <= checked


def test_a_check_that_hangs_takes_no_other_with_it(tmp_path):
    """What a part had written before it was killed is kept, and says which check did not end."""
    hung, broken = check_gluon.PARTS[-2:]
    (tmp_path / "check-bounded-named-barriers.json").write_text('{"rows": [{"passed": false}], "runs": []}')
    result = {"parts": {hung: "killed at the deadline", broken: "killed at the deadline"}, "rows": [], "runs": []}
    given = SimpleNamespace(out=tmp_path, head_dims=[64], parts=[hung, broken])
    commands = iter(["import time; time.sleep(60)", "raise SystemExit('no GPU')"])
    check_gluon.side_by_side(given, time.monotonic() + 1, result, lambda part: [sys.executable, "-c", next(commands)], grace_s=2)
    assert result["parts"] == {hung: "killed at the deadline", broken: "no GPU\n"} and result["rows"] == [{"passed": False}]


def test_stalls_are_read_from_the_profilers_table():
    """Launches that did not multiply, such as a library's of a counter, are passed over."""
    known = [reason for reason in stalls.REASONS if reason != "membar"]  # one that another version has by another name
    heads = ["ID", "Kernel Name", *stalls.METRICS, *map(stalls.STALL.format, known)]
    launches = [[number, name, "1,000", tensor, "30", "5", *["0.5"] * len(known)] for number, name, tensor in ROWS]
    table = io.StringIO()
    csv.writer(table, quoting=csv.QUOTE_ALL).writerows([heads, [""] * len(heads), *launches])
    (row,) = stalls.read("==PROF== Connected\n" + table.getvalue(), ["gluon-fa3"])
    assert (row["kernel"], row["entry"], row["cycles"], row["tensor_pct"]) == ("gluon-fa3", "attention_forward", 1000, 80)
    assert set(row["stalls"]) == set(known) and row["stalls"]["barrier"] == 0.5


ROWS = (("0", "fill", "0.0"), ("1", "attention_forward", "80.0"))
