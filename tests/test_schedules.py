"""Every schedule: legal at any length, complete in what it loads and multiplies, and true to the idea it is named for."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from fasim.simulator.devices.device import load_device
from fasim.simulator.language.check import check
from fasim.simulator.language.ops import Op
from fasim.simulator.language.program import disassemble, trace
from fasim.simulator.predict import default_tile, predict, programs
from fasim.simulator.problem.workload import Workload
from fasim.simulator.replay.engine import Memory, replay
from fasim.simulator.schedules import SCHEDULES

ROWS = [(name, kernel) for name, s in SCHEDULES.items() for kernel in s.kernels if kernel.grid == "rows"]
ATTENTION = ["fa2", *(name for name, s in SCHEDULES.items() if s.hopper)]
MEMORY = Memory(40.0, 18.0, {}, {})


def program_of(name, head_dim=128, dtype="fp16", loops=((4, 1),), length=8192):
    workload = Workload(1, 16, length, head_dim, dtype)
    tile = default_tile(workload, name, "h200")
    return trace(SCHEDULES[name].kernels[0], workload, tile, loops), workload, tile


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_schedule_is_legal_at_every_length_and_across_tiles(name, head_dim):
    for dtype in SCHEDULES[name].dtypes:
        workload = Workload(1, 2, 300, head_dim, dtype)
        tile = default_tile(workload, name, "h200")
        for kernel in SCHEDULES[name].kernels:
            for loops in ([(1, 1)], [(2, 0)], [(3, 1), (1, 1)], [(5, 2), (2, 2), (0, 0), (7, 1)], [(0, 0)]):
                if kernel.grid == "heads" and (0, 0) in loops:
                    continue  # a CTA of FlashAttention-1 always has a whole head
                check(trace(kernel, workload, tile, loops))


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("loop", [1, 2, 3, 6])
def test_each_block_is_loaded_once_and_multiplied_twice(name, loop):
    program, workload, tile = program_of(name, loops=[(loop, 0)])
    loads = Counter(
        (program.rings[i["ring"]].name, int(i["index"])) for i in program.code[program.code["op"] == Op.LOAD]
    )
    parts = [ring.name for ring in program.rings if ring.tensor == "Q"]
    assert sum(ring.nbytes for ring in program.rings if ring.tensor == "Q") == tile.block_m * workload.head_dim * 2
    wanted = {(q, 0) for q in parts} | {(ring, j) for ring in "KV" for j in range(loop)}
    assert set(loads) == wanted
    assert set(loads.values()) == {1 if SCHEDULES[name].hopper else tile.consumers}
    _, gemms = program.recorded((Op.WGMMA, Op.MMA))
    flops = 2 * (gemms["k_steps"].astype(int) * gemms["m"] * gemms["n"] * gemms["k_per_step"]).sum()
    assert flops == 4 * tile.block_m * tile.block_n * loop * workload.head_dim


@pytest.mark.parametrize("name", ATTENTION)
def test_exp2_is_counted_once_per_score_and_little_more(name):
    program, _, tile = program_of(name, loops=[(8, 0)])
    _, phases = program.recorded(Op.COMPUTE)
    per_thread = (phases["mufu"].astype(int) * phases["chunks"]).sum()
    scores = 8 * tile.block_m * tile.block_n // 128
    assert scores <= per_thread <= 1.08 * scores


def consumer_ops(program, warp="WG0"):
    """(verb, step) of one consumer's GEMMs, waits for GEMMs, and softmaxes, in program order."""
    out = []
    for i in program.stream(program.warps.index(warp)):
        label = program.labels[i["label"]]
        spoken = i["op"] in (Op.WGMMA, Op.WGMMA_WAIT) or label in ("softmax", "take turn", "give turn")
        if spoken and out[-1:] != [(label, int(i["step"]))]:
            out.append((label, int(i["step"])))
    return out


def test_warp_specialized_waits_for_each_gemm_at_once():
    ops = consumer_ops(program_of("warp-specialized")[0])
    assert [label for label, _ in ops[:5]] == ["S=QK^T", "wait S=QK^T", "softmax", "O+=PV", "wait O+=PV"]
    assert not any("turn" in label for label, _ in ops)


def test_pingpong_adds_only_the_turns_to_warp_specialized():
    turns = [label for label, _ in consumer_ops(program_of("pingpong")[0])]
    plain = [label for label, _ in consumer_ops(program_of("warp-specialized")[0])]
    assert [label for label in turns if "turn" not in label] == plain
    assert turns[:3] == ["take turn", "S=QK^T", "give turn"]


def test_two_stage_overlap_issues_pv_of_the_last_block_before_the_softmax_of_this_one():
    ops = consumer_ops(program_of("overlap-2stage")[0])
    for j in (1, 2, 3):
        qk, pv = ops.index(("S=QK^T", j)), ops.index(("O+=PV", j - 1))
        softmax = ops.index(("softmax", j))
        assert qk < pv < softmax < ops.index(("wait O+=PV", -1), softmax)


def test_three_stage_overlap_also_has_the_next_scores_in_flight():
    ops = consumer_ops(program_of("overlap-3stage")[0])
    for j in (1, 2):
        assert ops.index(("O+=PV", j - 1)) < ops.index(("S=QK^T", j + 1)) < ops.index(("softmax", j))


def test_fa3_is_two_stage_overlap_with_turns():
    fa3 = [label for label, _ in consumer_ops(program_of("fa3")[0])]
    plain = [label for label, _ in consumer_ops(program_of("overlap-2stage")[0])]
    assert [label for label in fa3 if "turn" not in label] == plain
    assert fa3.count("take turn") == fa3.count("give turn") == 3


@pytest.mark.parametrize("name", sorted(name for name in SCHEDULES if name.endswith("-published")))
def test_the_papers_own_program_issues_its_gemms_as_ours_does(name):
    ours, theirs = (
        [(label, step) for label, step in consumer_ops(program_of(each)[0]) if "turn" in label or "=" in label]
        for each in (name.removesuffix("-published"), name)
    )
    assert ours == theirs


def test_weights_from_the_maximum_so_far_look_for_a_maximum_in_the_first_block_alone():
    program, _, tile = program_of("fa3", loops=[(4, 0)])
    code = program.stream(program.warps.index("WG0"))
    softmax = code[[program.labels[i] == "softmax" for i in code["label"]]]
    phases = program.phases[softmax["record"]]
    alu = {j: int((phases["alu"] * phases["chunks"])[softmax["step"] == j].sum()) for j in range(4)}
    scores = tile.block_m // 2 * tile.block_n // 128
    assert alu[0] > scores  # FMNMX of every score
    assert set(list(alu.values())[1:]) == {2}  # a comparison of each row's sum
    assert "rescale O" not in program.labels


@pytest.mark.parametrize(("name", "gemms_per_turn"), [("pingpong", 2), ("fa3", 2)])
def test_warpgroups_alternate_on_the_tensor_cores(name, gemms_per_turn):
    """In the steady state each warpgroup runs its two GEMMs, then the other its two."""
    program, _, _ = program_of(name, loops=[(12, 0)])
    run = replay([program], load_device("h200"), MEMORY, max_spans=20_000)
    lanes = [lane.name for lane in run.lanes]
    tensor = run.spans[run.spans["lane"] == lanes.index("tensor cores")]
    tensor = tensor[(tensor["step"] >= 3) & (tensor["step"] <= 8)]
    order = [lanes[s["warp"]] for s in np.sort(tensor, order="start")]
    runs = [1]
    for before, after in pairwise(order):
        if after == before:
            runs[-1] += 1
        else:
            runs.append(1)
    middle = runs[1:-1]
    assert middle
    assert max(middle) <= gemms_per_turn


def test_fa1_reads_and_writes_o_at_every_step():
    workload = Workload(1, 1, 1024, 64)
    tile = default_tile(workload, "fa1", "a100-sxm")
    program = trace(SCHEDULES["fa1"].kernels[0], workload, tile, [(2, 0)])
    names = Counter((program.tensors[a[0]], "store" if a[3] else "load") for a in program.accesses)
    steps = 2 * 1024 // tile.block_m
    assert names[("O", "load")] == names[("O", "store")] == names[("Q", "load")] == steps
    assert names[("K", "load")] == 2


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_disassembly_names_every_warp_and_buffer(name):
    program, _, _ = program_of(name, loops=[(2, 1)], length=512)
    text = disassemble(program)
    for warp in program.warps:
        assert f"\n{warp}:" in text
    for ring in program.rings:
        assert f"{ring.name}[0]" in text


def test_a_block_that_a_consumer_sees_nothing_of_leaves_no_maximum():
    """d256, causal: tiles of 128 x 64. Above the first warpgroup's diagonal lies a whole block; the next is done twice."""
    work = Workload(1, 1, 1024, 256, causal=True)
    program = trace(SCHEDULES["fa3"].kernels[0], work, default_tile(work, "fa3", "h200"), [(4, 2)])

    def exponentials(warp: int) -> list[int]:
        code = program.stream(warp)
        code = code[code["op"] == Op.COMPUTE]
        phases = program.phases[code["record"]]
        return [int((phases["mufu"] * phases["chunks"])[code["step"] == j].sum()) for j in range(4)]

    first, second = (exponentials(program.warps.index(name)) for name in ("WG0", "WG1"))
    assert first[1] > 2 * 32 > first[2] == second[1]


@pytest.mark.parametrize(
    ("schedule", "copies"),
    [
        ("pingpong", {4: {0, 1}, 5: {0, 1}}),
        ("fa3", {4: {0, 1, 2, 3}, 5: {0, 1, 2}}),  # three blocks behind the first: a pair and one more
        ("overlap-3stage", {2: {0, 1}, 4: {0, 1, 2, 3}, 5: {0, 1, 2, 3, 4}, 6: {0, 1, 2, 5}, 7: {0, 1, 2, 5, 6}}),
    ],
)
def test_a_tile_finds_the_code_cold_that_it_comes_to_first(schedule, copies):
    """As the loops of kernels/cuda are written: a first block, pairs where P alternates, and what the loop leaves over."""
    workload = Workload(1, 1, 4096, 128)
    for blocks, cold in copies.items():
        (program,) = programs(workload, schedule, "h200", kv_blocks=blocks)
        stream = program.stream(program.warps.index("WG0"))
        softmax = stream[stream["label"] == program.labels.index("softmax")]
        fetches = program.phases[softmax["record"]]["fetched"] > 0
        assert set(softmax["step"][fetches].tolist()) == cold, (schedule, blocks)


@pytest.mark.parametrize(
    ("name", "passes"),
    [("standard", ["row max", "row sum", "probabilities"]), ("standard-online", ["row max and sum", "probabilities"])],
)
def test_the_softmax_of_standard_attention_goes_over_the_whole_row_once_a_pass(name, passes):
    _, program, _ = programs(Workload(2, 4, 4096), name, "h200", kv_blocks=4)
    for warp in range(len(program.warps)):
        stream = program.stream(warp)
        said = [(program.labels[each["label"]], int(each["step"])) for each in stream if each["op"] in (Op.COMPUTE, Op.STORE)]
        arithmetic = [each for each in said if each[0] in passes]
        assert arithmetic == [(label, j) for label in passes for j in range(4)]
        assert said.index(("store P", 0)) > said.index((passes[-2], 3)), "no probability before the statistics are complete"
    read = [block for tensor, block, _, write, _ in program.accesses if program.tensors[tensor] == "S" and not write]
    assert read == list(range(4)) * len(passes)


@pytest.mark.parametrize("name", ["standard", "standard-online"])
def test_a_row_that_goes_through_its_passes_at_once_is_read_from_hbm_once(name):
    traffic = predict(Workload(4, 16, 4096), name, "h200").traffic.by_tensor
    passes = 3 if name == "standard" else 2
    assert traffic["S"].algorithmic_read == passes * traffic["S"].algorithmic_write
    assert traffic["S"].hbm_read <= traffic["S"].algorithmic_write


def test_the_gemms_of_fa1_belong_to_the_steps_of_its_loop_over_q():
    workload = Workload(1, 1, 512)
    tile = default_tile(workload, "fa1", "h200")
    program = trace(SCHEDULES["fa1"].kernels[0], workload, tile, [(1, 0)])
    gemms = program.stream(0)[program.stream(0)["op"] == Op.MMA]
    assert [int(step) for step in gemms["step"]] == [i for i in range(512 // tile.block_m) for _ in range(2)]


def steady_steps(name, head_dim, dtype):
    """What a consumer does between the first two GEMMs of block 2 and of block 3, by label; and the program."""
    program, _, _ = program_of(name, head_dim, dtype, loops=((5, 0),))
    stream = program.stream(program.warps.index("WG0"))
    labels = [program.labels[row["label"]] for row in stream]
    scores = [n for n, label in enumerate(labels) if label.startswith("S=")]
    return labels[scores[2] : scores[3]], program


@pytest.mark.parametrize(
    ("head_dim", "dtype", "turns", "late", "through_smem"),
    [
        (64, "bf16", True, False, True), (128, "bf16", True, False, False), (256, "bf16", False, True, False),
        (64, "e4m3", False, False, False), (128, "e4m3", True, False, False), (256, "e4m3", True, False, False),
    ],
)  # fmt: skip
def test_flash_attention_3_takes_the_variant_of_its_source(head_dim, dtype, turns, late, through_smem):
    steps, program = steady_steps("fa3-published", head_dim, dtype)
    assert ("take turn" in steps or "give turn" in steps) == turns
    assert (steps.index("rescale O") < steps.index("O+=PV")) == late
    assert ("put P" in steps) == through_smem == ("P" in program.smem_parts)
    _, gemms = program.recorded(Op.WGMMA)
    assert (gemms["a_in_registers"] == 0).all() == through_smem


def test_weights_that_registers_hold_stay_there():
    _, program = steady_steps("fa3-published", 64, "fp16")
    assert "P" in program.smem_parts
    workload = Workload(1, 2, 4096, 64, causal=True)
    narrow = trace(SCHEDULES["fa3-published"].kernels[0], workload, default_tile(workload, "fa3-published", "h200"), ((3, 0),))
    assert "P" not in narrow.smem_parts


@pytest.mark.parametrize("name", ["fa3", "fa3-published", "pingpong-published", "warp-specialized-published"])
def test_8_bit_v_is_transposed_before_it_is_multiplied(name):
    program, _, tile = program_of(name, dtype="e4m3", loops=((4, 0), (3, 0)))
    check(program)
    names = [program.rings[row["ring"]].name for row in program.code if row["op"] == Op.LOAD]
    assert "V" in names and "V^T" not in names  # loaded as it lies in memory
    stream = program.stream(program.warps.index("transposers"))
    labels = [program.labels[row["label"]] for row in stream]
    assert labels.count("fill") == 4 + 3
    phases = [program.phases[row["record"]] for row in stream if program.labels[row["label"]] == "transpose V"]
    moved = sum(int(phase["matrices"]) * int(phase["chunks"]) for phase in phases) * 4 * 32 * 16  # counted for four warps
    assert moved == 2 * (4 + 3) * tile.block_n * 128  # read and written once, 16 bytes a lane
    gemms = program.code[program.code["op"] == Op.WGMMA]
    assert {program.rings[row["ring"]].name for row in gemms} == {"K", "V^T"}


def test_pytorchs_flash_attention_2_makes_exponentials_without_fast_math_and_in_copies_of_its_loop():
    """SASS of torch 2.11: five FMA instructions and a comparison a score, where FlashAttention-2 itself has two and none."""
    found = {}
    for name in ("fa2", "fa2-pytorch"):
        program, _, tile = program_of(name, loops=((6, 1),))
        rows, phases = program.recorded(Op.COMPUTE)
        of = [(row, phase) for row, phase in zip(rows, phases, strict=True) if program.labels[row["label"]] == "softmax"]
        made = [phase for row, phase in of if row["step"] == 3 and phase["mufu"] >= 8]
        found[name] = sum(int(phase[pipe]) * int(phase["chunks"]) for phase in made for pipe in ("fma", "alu"))
        fetched = {int(row["step"]) for row, phase in of if phase["fetched"]}
        assert fetched == ({0, 1} if name == "fa2-pytorch" else set())
    scores = tile.block_m * tile.block_n // 128
    assert found["fa2-pytorch"] - found["fa2"] == 4 * scores
