"""Other people's kernels by name: how they are called, what is kept and counted of them; one that fails stops no other."""

from __future__ import annotations

import hashlib
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

PLAN = Path(fasim.__file__).parent / "traces" / "recorded" / "peers" / "plan.toml"
FA3_FULL = (
    "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90<2, "
    "cute::tuple<cute::C<2>, cute::C<1>, cute::C<1> >, cute::tuple<cute::C<128>, cute::C<176>, cute::C<128> >, 128, "
    "cutlass::bfloat16_t, float, cutlass::arch::Sm90, false, false, false>, flash::StaticPersistentTileScheduler<false> > > >()"
)
FA2_D256 = "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<256, 64, 64, 4, 0, 0, cutlass::half_t>>(Flash_fwd_params)"
WHEEL = '''
import torch

calls = []

def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None):
    calls.append((causal, q_descale))
    q, k, v = (x.double() for x in (q, k, v))
    s = torch.einsum("bmhd,bnhd->bhmn", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)) * q.shape[-1] ** -0.5
    if causal:
        s = s.masked_fill(~torch.ones(s.shape[-2:]).tril(s.shape[-1] - s.shape[-2]).bool(), float("-inf"))
    v = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
    return torch.einsum("bhmn,bnhd->bmhd", torch.softmax(s, -1), v).bfloat16()
'''


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package called fa3-fwd, its interface in plain torch; returns the module."""
    pytest.importorskip("torch")
    (tmp_path / "fa3_fwd").mkdir()
    (tmp_path / "fa3_fwd" / "_C.abi3.so").write_bytes(b"machine code")
    (tmp_path / "fa3_fwd_interface.py").write_text(WHEEL)
    info = tmp_path / "fa3_fwd-0.0.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fa3-fwd\nVersion: 0.0.3\n")
    (info / "RECORD").write_text("fa3_fwd/_C.abi3.so,,\nfa3_fwd_interface.py,,\nfa3_fwd-0.0.3.dist-info/RECORD,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "fa3_fwd_interface", raising=False)
    import fa3_fwd_interface

    yield fa3_fwd_interface
    sys.modules.pop("fa3_fwd_interface", None)


@pytest.fixture
def bench(monkeypatch):
    torch = pytest.importorskip("torch")
    from fasim.kernels.measure import bench as room

    monkeypatch.setattr(room, "MAX_BUFFERS", 2)
    monkeypatch.setattr(trains, "IDLE_S", 0.001)

    def made(regime: str = "sustained", l2: str = "cold", seconds: float = 0.1):
        return room.Bench(regime, l2, 0.1, MadeUpGpu(torch))

    return made


WORK = Workload(2, 4, 96, 64, "bf16", causal=True, kv_heads=2)


def test_a_run_says_library_version_and_the_hash_of_what_was_run(wheel, bench):
    run = bench().measure(plan.Entry("peer:fa3", WORK))
    taken = run.measurement
    assert (run.schedule, taken.kernel, taken.implementation, run.tile) == ("peer:fa3", "peer:fa3", "peer", None)
    assert taken.packages["fa3-fwd"] == "0.0.3"
    assert taken.sources == {
        "fa3_fwd/_C.abi3.so": hashlib.sha256(b"machine code").hexdigest(),
        "fa3_fwd_interface.py": hashlib.sha256(WHEEL.encode()).hexdigest(),
    }
    assert wheel.calls[0] == (True, None) and taken.relative_error < 1e-2
    assert store.file_name(run) == "peer-fa3-peer-b2h4k2s96d64-bf16-causal-sustained.run.json"


def test_e4m3_is_given_a_scale_for_each_head_of_k_and_v(wheel, bench):
    bench().measure(plan.Entry("peer:fa3", replace(WORK, dtype="e4m3")))
    causal, scale = wheel.calls[0]
    assert causal and scale.shape == (2, 2) and bool((scale == 1).all())


def test_what_a_peer_does_not_take_and_what_is_none_is_one_sentence(bench):
    for kernel, workload, said in (
        ("peer:fa3", replace(WORK, dtype="fp16"), "dtype=fp16 is not supported by 'peer:fa3'"),
        ("peer:fa3", replace(WORK, head_dim=80), "head_dim=80"),
        ("peer:fa5", WORK, "no peer is called 'peer:fa5'"),
        ("peer:cudnn", Workload(1, 2, seqlen_q=64, seqlen_k=96, head_dim=64, causal=True), "top left"),
    ):
        with pytest.raises(UsageError, match=said):
            bench().measure(plan.Entry(kernel, workload))


def test_a_library_that_is_not_installed_stops_no_other(wheel, bench, monkeypatch):
    from fasim.kernels.measure import runs
    from fasim.kernels.validation.check import MissingTool

    monkeypatch.setattr(runs, "require_gpu", lambda: None)
    monkeypatch.setattr(runs, "Bench", bench)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    first, second = runs.measure_all([plan.Entry("peer:fa4", WORK), plan.Entry("peer:fa3", WORK)])
    assert "pip install flash-attn-4" in first.reason and second.origin == "measured"
    with pytest.raises(MissingTool, match="flash-attn-4"):
        runs.measure("peer:fa4", WORK)


def test_one_process_counts_for_one_library():
    from fasim.kernels.measure import runs

    entries = [plan.Entry(f"peer:{name}", WORK) for name in ("fa3", "fa3", "fa2", "cudnn", "fa4")]
    assert [[each.kernel for each in chunk] for chunk in runs.chunks(entries)] == [
        ["peer:fa3"] * 2, ["peer:fa2", "peer:cudnn"], ["peer:fa4"],
    ]  # fmt: skip
    assert [len(chunk) for chunk in runs.chunks([plan.Entry("fa3", WORK)] * 70)] == [64, 6]


# -- what is counted ---


def counted(cycles: float, delivered: float = 900.0, multicast: float = 600.0) -> dict[str, float]:
    return {
        nsight.CYCLES: cycles, nsight.DELIVERED: delivered, nsight.MULTICAST: multicast, nsight.TENSOR: 50.0,
        nsight.GRID: 132.0, "launch__registers_per_thread": 168.0,
    }  # fmt: skip


def test_of_a_call_only_the_attention_is_compared_and_all_are_named(wheel, bench):
    run = bench().measure(plan.Entry("peer:fa3", WORK))
    kernels = [Profiled("void at::native::fill", counted(90_000.0)), Profiled(FA3_FULL, counted(50_000.0))]
    found = peers.with_counters(run, kernels)
    assert (found.cycles, found.tile) == (50_000, Tile(128, 176, 2, 2, 2))
    assert found.traffic.total("l2_read") == 900 - 600 / 2  # a multicast to two CTAs crosses once
    taken = found.measurement
    assert taken.kernels == ((FA3_FULL, 50_000.0), ("void at::native::fill", 90_000.0))
    assert (taken.counters[nsight.GRID], taken.counters["launch__registers_per_thread"]) == (132.0, 168.0)


def test_without_a_known_name_the_longest_is_the_attention():
    kernels = [Profiled("fill", {nsight.CYCLES: 5.0}), Profiled("other", {nsight.CYCLES: 50.0}), Profiled("last", {})]
    assert peers.attention_of("peer:fa4", kernels).name == "other"


@pytest.mark.parametrize(
    ("name", "tile"),
    [
        (FA3_FULL, Tile(128, 176, 2, 2, 2)),
        (FA3_FULL.replace("C<2>", "C<(int)1>").replace("C<128>, cute::C<176>", "C<192>, cute::C<192>"), Tile(192, 192, 2, 3)),
        (FA2_D256, Tile(64, 64, 1, 1)),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_cga1x1x1_kernel0_0", None),
    ],
)
def test_a_kernels_name_tells_its_tile(name, tile):
    assert peers.tile_of(name) == tile


def test_nsights_table_says_how_a_kernel_was_launched():
    head = (
        '"ID","Kernel Name","Block Size","Grid Size","sm__cycles_elapsed.max",'
        '"launch__registers_per_thread","launch__shared_mem_per_block"'
    )
    units = '"","","","","cycle","register/thread","byte/block"'
    text = f'{head}\n{units}\n"0","k","(384, 1, 1)","(66, 2, 1)","9,000","168","215,040"\n'
    (kernel,) = nsight.parse(text)
    assert nsight.total([kernel]) == {
        nsight.CYCLES: 9000.0, nsight.BLOCK: 384.0, nsight.GRID: 132.0,
        "launch__registers_per_thread": 168.0, "launch__shared_mem_per_block": 215040.0,
    }  # fmt: skip
    assert nsight.GRID not in nsight.total([kernel, kernel])


def test_a_recorded_table_of_peers_gives_tiles_and_grids():
    found = nsight.parse((Path(__file__).parent / "data" / "ncu_h200.csv").read_text())
    ((name, grid),) = {(each.name, each.metrics[nsight.GRID]) for each in found if "flash_fwd_kernel" in each.name}
    assert peers.tile_of(name) == Tile(128, 64, 1, 1) and grid == 256 * 16


def test_what_ncu_started_ends_with_it(tmp_path):
    left = tmp_path / "left"
    with pytest.raises(UsageError, match=r"did not end within 0\.3 s"):
        counters._run(["sh", "-c", f"(sleep 1; touch {left}) & wait"], 0.3)
    import time

    time.sleep(1.1)
    assert not left.exists()


# -- the plan ---


def test_the_plan_of_peers_is_a_set_worth_the_name():
    entries = plan.read(PLAN)
    assert len(entries) >= 60 and {each.kernel for each in entries} == set(peers.NAMES)
    for each in entries:
        peer = peers.find(each.kernel)
        assert each.workload.dtype in peer.dtypes and each.workload.head_dim in peer.head_dims


def test_a_plan_is_resumed_where_it_stopped(wheel, bench, tmp_path):
    from fasim.kernels.measure import __main__ as command

    entries = [plan.Entry("peer:fa3", WORK), plan.Entry("peer:fa3", replace(WORK, causal=False))]
    folder = tmp_path / "runs"
    folder.mkdir()
    assert command.left(entries, folder) == entries
    run = bench().measure(entries[0])
    store.save(run, folder / store.file_name(run))
    assert command.left(entries, folder) == entries[1:]


def test_torchs_own_names_are_called_as_peers_are(monkeypatch):
    torch = pytest.importorskip("torch")
    from fasim.kernels.measure.names import caller

    monkeypatch.setattr(
        torch.ops.aten, "_scaled_dot_product_flash_attention", lambda q, *rest: (q * 2, rest[2:]), raising=False
    )
    q = torch.ones(1, 96, 4, 64)
    for name in ("torch-fa2", "peer:fa2"):
        assert bool((caller(SimpleNamespace(name=name), WORK)(q, q, q) == 2).all())


def test_runs_that_were_timed_without_counters_are_counted_later(wheel, bench, tmp_path, monkeypatch, capsys):
    from fasim.kernels.measure import __main__ as command
    from fasim.kernels.measure import runs

    for workload in (WORK, replace(WORK, causal=False)):
        run = replace(bench().measure(plan.Entry("peer:fa3", workload)), warnings=("no counters: ncu failed",))
        store.save(run, tmp_path / store.file_name(run))
    asked: list = []

    def profile(entries):
        asked.extend(entries)
        return [[Profiled(FA3_FULL, counted(50_000.0))] if entry["workload"]["causal"] else [] for entry in entries]

    monkeypatch.setattr(runs, "require_gpu", lambda: None)
    monkeypatch.setattr(counters, "require", lambda: "ncu")
    monkeypatch.setattr(counters, "profile", profile)
    assert command._complete(tmp_path) == 1 and "saw no kernel" in capsys.readouterr().out
    found = {run.workload.causal: run for run in store.load_folder(tmp_path).values()}
    assert found[True].cycles == 50_000 and found[True].warnings == () and found[True].measurement.time_s
    assert found[False].measurement.counters == {}
    asked.clear()
    command._complete(tmp_path)
    assert [entry["workload"]["causal"] for entry in asked] == [False]


def test_the_counted_program_is_this_package(tmp_path):
    import subprocess

    listed = tmp_path / "plan.json"
    listed.write_text("[]")
    done = subprocess.run(counters.child(listed), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
