"""Roofline: closed-form lower bounds that no schedule can beat, and where a workload stands under them.

Each bound assumes that one resource is the only one: the tensor cores at their dense peak, exp2 of every unmasked pair
on the special-function units, the compulsory bytes at the datasheet's HBM bandwidth, the same bytes once through L2.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..devices.device import Device
from ..problem.workload import Workload

WARP_LANES = 32
SUB_PARTITIONS = 4


@dataclass(frozen=True)
class Ceiling:
    """One line of a roofline plot, in FLOP/s: flat (a compute peak) or rising with FLOP per byte (a bandwidth).

    Bytes that L2 moves are not those that HBM moves: a plot over the one cannot show the other's line.
    """

    name: str
    flops_per_s: float | None = None
    bytes_per_s: float | None = None
    over: str | None = None  # whose bytes it rises with: "HBM" or "L2"

    def at(self, flops_per_byte: float) -> float:
        """FLOP/s that this ceiling allows at an arithmetic intensity."""
        return self.flops_per_s if self.flops_per_s is not None else self.bytes_per_s * flops_per_byte


@dataclass(frozen=True)
class Roofline:
    """The bounds of one workload on one device at one clock. Cycles are SM cycles of the whole chip's run."""

    workload: Workload
    device: str
    clock_hz: float
    flops: int
    compulsory_bytes: int
    tensor_cycles: float
    mufu_cycles: float
    hbm_cycles: float
    l2_cycles: float
    bound_cycles: float
    binding: str  # "tensor", "mufu", "hbm" or "l2"
    ceilings: tuple[Ceiling, ...]

    @property
    def arithmetic_intensity(self) -> float:
        """FLOP per compulsory HBM byte."""
        return self.flops / self.compulsory_bytes

    @property
    def bound_flops_per_s(self) -> float:
        """FLOP/s at the binding bound: the attainable ceiling of this workload."""
        return self.flops / (self.bound_cycles / self.clock_hz)

    @property
    def ridge_flops_per_byte(self) -> float:
        """Arithmetic intensity at which HBM bandwidth just feeds the tensor cores."""
        by_name = {ceiling.name: ceiling for ceiling in self.ceilings}
        return by_name["tensor"].flops_per_s / by_name["hbm"].bytes_per_s

    def to_dict(self) -> dict:
        """The roofline as plain JSON values."""
        return {
            "workload": self.workload.to_dict(),
            "device": self.device,
            "sm_clock_hz": self.clock_hz,
            "flops": self.flops,
            "compulsory_bytes": self.compulsory_bytes,
            "arithmetic_intensity": self.arithmetic_intensity,
            "ridge_flops_per_byte": self.ridge_flops_per_byte,
            "cycles": {
                "tensor": self.tensor_cycles,
                "mufu": self.mufu_cycles,
                "hbm": self.hbm_cycles,
                "l2": self.l2_cycles,
            },
            "bound_cycles": self.bound_cycles,
            "bound_tflops": self.bound_flops_per_s / 1e12,
            "binding": self.binding,
            "ceilings": [vars(ceiling) for ceiling in self.ceilings],
        }


def roofline(workload: Workload, device: Device, clock_hz: float, standard: bool = False) -> Roofline:
    """Bounds of a workload at an SM clock.

    `standard` attention also writes and reads S and P once each, in kernels over the whole problem: all of it passes
    through L2, and what L2 cannot hold from one kernel to the next (at least S or P less `l2_bytes`) through HBM. Its backward
    reads P twice, writes and reads dP, writes dS and reads it twice: seven passes. Only
    unmasked pairs are counted, so the bound holds for kernels that skip masked tiles too.
    """
    pairs = workload.all_pairs
    tensor_flops = device.sms * device.tensor_rate(workload.element_bytes)  # per cycle
    exp2 = device.sms * SUB_PARTITIONS * WARP_LANES / device.mufu_cycles  # per cycle
    nbytes = l2_bytes = sum(workload.tensor_bytes.values())
    flops, exponentials = workload.flops, pairs
    if standard and workload.backward:  # P is what the forward left: neither S nor an exponential is computed again
        flops, exponentials = flops * 4 // 5, 0
    if standard:
        scores = pairs * workload.element_bytes  # bytes of S, and of P
        passes = 7 if workload.backward else 4
        l2_bytes += passes * scores
        nbytes += passes * max(0, scores - device.l2_bytes)
    hbm_bytes_per_cycle = device.hbm_bytes_per_s / clock_hz
    cycles = {
        "tensor": flops / tensor_flops,
        "mufu": exponentials / exp2,
        "hbm": nbytes / hbm_bytes_per_cycle,
        "l2": l2_bytes / device.l2_bytes_per_cycle,
    }
    binding = max(cycles, key=cycles.get)
    ceilings = (
        Ceiling("tensor", flops_per_s=tensor_flops * clock_hz),
        Ceiling("mufu", flops_per_s=workload.flops_per_pair * exp2 * clock_hz),
        Ceiling("l2", bytes_per_s=device.l2_bytes_per_cycle * clock_hz, over="L2"),
        Ceiling("hbm", bytes_per_s=device.hbm_bytes_per_s, over="HBM"),
    )
    return Roofline(
        workload=workload,
        device=device.name,
        clock_hz=clock_hz,
        flops=workload.flops,
        compulsory_bytes=nbytes,
        tensor_cycles=cycles["tensor"],
        mufu_cycles=cycles["mufu"],
        hbm_cycles=cycles["hbm"],
        l2_cycles=cycles["l2"],
        bound_cycles=cycles[binding],
        binding=binding,
        ceilings=ceilings,
    )
