"""Doubling: a device with one resource twice as fast, everything that depends on it along, and what that would save.

Joules stay with the work: a unit twice as fast draws twice the watts at full rate. Latencies stay, but for the time that
a load queues, which is service time. The cycles of a pipe are whole numbers, so half of an odd one is rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from .device import Device


@dataclass(frozen=True)
class Saving:
    """What one resource twice as fast would save: the device fields that change, and the share by which time falls."""

    resource: str
    changed: dict[str, float]  # device field -> its new value
    time_s: float
    saved: float  # 0.25: a quarter of the time; below zero where it takes longer

    def to_dict(self) -> dict:
        """The fields as plain JSON values."""
        return dict(vars(self))


def _mufu(device: Device, factor: float = 2) -> dict:
    """Cycles of an EX2; what its neighbours in a softmax add to them stays."""
    cycles = _shorter(device.mufu_cycles, factor)
    spacing = device.mufu_spacing_cycles - device.mufu_cycles + cycles
    beside = device.mufu_beside_wgmma_cycles / factor
    return {
        "mufu_cycles": cycles, "mufu_spacing_cycles": spacing, "mufu_beside_wgmma_cycles": beside, "mufu_w": factor * device.mufu_w
    }  # fmt: skip


def _tensor(device: Device, factor: float = 2) -> dict:
    """FLOPs a cycle, and shared memory along with them: a k step whose operands come no sooner is not twice as fast."""
    return _times(device, factor, "tensor_flops_per_cycle", "tensor_w", "smem_bytes_per_cycle", "smem_w")


def _issue(device: Device, factor: float = 2) -> dict:
    """Warp instructions a cycle; each pipe still takes them at its own rate."""
    return _times(device, factor, "issue_per_cycle")


def _smem(device: Device, factor: float = 2) -> dict:
    """Reads, writes, and what a copy out takes from it."""
    names = ("smem_bytes_per_cycle", "store_beside_most", "store_beside_least", "matrix_beside_most", "matrix_beside_more")
    return _times(device, factor, *names, "tma_store_bytes_per_cycle", "smem_w")


def _l2(device: Device, factor: float = 2) -> dict:
    """Delivery, lookups and the port of an SM; loads queue half as long."""
    rates = _times(device, factor, "l2_bytes_per_cycle", "l2_lookup_bytes_per_cycle", "l2_bytes_per_cycle_per_sm")
    return rates | {"l2_queue_cycles": device.l2_queue_cycles / factor}


def _hbm(device: Device, factor: float = 2) -> dict:
    """The datasheet's bandwidth, of which a copy reaches the same share; loads queue half as long."""
    return _times(device, factor, "hbm_bytes_per_s") | {"hbm_queue_cycles": device.hbm_queue_cycles / factor}


def _power(device: Device, factor: float = 2) -> dict:
    """What the board may draw over seconds, and before the clock falls at once."""
    return _times(device, factor, "power_limit_w", "burst_w")


def _launch(device: Device, factor: float = 2) -> dict:
    """The launch of a kernel, of a CTA, and a CTA's setup."""
    return {name: _shorter(getattr(device, name), factor) for name in ("kernel_launch_cycles", "cta_launch_cycles", "setup_cycles")}


def _times(device: Device, factor: float, *names: str) -> dict:
    """Those fields so many times as large; a whole number stays one."""
    values = {name: getattr(device, name) for name in names}
    return {name: round(factor * value) if type(value) is int else factor * value for name, value in values.items()}


def _shorter(cycles: int, factor: float) -> int:
    return math.ceil(cycles / factor)


RESOURCES: Mapping[str, Callable[..., dict]] = {
    "MUFU": _mufu,
    "tensor cores": _tensor,
    "issue": _issue,
    "shared memory": _smem,
    "L2": _l2,
    "HBM": _hbm,
    "power limit": _power,
    "launch": _launch,
}


def saving(resource: str, device: Device, time_with: Callable[[Device], float]) -> Saving:
    """What `resource` twice as fast would save; `time_with` predicts the seconds of a call on a device."""
    changed = RESOURCES[resource](device)
    before, after = time_with(device), time_with(replace(device, **changed))
    return Saving(resource, changed, after, float(1.0 - after / before))


