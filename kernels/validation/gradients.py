"""The group that holds dQ, dK and dV, of every batch entry and head, to the fp64 oracle; gradcheck where the subject takes
fp64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.autograd.gradcheck import GradcheckError, gradcheck

from . import calls, criteria, large, shapes, yardstick
from .check import Case, Fault, Skipped, Trial, explained
from .differentiate import NAMES, backward, hold, wanted
from .layouts import DOUT_LAYOUTS
from .problem import Problem

if TYPE_CHECKING:
    from .bench import Bench


_FP64 = 1e-10
"""An error of O that fp64 arithmetic stays below, and fp32 does not."""


def trials(bench: Bench) -> Iterator[Trial]:
    """Lengths and masks at every head dim; batches, heads, scales, layouts of q, k, v and dO; the gradient of LSE; empty
    problems; positions past 2^16; gradcheck."""
    for case, proves in _cases(bench):
        yield Trial(case.name, lambda case=case, proves=proves: _hold(bench, case, proves))
    tile, first = bench.tile, bench.head_dims[0]
    common = {"batch": 2, "seqlen_q": tile + 3, "seqlen_k": tile + 9, "head_dim": first}
    for layout in DOUT_LAYOUTS:
        case = Case(name=f"dO {layout}", **common)
        yield Trial(case.name, lambda case=case, layout=layout: _hold(bench, case, "dO may have any strides", dout=layout))
    for of in ("O and LSE", "LSE alone", "LSE.sum()"):
        case = Case(name=f"gradients of {of}", causal=True, kv_heads=1, **common)
        yield Trial(case.name, lambda case=case, of=of: _hold(bench, case, "LSE is returned and differentiable", of=of))
    for head_dim in shapes.other_head_dims(bench):
        case = Case(name=f"head dim {head_dim}", seqlen_q=tile + 1, seqlen_k=tile + 3, head_dim=head_dim, causal=True)
        yield Trial(case.name, lambda case=case: _offered(bench, case))
    if not bench.quick and bench.on_gpu:
        long = Case(name="4096 x 4096, causal", seqlen_q=4096, seqlen_k=4096, head_dim=first, causal=True)
        yield Trial(long.name, lambda: _hold(bench, long))
        many = Case(name="batch x heads > 65535", batch=1100, heads=60, seqlen_q=17, seqlen_k=17, head_dim=first, causal=True)
        yield Trial(many.name, lambda: _hold_corners(bench, many))
    yield Trial("gradcheck", lambda: _gradcheck(bench))


def _cases(bench: Bench) -> Iterator[tuple[Case, str]]:
    """(case, what it proves) where dO is contiguous and all of N(0, 1)."""
    tile, first = bench.tile, bench.head_dims[0]
    for head_dim in bench.head_dims:
        for rows, keys, causal in ((2 * tile, 2 * tile, False), (2 * tile, 2 * tile, True), (tile + 1, 2 * tile - 1, True)):
            name = f"{rows} x {keys}, {'causal' if causal else 'full'}, d{head_dim}"
            yield Case(name=name, seqlen_q=rows, seqlen_k=keys, head_dim=head_dim, causal=causal), ""
    common = {"seqlen_q": tile + 3, "seqlen_k": tile + 9, "head_dim": first}
    summed = "dK and dV sum over the query heads of a group"
    for name, proves, sizes in (
        ("batch 3, 3 heads", "every batch entry has its own gradients", {"batch": 3, "heads": 3}),
        ("4 query heads on 2 key heads", summed, {"batch": 2, "heads": 4, "kv_heads": 2}),
        ("4 query heads on 1 key head, causal", summed, {"heads": 4, "kv_heads": 1, "causal": True}),
        ("many tiles", "dQ adds up over more tiles than a ring has stages", {"seqlen_q": 3 * tile + 5, "seqlen_k": 5 * tile + 9}),
        ("rows fully masked", "a row that sees no key has no gradient", {"seqlen_q": 2 * tile, "seqlen_k": tile, "causal": True}),
        ("large logits", "P is recomputed from LSE", {"inputs": "large logits"}),
    ):
        yield Case(name=name, **(common | sizes)), proves
    for case in shapes.many_heads(tile, first):
        yield case, summed
    for scale in shapes.SCALES:
        case = Case(name=f"softmax_scale {scale:g}", softmax_scale=scale, causal=True, **common)
        yield case, "softmax_scale is the one given"
    yield from shapes.laid_out(tile, first)
    for case, _ in shapes.empty(tile, first):
        yield case, "gradients of an empty problem are empty or 0"
    yield from large.positions(first, bench.quick)


def _hold(bench: Bench, case: Case, proves: str = "", dout: str = "", of: str = "O") -> dict:
    q, k, v = bench.tensors(case)
    do = dlse = None
    if of.startswith("O"):
        do = bench.dout(case, f"dO of {case.name}")
        do = DOUT_LAYOUTS[dout](do) if dout else do
    if "LSE" in of:
        dlse = bench.like(q[..., 0].transpose(1, 2), f"dLSE of {case.name}").to(torch.promote_types(bench.dtype, torch.float32))
        dlse = torch.ones_like(dlse[:1, :1, :1]).expand_as(dlse) if "sum" in of else dlse
    problem = Problem(q, k, v, do, dlse)
    right = wanted(bench, case, problem)
    with explained(case, proves):
        return hold(case, problem, backward(bench, case, *problem), right)


def _offered(bench: Bench, case: Case) -> dict:
    """A problem outside the promise: refused by whatever exception, or right."""
    try:
        backward(bench, case, *bench.tensors(case), bench.dout(case))
    except Fault as fault:
        if "raised " not in str(fault):
            raise
        raise Skipped(f"head dim {case.head_dim} is not promised: {fault}") from None
    return _hold(bench, case, "a head dim that is taken is computed right, its default softmax_scale included")


def _hold_corners(bench: Bench, case: Case) -> dict:
    """The first and the last head of a problem that is too large for the oracle as a whole."""
    q, k, v = bench.tensors(case)
    do = bench.dout(case, f"dO of {case.name}")
    with explained(case, "more heads than a grid's y axis holds"):
        found = backward(bench, case, q, k, v, do)
        figures = {}
        for where in (0, -1):
            corner = [x[where:, :, where:][:1, :, :1] for x in (q, k, v, do, *found)]
            exact, bounds = yardstick.gradients(*corner[:4], case.causal, case.softmax_scale)
            end = "last" if where else "first"
            for name, axes, got, due, bound in zip(NAMES, ("bmhd", "bnhd", "bnhd"), corner[4:], exact, bounds, strict=True):
                figures = criteria.hold(f"{name}[{end} head of the {end} batch]", axes, got, due, bound)
        return figures


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
