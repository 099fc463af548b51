"""Asking autograd for a subject's gradients, and holding them to the fp64 oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from . import calls, criteria, diagnose_gradients, yardstick
from .check import Case, Fault, Skipped
from .problem import Problem

if TYPE_CHECKING:
    from .bench import Bench

NAMES = ("dQ", "dK", "dV")
_AXES = ("bmhd", "bnhd", "bnhd")
_LARGE = 1 << 23  # elements of gradients that are not worth their memory


class Recorded(NamedTuple):
    """A forward pass that autograd recorded: q, k, v as leaves, O, and LSE or None."""

    leaves: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    out: torch.Tensor
    lse: torch.Tensor | None


def record(bench: Bench, case: Case, qkv: tuple, needs: tuple[bool, ...] = (True, True, True)) -> Recorded:
    """Call the subject with leaves of which `needs` says whether they require a gradient.

    Raises Skipped where it has no backward and promises none.
    """
    reason = bench.no_backward(case)
    if reason:
        raise Skipped(reason)
    leaves = tuple(x.detach().requires_grad_(need) for x, need in zip(qkv, needs, strict=True))
    out, lse = bench.call(*leaves, case)
    if not out.requires_grad:
        if bench.subject.differentiable:
            raise Fault("O carries no gradient")
        raise Skipped("forward only: O carries no gradient")
    return Recorded(leaves, out, lse)


def gradients(
    bench: Bench, case: Case, recorded: Recorded, do: torch.Tensor | None, dlse: torch.Tensor | None = None, keep: bool = False
) -> tuple[torch.Tensor | None, ...]:
    """(dQ, dK, dV) of a recorded call, None for what requires none, with their form checked; `keep` as retain_graph.

    Raises Skipped where `dlse` is given and LSE is not returned or carries no gradient.
    """
    if dlse is not None and (recorded.lse is None or not recorded.lse.requires_grad):
        raise Skipped("LSE is not returned" if recorded.lse is None else "LSE is not differentiable")
    needs = tuple(x.requires_grad for x in recorded.leaves)

    def ask(of: Recorded) -> tuple:
        asked = [(result, gradient) for result, gradient in ((of.out, do), (of.lse, dlse)) if gradient is not None]
        results, from_above = zip(*asked, strict=True)
        leaves = [x for x in of.leaves if x.requires_grad]
        found = torch.autograd.grad(results, leaves, from_above, retain_graph=keep, allow_unused=True)
        if bench.on_gpu:
            torch.cuda.current_stream().synchronize()
        return tuple(map(calls.plain, found))

    def again() -> None:
        calls.refill(*recorded.leaves)
        ask(record(bench, case, recorded.leaves, needs))

    answers = iter(bench.run(lambda: ask(recorded), again, "backward "))
    found = tuple(next(answers) if need else None for need in needs)
    for name, leaf, gradient, need in zip(NAMES, recorded.leaves, found, needs, strict=True):
        if not need:
            continue
        if gradient is None:
            raise Fault(f"{name} is missing: the result does not depend on its tensor")
        criteria.hold_form(name, gradient, tuple(leaf.shape), bench.dtype, bench.device)
    return found


def backward(
    bench: Bench,
    case: Case,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor | None,
    dlse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """(dQ, dK, dV) of a new call; raises Skipped as `record` and `gradients` do."""
    return gradients(bench, case, record(bench, case, (q, k, v)), do, dlse)


def wanted(bench: Bench, case: Case, problem: Problem, about: str = "") -> tuple:
    """((dQ, dK, dV) in fp64, their Bounds), from memory where asked before; `about` tells apart what `case` does not."""
    key = ("gradients", bench.group, bench.seed, case, about, bench.dtype, bench.device.type)
    if key not in bench.known:
        do = torch.zeros(case.o_shape, dtype=bench.dtype, device=bench.device) if problem.do is None else problem.do
        answer = yardstick.gradients(*problem.qkv, do, case.causal, case.softmax_scale, problem.dlse)
        if sum(x.numel() for x in answer[0]) > _LARGE:
            return answer
        bench.known[key] = answer
    return bench.known[key]


def hold(case: Case, problem: Problem, found: tuple, right: tuple) -> dict:
    """Hold the gradients that are not None; a Fault says what the wrong one looks like. The figures are the worst one's."""
    figures, worst = {}, -1.0
    for name, axes, got, exact, bound in zip(NAMES, _AXES, found, *right, strict=True):
        if got is None:
            continue
        try:
            held = criteria.hold(name, axes, got, exact, bound)
        except Fault as fault:
            guess = diagnose_gradients.look(case, problem, name, found, right)
            raise Fault(f"{fault}; {guess}" if guess else str(fault)) from None
        if held and held["max_error"] / held["max_error_allowed"] > worst:
            worst = held["max_error"] / held["max_error_allowed"]
            figures = held | {"tensor": name}
    return figures
