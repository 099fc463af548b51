"""Standing: where predicted runs lie under the roofline of their workload, each at its own clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..simulator.devices.device import Device
from ..simulator.results import metrics
from ..simulator.results.floors import Floors, floors
from ..simulator.results.roofline import Roofline, roofline
from ..simulator.results.run import Bottleneck, Run

RESOURCES = {"tensor": "tensor cores", "mufu": "MUFU", "hbm": "HBM", "l2": "L2"}
"""Resource of a roofline -> its name."""


STEPS = 4
"""Of the loop whose floors are counted: any step is as any other."""


@dataclass(frozen=True)
class Mark:
    """One run as a point, FLOP/s over FLOPs per byte that crosses HBM, under the roofline at its own clock.

    That roofline counts what the schedule cannot avoid: standard attention's S and P too.
    """

    schedule: str
    roofline: Roofline
    time_s: float
    flops_per_s: float
    flops_per_hbm_byte: float
    flops_per_algorithmic_byte: float
    l2_flops_per_s: float  # that L2 allows, at the bytes which this schedule asks of it
    bottleneck: Bottleneck
    floors: Floors | None = None  # of a step of its loop; None for a kernel whose program is not known

    @property
    def share_of_bound(self) -> float:
        """Of the FLOP/s that the binding resource allows."""
        return self.flops_per_s / self.roofline.bound_flops_per_s

    def alone_s(self, resource: str) -> float:
        """Seconds that a resource alone would take."""
        return getattr(self.roofline, f"{resource}_cycles") / self.roofline.clock_hz

    def to_dict(self) -> dict:
        """The mark as plain JSON values."""
        return {
            "schedule": self.schedule,
            "sm_clock_hz": self.roofline.clock_hz,
            "time_s": self.time_s,
            "flops_per_s": self.flops_per_s,
            "flops_per_hbm_byte": self.flops_per_hbm_byte,
            "flops_per_algorithmic_byte": self.flops_per_algorithmic_byte,
            "l2_flops_per_s": self.l2_flops_per_s,
            "alone_s": {resource: self.alone_s(resource) for resource in RESOURCES},
            "binding": self.roofline.binding,
            "bound_flops_per_s": self.roofline.bound_flops_per_s,
            "share_of_bound": self.share_of_bound,
            "bottleneck": dict(vars(self.bottleneck)),
            "floors": self.floors and self.floors.to_dict(),
        }


@dataclass(frozen=True)
class Standing:
    """The workload's roofline at one clock, whichever schedules are shown, and the runs, each under its own."""

    roofline: Roofline
    marks: tuple[Mark, ...]

    def to_dict(self) -> dict:
        """The roofline's fields and the marks as plain JSON values."""
        return {**self.roofline.to_dict(), "runs": [mark.to_dict() for mark in self.marks]}


def standing(runs: Sequence[Run], device: Device, clock_hz: float | None = None) -> Standing:
    """Place runs of one workload and device under the roofline at `clock_hz` (default: the boost clock)."""
    whole = roofline(runs[0].workload, device, clock_hz or device.max_clock_hz)
    return Standing(whole, tuple(_mark(run, device) for run in runs))


def _mark(run: Run, device: Device) -> Mark:
    traffic, flops, time_s = run.traffic, run.workload.flops, metrics.time_s(run)
    own = roofline(run.workload, device, run.sm_clock_hz, standard=run.goes_through_hbm)
    l2 = traffic.total("l2_read") + traffic.total("l2_write")
    return Mark(
        schedule=run.schedule,
        roofline=own,
        time_s=time_s,
        flops_per_s=flops / time_s,
        flops_per_hbm_byte=flops / (traffic.total("hbm_read") + traffic.total("hbm_write")),
        flops_per_algorithmic_byte=flops / (traffic.total("algorithmic_read") + traffic.total("algorithmic_write")),
        l2_flops_per_s=flops / l2 * device.l2_bytes_per_cycle * run.sm_clock_hz,
        bottleneck=run.bottleneck,
        floors=_floors(run, device),
    )


def _floors(run: Run, device: Device) -> Floors | None:
    """Of the kernel that multiplies most."""
    if run.tile is None:
        return None
    from ..simulator.predict import programs

    found = programs(run.workload, run.schedule, device, run.tile, STEPS)
    return floors(max(found, key=lambda program: program.gemm_flops), device, STEPS, run.workload.element_bytes)
