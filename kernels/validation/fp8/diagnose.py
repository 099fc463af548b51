"""What a wrong FP8 answer looks like: known mistakes, each tried in fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ...fp8 import emulate
from ...fp8.plain import Quantised
from ..check import Case
from ..criteria import Bound

LARGEST = 1 << 22
"""Scores of a case beyond which no guess is made."""
FEWER = 0.25
"""A guess stands where it leaves a quarter of the mean error or less."""


def output(case: Case, q: Quantised, k: Quantised, v: Quantised, out: torch.Tensor, bound: Bound) -> str:
    """A sentence naming the mistake that `out` equals within FP8's own error, or an empty one."""
    if case.batch * case.heads * case.seqlen_q * case.seqlen_k > LARGEST or not out.numel():
        return ""
    given = {"q": q, "k": k, "v": v}
    exact = emulate.exact(q, k, v, case.softmax_scale, case.causal).o
    before = float((out.double() - exact).abs().nan_to_num(0.0, 0.0, 0.0).mean())
    for words, changed in guesses(given):
        there = emulate.exact(**(given | changed), softmax_scale=case.softmax_scale, causal=case.causal).o
        error = (out.double() - there).abs().nan_to_num(math.inf, math.inf, math.inf)
        if float(error.mean()) < max(bound.mean, FEWER * before) and float(there.sub(exact).abs().mean()) > bound.mean:
            return f"it is what comes out {words}"
    return ""


def guesses(given: dict[str, Quantised]) -> Iterator[tuple[str, dict[str, Quantised]]]:
    """(how the mistake reads, the inputs with which it is right)."""
    for name, x in given.items():
        yield f"without {name}_descale", {name: x._replace(descale=torch.ones_like(x.descale))}
    for name, x in given.items():
        if x.block is not None and x.descale.shape[2] > 1:
            for step, which in ((-1, "the block after"), (1, "the block before")):
                yield f"with the descale of {which} in {name}", {name: x._replace(descale=x.descale.roll(step, 2))}
    v = given["v"]
    rows = v.values.shape[1] // 16 * 16
    if rows:
        order = torch.arange(rows, device=v.values.device).view(-1, 16)
        for index in (SWAPPED, SWAPPED.argsort()):
            mixed = v.values.view(torch.uint8).clone()
            mixed[:, :rows] = mixed[:, order[:, index.to(order.device)].flatten()]
            yield (
                "where P's keys are in the order of the accumulators and V's are not",
                {"v": v._replace(values=mixed.view(v.values.dtype))},
            )


SWAPPED = torch.tensor([2 * (i // 4) + (0, 1, 8, 9)[i % 4] for i in range(16)])
"""The order in which a thread's accumulators have 16 keys."""


def lse(got: torch.Tensor, wanted: torch.Tensor, allowed: float) -> str:
    """A sentence where LSE is off by the same power of two everywhere."""
    seen = wanted.isfinite() & got.isfinite()
    if not seen.any():
        return ""
    off = (got - wanted)[seen] / math.log(2)
    step = round(float(off.mean()))
    if step and float((off - step).abs().max()) * math.log(2) <= allowed:
        return f"it is {step:+d} in base 2 everywhere: the shift of P's exponent is not taken back"
    return ""
