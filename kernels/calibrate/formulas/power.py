"""Power and clock."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from .. import power_fit
from .found import Derivation, Found


def _droop(power: dict) -> Found:
    shares, _ = power_fit.droop(power["workloads"])
    how = f"GEMMs at the power limit run below the clock that NVML says was asked for, median of {len(shares)}"
    return Found(median(shares), min(shares), max(shares), how)


def _droop_activity(power: dict) -> Found:
    _, activity = power_fit.droop(power["workloads"])
    return Found(activity, activity, activity, "fits the GEMMs below the power limit, at 7 to 46 % tensor activity")


def _power_term(term: str, what: str, unit: float = 1.0) -> Callable[[dict], Found]:
    """One energy of the fit over all workloads, with its range when each workload in turn is left out."""

    def formula(power: dict) -> Found:
        found, without = power_fit.fit(power["workloads"]), power_fit.spread(power["workloads"])
        low, high = (side(each.terms[term] for each in without) for side in (min, max))
        how = f"least squares over {len(found.errors)} workloads, rms {found.rms:.1%}: {what}"
        if unit == 1.0:
            return Found(found.terms[term], low, high, how)
        value = found.terms[term]
        return Found(value, value, value, f"{how}; {low / unit:.1f} to {high / unit:.1f} pJ/B with any one left out")

    return formula


def _bf16_ratio(power: dict) -> Found:
    found, without = power_fit.fit(power["workloads"]), power_fit.spread(power["workloads"])
    ratios = [each.terms["bf16"] / each.terms["tensor"] for each in without]
    return Found(found.terms["bf16"] / found.terms["tensor"], min(ratios), max(ratios), "the same fit: bf16 tiles over fp16")


def _voltage_floor(power: dict) -> Found:
    found = power_fit.fit(power["workloads"])
    near = [floor / 100 for floor in range(96) if power_fit.fit(power["workloads"], floor=floor / 100).rms < 1.1 * found.rms]
    how = f"the same fit: the least rms, {found.rms:.1%}, within a tenth of it in the range"
    return Found(found.floor, min(near), max(near), how)


def _overshoot(power: dict) -> Found:
    ratios = [watts / power["power_limit_watts"] for watts in power_fit.limited(power["workloads"])]
    how = f"watts of {len(ratios)} GEMM streams at the limit over the limit, 0.5 to 1.5 s into the load, median"
    return Found(median(ratios), min(ratios), max(ratios), how)


def _burst_power(power: dict) -> Found:
    workloads = power["workloads"]
    shares, _ = power_fit.droop(workloads)
    needed = power_fit.bursts(workloads, power_fit.fit(workloads), median(shares))
    how = f"first 30 ms of {len(needed)} GEMM streams: half of the excess over it, in logarithms, is given up"
    return Found(median(needed), min(needed), max(needed), how)


def _idle(power: dict) -> Found:
    watts = power["workloads"]["sleep"]["watts_instant_settled"]
    return Found(watts, watts, watts, "a kernel that sleeps")


DERIVATIONS = (
    Derivation("tensor_clock_droop", ("power",), _droop, 3),
    Derivation("tensor_droop_activity", ("power",), _droop_activity, 2),
    Derivation("power_limit_overshoot", ("power",), _overshoot, 3),
    Derivation("burst_w", ("power",), _burst_power),
    Derivation("idle_w", ("power",), _idle, 1),
    Derivation("tensor_w", ("power",), _power_term("tensor", "GEMMs of fp16 tiles that are new every time")),
    Derivation("tensor_bf16_ratio", ("power",), _bf16_ratio, 3),
    Derivation("issue_w", ("power",), _power_term("issue", "softmax without exp2")),
    Derivation("mufu_w", ("power",), _power_term("mufu", "softmax and its exp2 alone, less issue")),
    Derivation("smem_w", ("power",), _power_term("smem", "16-byte reads with their registers; part of WGMMA's operands")),
    Derivation("l2_joules_per_byte", ("power",), _power_term("l2", "TMA of tiles, with or without GEMMs", 1e-12), 13),
    Derivation("l2_lookup_joules_per_byte", ("power",), _power_term("l2_lookup", "the same, SMs in step or apart", 1e-12), 13),
    Derivation("hbm_joules_per_byte", ("power",), _power_term("hbm", "TMA of 2 GiB, and a copy, less L2", 1e-12), 13),
    Derivation("voltage_floor", ("power",), _voltage_floor, 2),
)
