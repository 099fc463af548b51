"""Run: what one execution of a kernel did, predicted or measured. The one currency of the project."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from . import metrics
from .tile import Tile
from .workload import Workload

SCHEMA = "fasim.run/1"

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
    """Bytes of one tensor, read and written, at the three levels that are reported apart."""

    algorithmic_read: int = 0  # what the paper's IO theorem counts: every tile load, no cache between HBM and SMEM
    algorithmic_write: int = 0
    l2_read: int = 0  # requested from L2 (a multicast load counts once per cluster)
    l2_write: int = 0
    hbm_read: int = 0  # missed in L2
    hbm_write: int = 0  # written back


@dataclass(frozen=True)
class Traffic:
    """Bytes per tensor (Q, K, V, O, S, P, LSE, and FlashAttention-1's l and m), L2 hits, and SMEM bytes of the whole call."""

    by_tensor: dict[str, Bytes]
    l2_hit_rate: float  # fraction of read bytes requested from L2 that HBM did not have to deliver
    smem_bytes: int = 0

    def total(self, name: str) -> int:
        """Sum over tensors of one field of Bytes, e.g. total("hbm_read")."""
        return sum(getattr(b, name) for b in self.by_tensor.values())


@dataclass(frozen=True)
class Activity:
    """Busy cycles of each unit, summed over SMs (for units that exist per sub-partition: averaged over the four)."""

    sms: int
    tensor: float
    mufu: float
    issue: float
    fma: float = 0.0
    alu: float = 0.0


@dataclass(frozen=True)
class Bottleneck:
    """What holds the kernel back, and the sentence that says why."""

    resource: str
    why: str


@dataclass(frozen=True)
class Run:
    """One execution. Times are SM cycles; seconds exist only through `sm_clock_hz`."""

    origin: str  # "predicted" or "measured"
    workload: Workload
    schedule: str
    tile: Tile
    device: str
    cycles: int
    sm_clock_hz: float
    power_w: float
    activity: Activity
    traffic: Traffic
    bottleneck: Bottleneck
    warnings: tuple[str, ...] = ()
    lanes: tuple[Lane, ...] = ()
    labels: tuple[str, ...] = ()
    spans: np.ndarray = field(default_factory=lambda: np.zeros(0, SPAN), repr=False)

    def to_dict(self) -> dict:
        """The run as plain JSON values, schema `fasim.run/1`."""
        traffic = self.traffic
        return {
            "schema": SCHEMA,
            "origin": self.origin,
            "workload": self.workload.to_dict(),
            "schedule": self.schedule,
            "tile": self.tile.to_dict(),
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
            "bottleneck": {"resource": self.bottleneck.resource, "why": self.bottleneck.why},
            "warnings": list(self.warnings),
        }
