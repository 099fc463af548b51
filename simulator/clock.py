"""Clock: power from the activity of the units, and the SM clock that is left.

    P(f) = idle + (sum over units of full-rate watts x utilisation) x (f / f_max) x (V(f) / V_max)^2 + HBM J/B x B/s

V falls linearly with f. Two things lower the clock. Tensor cores at work take a share of it at once, whatever the power
(`tensor_clock_droop`); and when the board has drawn more than its limit for some tens of milliseconds, the clock falls
until P is within the limit. A "burst" is over before that happens; "sustained" is the clock after it, which a benchmark
that repeats a kernel for a second sees, and the default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .device import Device
from .errors import UsageError

REGIMES = ("sustained", "burst")
MIN_CLOCK_HZ = 345e6
"""Lowest SM clock the search considers (the lowest that nvidia-smi offers on an H100)."""


@dataclass(frozen=True)
class Rates:
    """Mean activity while the kernel runs, per SM cycle and averaged over all SMs of the device."""

    tensor: float = 0.0  # 0..1
    mufu: float = 0.0  # 0..1
    issue: float = 0.0  # 0..1
    smem_bytes_per_cycle: float = 0.0  # of one SM
    l2_bytes_per_cycle: float = 0.0  # of the chip, reads and writes
    hbm_bytes_per_cycle: float = 0.0  # of the chip, reads and writes


class Clock(NamedTuple):
    """The clock a kernel runs at and its power there; `over_limit` where a pinned clock needs more than allowed."""

    clock_hz: float
    power_w: float
    over_limit: bool


def power_w(device: Device, rates: Rates, clock_hz: float) -> float:
    """Board power in watts at an SM clock."""
    full_rate_w = (
        device.tensor_w * rates.tensor
        + device.mufu_w * rates.mufu
        + device.issue_w * rates.issue
        + device.smem_w * rates.smem_bytes_per_cycle / device.smem_bytes_per_cycle
        + device.l2_w * rates.l2_bytes_per_cycle / device.l2_bytes_per_cycle
    )
    speed = clock_hz / device.max_clock_hz
    voltage = device.voltage_floor + (1.0 - device.voltage_floor) * speed
    hbm_bytes_per_s = min(rates.hbm_bytes_per_cycle * clock_hz, device.hbm_bytes_per_s)
    return device.idle_w + full_rate_w * speed * voltage**2 + device.hbm_joules_per_byte * hbm_bytes_per_s


def sustained(device: Device, rates: Rates, pinned_hz: float | None = None, regime: str = "sustained") -> Clock:
    """The SM clock of a kernel with this activity, and its power.

    `pinned_hz` fixes the clock; `over_limit` then says that the board's power limit would not let it last.
    Raises UsageError for a pinned clock that the device does not have.
    """
    if regime not in REGIMES:
        raise UsageError(f"regime {regime!r} is not known ({', '.join(REGIMES)})")
    limit_w = device.power_limit_w
    if pinned_hz is not None:
        if not 0 < pinned_hz <= device.max_clock_hz:
            raise UsageError(
                f"a clock of {pinned_hz / 1e6:g} MHz is not possible on {device.name}; "
                f"give one above 0 and at most {device.max_clock_hz / 1e6:g} MHz"
            )
        power = power_w(device, rates, pinned_hz)
        return Clock(float(pinned_hz), power, power > limit_w)
    high = device.max_clock_hz * (1.0 - device.tensor_clock_droop * min(1.0, rates.tensor))
    low = min(MIN_CLOCK_HZ, high)
    if regime == "burst" or power_w(device, rates, high) <= limit_w:
        return Clock(high, power_w(device, rates, high), False)
    if power_w(device, rates, low) > limit_w:
        return Clock(low, power_w(device, rates, low), True)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if power_w(device, rates, middle) <= limit_w else (low, middle)
    return Clock(low, power_w(device, rates, low), False)
