"""Clock: power from the activity of the units, and the SM clock that the power limit leaves.

    P(f) = idle + (sum over units of full-rate watts x utilisation) x (f / f_max) x (V(f) / V_max)^2 + HBM J/B x B/s

V falls linearly with f. The clock is the highest f at which P is within the limit. There are two limits. A benchmark
that times single calls with CUDA events sees "burst": for some milliseconds the board may draw more than its rated
limit, and the tensor cores run faster than they could for a second. "sustained" is what is left when the rated limit is
enforced. Benchmark tables are medians of such events, so "burst" is the default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .device import Device
from .errors import UsageError

REGIMES = ("burst", "sustained")
MIN_CLOCK_HZ = 345e6
"""Lowest SM clock the search considers (nvidia-smi's lowest supported application clock on H100)."""


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


def sustained(device: Device, rates: Rates, pinned_hz: float | None = None, regime: str = "burst") -> Clock:
    """The SM clock of a kernel with this activity, and its power.

    `pinned_hz` fixes the clock; `over_limit` then says that the board could not hold it in this regime.
    Raises UsageError for a pinned clock that the device does not have.
    """
    if regime not in REGIMES:
        raise UsageError(f"regime {regime!r} is not known ({', '.join(REGIMES)})")
    limit_w = device.burst_power_limit_w if regime == "burst" else device.power_limit_w
    if pinned_hz is not None:
        if not 0 < pinned_hz <= device.max_clock_hz:
            raise UsageError(
                f"a clock of {pinned_hz / 1e6:g} MHz is not possible on {device.name}; "
                f"give one above 0 and at most {device.max_clock_hz / 1e6:g} MHz"
            )
        power = power_w(device, rates, pinned_hz)
        return Clock(float(pinned_hz), power, power > limit_w)
    low, high = min(MIN_CLOCK_HZ, device.max_clock_hz), device.max_clock_hz
    if power_w(device, rates, high) <= limit_w:
        return Clock(high, power_w(device, rates, high), False)
    if power_w(device, rates, low) > limit_w:
        return Clock(low, power_w(device, rates, low), True)
    for _ in range(40):  # to less than 1 mHz
        middle = (low + high) / 2
        low, high = (middle, high) if power_w(device, rates, middle) <= limit_w else (low, middle)
    return Clock(low, power_w(device, rates, low), False)
