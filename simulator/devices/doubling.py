"""Doubling: a device with one resource twice as fast, everything that depends on it along, and what that would save.

Joules stay with the work: a unit twice as fast draws twice the watts at full rate. Latencies stay, but for the time that
a load queues, which is service time. The cycles of a pipe are whole numbers, so half of an odd one is rounded up.
"""

from __future__ import annotations

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


def _mufu(device: Device) -> dict:
    """Cycles of an EX2; what its neighbours in a softmax add to them stays."""
    cycles = _half(device.mufu_cycles)
    spacing = device.mufu_spacing_cycles - device.mufu_cycles + cycles
    beside = device.mufu_beside_wgmma_cycles / 2
    return {"mufu_cycles": cycles, "mufu_spacing_cycles": spacing, "mufu_beside_wgmma_cycles": beside, "mufu_w": 2 * device.mufu_w}


def _tensor(device: Device) -> dict:
    """FLOPs a cycle, and shared memory along with them: a k step whose operands come no sooner is not twice as fast."""
    return _twice(device, "tensor_flops_per_cycle", "tensor_w", "smem_bytes_per_cycle", "smem_w")


def _issue(device: Device) -> dict:
    """Warp instructions a cycle; each pipe still takes them at its own rate."""
    return _twice(device, "issue_per_cycle")


def _smem(device: Device) -> dict:
    """Reads, writes, and what a copy out takes from it."""
    return _twice(device, "smem_bytes_per_cycle", "store_beside_most", "store_beside_least", "tma_store_bytes_per_cycle", "smem_w")


def _l2(device: Device) -> dict:
    """Delivery, lookups and the port of an SM; loads queue half as long."""
    rates = _twice(device, "l2_bytes_per_cycle", "l2_lookup_bytes_per_cycle", "l2_bytes_per_cycle_per_sm")
    return rates | {"l2_queue_cycles": device.l2_queue_cycles / 2}


def _hbm(device: Device) -> dict:
    """The datasheet's bandwidth, of which a copy reaches the same share; loads queue half as long."""
    return _twice(device, "hbm_bytes_per_s") | {"hbm_queue_cycles": device.hbm_queue_cycles / 2}


def _power(device: Device) -> dict:
    """What the board may draw over seconds, and before the clock falls at once."""
    return _twice(device, "power_limit_w", "burst_w")


def _launch(device: Device) -> dict:
    """The launch of a kernel, of a CTA, and a CTA's setup."""
    return {name: _half(getattr(device, name)) for name in ("kernel_launch_cycles", "cta_launch_cycles", "setup_cycles")}


def _twice(device: Device, *names: str) -> dict:
    return {name: 2 * getattr(device, name) for name in names}


def _half(cycles: int) -> int:
    return -(-cycles // 2)


RESOURCES: Mapping[str, Callable[[Device], dict]] = {
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


