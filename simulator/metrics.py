"""Metrics: pure functions of a Run. Utilisations are fractions of a unit's peak while the kernel runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run import Run


def time_s(run: Run) -> float:
    """Seconds of one call: cycles over the sustained SM clock."""
    return run.cycles / run.sm_clock_hz


def tflops(run: Run) -> float:
    """Exact FLOPs per second, in 1e12."""
    return run.workload.flops / time_s(run) / 1e12


def paper_tflops(run: Run) -> float:
    """TFLOP/s by the papers' count, which halves the full FLOPs when causal."""
    return run.workload.paper_flops / time_s(run) / 1e12


def energy_j(run: Run) -> float:
    """Joules of one call."""
    return run.power_w * time_s(run)


def _fraction(run: Run, busy: float) -> float:
    return busy / (run.cycles * run.activity.sms)


def tensor_utilization(run: Run) -> float:
    """Share of the run in which the tensor cores execute a k step, over all SMs of the device."""
    return _fraction(run, run.activity.tensor)


def mufu_utilization(run: Run) -> float:
    """Share of the special-function units' peak (16 lanes per cycle per SM on Hopper)."""
    return _fraction(run, run.activity.mufu)


def issue_utilization(run: Run) -> float:
    """Warp instructions issued over issue slots (one per cycle per sub-partition)."""
    return _fraction(run, run.activity.issue)
