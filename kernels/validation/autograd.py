"""The group that uses a kernel as models do: what autograd may call, when, how often, and for which inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from . import yardstick
from .check import Case, Fault, Noted, Trial, explained
from .criteria import Bound
from .differentiate import NAMES, gradients, hold, record, wanted
from .ownership import hold_own_memory, hold_unchanged, same_bits
from .problem import Problem

if TYPE_CHECKING:
    from .bench import Bench


def trials(bench: Bench) -> Iterator[Trial]:
    """Backward again, late, in any order, for some inputs only; whose memory it writes; .grad, packed inputs, modes."""
    case = Case(
        name="autograd", batch=2, seqlen_q=bench.tile + 3, seqlen_k=2 * bench.tile - 1, head_dim=bench.head_dims[0], causal=True
    )
    for name, ask in (
        ("a second backward on kept tensors", _twice),
        ("two calls, then backward of the first and of the second", _interleaved),
        ("gradients of an earlier backward stay", _earlier_gradients),
        ("backward leaves q, k, v, dO, O and LSE unchanged", _unchanged),
        (".grad accumulates", _accumulated),
        ("q, k and v slices of one packed projection", _packed),
        ("grad mode off", _no_grad),
        ("under autocast", _autocast),
    ):
        yield Trial(name, lambda ask=ask, name=name: ask(bench, replace(case, name=name)))
    for needs in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
        names = " and ".join(name for name, need in zip("qkv", needs, strict=True) if need)
        some = replace(case, name=f"gradients for {names} only")
        yield Trial(some.name, lambda some=some, needs=needs: _some(bench, some, needs))
    one = replace(case, seqlen_q=1, seqlen_k=1)
    for which, sized in (("ragged", case), ("one row, one key", one)):
        owned = replace(sized, name=f"gradients have memory of their own, {which}")
        yield Trial(owned.name, lambda owned=owned: _own_memory(bench, owned))


def _problem(bench: Bench, case: Case, about: str = "") -> tuple[Problem, tuple]:
    """Inputs and dO, other ones for another `about`, and the right gradients."""
    named = replace(case, name=f"{case.name}, {about}") if about else case
    problem = Problem(*bench.tensors(named), bench.dout(named, f"dO of {named.name}"))
    return problem, wanted(bench, named, problem)


def _held(case: Case, proves: str, problem: Problem, found: tuple, right: tuple) -> dict:
    with explained(case, proves):
        return hold(case, problem, found, right)


def _twice(bench: Bench, case: Case) -> dict:
    problem, right = _problem(bench, case)
    recorded = record(bench, case, problem.qkv)
    first = [x.clone() for x in gradients(bench, case, recorded, problem.do, keep=True)]
    again = gradients(bench, case, recorded, problem.do)
    _held(case, "the first of two backward passes", problem, first, right)
    return _held(case, "what backward keeps is as it was for a second backward (retain_graph)", problem, again, right)


def _interleaved(bench: Bench, case: Case) -> dict:
    first, second = (_problem(bench, case, about) for about in ("first", "second"))
    recorded = [record(bench, case, problem.qkv) for problem, _ in (first, second)]
    figures = {}
    for (problem, right), (other, _), of in ((first, second, recorded[0]), (second, first, recorded[1])):
        found = gradients(bench, case, of, problem.do)
        try:
            figures = _held(case, "each backward uses what its own forward kept", problem, found, right)
        except Fault as fault:
            theirs = yardstick.gradients(*other.qkv, problem.do, case.causal, case.softmax_scale)[0]
            equal = [name for name, x, y, bound in zip(NAMES, found, theirs, right[1], strict=True) if _near(x, y, bound)]
            raise Fault(f"{fault}; {', '.join(equal)} as of the other call's q, k and v" if equal else str(fault)) from None
    return figures


def _near(got: torch.Tensor, other: torch.Tensor, bound: Bound) -> bool:
    return bool((got - other).abs().max() <= 2 * bound.largest)


def _earlier_gradients(bench: Bench, case: Case) -> dict:
    (first, _), (second, _) = (_problem(bench, case, about) for about in ("first", "second"))
    found = gradients(bench, case, record(bench, case, first.qkv), first.do)
    before = [x.clone() for x in found]
    later = gradients(bench, case, record(bench, case, second.qkv), second.do)
    for name, old, now in zip(NAMES, before, found, strict=True):
        if not same_bits(old, now):
            raise Fault(f"{name} of an earlier backward changes when backward runs again: they share a buffer; inputs: {case}")
    del later
    return {}


def _unchanged(bench: Bench, case: Case) -> dict:
    problem, right = _problem(bench, case)
    recorded = record(bench, case, problem.qkv)
    watched = {"q": problem.q, "k": problem.k, "v": problem.v, "dO": problem.do, "O": recorded.out.detach()}
    watched |= {} if recorded.lse is None else {"LSE": recorded.lse.detach()}
    before = [x.clone() for x in watched.values()]
    found = gradients(bench, case, recorded, problem.do)
    hold_unchanged(case, tuple(watched), before, tuple(watched.values()), "backward modifies")
    return _held(case, "", problem, found, right)


def _some(bench: Bench, case: Case, needs: tuple[bool, bool, bool]) -> dict:
    problem, right = _problem(bench, case)
    found = gradients(bench, case, record(bench, case, problem.qkv, needs), problem.do)
    names = ", ".join(name for name, need in zip("qkv", needs, strict=True) if not need)
    return _held(case, f"{names} {'requires' if len(names) == 1 else 'require'} no gradient", problem, found, right)


def _accumulated(bench: Bench, case: Case) -> dict:
    """.grad after two backward passes is the sum of their gradients: one buffer for both would hold the second twice."""
    (first, right), (second, more) = (_problem(bench, case, about) for about in ("first", "second"))
    leaves, _, _ = record(bench, case, first.qkv)
    second = Problem(*first.qkv, second.do)
    more = wanted(bench, replace(case, name=f"{case.name}, another dO"), second)
    for problem in (first, second):
        out, _ = bench.call(*leaves, case)
        bench.run(lambda out=out, problem=problem: out.backward(problem.do), None, "backward ")
    exact = tuple(x + y for x, y in zip(right[0], more[0], strict=True))
    bounds = tuple(_sum(*each) for each in zip(right[1], more[1], exact, leaves, strict=True))
    found = tuple(leaf.grad for leaf in leaves)
    return _held(case, ".grad of two backward passes is the sum of theirs", second, found, (exact, bounds))


def _sum(first: Bound, second: Bound, exact: torch.Tensor, leaf: torch.Tensor) -> Bound:
    """Of a sum of two gradients, itself rounded."""
    rounding = torch.finfo(leaf.dtype).eps * exact.abs().max().item()
    return Bound(first.largest + second.largest + rounding, first.mean + second.mean + rounding)


def _packed(bench: Bench, case: Case) -> dict:
    """One leaf (B, S, 3H, D): its gradient is dQ, dK and dV side by side."""
    case = replace(case, seqlen_q=case.seqlen_k)
    if case.head_dim_v != case.head_dim:
        case = replace(case, head_dim=int(case.head_dim))
    problem, right = _problem(bench, case)
    record(bench, case, problem.qkv)
    leaf = torch.cat(problem.qkv, 2).requires_grad_()
    out, _ = bench.call(*leaf.split([case.heads, case.heads_kv, case.heads_kv], 2), case)
    (found,) = bench.run(lambda: torch.autograd.grad(out, leaf, problem.do), None, "backward ")
    parts = found.split([case.heads, case.heads_kv, case.heads_kv], 2)
    return _held(case, "gradients reach a packed projection", problem, parts, right)


def _no_grad(bench: Bench, case: Case) -> dict:
    q, k, v = bench.tensors(case)
    right = bench.yardstick(case, q, k, v)
    figures = {}
    record(bench, case, (q, k, v))
    for mode, context in (("torch.no_grad", torch.no_grad), ("torch.inference_mode", torch.inference_mode)):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with context():
            out, lse = bench.call(*leaves, case)
        if out.requires_grad:
            raise Fault(f"O requires a gradient under {mode}; inputs: {case}")
        with explained(case, f"under {mode}"):
            figures = bench.compare(case, (q, k, v), (out, lse), right)
    return figures


def _autocast(bench: Bench, case: Case) -> dict:
    """Forward and backward under autocast to bf16, which changes what a kernel made of PyTorch's operators computes: a note."""
    problem, right = _problem(bench, case)
    try:
        with torch.autocast(bench.device.type, torch.bfloat16):
            found = gradients(bench, case, record(bench, case, problem.qkv), problem.do)
        return _held(case, "", problem, found, right)
    except Fault as fault:
        raise Noted(f"computes otherwise under torch.autocast to bf16: {fault}") from None


def _own_memory(bench: Bench, case: Case) -> dict:
    problem, _ = _problem(bench, case)
    recorded = record(bench, case, problem.qkv)
    found = gradients(bench, case, recorded, problem.do)
    inputs = {"q": problem.q, "k": problem.k, "v": problem.v, "dO": problem.do, "O": recorded.out.detach()}
    hold_own_memory(case, dict(zip(NAMES, found, strict=True)), inputs)
    return {}
