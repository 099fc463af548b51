"""Standing: where predicted runs lie under the roofline of their workload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..simulator import metrics
from ..simulator.device import Device
from ..simulator.roofline import Roofline, roofline
from ..simulator.run import Run


@dataclass(frozen=True)
class Mark:
    """One run as a point: FLOP/s over FLOPs per byte that crosses HBM, and the same per algorithmic byte."""

    schedule: str
    flops_per_s: float
    flops_per_hbm_byte: float
    flops_per_algorithmic_byte: float
    share_of_bound: float  # of the FLOP/s that the binding bound allows


@dataclass(frozen=True)
class Resource:
    """One resource alone: the least time it needs, and how much of the bound that is."""

    name: str
    cycles: float
    share_of_bound: float
    binding: bool


@dataclass(frozen=True)
class Standing:
    """A roofline, what each resource alone would need, and the runs under it."""

    roofline: Roofline
    resources: tuple[Resource, ...]
    marks: tuple[Mark, ...]

    def to_dict(self) -> dict:
        """The roofline's fields and the marks as plain JSON values."""
        return {**self.roofline.to_dict(), "runs": [vars(mark) for mark in self.marks]}


def standing(runs: Sequence[Run], device: Device) -> Standing:
    """Place runs of one workload and device under the roofline at the fastest of their clocks."""
    workload = runs[0].workload
    roof = roofline(workload, device, max(run.sm_clock_hz for run in runs))
    names = {"tensor": "tensor cores", "mufu": "MUFU (exp2)", "hbm": "HBM", "l2": "L2"}
    resources = tuple(
        Resource(name, cycles, cycles / roof.bound_cycles, key == roof.binding)
        for key, name in names.items()
        for cycles in [getattr(roof, f"{key}_cycles")]
    )
    return Standing(roof, resources, tuple(_mark(run, roof) for run in runs))


def _mark(run: Run, roof: Roofline) -> Mark:
    hbm = run.traffic.total("hbm_read") + run.traffic.total("hbm_write")
    algorithmic = run.traffic.total("algorithmic_read") + run.traffic.total("algorithmic_write")
    flops_per_s = run.workload.flops / metrics.time_s(run)
    return Mark(
        schedule=run.schedule,
        flops_per_s=flops_per_s,
        flops_per_hbm_byte=run.workload.flops / hbm,
        flops_per_algorithmic_byte=run.workload.flops / algorithmic,
        share_of_bound=flops_per_s / roof.bound_flops_per_s,
    )
