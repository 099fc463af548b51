"""Clock: power from the activity of the units, and the SM clock that is left.

    P = idle + (sum over units of full-rate watts x utilisation) x (f / f_max) x (V / V_max)^2 + HBM J/B x B/s

The supply voltage V falls linearly with the clock that the board asks for; tensor cores at work make the SMs run at up to a
tenth less than was asked (`tensor_clock_droop`), at the same voltage. Two things lower the clock further. At once, power
far above the limit lets the supply sag: the clock gives up half of the excess over `burst_w`, on a logarithmic scale.
After some tens of milliseconds the board asks for less, until P is within its limit. A "burst" is over before that
happens; "sustained" is the clock after it, which a benchmark that repeats a kernel for a second sees, and the default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from .devices.device import Device
from .errors import UsageError, did_you_mean

REGIMES = ("sustained", "burst")
MIN_CLOCK_HZ = 345e6
"""Lowest SM clock the search considers (the lowest that nvidia-smi offers on an H100)."""
LOOKED_UP = 0.67
"""Of the bytes that L2 delivers, those that it looks up, where this is not known: counted under attention's GEMMs alone, SMs in
four groups that read the same tiles (traces/recorded/calibration/power.json, attention_1.0)."""


@dataclass(frozen=True)
class Rates:
    """Mean activity while the kernel runs, per SM cycle and averaged over all SMs of the device."""

    tensor: float = 0.0  # 0..1
    mufu: float = 0.0  # 0..1
    issue: float = 0.0  # 0..1
    smem_bytes_per_cycle: float = 0.0  # of one SM
    l2_bytes_per_cycle: float = 0.0  # of the chip, reads and writes
    hbm_bytes_per_cycle: float = 0.0  # of the chip, reads and writes
    l2_lookup_bytes_per_cycle: float | None = None  # of the chip; SMs that ask for a line together are one lookup; None: LOOKED_UP
    dtype: str = "fp16"  # of the tensor cores' operands


class Clock(NamedTuple):
    """The clock a kernel runs at and its power there; `over_limit` where a pinned clock needs more than allowed."""

    clock_hz: float
    power_w: float
    over_limit: bool


def droop(device: Device, tensor: float) -> float:
    """Share of the clock asked for that the SMs do not run at, tensor cores being this busy."""
    return device.tensor_clock_droop * min(1.0, tensor / device.tensor_droop_activity)


def power_w(device: Device, rates: Rates, clock_hz: float) -> float:
    """Board power in watts at an SM clock, as the SMs count it."""
    return _power(device, rates, clock_hz, min(device.max_clock_hz, clock_hz / (1.0 - droop(device, rates.tensor))))


def _power(device: Device, rates: Rates, clock_hz: float, asked_hz: float) -> float:
    lookups = rates.l2_lookup_bytes_per_cycle
    if lookups is None:
        lookups = LOOKED_UP * rates.l2_bytes_per_cycle
    l2_joules_per_cycle = device.l2_joules_per_byte * rates.l2_bytes_per_cycle + device.l2_lookup_joules_per_byte * lookups
    full_rate_w = (
        device.tensor_w * rates.tensor * (device.tensor_bf16_ratio if rates.dtype == "bf16" else 1.0)
        + device.mufu_w * rates.mufu
        + device.issue_w * rates.issue
        + device.smem_w * rates.smem_bytes_per_cycle / device.smem_bytes_per_cycle
        + l2_joules_per_cycle * device.max_clock_hz
    )
    voltage = device.voltage_floor + (1.0 - device.voltage_floor) * asked_hz / device.max_clock_hz
    hbm_bytes_per_s = min(rates.hbm_bytes_per_cycle * clock_hz, device.hbm_bytes_per_s)
    return device.idle_w + full_rate_w * clock_hz / device.max_clock_hz * voltage**2 + device.hbm_joules_per_byte * hbm_bytes_per_s


def sustained(device: Device, rates: Rates, pinned_hz: float | None = None, regime: str = "sustained") -> Clock:
    """The SM clock of a kernel with this activity, and its power.

    `pinned_hz` fixes the clock; `over_limit` then says that the board's power limit would not let it last.
    Raises UsageError for a pinned clock that the device does not have.
    """
    if regime not in REGIMES:
        raise UsageError(f"regime {regime!r} is not known ({', '.join(REGIMES)}){did_you_mean(regime, REGIMES)}")
    limit_w = device.power_limit_w * device.power_limit_overshoot
    if pinned_hz is not None:
        if not 0 < pinned_hz <= device.max_clock_hz:
            raise UsageError(
                f"a clock of {pinned_hz / 1e6:g} MHz is not possible on {device.name}; "
                f"give one above 0 and at most {device.max_clock_hz / 1e6:g} MHz"
            )
        power = power_w(device, rates, pinned_hz)
        return Clock(float(pinned_hz), power, power > limit_w)
    high = device.max_clock_hz * (1.0 - droop(device, rates.tensor))
    low = min(MIN_CLOCK_HZ, high)
    if power_w(device, rates, high) <= limit_w:
        return Clock(high, power_w(device, rates, high), False)
    if regime == "burst":
        return _burst(device, rates, high)
    if power_w(device, rates, low) > limit_w:
        return Clock(low, power_w(device, rates, low), True)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if power_w(device, rates, middle) <= limit_w else (low, middle)
    return Clock(low, power_w(device, rates, low), False)


def _burst(device: Device, rates: Rates, high: float) -> Clock:
    """The clock before the board has answered: full voltage is asked for, and sags where the power is above `burst_w`."""
    wanted = _power(device, rates, high, device.max_clock_hz)
    drawn = math.sqrt(device.burst_w * wanted)
    if wanted > device.burst_w:
        high *= (drawn - device.idle_w) / (wanted - device.idle_w)
    return Clock(high, _power(device, rates, high, device.max_clock_hz), False)
