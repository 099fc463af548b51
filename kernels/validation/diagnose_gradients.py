"""Known wrong gradients: where one fails, say which common mistake it equals."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import diagnose, yardstick
from .check import Case
from .criteria import Bound
from .problem import Problem

_ALIKE = 0.02  # of the norm: what is left where a factor explains a gradient
_DIFFERENT = 0.05  # of the factor: nearer to 1 it explains nothing


def look(case: Case, problem: Problem, name: str, found: tuple, right: tuple) -> str:
    """A sentence on what the gradient `name` among `found` looks like, or an empty string."""
    place = ("dQ", "dK", "dV").index(name)
    exact, bounds = right
    got, due, bound = found[place].double(), exact[place], bounds[place]
    if not got.numel() or not torch.isfinite(got).all():
        return ""
    sentence = factor(got, due) or _parts(got, due, bound)
    if sentence:
        return sentence
    for other, theirs, allowed in zip(("dQ", "dK", "dV"), exact, bounds, strict=True):
        if other != name and _equal(got, theirs, allowed):
            return f"it equals {other}"
    if case.batch * case.heads * case.seqlen_q * case.seqlen_k > diagnose.SMALL:
        return ""
    return _with_dlse(case, problem, place, got, bound) or _mistake(case, problem, place, got)


def factor(got: torch.Tensor, due: torch.Tensor) -> str:
    """ "it is 1.41 times what it should be", where one factor explains the difference."""
    if not got.any():
        return "it is 0 everywhere"
    times = _factor(got, due)
    return f"it is {times:.3g} times what it should be" if times is not None and abs(times - 1) > _DIFFERENT else ""


def _factor(got: torch.Tensor, due: torch.Tensor) -> float | None:
    """The factor by which `got` differs from `due`, or None where it differs otherwise."""
    got, size = got.double(), due.square().sum()
    if not size:
        return None
    times = (got * due).sum() / size
    rest = (got - times * due).norm() / due.norm()
    return times.item() if rest < _ALIKE * abs(times.item()) else None


def _parts(got: torch.Tensor, due: torch.Tensor, bound: Bound) -> str:
    """Where whole batch entries or heads are right and the others are off by one factor."""
    for axis, singular, plural in ((0, "batch", "batches"), (2, "head", "heads")):
        pieces = list(zip(got.unbind(axis), due.unbind(axis), strict=True))
        wrong = [i for i, (a, b) in enumerate(pieces) if not _equal(a, b, bound)]
        if not 0 < len(wrong) < len(pieces):
            continue
        factors = [_factor(*pieces[i]) for i in wrong]
        if None in factors or max(factors) - min(factors) > _DIFFERENT:
            continue
        where = f"{singular} {wrong[0]} is" if len(wrong) == 1 else f"{plural} {', '.join(map(str, wrong))} are"
        return f"{where} {factors[0]:.3g} times what it should be, the others are right"
    return ""


def _with_dlse(case: Case, problem: Problem, place: int, got: torch.Tensor, bound: Bound) -> str:
    """What goes wrong with the gradient of LSE."""
    if problem.dlse is None:
        return ""
    do = problem.do if problem.do is not None else torch.zeros(case.o_shape, dtype=problem.q.dtype, device=problem.q.device)
    for sentence, dlse in (("it lacks the gradient of LSE", None), ("the gradient of LSE has the wrong sign", -problem.dlse)):
        exact, _ = yardstick.gradients(*problem.qkv, do, case.causal, case.softmax_scale, dlse)
        if _equal(got, exact[place], bound):
            return sentence
    return ""


def _mistake(case: Case, problem: Problem, place: int, got: torch.Tensor) -> str:
    """The step of a backward pass that, taken wrongly after a forward pass that was right, gives this gradient."""
    for sentence, wrong in _backward_passes(case, problem):
        if (got - wrong[place]).norm() <= _ALIKE * wrong[place].norm():
            return f"it equals that of a backward pass {sentence}"
    return ""


def _backward_passes(case: Case, problem: Problem) -> Iterator[tuple[str, tuple]]:
    """(what was done wrong, the dQ, dK, dV it gives)."""
    q, k, v, do, dlse = problem
    do = torch.zeros(case.o_shape, dtype=q.dtype, device=q.device) if do is None else do
    scale, seen = diagnose.scale_of(case), yardstick.sees(case.seqlen_q, case.seqlen_k, case.causal, q.device)
    out, lse = diagnose.attend(q, k, v, scale, seen)

    def delta_of(do: torch.Tensor) -> torch.Tensor:
        return (do.double() * out).sum(-1).transpose(1, 2) - (0.0 if dlse is None else dlse)

    delta = delta_of(do)
    right = {"qkv": (q, k, v), "do": do, "lse": lse, "delta": delta, "scale": scale, "seen": seen, "heads": None}
    for sentence, tensors in diagnose.misread(q, k, v):
        if all(x is not None for x in tensors):
            yield sentence, _recompute(**(right | {"qkv": tensors}))
    flat = diagnose.strided(do, diagnose.contiguous(do))
    if flat is not None and not do.is_contiguous():
        yield "on dO read as if it were contiguous", _recompute(**(right | {"do": flat, "delta": delta_of(flat)}))
    if do.is_neg():
        yield "on -dO where the negation is lazy", _recompute(**(right | {"do": do.neg(), "delta": delta_of(do.neg())}))
    yield "without rowsum(dO * O)", _recompute(**(right | {"delta": torch.zeros_like(delta)}))
    for sentence, mask in diagnose.masks(case, seen):
        if not torch.equal(mask, seen):
            yield sentence, _recompute(**(right | {"seen": mask}))
    for sentence, wrong in diagnose.scales(case):
        if wrong != scale:
            yield sentence, _recompute(**(right | {"scale": wrong}))
    if case.heads_kv not in (0, case.heads):
        interleaved = [h % case.heads_kv for h in range(case.heads)]
        yield "with key head h mod Hkv, not h // (H / Hkv)", _recompute(**(right | {"heads": interleaved}))
        yield "with key head 0 for every query head", _recompute(**(right | {"heads": [0] * case.heads}))


def _recompute(
    qkv: tuple, do: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, scale: float, seen: torch.Tensor, heads: list[int] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK, dV in fp64 from LSE and delta, as FlashAttention-2's Algorithm 2 without tiles."""
    q, k, v = (x.double() for x in qkv)
    group = q.shape[2] // max(1, k.shape[2])
    index = torch.tensor(heads or [h // max(1, group) for h in range(q.shape[2])], device=q.device, dtype=torch.long)
    k_wide, v_wide = k.index_select(2, index), v.index_select(2, index)
    s = torch.einsum("bmhd,bnhd->bhmn", q, k_wide) * scale
    p = torch.exp(s - torch.where(lse == float("-inf"), 0.0, lse)[..., None]).masked_fill(~seen, 0.0)
    ds = p * (torch.einsum("bmhd,bnhd->bhmn", do.double(), v_wide) - delta[..., None]) * scale
    dk = torch.zeros_like(k).index_add_(2, index, torch.einsum("bhmn,bmhd->bnhd", ds, q))
    dv = torch.zeros_like(v).index_add_(2, index, torch.einsum("bhmn,bmhd->bnhd", p, do.double()))
    return torch.einsum("bhmn,bnhd->bmhd", ds, k_wide), dk, dv


def _equal(got: torch.Tensor, other: torch.Tensor, bound: Bound) -> bool:
    return got.shape == other.shape and (not got.numel() or (got - other).abs().max().item() <= 2 * bound.largest)
