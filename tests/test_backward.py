"""The backward: its FLOPs and bytes in closed form, its bounds, the order that its schedules may not break, its commands."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fasim.cli.main import run as fasim
from fasim.simulator.devices.device import load_device
from fasim.simulator.errors import UsageError
from fasim.simulator.language.check import IllegalProgram, check
from fasim.simulator.language.ops import Op
from fasim.simulator.language.program import trace
from fasim.simulator.predict import default_tile, laid_out, predict, programs
from fasim.simulator.problem.order import work_items
from fasim.simulator.problem.tile import Tile
from fasim.simulator.problem.workload import Workload
from fasim.simulator.replay.engine import Memory, replay
from fasim.simulator.replay.interpreter import interpret
from fasim.simulator.results.floors import floors
from fasim.simulator.results.roofline import roofline
from fasim.simulator.schedules import BACKWARD, find_schedule

H200 = load_device("h200")
FUSED = [name for name in BACKWARD if name != "standard"]
PARTS = ("algorithmic_read", "algorithmic_write", "l2_read", "l2_write", "hbm_read", "hbm_write")


def dims(name):
    """A head dim that a schedule is for."""
    return 128 if 128 in BACKWARD[name].head_dims else 256


def backward(*shape, **fields):
    return Workload(*shape, **fields, direction="backward")


def whole(workload, schedule):
    """All bytes that cross HBM."""
    traffic = laid_out(workload, schedule, "h200").traffic
    return traffic.total("hbm_read") + traffic.total("hbm_write")


def test_the_backward_is_five_gemms_where_the_forward_is_two():
    forward, back = Workload(2, 4, 300, 64, causal=True), backward(2, 4, 300, 64, causal=True)
    assert back.flops * 2 == forward.flops * 5
    assert back.paper_flops * 2 == forward.paper_flops * 5


@pytest.mark.parametrize("name", BACKWARD)
def test_a_schedules_gemms_are_those_five_or_four_where_p_is_kept(name):
    workload = backward(1, 1, 1024, dims(name))
    tile = default_tile(workload, name, "h200")
    steps = 4
    found = sum(program.gemm_flops for program in programs(workload, name, "h200", tile, steps))
    blocks = 3 * steps + 1 if name == "standard" else 5 * steps  # dP's kernel has no loop
    assert found == blocks * 2 * tile.block_m * tile.block_n * workload.head_dim


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_bytes_of_a_fused_backward_have_a_closed_form(name, kv_heads):
    """Q, dO, LSE and delta travel once per tile of keys, and so does dQ's sum, there and back; all else travels once."""
    workload = backward(2, 4, 1024, dims(name), kv_heads=kv_heads)
    tile = default_tile(workload, name, "h200")
    size, keys = workload.tensor_bytes, -(-1024 // tile.block_n)
    sums = 2 * size["dQ"]  # fp32
    expected = {
        "Q": (keys * size["Q"], 0), "dO": ((keys + 1) * size["dO"], 0), "O": (size["O"], 0),
        "K": (size["K"], 0), "V": (size["V"], 0), "LSE": (keys * size["LSE"], 0), "delta": (keys * size["LSE"], size["LSE"]),
        "dQaccum": ((keys + 1) * sums, (keys + 1) * sums), "dQ": (0, size["dQ"]), "dK": (0, size["dK"]), "dV": (0, size["dV"]),
    }  # fmt: skip
    if BACKWARD[name].kernels[1].finishers:
        expected["LSE"] = expected["delta"]  # to base 2
    moved = laid_out(workload, name, "h200").traffic.by_tensor
    assert {tensor: (b.algorithmic_read, b.algorithmic_write) for tensor, b in moved.items()} == expected
    assert moved["dQaccum"].l2_read == sums, "what is added to is read by L2, not by an SM"


def test_standard_attentions_backward_crosses_hbm_seven_times_with_the_scores():
    workload = backward(1, 16, 4096, 64)
    scores = 16 * 4096**2 * 2
    moved = laid_out(workload, "standard", "h200").traffic
    through = {name: (b.algorithmic_read // scores, b.algorithmic_write // scores) for name, b in moved.by_tensor.items()}
    assert {name: through[name] for name in ("P", "dP", "dS")} == {"P": (3, 0), "dP": (2, 1), "dS": (2, 1)}


def test_gpt_2s_forward_and_backward_move_several_times_the_bytes_without_flash():
    """FlashAttention Figure 2: 40.3 against 4.4 GB. Ours has no dropout and no mask: 11 passes of the scores."""
    shape = (64, 16, 1024, 64)
    both = {name: whole(Workload(*shape), name) + whole(backward(*shape), name) for name in ("standard", "fa2")}
    size = 64 * 16 * 1024**2 * 2
    assert both["standard"] == pytest.approx((4 + 7) * size, rel=0.10)
    assert both["standard"] < 40.3e9
    compulsory = sum(w.compulsory_read_bytes + w.compulsory_write_bytes for w in (Workload(*shape), backward(*shape)))
    assert compulsory < both["fa2"] < 4.4e9


@st.composite
def workloads(draw):
    kv_heads = draw(st.sampled_from([1, 2]))
    return backward(
        batch=draw(st.integers(1, 2)), heads=kv_heads * draw(st.sampled_from([1, 3])), kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([64, 128, 256])), causal=draw(st.booleans()),
        seqlen_q=draw(st.integers(1, 900)), seqlen_k=draw(st.integers(1, 900)),
    )  # fmt: skip


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(workloads(), st.sampled_from(list(BACKWARD)))
def test_no_backward_beats_the_roofline_or_moves_less_than_compulsory(workload, name):
    if workload.head_dim not in BACKWARD[name].head_dims:
        with pytest.raises(UsageError, match="--schedule fa2"):
            predict(workload, name, "h200")
        return
    run = predict(workload, name, "h200")
    assert run.cycles >= roofline(workload, H200, run.sm_clock_hz).bound_cycles
    assert run.traffic.total("hbm_read") >= workload.compulsory_read_bytes
    assert run.traffic.total("hbm_write") >= workload.compulsory_write_bytes
    assert 0 <= run.traffic.l2_hit_rate <= 1
    assert sum(run.breakdown.to_dict().values()) == pytest.approx(1, abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(workloads(), st.sampled_from([64, 80]), st.sampled_from([64, 128]))
def test_columns_walk_exactly_the_query_tiles_that_see_them(workload, block_m, block_n):
    items = work_items(workload, block_m, block_n, "columns")
    rows = np.arange(workload.seqlen_q)
    limit = rows + workload.seqlen_k - workload.seqlen_q if workload.causal else np.full_like(rows, workload.seqlen_k)
    seen = {}
    for item in items.tolist():
        q_head, kv_head, m, n, blocks, masked = item
        assert q_head == kv_head * workload.heads_per_kv
        keys = n * block_n, min((n + 1) * block_n, workload.seqlen_k) - 1
        sees = {int(r) // block_m for r in rows[limit >= keys[0]]}
        every = blocks // workload.heads_per_kv
        assert blocks == every * workload.heads_per_kv
        assert sees <= set(range(m, m + every)) <= sees | {max(sees)}
        partly = {b for b in sees if limit[b * block_m] < keys[1]}
        assert masked == len(partly)
        seen[kv_head, n] = seen.get((kv_head, n), 0) + 1
    assert len(seen) == workload.batch * workload.kv_heads * -(-workload.seqlen_k // block_n) and set(seen.values()) == {1}


@pytest.mark.parametrize("name", BACKWARD)
def test_the_engine_replays_a_backward_as_the_interpreter_does(name):
    workload = backward(1, 2, 640, min(BACKWARD[name].head_dims), causal=True)
    memory = Memory(30.0, 12.0, {"Q": 0.4}, {"dQaccum": 0.5}, adds=18.0)
    tile = default_tile(workload, name, "h200")
    for kernel in BACKWARD[name].kernels:
        program = trace(kernel, workload, tile, [(3, 1), (2, 1)])
        check(program)
        one, other = replay([program] * 2, H200, memory, max_spans=20_000), interpret([program] * 2, H200, memory)
        assert (one.cycles, one.busy.tolist()) == (other.cycles, other.busy.tolist())
        assert one.spans.tolist() == other.spans.tolist()


def test_the_floors_of_fa3s_backward_are_those_counted_by_hand():
    """80 x 128 at d128: WGMMA reads B at 64 bytes a cycle, and A of three GEMMs; dQ passes twice, in fp32."""
    workload = backward(1, 16, 4096, 128)
    counted = {}
    for name in ("fa3", "registers"):
        found = programs(workload, name, "h200", default_tile(workload, name, "h200"), 4)[1]
        counted[name] = floors(found, H200, 4, 2)
    fa3, registers = counted["fa3"], counted["registers"]
    block = 80 * 128 * 128
    assert fa3.tensor == 5 * 2 * block / 4096 == 3200 and fa3.mufu == 80 * 128 / 16
    assert fa3.smem_bytes["B operands"] == 64 * fa3.tensor
    assert fa3.smem_bytes["A operands"] == (2 * 128 * 128 + 128 * 128) * 2
    assert fa3.smem_bytes["stores"] == 80 * 128 * (2 + 4) and fa3.smem_bytes["copies out"] == 80 * 128 * 4
    assert fa3.smem_bytes["loads"] == 2 * (80 * 128 * 2 + 80 * 4)
    assert fa3.smem == (64 * 3200 + 98304 + 61440) / 128 < fa3.tensor
    assert registers.smem == (64 * 3200 + 98304 + 20480) / 128
    assert fa3.at_full_rate == pytest.approx(139.7, abs=0.1) and registers.at_full_rate == pytest.approx(114.1, abs=0.1)
    assert fa3.adds == registers.adds == 80 * 128 * 4 / (H200.l2_add_bytes_per_cycle / 132)


def mutant(name, verb, of, other=lambda warp, *_, **__: None):
    """The main kernel of a schedule whose warps do something else where they would say a verb to a slot of that ring."""
    kernel = next(each for each in BACKWARD[name].kernels if each.grid == "columns")
    workload = backward(1, 1, 640, 128)

    def body(cta, tile):
        from fasim.simulator.language import verbs

        real = getattr(verbs.Warp, verb)

        def changed(warp, *said, **named):
            slots = [each for each in said if isinstance(each, verbs.Slot)]
            return other(warp, *said, **named) if any(each.ring.tensor == of for each in slots) else real(warp, *said, **named)

        setattr(verbs.Warp, verb, changed)
        try:
            kernel.body(cta, tile)
        finally:
            setattr(verbs.Warp, verb, real)


    return trace(replace(kernel, body=body), workload, default_tile(workload, name, "h200"), [(4, 0)])


@pytest.mark.parametrize(
    ("name", "verb", "of", "says"),
    [
        ("fa2", "free", "dS", "deadlock: .* waits to fill dS"),
        ("fa2", "put", "dS", "deadlock: .* waits for dS"),
        ("fa2", "wait", "P", "race: .* on P.* before it has waited"),
        ("fa2", "free", "K", "leak: .* never free K"),
        ("fa3", "free", "dS", "deadlock: .* waits to fill dS"),
        ("fa3", "wait", "dS", "race: .* on dS.* before it has waited"),
        ("fa3", "put", "dQ", "deadlock: drain waits for dQ"),
        ("fa3", "free", "dQ", "deadlock: .* waits to fill dQ"),
        ("lagged", "wait", "dS", "race: .* on dS.* before it has waited"),
        ("lagged", "free", "dS", "deadlock: .* waits to fill dS"),
    ],
)
def test_what_a_backward_forgets_is_found(name, verb, of, says):
    with pytest.raises(IllegalProgram, match=says):
        check(mutant(name, verb, of))


def test_a_gemm_that_may_still_run_keeps_its_operands():
    """dV reads P^T, and dK dS^T, out of registers: the next block's may not be written before they have been waited for."""

    def body(cta, tile):
        from fasim.simulator.language import verbs

        kernel, real = BACKWARD["fa3"].kernels[1].body, verbs.Warp.wait

        def hasty(warp, what):
            if not (isinstance(what, verbs.Result) and what.label.startswith("dK")):
                real(warp, what)

        verbs.Warp.wait = hasty
        try:
            kernel(cta, tile)
        finally:
            verbs.Warp.wait = real

    workload = backward(1, 1, 640, 128)
    kernel = replace(BACKWARD["fa3"].kernels[1], body=body)
    with pytest.raises(IllegalProgram, match=r"race: WG. frees Q\[0\] while its 'dK\+=dS\^TQ' may still read it"):
        check(trace(kernel, workload, default_tile(workload, "fa3", "h200"), [(4, 0)]))


def test_dq_leaves_by_adding_and_everything_else_by_storing():
    for name in FUSED:
        workload = backward(1, 1, 640, dims(name))
        tile = default_tile(workload, name, "h200")
        main = next(p for p in programs(workload, name, "h200", tile) if (p.code["op"] == Op.ADD).any())
        _, added = main.recorded(Op.ADD)
        assert {main.tensors[t] for t in added["tensor"]} == {"dQaccum"}
        assert added["nbytes"].sum() == 3 * tile.block_m * workload.head_dim * 4
        _, stored = main.recorded(Op.STORE)
        assert {main.tensors[t] for t in stored["tensor"]} == {"dK", "dV"}


def test_a_backward_run_says_its_pass_and_its_kernels(capsys):
    assert fasim(["predict", "fa2", "--pass", "both", "--seqlen", "512", "--batch", "1", "--json"]) == 0
    forward, back = json.loads(capsys.readouterr().out)
    assert (forward["pass"], back["pass"]) == ("forward", "backward")
    assert back["flops"] == 2.5 * forward["flops"]
    assert [kernel["name"] for kernel in back["kernels"]] == ["preprocess", "fa2", "postprocess"]
    assert sum(kernel["cycles"] for kernel in back["kernels"]) == back["cycles"]
    assert {"dO", "delta", "dQaccum", "dQ", "dK", "dV"} < back["traffic"]["by_tensor"].keys()
    assert fasim(["predict", "fa2", "--pass", "both", "--seqlen", "512", "--batch", "1"]) == 0
    assert "forward and backward" in capsys.readouterr().out


def test_a_backwards_timeline_names_its_gemms_and_what_its_softmax_hides_under():
    from fasim.traces.beside import beside
    from fasim.traces.window import by_iterations

    runs = {name: predict(backward(4, 16, 4096, 128), name, "h200") for name in ("fa3", "lagged")}
    shown = {span.short for row in by_iterations(runs["fa3"]).rows for span in row.spans}
    assert {"S3", "P3", "dP3", "dS3", "dV3", "dK3", "dQ3"} <= shown
    exposed = [panel.softmax["exposed"] for panel in beside(list(runs.values()))]
    assert exposed[0] > 1.5 * exposed[1] > 0, "dQ of the block before runs under the exponentials of this one"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["predict", "pingpong", "--pass", "backward"], "is of the forward; the backward has standard, fa2"),
        (["predict", "fa2", "--pass", "backwards"], "did you mean 'backward'"),
        (["timeline", "fa2", "--pass", "both"], "--pass both is for fasim predict"),
        (["walk", "--pass", "backward"], "fasim walk does the forward alone"),
        (["measure", "fa2", "--pass", "both"], "--pass both is for fasim predict"),
        (["predict", "./mine.py:mine", "--pass", "backward"], "a schedule of your own is a forward one"),
        (["predict", "fa3", "--pass", "backward", "--seqlen-q", "9999999", "--seqlen-k", "128"], "blocks of 80 queries is longer"),
        (["predict", "fa3", "--pass", "backward", "--head-dim", "256"], "(64, 128); use --schedule fa2 or wide"),
        (["predict", "fa3", "--pass", "backward", "--tile", "128x128"], "does not fit shared memory"),
        (["predict", "fa2", "--pass", "backward", "--dtype", "e4m3"], "not supported by the backward of 'fa2'"),
    ],
)
def test_a_pass_that_is_not_done_is_refused_in_a_sentence(line, says, capsys):
    assert fasim(line) == 2
    assert says in capsys.readouterr().err


def test_a_name_of_both_passes_is_two_schedules():
    assert find_schedule("fa2") is not find_schedule("fa2", "backward")


def instructions(name, causal, warp="WG1", head_dim=128):
    """What a consumer executes for one Q block of the main kernel amid a tile, by pipe, and all of it."""
    workload, kernel = backward(1, 1, 8448, head_dim, causal=causal), BACKWARD[name].kernels[1]
    counted = []
    for loop in (12, 13):
        program = trace(kernel, workload, Tile(64, 128, 3, 2), [(loop, 0)])
        stream = program.stream(program.warps.index(warp))
        phases = program.phases[stream["record"][stream["op"] == Op.COMPUTE]]
        sums = {pipe: int((phases[pipe] * phases["chunks"]).sum()) for pipe in ("fma", "alu", "mufu", "convert", "other", "stsm")}
        counted.append(sums | {"all": sum(sums.values()) + int(stream["issues"].sum())})
    return {pipe: counted[1][pipe] - counted[0][pipe] for pipe in counted[0]}


def test_cudnns_block_has_the_arithmetic_of_its_machine_code():
    """Nsight Compute's listing, d128, 32 elements a thread: FFMA 32, FMUL 96, FADD 32; FSETP and FSEL 32 each; 624 in all, full."""
    found = instructions("cudnn", causal=False)
    assert (found["fma"], found["alu"], found["mufu"], found["convert"], found["stsm"]) == (32 + 96 + 32, 64, 32, 32, 4)
    assert 0.75 < found["all"] / 624 < 1.05
    assert found["fma"] == instructions("cudnn", causal=True)["fma"] > instructions("lagged", causal=False)["fma"] == 96


def test_cudnn_walks_the_keys_of_one_head_after_the_other():
    section = BACKWARD["cudnn"].kernels[1].section_bytes
    items = work_items(backward(2, 2, 1024, 128, causal=True), 64, 128, "columns", section_bytes=section)
    assert items["n"][:9].tolist() == [*range(8), 0] and items["kv_head"][:9].tolist() == [0] * 8 + [1]
