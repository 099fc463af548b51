"""`fasim measure`: run a kernel on this machine's GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ..simulator.errors import UsageError
from . import output
from .options import Json, WorkloadOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from ..simulator.results.run import Run

_DEFAULT = WorkloadOptions()


def measure(
    kernel: str | None = None,
    workload: WorkloadOptions = _DEFAULT,
    *,
    plan: Path | None = None,
    counters: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    regime: str = "sustained",
    l2: str = "cold",
    seconds: float | None = None,
    timeline: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    out: Path | None = None,
    json: Json = False,
) -> int:
    """Run a kernel on the GPU: time, SM clock, power, energy, and with --counters what the hardware counted.

    The kernel is one of ours by its schedule, PyTorch's (torch-cudnn, torch-fa2, torch-math), another library's where its
    wheel is installed (peer:fa3, peer:fa4, peer:cudnn, peer:fa2, peer:flex) or your own function, given as
    package.module:function and called as f(q, k, v, causal=..., softmax_scale=...). Its output is held to fp64 first. With
    --pass backward its gradients are, and the backward is timed without the forward. Time is the median between CUDA events.
    Exit status: 1 where an output is wrong or a plan's run was refused, 3 without a GPU, or without Nsight Compute for
    --counters (`fasim doctor` says beforehand).

    Example: fasim measure fa3 --seqlen 4096 --causal --counters --out runs

    Theory: under load the power limit lowers the clock within a tenth of a second, so a benchmark's length decides its
    result: "burst" is what a short one sees, "sustained" what the hardware keeps up. NVML names the clock that was asked
    for; the SMs run at less, and are asked themselves.

    Parameters
    ----------
    kernel
        A kernel by name, peer:NAME, or package.module:function.
    plan
        Take many runs instead: a TOML file of [[runs]] blocks (see kernels/measure/plan.py).
    counters
        Also count cycles, bytes and utilisations under Nsight Compute.
    regime
        sustained or burst.
    l2
        cold (inputs rotate through more than L2) or warm (the same inputs every time).
    seconds
        Length of a sustained run; its last two thirds count. [default: 1.5]
    timeline
        Measure the build that stamps what it does, and keep the spans of three CTAs (our CUDA kernels; not with --counters).
    out
        Folder to keep the runs in, for `fasim compare`.
    """
    if (kernel is None) == (plan is None):
        raise UsageError("give a kernel, or a plan of many runs with --plan")
    if plan is not None and out is None:
        raise UsageError("--plan takes many runs: give the folder to keep them in with --out")
    if plan is not None and workload != _DEFAULT:
        raise UsageError("--plan names its workloads in the file: leave --batch, --seqlen and the others out")
    if regime == "burst" and seconds is not None:
        raise UsageError("--seconds is the length of a sustained run, and --regime burst takes the first 30 ms: give one of them")
    from ..kernels.measure import runs as room
    from ..kernels.measure.plan import Entry, read
    from ..kernels.validation.check import Fault, MissingTool
    from ..traces import store

    entries = read(plan) if plan else [Entry(kernel, workload.build())]
    runs, refused = [], []
    try:
        if out is not None:
            room.require_gpu()
            output.make_folder(out)
        with output.progress("measuring") as advance:
            length = room.SUSTAINED_S if seconds is None else seconds
            how = {"counters": counters, "regime": regime, "l2": l2, "seconds": length, "timeline": timeline}
            for found in room.measure_all(entries, **how, advance=advance):
                if isinstance(found, room.Refused):
                    refused.append(found)
                    continue
                runs.append(found)
                if out is not None:
                    store.save(found, out / store.file_name(found))
    except MissingTool as error:
        output.note(f"fasim: {error}")
        return 3
    except Fault as error:
        output.note(f"fasim: {error}")
        return 1
    if refused and kernel is not None:
        raise UsageError(refused[0].reason)
    for each in refused:
        output.note(f"{each.entry.kernel}, {each.entry.workload}: {each.reason}")
    if out is not None:
        output.note(f"wrote {len(runs)} run{'s' if len(runs) != 1 else ''} to {out}")
    if json:
        output.emit_json([run.to_dict() for run in runs])
    elif runs:
        output.stdout().print(_one(runs[0]) if len(runs) == 1 else _several(runs))
    return 1 if refused else 0


def _one(run: Run) -> RenderableType:
    """Everything measured of one run, and how."""
    from rich.console import Group
    from rich.text import Text

    from ..simulator.results import metrics
    from ..simulator.units import percent, scaled
    from .tables import house_table

    taken, traffic = run.measurement, run.traffic

    def shown(value: float | None, unit: str) -> str:
        return "missing" if value is None else scaled(value, unit) if unit else percent(value)

    spread = f"p10 {scaled(taken.time_p10_s, 's')}, p90 {scaled(taken.time_p90_s, 's')}, {taken.calls:,} calls"
    asked = "" if taken.clock_asked_hz is None else f", NVML asked for {taken.clock_asked_hz / 1e6:.0f} MHz"
    burst = "" if taken.burst_time_s is None else f"; in the first 30 ms {scaled(taken.burst_time_s, 's')}"
    table = house_table("", ">measured", "")
    for name, value, remark in (
        ("time", scaled(taken.time_s, "s"), spread + burst),
        ("throughput", f"{metrics.tflops(run):.0f} TFLOP/s", ""),
        ("cycles", f"{run.cycles:,}", taken.cycles_from),
        ("SM clock", f"{run.sm_clock_hz / 1e6:.0f} MHz", taken.clock_from + asked),
        ("power", shown(run.power_w, "W"), "NVML"),
        ("energy", shown(metrics.energy_j(run), "J"), "of one call"),
        ("HBM read", shown(traffic.total("hbm_read"), "B"), ""),
        ("HBM written", shown(traffic.total("hbm_write"), "B"), "without what stays dirty in L2"),
        ("L2 read", shown(traffic.total("l2_read"), "B"), "by the SMs"),
        ("L2 hit rate", shown(traffic.l2_hit_rate, ""), "of the bytes read"),
        ("tensor cores", shown(metrics.tensor_utilization(run), ""), ""),
        ("MUFU", shown(metrics.mufu_utilization(run), ""), ""),
        ("issue slots", shown(metrics.issue_utilization(run), ""), ""),
        ("tracing costs", shown(taken.trace_overhead, ""), f"in cycles; {len(run.spans):,} spans kept"),
        ("relative error", f"{taken.relative_error:.1e}", f"of {'dQ, dK, dV' if run.workload.backward else 'O'}, against fp64"),
    ):
        if name != "tracing costs" or taken.trace_overhead is not None:
            table.add_row(Text(name, "dim"), value, Text(remark, "dim"))
    title = Text.assemble((run.schedule, "bold"), f" on {taken.gpu}, {run.workload}\n{taken.regime}, L2 {taken.l2}")
    return Group(title, "", table)


def _several(runs: Sequence[Run]) -> RenderableType:
    """One row per run."""
    from rich.text import Text

    from ..simulator.results import metrics
    from ..simulator.units import percent, scaled
    from .tables import house_table

    table = house_table("kernel", "workload", ">time", ">TFLOP/s", ">cycles", ">MHz", ">W", ">HBM read", ">tensor", gap=1)
    for run in runs:
        read, power = run.traffic.total("hbm_read"), run.power_w
        table.add_row(
            Text(run.schedule, "bold"),
            str(run.workload),
            scaled(metrics.time_s(run), "s"),
            f"{metrics.tflops(run):.0f}",
            f"{run.cycles:,}",
            f"{run.sm_clock_hz / 1e6:.0f}",
            "-" if power is None else f"{power:.0f}",
            "-" if read is None else scaled(read, "B"),
            percent(metrics.tensor_utilization(run)) or "-",
        )
    return table
