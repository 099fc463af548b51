"""Comparison: what a prediction and a measurement share, number by number, and how far they are apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..simulator.results import metrics
from ..simulator.results.html import table
from ..simulator.results.run import Run
from ..simulator.units import percent, scaled

SETS = {
    "beside": "our kernels, beside which the model was made",
    "after": "our kernels, recorded after the model was finished and compared once",
    "others": "other people's kernels",
    "aside": "runs in bursts or with a warm L2, and kernels that a compiler schedules",
}
"""Which table a run belongs to; the last is no measure of the model."""


@dataclass(frozen=True)
class Quantity:
    """A number that prediction and measurement share; its error is relative, or the difference where it is a share."""

    name: str
    unit: str
    of: Callable[[Run], float | None]

    @property
    def is_share(self) -> bool:
        """Between 0 and 1, so that errors are differences in percentage points."""
        return self.unit == ""


def _written(run: Run) -> float | None:
    """HBM writes up to the end of each kernel, which is as far as counters see: what is dirty in L2 then comes later."""
    written = run.traffic.total("hbm_write")
    return None if written is None else written - (run.traffic.dirty_bytes or 0)


def _main(run: Run) -> float | None:
    """Cycles of the longest of a backward's kernels."""
    kernels = run.measurement.kernels if run.measurement else run.kernels
    counted = [cycles for _, cycles in kernels if cycles is not None]
    return max(counted) if run.workload.backward and len(counted) > 1 else None


QUANTITIES = (
    Quantity("cycles", "cycles", lambda run: run.cycles),
    Quantity("main kernel", "cycles", _main),
    Quantity("SM clock", "Hz", lambda run: run.sm_clock_hz),
    Quantity("time", "s", metrics.time_s),
    Quantity("throughput", "FLOP/s", lambda run: metrics.tflops(run) * 1e12),
    Quantity("HBM read", "B", lambda run: run.traffic.total("hbm_read")),
    Quantity("HBM written", "B", _written),
    Quantity("L2 read", "B", lambda run: run.traffic.total("l2_read")),
    Quantity("L2 lookups", "B", lambda run: run.traffic.l2_lookup_bytes),
    Quantity("L2 written", "B", lambda run: run.traffic.total("l2_write")),
    Quantity("L2 hit rate", "", lambda run: run.traffic.l2_hit_rate),
    Quantity("tensor cores", "", metrics.tensor_utilization),
    Quantity("MUFU", "", metrics.mufu_utilization),
    Quantity("issue slots", "", metrics.issue_utilization),
    Quantity("power", "W", lambda run: run.power_w),
)
_CAUSES = ("cycles", "SM clock", "HBM read", "L2 read", "L2 hit rate", "tensor cores", "MUFU", "issue slots")
"""What an explanation starts from; time, throughput and power follow from these, and writes are few."""


@dataclass(frozen=True)
class Row:
    """One quantity of both runs; None was not measured."""

    quantity: Quantity
    predicted: float | None
    measured: float | None

    @property
    def error(self) -> float | None:
        """Predicted over measured, less one; for a share predicted less measured. None where either is missing."""
        if self.predicted is None or self.measured is None:
            return None
        if self.quantity.is_share:
            return self.predicted - self.measured
        if self.measured == 0:
            return 0.0 if self.predicted == 0 else None
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Comparison:
    """Two runs of one workload, in one of the SETS. `predicted` is None where no schedule stands for the kernel."""

    name: str
    predicted: Run | None
    measured: Run
    rows: tuple[Row, ...]
    belongs: str
    note: str = ""
    explanation: str = ""  # one or two sentences on the largest disagreement

    def row(self, name: str) -> Row:
        """The row of a quantity."""
        return next(row for row in self.rows if row.quantity.name == name)

    @property
    def kernel(self) -> str:
        """Whose errors are averaged together: a kernel of ours by its name, others' by name and dtype."""
        ours = self.belongs in ("beside", "after")
        return (self.measured.schedule if ours else _of_others(self.measured)) + " backward" * self.measured.workload.backward

    @property
    def largest(self) -> Row | None:
        """The row with the largest error among those that others follow from; None where nothing can be compared."""
        found = [row for row in self.rows if row.quantity.name in _CAUSES and row.error is not None]
        return max(found, key=lambda row: abs(row.error), default=None)

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        rows = [
            (of.name, _shown(row.predicted, of), _shown(row.measured, of), percent(row.error, signed=True))
            for row in self.rows
            if (of := row.quantity)
        ]
        return table(self.name or str(self.measured.workload), ("", "predicted", "measured", "error"), rows, self.explanation)

    def to_dict(self) -> dict:
        """As plain JSON values."""
        return {
            "name": self.name,
            "workload": self.measured.workload.to_dict(),
            "kernel": self.measured.schedule,
            "schedule": self.predicted and self.predicted.schedule,
            "set": self.belongs,
            "note": self.note,
            "rows": [
                {"quantity": row.quantity.name, "unit": row.quantity.unit, "predicted": row.predicted,
                 "measured": row.measured, "error": row.error}
                for row in self.rows
            ],
            "explanation": self.explanation,
        }  # fmt: skip


def _shown(value: float | None, quantity: Quantity) -> str:
    """A value with its unit; a share in percent, cycles with all digits."""
    if value is None:
        return ""
    if quantity.unit == "cycles":
        return f"{value:,.0f}"
    return percent(value) if quantity.is_share else scaled(value, quantity.unit)


def _of_others(run: Run) -> str:
    return f"{run.schedule} {run.workload.dtype}"
