"""The CUDA kernels of the backward without a GPU: registers, shared memory, instructions; and how tiles are shared out."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from fasim.kernels.compile import build
from fasim.kernels.cuda.backward.config import ENTRIES, config_for
from fasim.simulator.errors import UsageError
from fasim.simulator.problem import sums
from fasim.simulator.problem.workload import Workload
from fasim.traces import static_gradients

MAX_SMEM_BYTES = 227 * 1024
CONSUMER_REGISTERS = 232
CONFIGS = [
    config_for("lagged", "bf16", 128, False),
    config_for("lagged", "bf16", 128, True, deterministic=True),
    config_for("lagged", "fp16", 64, False),
    config_for("fa3", "bf16", 128, True),
    config_for("apart", "bf16", 64, True),
    config_for("apart", "fp16", 64, False, deterministic=True),
    config_for("apart", "bf16", 128, False),
    config_for("apart", "fp16", 128, True),
    config_for("across", "bf16", 128, False),
    config_for("across", "fp16", 128, True, deterministic=True),
    config_for("late", "bf16", 128, False),
    config_for("relay", "bf16", 256, True),
    config_for("relay", "fp16", 256, False, deterministic=True),
]
each = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name.replace(" ", "-"))
compiles = pytest.mark.skipif(build.compiler_version() is None, reason="NVRTC is not installed")


@pytest.fixture(scope="module")
def compiled():
    """(config, part) -> its Built, or its CompileError."""
    keys = [(config, part) for config in CONFIGS for part in ENTRIES]
    return dict(zip(keys, build.build_all([config.source(part) for config, part in keys]), strict=True))


@compiles
@each
def test_every_part_compiles_without_spills_within_the_shared_memory(compiled, config):
    for part in ENTRIES:
        found = compiled[config, part]
        assert isinstance(found, build.Built), found
        report = found.report
        assert (report.spill_bytes, report.stack_bytes, report.remarks) == (0, 0, ()), part
        assert report.smem_bytes <= MAX_SMEM_BYTES


@compiles
@each
def test_the_main_kernel_has_five_gemms_and_the_means_of_its_schedule(compiled, code_of, config):
    code = code_of(compiled[config, "main"].cubin).instructions
    opcodes = Counter(each.name for each in code)
    assert opcodes["UTMALDG"] and opcodes["UBLKRED"] and opcodes["STSM"] and opcodes["UTMASTG"]
    assert not {"HMMA", "LDL", "STL", "UBLKCP"} & opcodes.keys()  # all that is loaded has a tensor map
    shapes = Counter(re.match(r"HGMMA\.64x(\d+)x16", each.opcode)[1] for each in code if each.name == "HGMMA")
    queries, head_dim, keys = config.tile.block_m, config.head_dim, config.tile.block_n
    steps = Counter({str(queries): 2 * head_dim // 16})  # S and dP
    if head_dim == 256:  # of two warpgroups that do not do the same
        steps["128"] += 2 * 2 * queries // 16
        steps["64"] += 4 * keys // 16
    else:
        steps[str(head_dim)] += 2 * queries // 16  # dV and dK
        steps["64" if queries % 64 == 0 else str(queries)] += keys // 16  # dQ, or across where a GEMM's 64 rows are not its queries
    assert all(shapes[n] >= count for n, count in steps.items()) and shapes.keys() == steps.keys()
    highest = max(int(register) for each in code for register in re.findall(r"\bR(\d+)\b", each.operands))
    assert highest < CONSUMER_REGISTERS


def differs(kernel, config) -> str:
    """Whether the main loop of a compiled kernel is its schedule's."""
    workload = Workload(1, 1, 8448, config.head_dim, config.dtype, config.causal, direction="backward")
    return static_gradients.differs(kernel, config.schedule, workload, config.tile)


@compiles
@each
def test_waits_gemms_barriers_and_arithmetic_stand_in_the_machine_code_as_the_schedule_says(compiled, code_of, config):
    if config.schedule == "relay":
        pytest.skip("its warpgroups have loops of their own, of which one is read")
    assert differs(code_of(compiled[config, "main"].cubin), config) == ""


VALIDATED = Path(__file__).parents[1] / "traces/recorded/backward/validation/machine_code.sha256"


@compiles
def test_what_was_validated_has_the_machine_code_that_it_had(compiled):
    if build.compiler_version() != "13.0":
        pytest.skip("recorded as NVRTC 13.0 compiles it")
    then = {name: digest for digest, name in (line.split(" ", 1) for line in VALIDATED.read_text(encoding="utf-8").splitlines())}
    now = {}
    for (config, part), built in compiled.items():
        code = b"".join(each for _, each in sorted(build.machine_code(built.cubin).items()))
        now[f"{part}: {config.name}"] = sha256(code).hexdigest()
    assert then.keys() <= now.keys()
    assert {name: now[name] for name in then} == then


PLANTED = {
    "dO handed back before dV is over": (
        "  wg.wait_values<1>(i);\n  wg.free_do(i);\n", "  wg.free_do(i);\n  wg.wait_values<1>(i);\n"
    ),
    "dS not handed over before dK": (
        "  wg.share_gradient(i);\n  wg.issue_keys(dS, i, true);\n", "  wg.issue_keys(dS, i, true);\n  wg.share_gradient(i);\n"
    ),
}  # fmt: skip
"""Faults in the step of a copy of lagged: old texts and new ones."""


@compiles
@pytest.mark.parametrize("fault", PLANTED)
def test_an_order_that_the_schedule_does_not_say_is_found(fault, code_of):
    config = config_for("lagged", "bf16", 128, True)
    source, (old, new) = config.source("main"), PLANTED[fault]
    assert old in source.text
    built = build.build(replace(source, text=source.text.replace(old, new, 1)))
    assert "where lagged says" in differs(code_of(built.cubin), config)


def test_what_has_no_kernel_is_said_in_one_sentence():
    with pytest.raises(UsageError, match="schedule='fa9' has no CUDA backward"):
        config_for("fa9", "bf16", 128, causal=False)
    with pytest.raises(UsageError, match="head_dim=96 is not supported"):
        config_for("fa3", "bf16", 96, causal=False)


@compiles
def test_a_compiled_backward_is_refused_as_a_kernel_to_predict_in_one_sentence(compiled, code_of):
    from fasim.simulator.code import loop_reader

    code = code_of(compiled[CONFIGS[0], "main"].cubin)
    with pytest.raises(UsageError, match=r"adds to a sum in memory \(UBLKRED\), as a backward does .* --pass backward"):
        loop_reader.read(code)


def test_tiles_are_shared_where_that_evens_out_the_blocks_of_each_cta():
    launch = pytest.importorskip("fasim.kernels.cuda.backward.launch", exc_type=ImportError)
    assert launch.split_tiles(2048, 64, 132) == 2048 % 132 + 132
    assert launch.split_tiles(132 * 3, 64, 132) == 0  # even already
    assert launch.split_tiles(132 + 131, 64, 132) == 0  # nothing to gain
    assert launch.split_tiles(2048, 4, 132) == 0  # parts too short for what they cost


HAVE_SUMS = {  # batch, heads, K/V heads, length, head dim, causal -> query heads that have sums at a time on 132 SMs
    (4, 16, 16, 4096, 128, True): 12, (16, 16, 16, 1024, 128, True): 48, (1, 16, 16, 16384, 128, True): 3,
    (4, 16, 16, 4096, 128, False): 12, (3, 24, 8, 3584, 128, True): 36, (3, 24, 8, 3584, 128, False): 18,
    (2, 16, 16, 10240, 128, True): 5, (8, 16, 16, 2560, 128, True): 16, (2, 20, 4, 4864, 64, True): 40,
    (1, 2, 1, 16384, 128, True): 2, (4, 8, 8, 4096, 256, True): 6,
}  # fmt: skip


@pytest.mark.parametrize("shape", HAVE_SUMS, ids=str)
def test_heads_that_have_sums_hold_more_work_than_the_longest_tile_and_a_tile_for_every_cta(shape):
    launch = pytest.importorskip("fasim.kernels.cuda.backward.launch", exc_type=ImportError)
    batch, heads, kv_heads, seqlen, head_dim, causal = shape
    config = config_for("relay" if head_dim == 256 else "apart", "bf16", head_dim, causal)
    workload = Workload(batch, heads, seqlen, head_dim, "bf16", causal, kv_heads=kv_heads, direction="backward")
    m_tiles, sharing, ctas = -(-seqlen // config.tile.block_m), heads // kv_heads, 132
    blocks = [m_tiles - first for first in launch.first_blocks(config, seqlen, seqlen)]
    found = launch.ring_heads(launch.section_heads(seqlen, head_dim, sharing), blocks, ctas)
    assert found * sum(blocks) / ctas >= 1.25 * max(blocks) and found * len(blocks) >= ctas + len(blocks)
    ring = min(batch * heads, found * sharing)
    assert ring == sums.ring_heads(workload, config.tile, ctas) == HAVE_SUMS[shape]
    mib = seqlen * head_dim * sums.SUM_BYTES / 2**20
    assert ring * mib <= max(24, (21 + mib) * sharing)


def test_the_first_query_block_that_sees_a_tile_of_keys_is_the_masks():
    launch = pytest.importorskip("fasim.kernels.cuda.backward.launch", exc_type=ImportError)
    causal, full = config_for("lagged", "bf16", 128, True), config_for("lagged", "bf16", 128, False)
    for seqlen_q, seqlen_k in ((300, 300), (100, 500), (500, 100), (1, 1)):
        rows, keys = causal.tile.block_m, causal.tile.block_n
        wanted = [
            min(row for row in range(seqlen_q) if row + seqlen_k - seqlen_q >= key) // rows for key in range(0, seqlen_k, keys)
        ]
        assert launch.first_blocks(causal, seqlen_q, seqlen_k) == wanted
        assert launch.first_blocks(full, seqlen_q, seqlen_k) == [0] * len(wanted)
