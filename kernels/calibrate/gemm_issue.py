"""How long a warpgroup issues a GEMM, from the stamps of one warpgroup alone (pace.py, `alone`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .pace import tile

QUEUE = 6
"""K steps that the tensor cores' queue takes without delay."""


@dataclass(frozen=True)
class Gemm:
    """K steps, cycles of each on the tensor cores, cycles until issued, and (the plain order) until it returns, less stamps."""

    steps: int
    each: float
    issued: float
    returned: float | None


def gemms(alone: Mapping[str, dict]) -> list[Gemm]:
    """Those that find the tensor cores idle and wait for no mbarrier.

    A stamp costs what the plain order of the same head dimension loses by its own.
    """
    found = []
    for name, row in alone.items():
        order, d = name.rsplit("_d", 1)
        if d.endswith("_ring"):
            continue
        plain, d = alone[f"plain_d{d}"], int(d)
        stamp = (plain["cycles_per_block_with_stamps"] - plain["cycles_per_block"]["median"]) / len(plain["stamps"])
        n, _ = tile(order, d)
        after = dict(zip(row["stamps"], row["cycles_to_next"], strict=False))  # nothing comes after the last stamp
        scores, values = ("K arrived", "S issued", d // 16, n / 2), ("V arrived", "PV issued", n // 16, d / 2)
        for arrived, issued, steps, each in {"plain": (scores, values), "two_stage": (scores,), "three_stage": (values,)}[order]:
            returned = after[arrived] + after[issued] - 2 * stamp if order == "plain" else None
            found.append(Gemm(steps, each, after[arrived] - stamp, returned))
    return found


def fit(alone: Mapping[str, dict]) -> tuple[int, int, float, list[float]]:
    """(cycles before the first k step, least cycles of a k step, or share of its own, what that misses of each GEMM).

    Least squares over the GEMMs of at most QUEUE k steps.
    """
    short = [gemm for gemm in gemms(alone) if gemm.steps <= QUEUE]

    def missed(start: int, least: int, share: float) -> list[float]:
        return [start + gemm.steps * max(least, share * gemm.each) - gemm.issued for gemm in short]

    shapes = ((start, least, percent / 100) for start in range(31) for least in range(5, 26) for percent in range(10, 41))
    best = min(shapes, key=lambda shape: sum(off * off for off in missed(*shape)))
    return *best, missed(*best)
