"""The group that asks how close O and LSE come to fp64 at the lengths people run, and the table of the paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...simulator.reading import read_csv
from . import yardstick
from .check import Case, Trial

if TYPE_CHECKING:
    from .bench import Bench

PAPER = Path(__file__).parents[2] / "traces" / "published" / "numerical_error.csv"
"""FlashAttention-3 Table 3: source, dtype, method, rmse."""


def trials(bench: Bench) -> Iterator[Trial]:
    """Random inputs at growing lengths, full and causal, every head dim; outliers at a long one."""
    for head_dim in bench.head_dims:
        for rows, keys, causal in _lengths(bench):
            name = f"{rows} x {keys}, {'causal' if causal else 'full'}, d{head_dim}"
            case = Case(name=name, seqlen_q=rows, seqlen_k=keys, head_dim=head_dim, causal=causal)
            yield Trial(name, lambda case=case: bench.hold(case))
    rows, keys = (256, 16384 if not bench.quick else 8192) if bench.at_scale else (bench.tile, min(256 * bench.tile, 8192))
    name, kind = f"V around 1, {rows} x {keys}", "V around 1"
    drift = Case(name=name, seqlen_q=rows, seqlen_k=keys, head_dim=bench.head_dims[0], inputs=kind)
    yield Trial(drift.name, lambda: bench.hold(drift, "O is accumulated in fp32"))
    case = table_case(bench)
    yield Trial(case.name, lambda: bench.hold(case))


def _lengths(bench: Bench) -> list[tuple[int, int, bool]]:
    if not bench.at_scale:
        near, far = 4 * bench.tile, min((64 if bench.subject.slow else 128) * bench.tile, 4096)
        return [(near, near, False), (near, near, True), (near, far, False)]
    lengths = [1024, 4096] if bench.quick else [512, 1024, 2048, 4096, 8192, 16384]
    return [(length, length, causal) for length in lengths for causal in (False, True)]


def table_case(bench: Bench) -> Case:
    """The problem of the RMSE table: N(0, 1) + N(0, 100) * Bernoulli(0.001)."""
    length = 4096 if bench.at_scale and not bench.quick else 1024 if bench.at_scale else 256
    head_dim = min(bench.subject.head_dims, key=lambda d: abs(d - 128))
    name = f"outliers, {length} x {length}, d{head_dim}"
    return Case(name=name, seqlen_q=length, seqlen_k=length, head_dim=head_dim, heads=4, inputs="outliers")


def table(bench: Bench) -> list[dict]:
    """RMSE of the subject and of same-precision math attention beside the paper's rows of the same dtype.

    Rows are {method, rmse, source}. A subject that fails on this problem has no row; its check says why.
    """
    case = table_case(bench)
    q, k, v = bench.tensors(case)
    exact, _ = yardstick.expected(q, k, v, case.causal, case.softmax_scale)

    def rmse(out: torch.Tensor) -> float:
        return (out.double() - exact).square().mean().sqrt().item()

    here = f"here, {case}"
    rows = [{"method": "math attention, S and P in this precision", "rmse": rmse(yardstick.baseline(q, k, v, False, None))}]
    out = bench.call(q, k, v, case)[0]
    rows.append({"method": bench.subject.name, "rmse": rmse(out)})
    return [row | {"source": here} for row in rows] + published(str(bench.dtype).removeprefix("torch."))


def published(dtype: str) -> list[dict]:
    """The paper's rows for "float16"; none for another dtype that it did not measure."""
    if dtype != "float16" or not PAPER.exists():
        return []
    rows = [row for row in read_csv(PAPER, "table") if row["dtype"] == "fp16"]
    return [{"method": row["method"], "rmse": float(row["rmse"]), "source": row["source"]} for row in rows]
