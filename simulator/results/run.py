"""Run: what one execution of a kernel did, predicted or measured. The one currency of the project."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import numpy as np

from ..devices.doubling import Saving
from ..problem.tile import Tile
from ..problem.workload import Workload
from ..values import WHOLE, Within
from . import metrics
from .breakdown import Breakdown
from .html import of_run

SCHEMA = "fasim.run/1"

# What a figure can be, held where a run is read from a file.
Count = Annotated[int, WHOLE]
Some = Annotated[int, Within(1, 10**12)]
Amount = Annotated[float, Within(0, 1e18)]
Seconds = Annotated[float, Within(1e-9, 1e6)]
Hertz = Annotated[float, Within(1e6, 1e11)]
Watts = Annotated[float, Within(0, 1e6)]

SPAN = np.dtype(
    [
        ("lane", "i4"),  # index into Run.lanes
        ("label", "i4"),  # index into Run.labels
        ("warp", "i4"),  # the lane index of the warp on whose behalf the unit worked
        ("step", "i4"),  # iteration (K/V block counted along the loop), -1 outside the loop
        ("tile", "i4"),  # which tile of the CTA's sequence
        ("wait", "i4"),  # 1 where a warp is blocked, 0 where it or the unit works
        ("start", "i8"),  # SM cycles
        ("end", "i8"),
    ]
)


@dataclass(frozen=True)
class Lane:
    """One row of the timeline: a warp (role) of the CTA or a hardware unit of the SM."""

    name: str
    kind: str  # "warp" or "unit"


@dataclass(frozen=True)
class Bytes:
    """Bytes of one tensor, read and written, at the three levels that are reported apart; None was not measured."""

    algorithmic_read: Count | None = 0  # what the paper's IO theorem counts: every tile load, no cache between HBM and SMEM
    algorithmic_write: Count | None = 0
    l2_read: Count | None = 0  # requested from L2 (a multicast load counts once per cluster)
    l2_write: Count | None = 0
    hbm_read: Count | None = 0  # missed in L2
    hbm_write: Count | None = 0  # written back


@dataclass(frozen=True)
class Traffic:
    """Bytes per tensor (Q, K, V, O, S, P, LSE, and FlashAttention-1's l and m), L2 hits, and SMEM bytes of the whole call.

    Counters of the hardware do not tell tensors apart: a measured run has all its bytes under "all". None was not measured.
    """

    by_tensor: dict[str, Bytes]
    # fraction of read bytes requested from L2 that HBM did not have to deliver; counted, HBM can deliver more than was asked for
    l2_hit_rate: Annotated[float, Within(-1e6, 1)] | None
    smem_bytes: Count | None = 0
    dirty_bytes: Count | None = 0  # dirty in L2 when each kernel ends: counters miss them, L2 being emptied before the next
    l2_lookup_bytes: Count | None = 0  # reads, again in a line's home: SMs that ask for it together are answered at once

    def total(self, name: str) -> int | None:
        """Sum over tensors of one field of Bytes, e.g. total("hbm_read"); None where one of them was not measured."""
        parts = [getattr(b, name) for b in self.by_tensor.values()]
        return None if None in parts else sum(parts)


@dataclass(frozen=True)
class Activity:
    """Busy cycles of each unit, summed over SMs (for units that exist per sub-partition: averaged over the four).

    None was not measured.
    """

    sms: Annotated[int, Within(1, 4096)]
    tensor: Amount | None
    mufu: Amount | None
    issue: Amount | None
    fma: Amount | None = 0.0
    alu: Amount | None = 0.0


@dataclass(frozen=True)
class Bottleneck:
    """What holds the kernel back, and the sentence that says why."""

    resource: str
    why: str


@dataclass(frozen=True)
class Measurement:
    """How a measured run was taken, and what only hardware can say. None is a quantity that was not measured.

    Time, clock and power are of the same repeated calls; counters come from another process, Nsight Compute's, which
    empties L2 before each kernel and leaves the clock alone.
    """

    kernel: str  # what ran: a kernel of ours by schedule, torch-cudnn, .., or package.module:function
    implementation: str  # "cuda", "gluon" or "triton" (ours), "pytorch", "callable"
    gpu: str
    driver: str
    cuda: str
    date: str  # ISO 8601
    regime: str  # "sustained": after seconds of back-to-back calls; "burst": the first 30 ms after idling
    l2: str  # "cold": inputs rotate through more than L2; "warm": the same inputs every time
    buffers: Some  # sets of inputs that the calls rotate through
    launch: str  # "stream": one launch after another; "graph": a CUDA graph, where launching takes longer than the kernel
    calls: Some  # behind the median
    time_s: Seconds  # of one call, the median by CUDA events
    time_p10_s: Seconds
    time_p90_s: Seconds
    burst_time_s: Seconds | None = None  # median of the calls in the first 30 ms
    clock_from: str = "NVML"  # or "SM cycle counters": what the SMs counted while the calls ran
    clock_asked_hz: Hertz | None = None  # what NVML said meanwhile; under load the SMs run at less
    clock_p10_hz: Hertz | None = None  # spread of the clock
    clock_p90_hz: Hertz | None = None
    # of a build that stamps a timeline: its cycles over the plain build's, less one
    trace_overhead: Annotated[float, Within(-1, 1e3)] | None = None
    energy_j: Amount | None = None  # of one call, from the board's energy counter
    relative_error: Amount | None = None  # of O against the fp64 reference, norm of the difference over norm
    cycles_from: str = "time x clock"  # or the name of the counter
    counters: dict[str, float] = field(default_factory=dict)  # by Nsight Compute's names, whole call: sums, rates by cycles
    kernels: tuple[tuple[str, float | None], ...] = ()  # every kernel of the call with its cycles under Nsight Compute
    packages: dict[str, str] = field(default_factory=dict)  # name -> version
    sources: dict[str, str] = field(default_factory=dict)  # path of the kernel's file within the package -> SHA-256

    def to_dict(self) -> dict:
        """The fields as plain JSON values."""
        return {**vars(self), "kernels": [list(each) for each in self.kernels]}


@dataclass(frozen=True)
class Copies:
    """Bytes that one span of the timeline stands for, between SM and L2, and of those in the mean between L2 and HBM."""

    label: str  # of the span
    way: str  # "read" or "written"
    l2: int
    hbm: float


@dataclass(frozen=True)
class Sample:
    """Which kernel of the schedule the spans of a predicted run are of, and how much of its loop they show."""

    kernels: tuple[str, ...]  # of the schedule, in the order of their launches
    number: int  # of the one that the spans are of, from 1
    step: str  # what a step of its loop is: "K/V block", "Q block", "block of S"
    steps: int  # that a tile was recorded with
    loop: int  # steps of the longest tile of the workload
    copies: tuple[Copies, ...]


@dataclass(frozen=True)
class Run:
    """One execution. Times are SM cycles; seconds exist only through `sm_clock_hz`, and as a measured run's `measurement`."""

    origin: str  # "predicted" or "measured"
    workload: Workload
    schedule: str
    tile: Tile | None  # None: a kernel whose tile is not known
    device: str
    cycles: Annotated[int, Within(1, 10**15)]
    sm_clock_hz: Hertz
    power_w: Watts | None
    activity: Activity
    traffic: Traffic
    bottleneck: Bottleneck
    warnings: tuple[str, ...] = ()
    lanes: tuple[Lane, ...] = ()
    labels: tuple[str, ...] = ()
    spans: np.ndarray = field(default_factory=lambda: np.zeros(0, SPAN), repr=False)
    measurement: Measurement | None = None  # of a measured run
    sample: Sample | None = None  # of a predicted run
    breakdown: Breakdown | None = None  # of a predicted run; counters do not tell
    kernels: tuple[tuple[str, Amount], ...] = ()  # of a predicted run, with the cycles of each, in the order of their launches
    savings: tuple[Saving, ...] | None = None  # what each resource twice as fast would save, where it was asked

    @property
    def goes_through_hbm(self) -> bool:
        """Whether scores, or their derivatives, are tensors in memory, as in standard attention."""
        return not {"S", "dP"}.isdisjoint(self.traffic.by_tensor)

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        return of_run(self)

    def to_dict(self) -> dict:
        """The run as plain JSON values, schema `fasim.run/1`; a measured one says how, under "measurement"."""
        traffic = self.traffic
        measured = {"measurement": self.measurement.to_dict()} if self.measurement else {}
        return {
            "schema": SCHEMA,
            "origin": self.origin,
            "workload": self.workload.to_dict(),
            "pass": self.workload.direction,
            "schedule": self.schedule,
            "tile": self.tile and self.tile.to_dict(),
            "device": self.device,
            "cycles": self.cycles,
            "sm_clock_hz": self.sm_clock_hz,
            "time_s": metrics.time_s(self),
            "flops": self.workload.flops,
            "tflops": metrics.tflops(self),
            "tensor_utilization": metrics.tensor_utilization(self),
            "mufu_utilization": metrics.mufu_utilization(self),
            "issue_utilization": metrics.issue_utilization(self),
            "power_w": self.power_w,
            "energy_j": metrics.energy_j(self),
            "joules_per_million_tokens": metrics.joules_per_million_tokens(self),
            "kwh_per_million_tokens": metrics.kwh_per_million_tokens(self),
            "traffic": {
                "hbm_read_bytes": traffic.total("hbm_read"),
                "hbm_write_bytes": traffic.total("hbm_write"),
                "l2_read_bytes": traffic.total("l2_read"),
                "l2_write_bytes": traffic.total("l2_write"),
                "l2_hit_rate": traffic.l2_hit_rate,
                "smem_bytes": traffic.smem_bytes,
                "algorithmic_read_bytes": traffic.total("algorithmic_read"),
                "algorithmic_write_bytes": traffic.total("algorithmic_write"),
                "by_tensor": {
                    name: {f"{field_name}_bytes": value for field_name, value in vars(b).items()}
                    for name, b in traffic.by_tensor.items()
                },
            },
            "kernels": [{"name": name, "cycles": cycles, "time_s": cycles / self.sm_clock_hz} for name, cycles in self.kernels],
            "breakdown": self.breakdown and self.breakdown.to_dict(),
            "savings": self.savings and [saving.to_dict() for saving in self.savings],
            "bottleneck": {"resource": self.bottleneck.resource, "why": self.bottleneck.why},
            "warnings": list(self.warnings),
            **measured,
        }
