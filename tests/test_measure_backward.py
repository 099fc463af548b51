"""The backward measured without a GPU: what is called and held to fp64, what is counted of its kernels, what is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_up_gpu import MadeUpGpu

import fasim
from fasim.kernels.measure import counters, peers, plan, trains
from fasim.simulator.errors import UsageError
from fasim.simulator.problem.tile import Tile
from fasim.simulator.problem.workload import Workload
from fasim.traces import nsight, store
from fasim.traces.nsight import Profiled

torch = pytest.importorskip("torch")
RECORDED = Path(fasim.__file__).parent / "traces" / "recorded" / "backward"
WORK = Workload(2, 4, 96, 64, "bf16", causal=True, kv_heads=2, direction="backward")
LOOP = "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128, 64, 128, 8, 2, 4, 2, 0, 0>>"


@pytest.fixture
def bench(monkeypatch):
    from fasim.kernels.measure import bench as room

    monkeypatch.setattr(room, "MAX_BUFFERS", 2)
    monkeypatch.setattr(trains, "IDLE_S", 0.001)
    return room.Bench("sustained", "cold", 0.1, MadeUpGpu(torch))


def attend(q, k, v, *, causal=False, softmax_scale=None):
    """Plain attention in fp32, differentiable."""
    k, v = (x.float().repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bmhd,bnhd->bhmn", q.float(), k) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), float("-inf"))
    return torch.einsum("bhmn,bnhd->bmhd", torch.softmax(scores, -1), v).to(q.dtype)


def wheel(monkeypatch, factor: float = 1.0) -> list:
    """flash_attn.cute.interface in plain torch, whose dK is off by a factor; returns what its backward was called with."""
    seen = []

    def forward(q, k, v, causal, return_lse):
        return attend(q, k, v, causal=causal), torch.zeros(q.shape[0], q.shape[2], q.shape[1]), None, None, None

    def backward(q, k, v, o, do, lse, causal):
        seen.append((tuple(o.shape), tuple(lse.shape), causal))
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        dq, dk, dv = torch.autograd.grad(attend(*leaves, causal=causal), leaves, do)
        return dq, dk * factor, dv

    module = SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", module)
    return seen


def test_a_backward_is_held_to_fp64_and_timed_without_its_forward(bench, monkeypatch):
    seen = wheel(monkeypatch)
    monkeypatch.setattr(peers, "_function", lambda module, name, package: getattr(sys.modules[module], name))
    run = bench.measure(plan.Entry("peer:fa4", WORK))
    assert run.workload == WORK and 0 < run.measurement.relative_error < 1e-2
    assert len(seen) > 1 and set(seen) == {((2, 96, 4, 64), (2, 4, 96), True)}
    assert store.file_name(run) == "peer-fa4-peer-b2h4k2s96d64-bf16-causal-backward-sustained.run.json"


def test_a_wrong_gradient_is_not_timed(bench, monkeypatch):
    from fasim.kernels.validation.check import Fault

    wheel(monkeypatch, factor=1.1)
    monkeypatch.setattr(peers, "_function", lambda module, name, package: getattr(sys.modules[module], name))
    with pytest.raises(Fault, match="peer:fa4 is wrong on .* backward: relative error"):
        bench.measure(plan.Entry("peer:fa4", WORK))


def test_what_is_differentiable_is_measured_through_autograd(bench):
    run = bench.measure(plan.Entry("torch-math", replace(WORK, causal=False)))
    assert run.measurement.kernel == "torch-math" and run.measurement.relative_error < 1e-2


@pytest.mark.parametrize(
    ("kernel", "workload", "said"),
    [
        ("peer:fa3", WORK, "no backward of peer:fa3 is asked for here"),
        ("drained", WORK, "the backward of 'drained' has no kernel here"),
        ("fa3", replace(WORK, head_dim=80), "head_dim=80 is not supported by 'fa3'"),
        ("pingpong", WORK, "the backward of 'pingpong' has no kernel here"),
        ("peer:fa2", replace(WORK, dtype="e4m3"), "e4m3"),
    ],
)
def test_what_has_no_backward_here_is_one_sentence(bench, kernel, workload, said):
    with pytest.raises(UsageError, match=said):
        bench.measure(plan.Entry(kernel, workload))


def test_of_a_backward_all_kernels_are_counted_and_the_longest_apart(bench):
    def counted(cycles: float, tensor: float) -> dict[str, float]:
        return {nsight.CYCLES: cycles, nsight.HBM_READ: 100.0, nsight.TENSOR: tensor, "launch__registers_per_thread": 255.0}

    run = bench.measure(plan.Entry("torch-math", replace(WORK, causal=False)))
    small = counted(10_000.0, 0.0)
    kernels = [Profiled("dot", small), Profiled(LOOP, counted(80_000.0, 50.0)), Profiled("convert", small)]
    found = peers.with_counters(replace(run, schedule="peer:fa2"), kernels)
    taken = found.measurement
    assert (found.cycles, found.traffic.total("hbm_read"), found.tile) == (100_000, 300, Tile(64, 128, 2, 2))
    assert taken.kernels == (("dot", 10_000.0), (LOOP, 80_000.0), ("convert", 10_000.0))
    assert taken.counters[nsight.TENSOR] == pytest.approx(40.0) and taken.counters[nsight.MAIN + nsight.TENSOR] == 50.0
    assert taken.counters[f"{nsight.MAIN}launch__registers_per_thread"] == 255.0


def test_a_cuda_backward_of_ours_is_called_without_autograd_in_either_mode(bench, monkeypatch):
    seen = []

    def stand_in(q, k, v, o, lse, do, *, causal, scale, schedule, deterministic):
        seen.append((schedule, deterministic))
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(attend(*leaves, causal=causal), leaves, do)

    monkeypatch.setitem(sys.modules, "fasim.kernels.cuda.backward.launch", SimpleNamespace(backward=stand_in))
    forward = SimpleNamespace(flash_attn_func=lambda q, k, v, causal, return_lse: (attend(q, k, v, causal=causal), None))
    monkeypatch.setitem(sys.modules, "fasim.kernels.ops", forward)
    for name in ("lagged", "lagged-deterministic"):
        run = bench.measure(plan.Entry(name, WORK))
        assert (run.schedule, run.measurement.implementation, run.tile) == (name, "cuda", Tile(128, 128, 2, 2))
        assert {"kernels/cuda/backward/lagged.cu", "kernels/cuda/backward/prepare.cu"} <= run.measurement.sources.keys()
        assert set(seen) == {("lagged", name.endswith("deterministic"))}
        seen.clear()


@pytest.mark.parametrize(("head_dim", "tile"), [(64, Tile(64, 128, 5, 2)), (128, Tile(64, 128, 3, 2)), (256, None)])
def test_cudnns_name_tells_the_tile_of_its_backward_where_it_is_one_of_ours(head_dim, tile):
    name = f"cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x{head_dim}_1x4x1_cga1x1x1_kernel0_0"
    assert peers.tile_of(name) == tile


def test_a_backward_of_ours_is_several_kernels_and_marked():
    entry = plan.Entry("fa3", WORK).to_dict()
    assert counters.marked([entry]) and not counters.marked([plan.Entry("fa3", replace(WORK, direction="forward")).to_dict()])


def test_the_plan_of_peers_backwards_is_a_set_worth_the_name():
    entries = plan.read(RECORDED / "plan.toml")
    assert len(entries) >= 40 and all(each.workload.backward for each in entries)
    assert {each.workload.head_dim for each in entries} == {64, 128, 256}
    assert {peers.find(each.kernel).differentiate is not None for each in entries} == {True}


def test_beside_peers_a_deterministic_backward_has_its_price_and_a_schedule_only_its_head_dims():
    from fasim.kernels.measure import beside_backward

    rows = [
        {"kernel": "lagged", "head_dim": 128, "tflops": 600.0},
        {"kernel": "lagged-deterministic", "head_dim": 128, "tflops": 540.0},
        {"kernel": "peer:fa4", "head_dim": 128, "tflops": 640.0}, {"kernel": "peer:cudnn", "head_dim": 128, "refused": "no"},
    ]  # fmt: skip
    ours, same_bits, *theirs = beside_backward.compare(rows)
    assert (ours["vs_best_peer"], same_bits["vs_any_order"]) == (0.9375, 0.9) and "vs_best_peer" not in same_bits
    assert all(row.keys() <= {"kernel", "head_dim", "tflops", "refused"} for row in theirs)
    (mean,) = beside_backward.means_of(rows)
    assert (mean["kernel"], mean["geometric_mean"], mean["rows"]) == ("lagged", 0.9375, 1)
    wide = replace(WORK, head_dim=256)
    assert beside_backward.taking(["fa3", "fa2", "peer:fa4"], wide) == ["fa2", "peer:fa4"]
