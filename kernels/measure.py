"""Measure: run a kernel on the GPU and return a Run with origin "measured".

Calls follow one another on one stream, over random normal inputs; every call lies between two CUDA events. Of a train of
calls that starts on an idle GPU, the first 30 ms are the "burst" regime and the last two thirds the "sustained" one,
in which the power limit has settled (kernels/calibrate/NOTES.md, clock and power). The clock is what the SMs count
(clock_probe.py); NVML's power and energy are read between batches of calls while others are queued. L2 is "cold" where
the inputs of consecutive calls rotate through several times L2, "warm" where every call reads the same. Where launching
takes longer than the kernel, the calls are replayed from a CUDA graph. O is held to the fp64 reference before anything is
timed.

`python -m fasim.kernels.measure --out DIR --plan PLAN [--counters | --timeline]` takes many runs where only torch is installed.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import importlib.util
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..simulator.errors import UsageError, did_you_mean
from ..simulator.problem.tile import Tile
from ..simulator.problem.workload import Workload
from ..simulator.reading import read_json
from ..simulator.results.run import Activity, Bottleneck, Bytes, Measurement, Run, Traffic
from ..traces import nsight, store
from . import counters as nsight_process
from .cuda.config import DTYPES as CUDA_DTYPES
from .cuda.config import HEAD_DIMS, config_for
from .cuda.config import SCHEDULES as CUDA_SCHEDULES
from .plan import Entry, read
from .timeline import record
from .trains import BURST_S, SUSTAINED_S, Gpu, burst_trains, sustained_train, work_of
from .validation.check import Case, Fault, MissingTool
from .validation.subjects import Subject, resolve

REGIMES = ("sustained", "burst")
L2_STATES = ("cold", "warm")
L2_TIMES = 3
MAX_BUFFERS = 64
CHUNK = 64
"""Entries counted by one process under Nsight Compute."""
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
ROOM = Path(__file__).parent
Advance = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Refused:
    """A run that could not be taken, and why."""

    entry: Entry
    reason: str


def measure(
    kernel: str,
    workload: Workload,
    *,
    counters: bool = False,
    regime: str = "sustained",
    l2: str = "cold",
    seconds: float = SUSTAINED_S,
    timeline: bool = False,
) -> Run:
    """Run a kernel on the current GPU and measure it.

    `kernel` is a name that `kernels.validation.subjects` knows or the user's package.module:function. Time is the median
    of one call by CUDA events, energy and clock those of the same calls; cycles are time x clock, unless
    `counters` counts them, with everything else, in a second process under Nsight Compute. `timeline` measures the build
    that stamps what it does, and keeps the spans of a few CTAs (timeline.py). Raises UsageError for what the kernel does
    not take, MissingTool for a GPU, a library or a program that is not here, Fault for a wrong output.
    """
    how = {"counters": counters, "regime": regime, "l2": l2, "seconds": seconds, "timeline": timeline}
    (found,) = measure_all([Entry(kernel, workload)], **how)
    if isinstance(found, Refused):
        raise UsageError(found.reason)
    return found


def measure_all(
    plan: Sequence[Entry],
    *,
    counters: bool = False,
    regime: str = "sustained",
    l2: str = "cold",
    seconds: float = SUSTAINED_S,
    timeline: bool = False,
    advance: Advance | None = None,
) -> Iterator[Run | Refused]:
    """Measure every entry of a plan, one process under Nsight Compute counting for CHUNK of them; see `measure`.

    Counters come first, so that a machine without them says so before it has worked for minutes. Where one of several
    processes fails, its runs lack counters and say so in their warnings.
    """
    if regime not in REGIMES:
        raise UsageError(f"regime {regime!r} is not known ({', '.join(REGIMES)}){did_you_mean(regime, REGIMES)}")
    if not 0.1 <= seconds <= 60:
        raise UsageError(f"seconds={seconds:g} is not possible: give the length of a sustained run, 0.1 to 60")
    if l2 not in L2_STATES:
        raise UsageError(f"l2 {l2!r} is not a state ({', '.join(L2_STATES)}){did_you_mean(l2, L2_STATES)}")
    if timeline and counters:
        raise UsageError("counters are of the plain build, a timeline is of the one that stamps: take them apart")
    require_gpu()
    if counters:
        nsight_process.require()
    bench = Bench(regime, l2, seconds)
    for first in range(0, len(plan), CHUNK):
        chunk = plan[first : first + CHUNK]
        counted: Sequence = [()] * len(chunk)
        missing = ""
        if counters:
            if advance:
                advance(first, len(plan), "counters, by Nsight Compute")
            try:
                counted = nsight_process.profile([entry.to_dict() for entry in chunk])
            except UsageError as error:
                if len(plan) == 1:
                    raise
                missing = f"no counters: {error}"
        for number, (entry, kernels) in enumerate(zip(chunk, counted, strict=True), start=first):
            if advance:
                advance(number, len(plan), f"{entry.kernel}, {entry.workload}")
            try:
                run = record(bench, entry) if timeline else bench.measure(entry)
            except MissingTool:
                raise
            except Exception as error:  # out of memory, or whatever a user's kernel raises: the other runs go on
                if isinstance(error, Fault) and len(plan) == 1:
                    raise
                yield Refused(entry, _reason(error))
                continue
            if kernels:
                run = nsight.with_counters(run, kernels)
            elif counters:
                run = replace(run, warnings=(missing or "no counters: the call launched no kernel under Nsight Compute",))
            yield run


def require_gpu() -> None:
    """Raise MissingTool, one sentence, unless torch sees an NVIDIA GPU."""
    if importlib.util.find_spec("torch") is None:
        raise MissingTool("measuring needs torch, which is not installed: pip install 'fasim[kernels]'")
    import torch

    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else " (this torch is built without CUDA)"
        raise MissingTool(f"measuring needs an NVIDIA GPU, and torch sees none{built}; `fasim doctor` says what is missing")


def implementation_of(kernel: str) -> str:
    """Whose kernel it is: "cuda" or "triton" (ours), "pytorch", or "callable"."""
    if ":" in kernel:
        return "callable"
    if kernel.startswith("torch-"):
        return "pytorch"
    return "cuda" if kernel in CUDA_SCHEDULES else "triton"


def subject_of(kernel: str, device: str = "cuda") -> Subject:
    """The kernel by its name; raises as `subjects.resolve` does."""
    if kernel not in CUDA_SCHEDULES:
        return resolve(kernel, device)
    from .ops import flash_attn_func

    def forward(q, k, v, *, causal=False, softmax_scale=None):
        return flash_attn_func(q, k, v, softmax_scale=softmax_scale, causal=causal, schedule=kernel, return_lse=True)

    return Subject(name=kernel, forward=forward, head_dims=HEAD_DIMS, dtypes=CUDA_DTYPES, needs_cuda=True, returns_lse=True)


def sources_of(subject: Subject) -> dict[str, str]:
    """Path within the package -> SHA-256, of the files that make up a kernel of ours; of the user's, its module."""
    file = subject.name.replace("-", "_")
    match implementation_of(subject.name):
        case "cuda":
            room = ROOM / "cuda"
            paths = [room / f"{file}.cu", *sorted(room.glob("*.cuh")), room / "wgmma.py"]
        case "triton":
            paths = [ROOM / "triton" / f"{each}.py" for each in (file, "arithmetic", "loads", "tiles")]
        case _:
            return {path.name: _sha256(path) for path in subject.sources}
    return {path.relative_to(ROOM.parent).as_posix(): _sha256(path) for path in paths}


def tile_of(kernel: str, workload: Workload) -> Tile | None:
    """The tile our CUDA kernel takes for a workload; None where it is not known."""
    if implementation_of(kernel) != "cuda":
        return None
    return config_for(kernel, workload.dtype, workload.head_dim, workload.causal).tile


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, (UsageError, NotImplementedError, Fault)) else f"{type(error).__name__}: {text}"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- one kernel on one workload ---------------------------------------------------------------------------------------


class Bench:
    """A GPU that is asked to run one kernel after another."""

    def __init__(self, regime: str, l2: str, seconds: float = SUSTAINED_S, gpu: Gpu | None = None) -> None:
        self.regime = regime
        self.l2 = l2
        self.seconds = seconds
        self.gpu = gpu or Gpu()

    def measure(self, entry: Entry, attend: Callable | None = None) -> Run:
        """One run, without counters, by `attend(q, k, v)` where another build is called; raises as `measure` does."""
        subject, workload = subject_of(entry.kernel, self.gpu.name), entry.workload
        _accept(subject, workload)
        sets = self.inputs(workload)
        attend = attend or caller(subject, workload)
        error = _check(subject.name, workload, attend(*sets[0]), sets[0])
        work = work_of(self.gpu, lambda number: attend(*sets[number % len(sets)]), len(sets))
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
            packages=_packages(),
            sources=sources_of(subject),
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
        """Sets of (q, k, v): one for a warm L2, for a cold one enough to rotate through several times its size."""
        size = workload.tensor_bytes
        needed = 1 + math.ceil(L2_TIMES * self.gpu.properties.L2_cache_size / sum(size[name] for name in "QKV"))
        count = 1 if self.l2 == "warm" else min(MAX_BUFFERS, needed)
        generator = self.gpu.torch.Generator(device=self.gpu.name).manual_seed(workload.seqlen_q + workload.head_dim)
        return [random_inputs(workload, self.gpu.name, generator) for _ in range(count)]


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def _accept(subject: Subject, workload: Workload) -> None:
    """UsageError where the workload lies outside what the kernel promises."""
    if workload.dtype not in subject.dtypes:
        raise UsageError(f"dtype={workload.dtype} is not supported by '{subject.name}' ({', '.join(subject.dtypes)})")
    if workload.head_dim not in subject.head_dims and ":" not in subject.name:
        raise UsageError(
            f"head_dim={workload.head_dim} is not supported by '{subject.name}' ({', '.join(map(str, subject.head_dims))})"
        )
    case = Case(
        name="measure", batch=workload.batch, heads=workload.heads, kv_heads=workload.kv_heads, head_dim=workload.head_dim,
        seqlen_q=workload.seqlen_q, seqlen_k=workload.seqlen_k, causal=workload.causal,
    )  # fmt: skip
    if reason := subject.refuses(case):
        raise UsageError(f"{subject.name} does not take {workload}: {reason}")


def caller(subject: Subject, workload: Workload) -> Callable:
    """f(q, k, v) -> O or (O, LSE): the kernel and nothing beside it (validation tidies PyTorch's LSE up, which takes kernels)."""
    import torch

    causal = workload.causal
    if subject.name == "torch-fa2":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        return lambda q, k, v: kernel(*(x.transpose(1, 2) for x in (q, k, v)), 0.0, causal)[0].transpose(1, 2)
    if subject.name == "torch-cudnn":
        kernel = torch.ops.aten._scaled_dot_product_cudnn_attention
        return lambda q, k, v: kernel(*(x.transpose(1, 2) for x in (q, k, v)), None, True, 0.0, causal)[0].transpose(1, 2)
    return lambda q, k, v: subject.forward(q, k, v, causal=causal)


def random_inputs(workload: Workload, device: str = "cuda", generator=None) -> tuple:
    """(q, k, v) of the workload, normal, since zeros draw less power: q (B, S_q, H, D), k and v (B, S_k, H_kv, D)."""
    import torch

    w = workload
    kinds = {"fp16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
    shapes = [(w.batch, w.seqlen_q, w.heads, w.head_dim)] + [(w.batch, w.seqlen_k, w.kv_heads, w.head_dim)] * 2
    half = torch.float16 if w.dtype == "e4m3" else kinds[w.dtype]
    return tuple(torch.randn(shape, dtype=half, device=device, generator=generator).to(kinds[w.dtype]) for shape in shapes)


def _check(name: str, workload: Workload, got: object, inputs: tuple) -> float:
    """Relative error of the first and last rows of the first and last head; Fault where it is beyond TOLERANCE."""
    out = got[0] if isinstance(got, tuple) else got
    worst = 0.0
    for head in (0, workload.heads - 1):
        for ours, theirs in _compared(out, inputs, workload, head):
            error = float((ours.double() - theirs).norm() / theirs.norm().clamp(min=1e-30))
            worst = max(worst, error) if math.isfinite(error) else math.inf
    allowed = TOLERANCE[workload.dtype]
    if not worst <= allowed:
        raise Fault(
            f"{name} is wrong on {workload}: relative error {worst:.1e} against fp64, {allowed:.1e} allowed; "
            "`fasim validate` shows where"
        )
    return worst


def _compared(out, inputs: tuple, workload: Workload, head: int) -> Iterator[tuple]:
    """(kernel's rows, the reference's) of one head of the first batch entry: the first rows, and the last."""
    from .reference import attention_forward

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


# -- under Nsight Compute, and by itself ------------------------------------------------------------------------------


def launch_for_profiler(plan: Sequence[Entry]) -> None:
    """Warm every entry up, then launch one call of each with the profiler on, a marker before it or in its place."""
    import torch

    marked = nsight_process.marked([entry.to_dict() for entry in plan])
    for entry in plan:
        call = attend = inputs = None
        try:
            subject = subject_of(entry.kernel)
            _accept(subject, entry.workload)
            attend, inputs = caller(subject, entry.workload), random_inputs(entry.workload)
            call = partial(attend, *inputs)
            call()
        except (UsageError, NotImplementedError, MissingTool, RuntimeError) as error:
            sys.stderr.write(f"{entry.kernel}, {entry.workload}: {error}\n")
            call = None
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        if marked or not call:
            torch.cuda._sleep(1)
        if call:
            call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
        call = attend = inputs = None


def main() -> int:
    """Exit status: 0 all measured, 1 one was wrong or refused, 2 usage, 3 no GPU or tool."""
    parser = argparse.ArgumentParser(prog="python -m fasim.kernels.measure", description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path, help="TOML file of [[runs]]")
    parser.add_argument("--out", type=Path, help="folder for the runs")
    parser.add_argument("--counters", action="store_true", help="also count under Nsight Compute")
    parser.add_argument("--timeline", action="store_true", help="measure the build that stamps what it does; keep its spans")
    parser.add_argument("--regime", default="sustained", choices=REGIMES)
    parser.add_argument("--l2", default="cold", choices=L2_STATES)
    parser.add_argument("--seconds", type=float, default=SUSTAINED_S, help="length of a sustained run")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    try:
        if given.child:
            launch_for_profiler([Entry.from_dict(each) for each in read_json(given.child, "plan")])
            return 0
        if not given.plan or not given.out:
            parser.error("give --plan and --out")
        return _take(given)
    except UsageError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except MissingTool as error:
        sys.stderr.write(f"{error}\n")
        return 3


def _take(given: argparse.Namespace) -> int:
    plan = read(given.plan)
    given.out.mkdir(parents=True, exist_ok=True)
    status = 0
    how = {name: getattr(given, name) for name in ("counters", "regime", "l2", "seconds", "timeline")}
    for entry, found in zip(plan, measure_all(plan, **how), strict=True):
        if isinstance(found, Refused):
            status = 1
            sys.stdout.write(f"{entry.kernel}, {entry.workload}: {found.reason}\n")
        else:
            store.save(found, given.out / store.file_name(found))
            sys.stdout.write(f"{summary(found)}\n")
        sys.stdout.flush()
    return status


def summary(run: Run) -> str:
    """One line: what ran, how long, at which clock, and how many cycles were counted."""
    taken, report = run.measurement, run.to_dict()
    share = f", tensor {report['tensor_utilization']:.1%}" if report["tensor_utilization"] is not None else ""
    if taken.trace_overhead is not None:
        share += f", {len(run.spans):,} spans, tracing costs {taken.trace_overhead:+.1%} cycles"
    share += "".join(f" ({warning})" for warning in run.warnings)
    return (
        f"{run.schedule}, {run.workload}: {taken.time_s * 1e6:.1f} us "
        f"({taken.time_p10_s * 1e6:.1f} to {taken.time_p90_s * 1e6:.1f}), "
        f"{report['tflops']:.0f} TFLOP/s, {run.sm_clock_hz / 1e6:.0f} MHz, {run.cycles:,} cycles{share}"
    )


if __name__ == "__main__":
    sys.exit(main())
