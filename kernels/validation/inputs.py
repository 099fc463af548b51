"""The group of checks over inputs that break attention kernels (kinds.py), and over NaN and Inf."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from . import criteria, yardstick
from .check import Case, Trial, explained
from .kinds import KINDS

if TYPE_CHECKING:
    from .bench import Bench


def trials(bench: Bench) -> Iterator[Trial]:
    """Every kind, full and causal; rows without keys; NaN and Inf."""
    length, head_dim = 4 * bench.tile, bench.head_dims[0]
    for kind in KINDS:
        for causal in (False, True):
            name = f"{kind}, {'causal' if causal else 'full'}"
            case = Case(name=name, seqlen_q=length, seqlen_k=length, head_dim=head_dim, causal=causal, inputs=kind)
            yield Trial(name, lambda case=case: bench.hold(case))
    rows = bench.tile + bench.tile // 2
    name = f"{rows} of {length} rows fully masked"
    case = Case(name=name, seqlen_q=length, seqlen_k=length - rows, head_dim=head_dim, causal=True)
    yield Trial(name, lambda case=case: bench.hold(case, "a row that sees no key must give O = 0 and LSE = -inf"))
    for tensor in "qkv":
        for value in ("NaN", "Inf"):
            if (tensor, value) == ("k", "Inf"):
                continue  # an infinite key gives weight 1 or NaN by sign: PyTorch's backends differ among themselves
            for causal in (False, True):
                name = f"{value} in {tensor}, {'causal' if causal else 'full'}"
                case = Case(name=name, seqlen_q=length, seqlen_k=length, head_dim=head_dim, causal=causal)
                yield Trial(name, lambda case=case, t=tensor, v=value: _not_finite(bench, case, t, v))


def _not_finite(bench: Bench, case: Case, tensor: str, value: str) -> dict:
    """One element in the middle is NaN or Inf; rows that attend to it are NaN or Inf, and under a causal mask only those
    count: PyTorch's math attention spreads 0 * NaN to the rows above, its flash backends do not."""
    q, k, v = bench.tensors(case)
    *_, bound = yardstick.bound(q, k, v, case.causal, case.softmax_scale)
    at = (0, case.seqlen_k // 2 + 1, 0, 3)
    {"q": q, "k": k, "v": v}[tensor][at] = float(value)
    where = f"{value} at {tensor}[{', '.join(map(str, at))}]"
    wanted, _ = yardstick.expected(q, k, v, case.causal, case.softmax_scale)
    first = at[1] if case.causal else 0
    with explained(case, where):
        out, _ = bench.call(q, k, v, case)
        return criteria.hold_not_finite(out[:, first:], wanted[:, first:], bound)
