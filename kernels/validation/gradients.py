"""The group that holds dQ, dK and dV to autograd in fp64, and runs gradcheck where the subject takes fp64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.autograd.gradcheck import GradcheckError, gradcheck

from . import calls, criteria, yardstick
from .check import Case, Fault, Skipped, Trial

if TYPE_CHECKING:
    from .bench import Bench


_FP64 = 1e-10
"""An error of O that fp64 arithmetic stays below, and fp32 does not."""


def trials(bench: Bench) -> Iterator[Trial]:
    """Full and causal, every head dim; ragged lengths, GQA, rows without keys, a dO of stride 0; gradcheck."""
    tile = bench.tile
    for head_dim in bench.head_dims:
        for rows, keys, causal in ((2 * tile, 2 * tile, False), (2 * tile, 2 * tile, True), (tile + 1, 2 * tile - 1, True)):
            name = f"{rows} x {keys}, {'causal' if causal else 'full'}, d{head_dim}"
            case = Case(name=name, seqlen_q=rows, seqlen_k=keys, head_dim=head_dim, causal=causal)
            yield Trial(name, lambda case=case: _hold(bench, case))
    first = bench.head_dims[0]
    common = {"seqlen_q": tile + 3, "seqlen_k": tile + 9, "head_dim": first}
    summed = "dK and dV sum over the query heads of a group"
    for name, proves, sizes in (
        ("4 query heads on 2 key heads", summed, {"heads": 4, "kv_heads": 2}),
        ("4 query heads on 1 key head, causal", summed, {"heads": 4, "kv_heads": 1, "causal": True}),
        ("rows fully masked", "a row that sees no key has no gradient", {"seqlen_q": 2 * tile, "seqlen_k": tile, "causal": True}),
        ("softmax_scale 0.3", "softmax_scale is the one given", {"softmax_scale": 0.3}),
        ("large logits", "P is recomputed from LSE", {"inputs": "large logits"}),
    ):
        case = Case(name=name, **(common | sizes))
        yield Trial(name, lambda case=case, proves=proves: _hold(bench, case, proves))
    expanded = Case(name="dO of stride 0, as of O.sum()", **common)
    yield Trial(expanded.name, lambda: _hold(bench, expanded, "dO may have any strides", ones=True))
    if not bench.quick and bench.on_gpu:
        long = Case(name="4096 x 4096, causal", seqlen_q=4096, seqlen_k=4096, head_dim=first, causal=True)
        yield Trial(long.name, lambda: _hold(bench, long))
        many = Case(name="batch x heads > 65535", batch=1100, heads=60, seqlen_q=17, seqlen_k=17, head_dim=first, causal=True)
        yield Trial(many.name, lambda: _hold_corners(bench, many))
    yield Trial("gradcheck", lambda: _gradcheck(bench))


def backward(bench: Bench, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor) -> tuple:
    """(dQ, dK, dV) of the subject by autograd; raises Skipped where it has no backward and promises none."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    reason = bench.no_backward(case)
    if reason:
        raise Skipped(reason)
    out, _ = bench.call(*leaves, case)
    if not out.requires_grad:
        if bench.subject.differentiable:
            raise Fault("O carries no gradient")
        raise Skipped("forward only: O carries no gradient")

    def ask(out: torch.Tensor) -> tuple:
        found = torch.autograd.grad(out, leaves, do, allow_unused=True)
        if bench.on_gpu:
            torch.cuda.current_stream().synchronize()
        return tuple(map(calls.plain, found))

    def again() -> None:
        calls.refill(*leaves)
        ask(bench.call(*leaves, case)[0])

    found = bench.run(lambda: ask(out), again, "backward ")
    for name, leaf, gradient in zip(("dQ", "dK", "dV"), leaves, found, strict=True):
        if gradient is None:
            raise Fault(f"{name} is missing: O does not depend on its tensor")
        criteria.hold_form(name, gradient, tuple(leaf.shape), bench.dtype, bench.device)
    return found


def _hold(bench: Bench, case: Case, proves: str = "", ones: bool = False) -> dict:
    from .bench import explained

    q, k, v = bench.tensors(case)
    one = torch.ones((), dtype=bench.dtype, device=bench.device)
    do = one.expand(case.o_shape) if ones else bench.dout(case, f"dO of {case.name}")
    key = ("gradients", bench.seed, case, bench.dtype, bench.device.type)
    if key not in bench.known:
        bench.known[key] = yardstick.gradients(q, k, v, do, case.causal, case.softmax_scale)
    exact, bounds = bench.known[key]
    with explained(case, proves):
        figures = {}
        for name, axes, got, wanted, bound in zip(
            ("dQ", "dK", "dV"), ("bmhd", "bnhd", "bnhd"), backward(bench, case, q, k, v, do), exact, bounds, strict=True
        ):
            try:
                held = criteria.hold(name, axes, got, wanted, bound)
            except Fault as fault:
                raise Fault(f"{fault}{_factor(got, wanted)}") from None
            if held and held["max_error"] / held["max_error_allowed"] >= figures.get("ratio", 0.0):
                figures = held | {"tensor": name, "ratio": held["max_error"] / held["max_error_allowed"]}
        figures.pop("ratio", None)
        return figures


def _hold_corners(bench: Bench, case: Case) -> dict:
    """The first and the last head of a problem that is too large for the oracle as a whole."""
    from .bench import explained

    q, k, v = bench.tensors(case)
    do = bench.dout(case, f"dO of {case.name}")
    with explained(case, "more heads than a grid's y axis holds"):
        found = backward(bench, case, q, k, v, do)
        figures = {}
        for where in (0, -1):
            corner = [x[where:, :, where:][:1, :, :1] for x in (q, k, v, do, *found)]
            exact, bounds = yardstick.gradients(*corner[:4], case.causal, case.softmax_scale)
            end = "last" if where else "first"
            for name, axes, got, wanted, bound in zip(
                ("dQ", "dK", "dV"), ("bmhd", "bnhd", "bnhd"), corner[4:], exact, bounds, strict=True
            ):
                figures = criteria.hold(f"{name}[{end} head of the {end} batch]", axes, got, wanted, bound)
        return figures


def _factor(got: torch.Tensor, wanted: torch.Tensor) -> str:
    """ "; it is 1.41 times what it should be", where one factor explains the difference."""
    got = got.double()
    scale = (got * wanted).sum() / wanted.square().sum()
    rest = (got - scale * wanted).norm() / got.norm()
    return f"; it is {scale.item():.3g} times what it should be" if rest < 0.02 and abs(scale - 1) > 0.05 else ""


def _gradcheck(bench: Bench) -> dict:
    """Finite differences in fp64 on a small problem, for subjects that take fp64."""
    case = Case(name="gradcheck", seqlen_q=3, seqlen_k=5, head_dim=bench.head_dims[0], causal=True, heads=2, kv_heads=1)
    if bench.no_backward(case):
        raise Skipped(bench.no_backward(case))
    if "fp64" not in bench.subject.dtypes:
        raise Skipped("the kernel takes no fp64")
    small = {"head_dim": 4} if bench.head_dims[0] <= 32 else {}
    case = Case(**(vars(case) | small))
    generator = bench.generator("gradcheck")
    tensors = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(bench.device).requires_grad_()
        for shape in (case.q_shape, case.k_shape, case.v_shape)
    ]

    def output(*qkv: torch.Tensor) -> torch.Tensor:
        with calls.contained():
            answer = bench.subject.forward(*qkv, causal=True, softmax_scale=None)
        return answer[0] if isinstance(answer, (tuple, list)) and answer else answer

    try:
        out = output(*tensors)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # it was asked about another dtype than this one
        raise Skipped(f"does not take fp64: raised {calls.said(error)}") from error
    if not isinstance(out, torch.Tensor) or out.dtype != torch.float64 or tuple(out.shape) != case.o_shape:
        raise Skipped("does not take fp64: O is no fp64 tensor of its shape")
    if not out.requires_grad:
        raise Skipped("forward only: O carries no gradient")
    exact, _ = yardstick.expected(*tensors, True, None)
    if not (out.detach() - exact).abs().max() < _FP64:
        raise Skipped("takes fp64 and computes in less, where finite differences say nothing")
    try:
        gradcheck(output, tensors, fast_mode=True)
    except KeyboardInterrupt:
        raise
    except GradcheckError as error:
        raise Fault(f"gradcheck: {str(error).strip().splitlines()[0]} inputs: {case} in fp64") from error
    except BaseException as error:  # whatever a kernel raises is a failed check, in one line
        raise Fault(f"under gradcheck: raised {calls.said(error)}; inputs: {case} in fp64") from error
    return {}
