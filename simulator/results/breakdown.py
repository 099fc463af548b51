"""Breakdown: where the time of the tensor cores goes, as shares that add up to one.

The whole is every SM's tensor cores over every cycle of the call. What they execute is useful, or padding, or masked, or
slower than it could be; what they do not execute is laid to whatever kept the next GEMM from starting (idle.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

REASONS = ("softmax", "memory", "latency", "prologue", "epilogue")
"""The parts that lie between the GEMMs of an SM that has a CTA."""


@dataclass(frozen=True)
class Breakdown:
    """Shares of SMs x cycles; they add up to 1.

    `useful` is the workload's exact FLOPs at the tensor cores' dense peak, the roofline's share. `padding` is rows and
    keys of a tile beyond the lengths, `masked` pairs of computed tiles above the diagonal, `slow_gemms` the cycles by which
    a GEMM takes longer than at the peak (mma.sync; operands that shared memory cannot deliver in time).

    Of a CTA's idle cycles `prologue` is what lies before the first GEMM of a tile and `epilogue` what lies behind its last
    one; between, the warpgroup whose GEMM comes next was in arithmetic (`softmax`, exposed), waited for loads or stores
    (`memory`), or for a GEMM's result, its issue, a barrier or its turn (`latency`). `tail` is SMs that have run out of
    CTAs before the last one ends, `no_cta` those that never had one, `launch` the launch of the kernels.
    """

    useful: float
    padding: float
    masked: float
    slow_gemms: float
    softmax: float
    memory: float
    latency: float
    prologue: float
    epilogue: float
    tail: float
    no_cta: float
    launch: float

    @property
    def losses(self) -> dict[str, float]:
        """All parts but the useful one, the largest first."""
        parts = asdict(self)
        del parts["useful"]
        return dict(sorted(parts.items(), key=lambda part: -part[1]))

    def to_dict(self) -> dict[str, float]:
        """Part -> share."""
        return asdict(self)


def of_cycles(cycles: dict[str, float], total: float) -> Breakdown:
    """The breakdown of `total` cycles into parts; what is missing are zeros. Raises ValueError where they do not add up."""
    found = Breakdown(**{name: float(cycles.get(name, 0.0) / total) for name in Breakdown.__dataclass_fields__})
    if abs(sum(found.to_dict().values()) - 1.0) > 0.005 or min(found.to_dict().values()) < -1e-9:
        raise ValueError(f"the parts do not add up: {found}")
    return found
