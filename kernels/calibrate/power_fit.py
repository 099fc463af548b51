"""The power fields of a device from power.json: one least-squares fit over all workloads, then what the clock does.

    watts = idle + sum of (energy at full clock and voltage x rate x V^2) + HBM's joules, the errors relative

V = floor + (1 - floor) x the clock asked for over the highest; the floor is the one that fits best. The energies cannot
be negative. Loops that share a unit with others are taken apart by all of them together: TMA of tiles in step or not
gives L2's lookups and deliveries, softmax with and without its exp2 the MUFU and the rest. Needs neither GPU nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np

from ...simulator.clock import Rates

K_STEP_INSTRUCTIONS, K_STEP_CYCLES = 5, 64
"""Issued for a k step of m64n128k16, as the model counts them; the loops' own are address and waits on the scalar side."""
CHECKS = ("beside_softmax", "attention_zeros", "repeated_gemm")
"""Workloads that are not fitted: a sum that the fit is to foretell, and two whose operands toggle less than data does."""
SMEM_BYTES_PER_CYCLE = 128
SATURATED = 0.65
"""Tensor activity of the workloads that no pause keeps from full power."""
TERMS = ("tensor", "bf16", "issue", "mufu", "smem", "l2", "l2_lookup", "hbm")


@dataclass(frozen=True)
class Fitted:
    """Energies at full rate in W, or J/B, by term; the voltage's floor; the rms of the relative errors, and each."""

    terms: dict[str, float]
    floor: float
    rms: float
    errors: dict[str, float]


def rates(workloads: Mapping, name: str) -> Rates:
    """A recorded workload's activity, in the model's terms."""
    seen = workloads[name]["activity"]
    issue, mufu = seen.get("issue", 0.0), seen.get("mufu", 0.0)
    if seen["tensor"]:
        alone = workloads["softmax"]["activity"]
        issue = K_STEP_INSTRUCTIONS / K_STEP_CYCLES * seen["tensor"] + mufu * alone["issue"] / alone["mufu"]
    return Rates(
        tensor=seen["tensor"],
        mufu=mufu,
        issue=issue,
        smem_bytes_per_cycle=seen["smem_bytes"],
        l2_bytes_per_cycle=seen["l2_bytes"],
        hbm_bytes_per_cycle=seen["hbm_bytes"],
        l2_lookup_bytes_per_cycle=seen.get("l2_lookup_bytes", 0.0),
        dtype="bf16" if "bf16" in name else "fp16",
    )


def fitted_names(workloads: Mapping) -> list[str]:
    """The workloads that the fit takes."""
    return [name for name in workloads if not name.startswith(("sleep", *CHECKS))]


def droop(workloads: Mapping) -> tuple[list[float], float]:
    """Shares of the clock asked for that are missing at the power limit, and the tensor activity that is enough for them.

    The activity fits the workloads below the limit best, whose clock is taken to fall linearly up to it.
    """
    rows = [row for name, row in workloads.items() if "tensor_utilisation" in row and "zeros" not in name]
    seen = [(row["tensor_utilisation"], 1 - row["sm_mhz_settled"] / row["nvml_mhz_settled"], row) for row in rows]
    full = [share for _, share, row in seen if _held(workloads, row)]
    below = [(busy, share) for busy, share, row in seen if not _held(workloads, row)]
    tried = np.arange(0.05, 1.0, 0.01)
    worth = [sum((share - median(full) * min(1.0, busy / each)) ** 2 for busy, share in below) for each in tried]
    return full, float(tried[int(np.argmin(worth))])


def _held(workloads: Mapping, row: Mapping) -> bool:
    """Whether the board asks for a lower clock than the highest."""
    return row["nvml_mhz_settled"] < 0.98 * top_mhz(workloads)


def top_mhz(workloads: Mapping) -> float:
    """The highest clock, as the sleeping SMs count it."""
    return workloads["sleep"]["sm_mhz_settled"]


def watts(workloads: Mapping, names: list[str], floor: float) -> tuple[np.ndarray, np.ndarray]:
    """(workloads, terms) joules per unit of term's energy, and the workloads' watts above idle."""
    top = top_mhz(workloads)
    table = []
    for name in names:
        row, work = workloads[name], rates(workloads, name)
        clock = row["sm_mhz_settled"]
        asked = min(1.0, row["nvml_mhz_settled"] / max(r["nvml_mhz_settled"] for r in workloads.values()))
        square = (floor + (1 - floor) * asked) ** 2
        share, hertz = clock / top * square, clock * 1e6
        bf16 = work.dtype == "bf16"
        table.append([
            0.0 if bf16 else work.tensor * share, work.tensor * share if bf16 else 0.0, work.issue * share, work.mufu * share,
            work.smem_bytes_per_cycle / SMEM_BYTES_PER_CYCLE * share, work.l2_bytes_per_cycle * hertz * square,
            work.l2_lookup_bytes_per_cycle * hertz * square, work.hbm_bytes_per_cycle * hertz,
        ])  # fmt: skip
    idle = workloads["sleep"]["watts_instant_settled"]
    return np.array(table), np.array([workloads[name]["watts_instant_settled"] for name in names]) - idle


def fit(workloads: Mapping, leave_out: str | None = None, floor: float | None = None) -> Fitted:
    """Least squares of the relative errors over the fitted workloads, without one of them or with a given floor."""
    names = [name for name in fitted_names(workloads) if name != leave_out]
    idle = workloads["sleep"]["watts_instant_settled"]
    best = None
    for tried in np.arange(0.0, 0.96, 0.01) if floor is None else (floor,):
        table, above = watts(workloads, names, float(tried))
        weight = 1 / (above + idle)
        energies = nonnegative(table * weight[:, None], above * weight)
        errors = (table @ energies - above) * weight
        rms = float(np.sqrt(np.mean(errors**2)))
        if best is None or rms < best.rms:
            terms = dict(zip(TERMS, map(float, energies), strict=True))
            best = Fitted(terms, float(tried), rms, dict(zip(names, map(float, errors), strict=True)))
    return best


def nonnegative(table: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares without the columns whose factor would be negative, the worst left out first."""
    scale = np.abs(table).max(axis=0)
    kept = [column for column in range(table.shape[1]) if scale[column] > 0]
    answer = np.zeros(table.shape[1])
    while kept:
        found = np.linalg.lstsq(table[:, kept] / scale[kept], wanted, rcond=None)[0]
        if found.min() >= 0:
            answer[kept] = found / scale[kept]
            break
        kept.pop(int(np.argmin(found)))
    return answer


def spread(workloads: Mapping) -> list[Fitted]:
    """The fit without each workload in turn, at the floor that all of them give."""
    floor = fit(workloads).floor
    return [fit(workloads, name, floor) for name in fitted_names(workloads)]


def limited(workloads: Mapping) -> list[float]:
    """Watts of the workloads that the board holds to its power limit, between half a second and one and a half."""
    fitted = [workloads[name] for name in fitted_names(workloads)]
    return [row["watts_instant_settled"] for row in fitted if row["nvml_mhz_settled"] < 0.9 * top_mhz(workloads)]


def bursts(workloads: Mapping, found: Fitted, share: float) -> list[float]:
    """What `burst_w` has to be for each first 30 ms of tensor cores at work: (watts at the clock seen)^2 / watts unhindered."""
    idle, needed = workloads["sleep"]["watts_instant_settled"], []
    for name in fitted_names(workloads):
        row = workloads[name]
        unhindered = (1 - share) * top_mhz(workloads)
        if row.get("tensor_utilisation", 0.0) > SATURATED and row["sm_mhz_burst"] < unhindered:
            per_mhz = _watts_per_mhz(rates(workloads, name), found, top_mhz(workloads))
            needed.append((idle + per_mhz * row["sm_mhz_burst"]) ** 2 / (idle + per_mhz * unhindered))
    return needed


def _watts_per_mhz(work: Rates, found: Fitted, top: float) -> float:
    """Watts above idle per MHz at full voltage."""
    terms = found.terms
    units = (
        terms["bf16" if work.dtype == "bf16" else "tensor"] * work.tensor + terms["issue"] * work.issue + terms["mufu"] * work.mufu
        + terms["smem"] * work.smem_bytes_per_cycle / SMEM_BYTES_PER_CYCLE
    )  # fmt: skip
    moved = terms["l2"] * work.l2_bytes_per_cycle + terms["l2_lookup"] * work.l2_lookup_bytes_per_cycle
    return units / top + (moved + terms["hbm"] * work.hbm_bytes_per_cycle) * 1e6
