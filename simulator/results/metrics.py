"""Metrics: pure functions of a Run. Utilisations are fractions of a unit's peak while the kernel runs.

None stands for what a measured run lacks; a predicted run lacks nothing.
"""

from __future__ import annotations

from typing import Any, Protocol

J_PER_KWH = 3.6e6


class Execution(Protocol):
    """The fields of a Run (run.py) that metrics read."""

    workload: Any
    cycles: int
    sm_clock_hz: float
    power_w: float | None
    activity: Any
    measurement: Any


def time_s(run: Execution) -> float:
    """Seconds of one call: by CUDA events where measured, else cycles over the sustained SM clock."""
    return run.measurement.time_s if run.measurement else run.cycles / run.sm_clock_hz


def tflops(run: Execution) -> float:
    """Exact FLOPs per second, in 1e12."""
    return run.workload.flops / time_s(run) / 1e12


def paper_tflops(run: Execution) -> float:
    """TFLOP/s by the papers' count, which halves the full FLOPs when causal."""
    return run.workload.paper_flops / time_s(run) / 1e12


def energy_j(run: Execution) -> float | None:
    """Joules of one call: by the board's energy counter where it was read, else power times time."""
    if run.measurement and run.measurement.energy_j is not None:
        return run.measurement.energy_j
    return None if run.power_w is None else run.power_w * time_s(run)


def tokens(run: Execution) -> int:
    """Tokens of one call: its queries, over the batch."""
    return run.workload.total_q


def joules_per_million_tokens(run: Execution) -> float | None:
    """Joules that a layer's attention takes for a million tokens."""
    energy = energy_j(run)
    return None if energy is None else energy / tokens(run) * 1e6


def kwh_per_million_tokens(run: Execution) -> float | None:
    """The same in kWh, of the board alone."""
    joules = joules_per_million_tokens(run)
    return None if joules is None else joules / J_PER_KWH


def _fraction(run: Execution, busy: float | None) -> float | None:
    return None if busy is None else busy / (run.cycles * run.activity.sms)


def tensor_utilization(run: Execution) -> float | None:
    """Share of the run in which the tensor cores execute a k step, over all SMs of the device."""
    return _fraction(run, run.activity.tensor)


def mufu_utilization(run: Execution) -> float | None:
    """Share of the special-function units' peak (16 lanes per cycle per SM on Hopper)."""
    return _fraction(run, run.activity.mufu)


def issue_utilization(run: Execution) -> float | None:
    """Warp instructions issued over issue slots (one per cycle per sub-partition)."""
    return _fraction(run, run.activity.issue)
