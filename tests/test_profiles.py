"""Profiles of compiled kernels: made again they are the same, and what the model estimates is what they hold."""

from __future__ import annotations

from collections import Counter

import pytest
from estimates import ARITHMETIC, estimated_block

from fasim.kernels.compile import build, disassemble, profile
from fasim.kernels.cuda.config import config_for
from fasim.simulator.code import profiles, softmax
from fasim.simulator.code.pipeline import Pipeline
from fasim.simulator.language.check import check
from fasim.simulator.language.ops import Op
from fasim.simulator.predict import predict, programs
from fasim.simulator.problem.workload import Workload
from fasim.simulator.schedules import adopt

OURS, FA3 = profiles.load(profiles.OURS), profiles.load("fa3-fwd-0.0.3")


def named(each: profiles.Profile) -> str:
    return f"{each.schedule}-d{each.head_dim}-{each.dtype}-{'causal' if each.causal else 'full'}"


AGAIN = (("fa3", 128, True), ("pingpong", 64, False), ("overlap-3stage", 256, True))


@pytest.mark.parametrize(("schedule", "head_dim", "causal"), AGAIN)
def test_ours_made_again_is_what_is_kept(schedule, head_dim, causal):
    if build.compiler_version() is None:
        pytest.skip("NVRTC is not installed")
    config = config_for(schedule, "fp16", head_dim, causal)
    built = build.build(config.source)
    try:
        (code,) = disassemble.of_cubin(built.cubin)
    except disassemble.MissingDisassembler:
        pytest.skip("no disassembler: it comes with CUDA and with Triton's wheel")
    again = profile.of_ours(config, code, built.report.compiler)
    (kept,) = (each for each in OURS if (each.schedule, each.head_dim, each.causal) == (schedule, head_dim, causal))
    assert again.sha256 == kept.sha256, "the source has changed: python -m fasim.kernels.compile.profile ours"
    if (again.compiler, again.tool) == (kept.compiler, kept.tool):
        assert again == kept
    assert [block.order for block in again.pipeline.blocks] == [block.order for block in kept.pipeline.blocks]


def test_every_kernel_of_ours_has_a_profile_of_the_source_as_it_is():
    kept = {(each.schedule, each.head_dim, each.causal): each.sha256 for each in OURS}
    assert len(kept) == len(OURS) == 30
    for (schedule, head_dim, causal), digest in kept.items():
        assert config_for(schedule, "fp16", head_dim, causal).source.digest == digest


def test_a_profile_is_read_as_it_was_written():
    for each in (OURS[0], FA3[0]):
        assert Pipeline.from_dict(each.pipeline.to_dict()) == each.pipeline


@pytest.mark.parametrize("kept", OURS, ids=named)
def test_the_order_of_our_machine_code_is_what_its_schedule_records_wait_by_wait(kept):
    """From a tile's first wait to its last, with what is handed back, be the tile one block long or five."""
    name = adopt(f"{named(kept)} in order", kept.pipeline).name
    workload = Workload(1, 1, 2048, kept.head_dim, kept.dtype, kept.causal)

    def said(way: str, blocks: int) -> list[str]:
        (program,) = programs(workload, way, "h200", kv_blocks=blocks)
        rows = [row for row in program.stream(program.warps.index("WG0")) if row["op"] not in (Op.SETUP, Op.COMPUTE)]
        return [program.describe(row) for row in rows]

    for blocks in (1, 2, 5):
        assert said(name, blocks) == said(kept.schedule, blocks)


@pytest.mark.parametrize("kept", OURS, ids=named)
def test_the_estimate_of_our_kernels_counts_what_their_machine_code_has(kept):
    """By pipe within a tenth; test_cuda_kernels.py counts the rest, of every variant."""
    counted = sum((block.pipes for block in kept.pipeline.blocks), Counter())
    estimated = estimated_block(kept.schedule, Workload(1, 1, 8192, kept.head_dim, kept.dtype, kept.causal))
    for pipe in ARITHMETIC:
        assert estimated[pipe] == pytest.approx(counted[pipe] / len(kept.pipeline.blocks), rel=0.1), pipe


@pytest.mark.parametrize("kept", FA3, ids=named)
def test_flash_attention_3_hands_k_back_and_makes_its_exponentials_where_its_schedule_says(kept):
    block, in_16_bits, d = kept.pipeline.blocks[0], kept.pipeline.element_bytes == 2, kept.head_dim
    order = [(what, tensor) for what, tensor, _ in block.order]
    assert order.index(("finished", "K")) < order.index(("free", "K")) < order.index(("finished", "V"))
    assert not in_16_bits or d < 128 or block.softmax[order.index(("free", "K"))]  # behind the first part
    assert kept.pipeline.takes_turns == (d <= 128 if in_16_bits else d >= 128)
    assert bool(block.ahead) == (in_16_bits and d > 128)  # O is rescaled under the next S
    if kept.pipeline.takes_turns:
        assert order.index(("wait", "K")) < order.index(("take", ""))
    if d in softmax.EARLY[kept.pipeline.element_bytes]:
        share = softmax.EARLY[kept.pipeline.element_bytes][d][kept.causal]
        made = {gap: sum(phase.mufu * phase.chunks for phase in phases) for gap, phases in block.softmax.items()}
        early = sum(count for gap, count in made.items() if gap < block.product_done)
        assert early / sum(made.values()) == pytest.approx(share, abs=0.08)
        if share > 0.1:  # a third of the comparisons at least lie between these exponentials
            segments = [part for step in block.steps for part in step.code]
            between = sum(part.pipes.get("alu", 0) for part in segments if part.pipes.get("mufu"))
            assert between > sum(part.pipes.get("alu", 0) for part in segments) / 3


def test_v_of_8_bits_is_loaded_first_and_transposed_on_its_way():
    """Be a tile one block long or three: no warp waits for what never comes."""
    theirs = [each for each in FA3 if each.pipeline.transposes]
    assert {each.dtype for each in theirs} == {"e4m3"} and len(theirs) == sum(each.dtype == "e4m3" for each in FA3)
    kept = next(each for each in theirs if each.head_dim == 128)
    name = adopt("kept in 8 bits", kept.pipeline).name
    for blocks in (1, 3):
        (program,) = programs(Workload(1, 1, 2048, 128, "e4m3"), name, "h200", kv_blocks=blocks)
        check(program)
        producer = [program.describe(row) for row in program.stream(program.warps.index("producer")) if row["op"] == Op.LOAD]
        assert producer[:3] == ["load V[0]", "load K[0]", "load Q[0]"] and len(producer) == 1 + 2 * blocks


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_kept_kernel_is_predicted_without_its_file(head_dim):
    kept = next(each for each in FA3 if (each.head_dim, each.dtype, each.causal) == (head_dim, "bf16", True))
    workload = Workload(1, 8, 1024, head_dim, "bf16", causal=True)
    names = adopt(f"kept d{head_dim}", kept.pipeline).name, "fa3-published"
    found, estimated = (predict(workload, name, "h200", clock_hz=1.5e9) for name in names)
    assert found.tile == estimated.tile
    assert found.cycles == pytest.approx(estimated.cycles, rel=0.1)


def test_weights_that_go_through_shared_memory_are_put_there():
    """FlashAttention-3's full kernel at d64, 192 x 192."""
    (kept,) = (each for each in FA3 if (each.head_dim, each.dtype, each.causal) == (64, "bf16", False))
    workload = Workload(1, 16, 2048, 64, "bf16")
    name = adopt("kept d64 full", kept.pipeline).name
    (program,) = programs(workload, name, "h200", kv_blocks=4)
    assert not kept.pipeline.weights_in_registers and "put P" in program.labels
    assert program.smem_parts["P"] == 192 * 192 * 2
    found, estimated = (predict(workload, each, "h200", clock_hz=1.5e9).cycles for each in (name, "fa3-published"))
    assert found == pytest.approx(estimated, rel=0.05)
