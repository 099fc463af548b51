"""Measuring without a GPU: the plan, the arithmetic of a train on a made-up GPU, and what is said where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from made_up_gpu import MadeUpGpu

from fasim.kernels.measure import counters, plan, trains
from fasim.kernels.measure.board import Sample
from fasim.kernels.measure.clock_probe import clocks_hz
from fasim.kernels.measure.trains import Look, Train
from fasim.kernels.validation.check import MissingTool
from fasim.simulator.errors import UsageError
from fasim.simulator.problem.workload import Workload
from fasim.traces.nsight import Profiled

# -- the plan ---


def written(tmp_path, text: str):
    path = tmp_path / "plan.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_plan_is_the_cross_product_of_its_lists_each_entry_once(tmp_path):
    path = written(
        tmp_path,
        """
        [[runs]]
        kernels = ["fa3", "pingpong"]
        seqlen = [1024, 32768]
        head_dim = [64, 128]
        causal = true
        tokens = 16384
        hidden = 2048

        [[runs]]
        kernels = "fa3"
        batch = 1
        heads = 16
        seqlen = [32768, 4096]
        causal = true
        heads_per_kv = 1
        """,
    )
    found = plan.read(path)
    assert len(found) == 2 * 2 * 2 + 1  # of the second block one was there already
    assert found[0] == plan.Entry("fa3", Workload(16, 32, 1024, 64, causal=True))
    assert {e.workload.batch for e in found if e.workload.seqlen == 32768} == {1}
    assert found[-1].workload == Workload(1, 16, 4096, causal=True)
    assert [plan.Entry.from_dict(json.loads(json.dumps(e.to_dict()))) for e in found] == found


def test_grouped_heads_follow_the_heads(tmp_path):
    (entry,) = plan.read(written(tmp_path, '[[runs]]\nkernels=["fa3"]\nbatch=1\nseqlen=512\nhidden=2048\nheads_per_kv=4\n'))
    assert (entry.workload.heads, entry.workload.kv_heads) == (16, 4)


@pytest.mark.parametrize(
    "text",
    [
        "not TOML [",
        "",
        "runs = 3",
        "[[runs]]\nbatch = 1\nheads = 1\nseqlen = 64",
        '[[runs]]\nkernels = ["fa3"]\nbatch = 1\nheads = 1\nlength = 64',
        '[[runs]]\nkernels = ["fa3"]\nbatch = 1\nheads = 1\nseqlen = -64',
        '[[runs]]\nkernels = ["fa3"]\ntokens = 16384\nheads = 1',
        '[[runs]]\nkernels = ["fa3"]\nseqlen = 64\nheads = 1',
        "runs = [1]",
        "runs = [[{}]]",
        "[[runs]]\nkernels = 3\nbatch = 1\nheads = 1\nseqlen = 64",
        "[[runs]]\nkernels = [3]\nbatch = 1\nheads = 1\nseqlen = 64",
        "[[runs]]\nkernels = []\nbatch = 1\nheads = 1\nseqlen = 64",
        '[[runs]]\nkernels = "fa3"\nbatch = 1\nheads = 1\nseqlen = []',
        '[[runs]]\nkernels = "fa3"\nbatch = 1\nheads = 4\nseqlen = 64\nheads_per_kv = 0',
        '[[runs]]\nkernels = "fa3"\nbatch = 1\nhidden = "x"\nseqlen = 64',
        '[[runs]]\nkernels = "fa3"\nbatch = 1\nhidden = 2048\nseqlen = 64\nhead_dim = 0',
        '[[runs]]\nkernels = "fa3"\ntokens = 2048\nheads = 1\nseqlen = 0',
        '[[runs]]\nkernels = "fa3"\nbatch = 1.5\nheads = 1\nseqlen = 64',
        '[[runs]]\nkernels = "fa3"\nbatch = true\nheads = 1\nseqlen = 64',
        '[[runs]]\nkernels = "fa3"\nbatch = 1\nheads = 1\nseqlen = 64\ndtype = {a = 1}',
        '[[runs]]\nkernels = "fa3"\nbatch = 1\nheads = 1\nseqlen = 64\ncausal = "no"',
        f'[[runs]]\nkernels = "fa3"\nbatch = {"9" * 4000}\nheads = 1\nseqlen = 64',
        f'[[runs]]\nkernels = "fa3"\nbatch = {list(range(1, 3001))}\nheads = 1\nseqlen = {list(range(1, 3001))}',
        '[[runs]]\nkernels = ["a\\u001bb"]\nbatch = 1\nheads = 1\nseqlen = 64',
    ],
)
def test_a_broken_plan_is_one_sentence_that_names_it(tmp_path, text):
    path = written(tmp_path, text)
    with pytest.raises(UsageError, match=r"plan\.toml") as caught:
        plan.read(path)
    assert "\n" not in str(caught.value)


# -- a train ---


def test_a_train_tells_burst_from_settled_and_energy_from_the_counter():
    begins = [0.01 * i for i in range(200)]
    seconds = [0.008 if begin < 0.03 else 0.01 for begin in begins]
    looks = [Look(i / 10, Sample(i / 10, 1.98e9, 700.0, 650.0 * i / 10), (1.9 if i < 8 else 1.5) * 1e9) for i in range(20)]
    train = Train(seconds, begins, looks, Sample(2.0, 1.98e9, 700.0, 1300.0), settle_s=0.995)
    assert train.within(0.0, 0.03) == [0.008] * 3
    assert train.within(train.settle_s) == [0.01] * 100
    assert {look.clock_hz for look in train.looks_within(train.settle_s)} == {1.5e9}
    assert [look.at_s for look in train.looks_within(0.41, 0.49)] == [0.4]  # none in there: the nearest
    assert train.energy_j == pytest.approx(6.5)


def test_without_an_energy_counter_there_is_no_energy():
    look = Look(0.0, Sample(0.0, 1.5e9, 700.0, None), None)
    assert Train([0.1], [0.0], [look], Sample(1.0, 1.5e9, 700.0, None)).energy_j is None


def test_the_clock_is_cycles_over_nanoseconds_of_the_same_sm():
    seen = np.zeros((3, 4, 2), np.int64)
    for moment in range(3):
        for sm in range(3):  # each counter has an origin of its own; SM 3 never ran
            seen[moment, sm] = 7_000 * sm + 15_000_000 * moment, 123 + 10_000_000 * moment
    assert clocks_hz(seen) == [1.5e9, 1.5e9]


USER = """
import torch

def right(q, k, v, causal=False, softmax_scale=None):
    s = torch.einsum("bmhd,bnhd->bhmn", q.float(), k.float()) * q.shape[-1] ** -0.5
    if causal:
        s = s.masked_fill(~torch.ones(s.shape[-2:]).tril(s.shape[-1] - s.shape[-2]).bool(), float("-inf"))
    return torch.einsum("bhmn,bnhd->bmhd", torch.softmax(s, -1), v.float()).to(q.dtype)

def wrong(q, k, v, causal=False, softmax_scale=None):
    return right(q, k, v, not causal)

def raises(q, k, v, causal=False, softmax_scale=None):
    raise RuntimeError("no kernel image")
"""


@pytest.fixture
def bench(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    from fasim.kernels.measure import bench as room

    (tmp_path / "their_attention.py").write_text(USER, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "their_attention", raising=False)
    monkeypatch.setattr(room, "MAX_BUFFERS", 2)
    monkeypatch.setattr(trains, "IDLE_S", 0.01)

    real = room.Bench

    def with_regime(regime: str = "sustained", l2: str = "cold", seconds: float = 0.25):
        return real(regime, l2, min(seconds, 0.25), MadeUpGpu(torch))

    return with_regime


SMALL = Workload(1, 2, 96, 64)


@pytest.mark.parametrize("regime", ["sustained", "burst"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_measured_run_says_what_was_measured_and_how(bench, regime, causal):
    workload = Workload(1, 2, 96, 64, causal=causal)
    run = bench(regime).measure(plan.Entry("their_attention:right", workload))
    taken = run.measurement
    assert (run.origin, run.schedule, run.device, run.workload) == ("measured", "their_attention:right", "h200", workload)
    assert taken.time_s == pytest.approx(0.05) and taken.burst_time_s == pytest.approx(0.05)
    assert run.sm_clock_hz == 1.5e9 and run.cycles == 75_000_000 and run.power_w == 690.0
    assert (taken.clock_from, taken.clock_asked_hz) == ("NVML", 1.5e9)
    assert taken.cycles_from == "time x clock"
    assert (taken.regime, taken.l2, taken.buffers, taken.launch, taken.implementation) == (regime, "cold", 2, "stream", "callable")
    assert taken.relative_error < 2e-3 and taken.calls >= 2
    assert list(taken.sources) == ["their_attention.py"]
    report = run.to_dict()
    assert report["tensor_utilization"] is None and report["traffic"]["hbm_read_bytes"] is None
    if regime == "sustained":
        assert taken.energy_j == pytest.approx(690.0 * 0.05, rel=0.2)


def test_the_same_inputs_every_time_keep_l2_warm(bench):
    taken = bench(l2="warm").measure(plan.Entry("their_attention:right", SMALL)).measurement
    assert (taken.l2, taken.buffers) == ("warm", 1)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "e4m3"])
def test_a_wrong_kernel_is_not_timed(bench, monkeypatch, dtype):
    from fasim.kernels.measure import bench as room
    from fasim.kernels.validation.check import Fault

    def timed(*_):
        raise AssertionError("it was timed")

    monkeypatch.setattr(room, "work_of", timed)
    workload = replace(SMALL, dtype=dtype)
    monkeypatch.setattr(room, "subject_of", lambda kernel, *_: made_up(kernel))
    with pytest.raises(Fault, match="their_attention:wrong is wrong on .* relative error"):
        bench().measure(plan.Entry("their_attention:wrong", workload))
    with pytest.raises(AssertionError, match="it was timed"):
        bench().measure(plan.Entry("their_attention:right", workload))


def made_up(kernel):
    """A subject that takes every dtype; in e4m3 the right one rounds P as a kernel does and gives bf16."""
    import torch

    from fasim.kernels.validation.subjects import Subject

    def forward(q, k, v, *, causal=False, softmax_scale=None):
        scores = torch.einsum("bmhd,bnhd->bhmn", q.double(), k.double()) * q.shape[-1] ** -0.5
        if kernel.endswith("wrong"):
            scores = scores.tril()
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        narrow = weights.to(q.dtype).double()
        out = torch.einsum("bhmn,bnhd->bmhd", narrow / weights.sum(-1, keepdim=True), v.double())
        return out.to(torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype)

    return Subject(name=kernel, forward=forward, dtypes=("fp16", "bf16", "e4m3"))


def test_the_clock_is_right_past_the_first_block_of_moments(monkeypatch):
    torch = pytest.importorskip("torch")
    from fasim.kernels.measure import clock_probe

    class Module:
        def __init__(self, source):
            self.moment = 0

        def launch(self, name, grid, threads, arguments):
            log, slot, sms = arguments
            log[slot, :sms, 0], log[slot, :sms, 1] = 1500 * self.moment**2 + 1, 1000 * self.moment**2 + 1
            self.moment += 1

    monkeypatch.setattr("fasim.kernels.calibrate.harness.Module", Module)
    monkeypatch.setattr(clock_probe, "SLOTS", 4)
    monkeypatch.setattr(
        clock_probe.ClockProbe, "_log", lambda self: torch.zeros((clock_probe.SLOTS, self.sms, 2), dtype=torch.int64)
    )
    probe = clock_probe.ClockProbe(3)
    for _ in range(3):
        moments = [probe.stamp() for _ in range(11)]
        assert probe.clocks_hz(moments) == pytest.approx([1.5e9] * 10)
        assert len(probe._logs) == 1  # what was read is forgotten


def test_one_that_fails_does_not_stop_the_others(bench, monkeypatch):
    from fasim.kernels.measure import runs as measure

    monkeypatch.setattr(measure, "require_gpu", lambda: None)
    monkeypatch.setattr(measure, "Bench", bench)
    entries = [plan.Entry(f"their_attention:{name}", SMALL) for name in ("raises", "wrong", "right")]
    first, second, third = measure.measure_all(entries)
    assert first.reason == "RuntimeError: no kernel image"
    assert "is wrong on" in second.reason
    assert third.origin == "measured"


def test_a_failed_profile_leaves_its_runs_without_counters_and_says_so(bench, monkeypatch):
    from fasim.kernels.measure import runs as measure

    monkeypatch.setattr(measure, "require_gpu", lambda: None)
    monkeypatch.setattr(measure, "Bench", bench)
    monkeypatch.setattr(measure, "CHUNK", 1)
    monkeypatch.setattr(counters, "require", lambda: "ncu")
    answers = iter([UsageError("ncu failed"), [[Profiled("k", {"sm__cycles_elapsed.max": 5.0})]]])

    def profile(_):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(counters, "profile", profile)
    entries = [plan.Entry("their_attention:right", Workload(1, 2, length, 64)) for length in (64, 96)]
    first, second = measure.measure_all(entries, counters=True)
    assert first.warnings == ("no counters: ncu failed",) and first.measurement.counters == {}
    assert second.warnings == () and second.cycles == 5


def test_what_a_kernel_does_not_take_is_said_before_anything_runs(bench):
    with pytest.raises(UsageError, match="head_dim=256 is not supported by 'torch-cudnn'"):
        bench().measure(plan.Entry("torch-cudnn", Workload(1, 2, 96, 256)))
    with pytest.raises(UsageError, match="dtype=e4m3"):
        bench().measure(plan.Entry("torch-cudnn", Workload(1, 2, 96, 64, "e4m3")))


def test_every_kernel_of_ours_names_its_sources():
    pytest.importorskip("torch")
    from fasim.kernels.measure import names

    for name in ("standard", "fa1", "fa2"):
        found = names.sources_of(SimpleNamespace(name=name, sources=()), SMALL)
        assert f"kernels/triton/{name}.py" in found and all(len(digest) == 64 for digest in found.values())


def test_our_fa3_is_measured_in_e4m3_too_on_its_own_tile_and_by_its_own_sources():
    pytest.importorskip("torch")
    from fasim.kernels.measure import names, timeline

    subject, work = names.subject_of("fa3"), Workload(1, 2, 4096, 128, "e4m3")
    names.accept(subject, work)
    assert names.tile_of("fa3", work).block_n == 192 and names.tile_of("fa3", replace(work, dtype="bf16")).block_n == 128
    found = names.sources_of(subject, work)
    assert {"kernels/cuda/fa3.cu", "kernels/cuda/fp8/attention.cuh", "kernels/cuda/fp8/wgmma.py"} <= found.keys()
    assert "kernels/cuda/wgmma.py" in names.sources_of(subject, replace(work, dtype="bf16")).keys() - found.keys()
    with pytest.raises(UsageError, match="dtype=e4m3 is not supported by 'pingpong'"):
        names.accept(names.subject_of("pingpong"), work)
    traced = timeline.Traced(plan.Entry("fa3", work)).config
    assert traced.fit.tile.block_n == 192 and traced.source.defines["TRACE"] == 1
    with pytest.raises(UsageError, match="'pingpong' has no FP8 kernel"):
        timeline.Traced(plan.Entry("pingpong", work))


UNEVEN = Workload(4, 4, head_dim=64, kv_heads=2, causal=True, lengths=((40, 40), (0, 9), (7, 70), (90, 20)))


def test_packed_sequences_are_a_plans_lengths(tmp_path):
    text = '[[runs]]\nkernels = "fa3"\nheads = 4\nlengths = [[100, [7, 70]], [5]]\n'
    one, other = plan.read(written(tmp_path, text))
    assert one.workload == Workload(2, 4, lengths=((100, 100), (7, 70))) and other.workload.batch == 1
    assert plan.Entry.from_dict(json.loads(json.dumps(one.to_dict()))) == one and counters.marked([one.to_dict()])
    for wrong in ("[3, 5]", '["3"]', "[[3.5]]", "[[]]", "7"):
        with pytest.raises(UsageError, match=r"plan\.toml: "):
            plan.read(written(tmp_path, f'[[runs]]\nkernels = "fa3"\nheads = 4\nlengths = {wrong}\n'))


@pytest.mark.parametrize("wrong", [False, True])
def test_packed_sequences_are_held_to_the_oracle_and_timed(bench, monkeypatch, wrong):
    torch = pytest.importorskip("torch")
    from fasim.kernels.measure import names, packed
    from fasim.kernels.validation.check import Fault
    from fasim.kernels.varlen.reference import attention_forward

    def right(q, k, v, starts_q, starts_k):
        o = attention_forward(q, k, v, starts_q, starts_k, causal=not wrong).o.to(q.dtype)
        assert len(q) == 137 and len(k) == 139 and starts_q.dtype == torch.int32
        return o

    monkeypatch.setattr(packed, "caller", lambda workload: right)
    entry = plan.Entry("fa3", UNEVEN)
    if wrong:
        with pytest.raises(Fault, match="fa3 is wrong on"):
            bench().measure(entry)
        with pytest.raises(UsageError, match="'pingpong' is not measured on packed sequences"):
            bench().measure(plan.Entry("pingpong", UNEVEN))
        return
    run = bench().measure(entry)
    assert run.workload.lengths == UNEVEN.lengths and run.measurement.relative_error < 2e-3
    assert names.sources_of(names.subject_of("fa3"), UNEVEN).keys() >= {"kernels/cuda/varlen/prepare.cu", "kernels/cuda/fa3.cu"}


def test_few_queries_are_measured_with_their_parts_and_sources(monkeypatch):
    torch = pytest.importorskip("torch")
    from fasim.kernels.measure import names

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    work = Workload(8, 32, kv_heads=8, seqlen_q=1, seqlen_k=32768, dtype="bf16")
    subject = names.subject_of("decode")
    names.accept(subject, work)
    assert (names.tile_of("decode", work).parts, names.implementation_of("decode")) == (2, "triton")
    assert names.sources_of(subject, work).keys() >= {"kernels/decode/kernel.py", "kernels/triton/loads.py"}


def test_without_a_gpu_measuring_says_so():
    torch = pytest.importorskip("torch")
    from fasim.kernels.measure import runs as measure

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(MissingTool, match="needs an NVIDIA GPU"):
        measure.measure("fa2", SMALL)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--plan", "none.toml", "--out", "runs"), 2, "plan none.toml does not exist"),
        (("--plan", "plan.toml"), 2, "give --plan and --out"),
        (("--plan", "plan.toml", "--out", "runs", "--seconds", "0"), 2, "seconds=0"),
        (("--plan", "plan.toml", "--out", "runs", "--l2", "hot"), 2, "invalid choice"),
    ],
)
def test_the_module_refuses_what_it_cannot_do_in_one_sentence(tmp_path, arguments, status, said):
    written(tmp_path, '[[runs]]\nkernels = "torch-cudnn"\nbatch = 1\nheads = 1\nseqlen = 64\n')
    command = [sys.executable, "-m", "fasim.kernels.measure", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (status, "") and said in done.stderr and "Traceback" not in done.stderr


def test_the_module_exits_3_without_a_gpu(tmp_path):
    try:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
    except ImportError:
        pass
    written(tmp_path, '[[runs]]\nkernels = "torch-cudnn"\nbatch = 1\nheads = 1\nseqlen = 64\n')
    command = [sys.executable, "-m", "fasim.kernels.measure", "--plan", "plan.toml", "--out", "runs"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1)
