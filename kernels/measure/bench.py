"""A bench: one kernel run on the GPU over one workload, as a Run with origin "measured".

Calls follow one another on one stream, over random normal inputs; every call lies between two CUDA events. Of a train of
calls that starts on an idle GPU, the first 30 ms are the "burst" regime and the last two thirds the "sustained" one,
in which the power limit has settled (kernels/calibrate/NOTES.md, clock and power). The clock is what the SMs count
(clock_probe.py); NVML's power and energy are read between batches of calls while others are queued. L2 is "cold" where
the inputs of consecutive calls rotate through several times L2, "warm" where every call reads the same. Where launching
takes longer than the kernel, the calls are replayed from a CUDA graph. O, of a backward dQ, dK and dV, are held to the fp64
reference before anything is timed. A backward is timed alone: each set of inputs has had its forward.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from ...simulator.problem.workload import Workload
from ...simulator.results.run import Activity, Bottleneck, Bytes, Measurement, Run, Traffic
from ..validation.check import Fault
from ..validation.subjects import Subject
from . import gradients, packed
from .names import accept, caller, implementation_of, packages_of, sources_of, subject_of, tile_of
from .plan import Entry
from .trains import BURST_S, SUSTAINED_S, Gpu, burst_trains, sustained_train, work_of

L2_TIMES = 3
MAX_BUFFERS = 64
TOLERANCE = {"fp16": 2e-3, "bf16": 1.6e-2, "e4m3": 0.2}
"""Relative error of O above which nothing is timed: some eight times what a right kernel makes, which for e4m3 is what rounding
P to three bits costs, 0.022 to 0.027 on normal data. `fasim validate` judges finely."""
CHECKED_ROWS = 512
DEVICE_OF = {
    "NVIDIA H200": "h200",
    "NVIDIA H100 80GB HBM3": "h100-sxm",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA A100-SXM4-80GB": "a100-sxm",
}
"""The GPU's name -> the device model; another GPU keeps its own name."""


class Bench:
    """A GPU that is asked to run one kernel after another."""

    def __init__(self, regime: str, l2: str, seconds: float = SUSTAINED_S, gpu: Gpu | None = None) -> None:
        self.regime = regime
        self.l2 = l2
        self.seconds = seconds
        self.gpu = gpu or Gpu()

    def measure(self, entry: Entry, attend: Callable | None = None) -> Run:
        """One run, without counters, by `attend(q, k, v)` where another build is called; raises as `measure` does."""
        subject, workload = subject_of(entry.kernel, self.gpu.name, entry.workload.direction), entry.workload
        accept(subject, workload)
        sets = self.inputs(workload)
        calls = [partial(attend, *each) for each in sets] if attend else calls_of(subject, workload, sets)
        error = _check(subject.name, workload, calls[0](), sets[0])
        work = work_of(self.gpu, lambda number: calls[number % len(calls)](), len(calls))
        if self.regime == "burst":
            trains = burst_trains(self.gpu, work)
            looks = [look for train in trains for look in train.looks_within(0.0, BURST_S)]
            seconds = burst = [t for train in trains for t in train.within(0.0, BURST_S)]
            energy = None
        else:
            train = sustained_train(self.gpu, work, self.seconds)
            seconds, looks, energy = train.within(train.settle_s), train.looks_within(train.settle_s), train.energy_j
            burst = train.within(0.0, BURST_S)
        seconds, time_s = sorted(seconds), statistics.median(seconds)
        counted = [look.clock_hz for look in looks if look.clock_hz is not None]
        asked = [look.sample.clock_hz for look in looks]
        clocks = sorted(counted or asked)
        clock_hz = statistics.median(clocks)
        powers = [look.sample.power_w for look in looks if look.sample.power_w is not None]
        found = self.gpu.properties
        taken = Measurement(
            kernel=subject.name,
            implementation=implementation_of(subject.name),
            gpu=found.name,
            driver=self.gpu.board.driver,
            cuda=self.gpu.torch.version.cuda or "",
            date=datetime.date.today().isoformat(),
            regime=self.regime,
            l2=self.l2,
            buffers=len(sets),
            launch=work.launch,
            calls=len(seconds) * work.calls,
            time_s=time_s,
            time_p10_s=_at(seconds, 0.1),
            time_p90_s=_at(seconds, 0.9),
            burst_time_s=statistics.median(burst),
            clock_from="SM cycle counters" if counted else "NVML",
            clock_asked_hz=statistics.fmean(asked),
            clock_p10_hz=_at(clocks, 0.1),
            clock_p90_hz=_at(clocks, 0.9),
            energy_j=energy,
            relative_error=error,
            packages=_packages() | packages_of(subject.name),
            sources=sources_of(subject, workload),
        )
        return Run(
            origin="measured",
            workload=workload,
            schedule=subject.name,
            tile=tile_of(subject.name, workload),
            device=DEVICE_OF.get(found.name, found.name),
            cycles=max(1, round(time_s * clock_hz)),
            sm_clock_hz=clock_hz,
            power_w=statistics.median(powers) if powers else None,
            activity=Activity(found.multi_processor_count, None, None, None, None, None),
            traffic=Traffic({"all": Bytes(None, None, None, None, None, None)}, None, None, None, None),
            bottleneck=Bottleneck("unknown", "a measured run is explained beside its prediction"),
            measurement=taken,
        )

    def inputs(self, workload: Workload) -> list[tuple]:
        """Sets of inputs: one for a warm L2, for a cold one enough to rotate through several times its size."""
        size = workload.tensor_bytes
        read = ("Q", "K", "V", "O", "dO") if workload.backward else "QKV"
        needed = 1 + math.ceil(L2_TIMES * self.gpu.properties.L2_cache_size / sum(size[name] for name in read))
        count = 1 if self.l2 == "warm" else min(MAX_BUFFERS, needed)
        generator = self.gpu.torch.Generator(device=self.gpu.name).manual_seed(workload.seqlen_q + workload.head_dim)
        return [random_inputs(workload, self.gpu.name, generator) for _ in range(count)]


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def calls_of(subject: Subject, workload: Workload, sets: Sequence[tuple]) -> list[Callable[[], object]]:
    """What is called with each set of inputs: the forward, or the backward when its forward is done."""
    attend = gradients.gradient_of(subject, workload) if workload.backward else caller(subject, workload)
    return [attend(*each) if workload.backward else partial(attend, *each) for each in sets]


def random_inputs(workload: Workload, device: str = "cuda", generator=None) -> tuple:
    """(q, k, v) of the workload, and dO of a backward, normal, since zeros draw less power: q and dO are (B, S_q, H, D), k and v
    (B, S_k, H_kv, D); of packed sequences those of packed.py."""
    import torch

    w = workload
    if w.lengths:
        return packed.inputs(w, device, generator)
    kinds = {"fp16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
    of_q, of_k = (w.batch, w.seqlen_q, w.heads, w.head_dim), (w.batch, w.seqlen_k, w.kv_heads, w.head_dim)
    shapes = [of_q, of_k, of_k, of_q] if w.backward else [of_q, of_k, of_k]
    half = torch.float16 if w.dtype == "e4m3" else kinds[w.dtype]
    return tuple(torch.randn(shape, dtype=half, device=device, generator=generator).to(kinds[w.dtype]) for shape in shapes)


def _check(name: str, workload: Workload, got: object, inputs: tuple) -> float:
    """`error_of`; Fault where it is beyond TOLERANCE."""
    worst, allowed = error_of(got, inputs, workload), TOLERANCE[workload.dtype]
    if not worst <= allowed:
        raise Fault(
            f"{name} is wrong on {workload}: relative error {worst:.1e} against fp64, {allowed:.1e} allowed; "
            "`fasim validate` shows where"
        )
    return worst


def error_of(got: object, inputs: tuple, workload: Workload) -> float:
    """Relative error of the first and last head of the first batch entry: of their first and last rows of O, or of dQ, dK, dV."""
    return largest_error(_pairs(got, inputs, workload))


def largest_error(pairs: Iterable[tuple]) -> float:
    """Of (ours, theirs): the norm of the difference over theirs, infinity where it is no number."""
    worst = 0.0
    for ours, theirs in pairs:
        error = float((ours.double() - theirs).norm() / theirs.norm().clamp(min=1e-30))
        worst = max(worst, error) if math.isfinite(error) else math.inf
    return worst


def _pairs(got: object, inputs: tuple, workload: Workload) -> Iterator[tuple]:
    if workload.backward:
        yield from gradients.compared(got, gradients.expected(inputs, workload), workload)
        return
    if workload.lengths:
        yield from packed.compared(got, inputs, workload)
        return
    out = got[0] if isinstance(got, tuple) else got
    for head in (0, workload.heads - 1):
        yield from _compared(out, inputs, workload, head)


def _compared(out, inputs: tuple, workload: Workload, head: int) -> Iterator[tuple]:
    """(kernel's rows, the reference's) of one head of the first batch entry: the first rows, and the last."""
    from ..reference import attention_forward

    q, k, v = inputs
    mine, shared = slice(head, head + 1), head // workload.heads_per_kv
    keys, values = (x[:1, :, shared : shared + 1] for x in (k, v))
    rows, length = min(CHECKED_ROWS, workload.seqlen_q), workload.seqlen_k
    for first in dict.fromkeys((0, workload.seqlen_q - rows)):
        seen = length
        if workload.causal:  # bottom right: these rows as the last of a shorter problem
            seen = min(length, max(0, length - workload.seqlen_q + first + rows))
        if seen:
            part = slice(first, first + rows)
            expected = attention_forward(q[:1, part, mine], keys[:, :seen], values[:, :seen], causal=workload.causal).o
            yield out[:1, part, mine], expected


def _packages() -> dict[str, str]:
    found = {}
    for name in ("torch", "triton", "cuda-bindings", "nvidia-cuda-nvrtc"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
