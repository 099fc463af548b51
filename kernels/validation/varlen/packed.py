"""A batch of packed sequences as the suite asks for it, and how the answer is held: each sequence alone, to what it is alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

from .. import calls, criteria, kinds, yardstick
from ..check import Case, Fault, Skipped, explained
from .subjects import LENGTHS

if TYPE_CHECKING:
    from ..bench import Bench

NAMES = ("dQ", "dK", "dV")


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Sequences of `queries[i]` and `keys[i]` rows, with rows of no sequence `before` the first and `after` the last."""

    name: str
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    head_dim: int
    heads: int = 2
    kv_heads: int = 2
    causal: bool = False
    softmax_scale: float | None = None
    inputs: str = "random"
    before: int = 0
    after: int = 0
    longer: int = 0  # than the longest is what max_seqlen_q and max_seqlen_k say

    def alone(self, i: int) -> Case:
        """Sequence i as a problem of its own."""
        about = {"head_dim": self.head_dim, "heads": self.heads, "kv_heads": self.kv_heads, "causal": self.causal}
        about |= {"softmax_scale": self.softmax_scale, "inputs": self.inputs}
        return Case(name=f"{self.name}, sequence {i}", seqlen_q=self.queries[i], seqlen_k=self.keys[i], **about)

    def rows(self, lengths: tuple[int, ...]) -> list[slice]:
        """Of each sequence, in the tensor."""
        ends = [*accumulate(lengths, initial=self.before)]
        return [slice(*pair) for pair in pairwise(ends)]

    def __str__(self) -> str:
        heads = f"{self.heads} heads" + (f" on {self.kv_heads}" if self.kv_heads != self.heads else "")
        outside = f", {self.before} rows before and {self.after} after" if self.before or self.after else ""
        mask = "causal" if self.causal else "full"
        return f"{self.inputs}, {_list(self.queries)} queries, {_list(self.keys)} keys, {heads}, d{self.head_dim}, {mask}{outside}"


def _list(lengths: tuple[int, ...]) -> str:
    shown = "+".join(map(str, lengths[:8]))
    return f"{shown}+... ({len(lengths)} sequences)" if len(lengths) > 8 else shown or "no"


def tensors(bench: Bench, case: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v, packed; what is in no sequence is NaN."""
    made = []
    for i in range(len(case.queries)):
        alone = case.alone(i)
        kind = alone if alone.seqlen_k and alone.seqlen_q else Case(**(vars(alone) | {"inputs": "random"}))
        made.append([x[0] for x in kinds.make(kind, bench.generator(alone.name), bench.dtype)])

    def packed(which: int, heads: int) -> torch.Tensor:
        def outside(rows: int) -> torch.Tensor:
            return torch.full((rows, heads, case.head_dim), float("nan"), dtype=bench.dtype)

        parts = [outside(case.before), *(each[which] for each in made), outside(case.after)]
        return torch.cat(parts).to(bench.device)

    return packed(0, case.heads), packed(1, case.kv_heads), packed(2, case.kv_heads)


def bounds(bench: Bench, case: Packed) -> dict[str, object]:
    """cu_seqlens and max_seqlens by name."""
    cu = [
        torch.tensor([*accumulate(lengths, initial=case.before)], dtype=torch.int32, device=bench.device)
        for lengths in (case.queries, case.keys)
    ]
    longest = [max(lengths, default=0) + case.longer for lengths in (case.queries, case.keys)]
    return dict(zip(LENGTHS, (*cu, *longest), strict=True))


def call(bench: Bench, case: Packed, qkv: tuple, given: dict[str, object] | None = None) -> tuple:
    """O and LSE (None where the subject returns none), with their form checked; raises as Bench.call does."""
    q, k, v = qkv
    given = bounds(bench, case) if given is None else given

    def ask() -> tuple:
        answer = bench.subject.packed(q, k, v, **given, causal=case.causal, softmax_scale=case.softmax_scale)
        if bench.on_gpu:
            torch.cuda.current_stream().synchronize()
        out, lse = (*answer, None)[:2] if isinstance(answer, (tuple, list)) and answer else (answer, None)
        return calls.plain(out), calls.plain(lse)

    def again() -> None:
        calls.refill(q, k, v)
        ask()

    out, lse = bench.run(ask, again)
    criteria.hold_form("O", out, tuple(q.shape), bench.dtype, bench.device)
    if lse is not None:
        wide = torch.float64 if bench.dtype == torch.float64 else torch.float32
        criteria.hold_form("LSE", lse, (case.heads, q.shape[0]), wide, bench.device)
    elif bench.subject.returns_lse:
        raise Fault("LSE is missing: only O came back")
    return out, lse


def hold(bench: Bench, case: Packed, promise: str = "", change: Callable | None = None) -> dict:
    """Call the subject on the batch and hold each sequence to the yardstick; `change(case, q, k, v)` makes others of these.

    A sequence that `change` has made other than finite is not held.
    """
    qkv = tensors(bench, case)
    changed = change(case, *(x.clone() for x in qkv)) if change else qkv
    got = call(bench, case, changed)
    figures, worst = {}, -1.0
    for i, (rows, keys) in enumerate(zip(case.rows(case.queries), case.rows(case.keys), strict=True)):
        parts = tuple(x[None, part] for x, part in zip(qkv, (rows, keys, keys), strict=True))
        if not all(x[part].isfinite().all() for x, part in zip(changed, (rows, keys, keys), strict=True)):
            continue
        alone = case.alone(i)
        wanted = bench.yardstick(alone, *parts)
        answer = got[0][None, rows], None if got[1] is None else got[1][None, :, rows]
        with explained(case, f"{promise + ': ' if promise else ''}sequence {i}, rows {rows.start} to {rows.stop} of q"):
            found = bench.compare(alone, parts, answer, wanted)
        if found and found["max_error"] / max(found["max_error_allowed"], 1e-30) > worst:
            worst, figures = found["max_error"] / max(found["max_error_allowed"], 1e-30), found
    return figures


def differentiated(bench: Bench, case: Packed, of_lse: bool = False) -> tuple:
    """q, k and v, their gradients, and the dO and dLSE (or None) that were given; raises Skipped where there is no backward."""
    if reason := bench.no_backward(case):
        raise Skipped(reason)
    qkv = tensors(bench, case)
    leaves = [x.clone().requires_grad_() for x in qkv]
    out, lse = call(bench, case, leaves)
    if not out.requires_grad or (of_lse and (lse is None or not lse.requires_grad)):
        raise Skipped("LSE is not differentiable" if out.requires_grad else "forward only: O carries no gradient")
    do, dlse = bench.like(out, f"dO of {case.name}"), None
    if of_lse:
        dlse = bench.like(out[..., 0].T, f"dLSE of {case.name}").to(lse.dtype)
        dlse = torch.where(lse.isfinite(), dlse, 0.0).detach()
    asked = ((out, lse), (do, dlse)) if of_lse else (out, do)
    return qkv, bench.run(lambda: torch.autograd.grad(asked[0], leaves, asked[1]), doing="backward "), do, dlse


def hold_gradients(bench: Bench, case: Packed, promise: str = "", of_lse: bool = False) -> dict:
    """dQ, dK and dV of every sequence; raises Skipped where the subject has no backward."""
    qkv, found, do, dlse = differentiated(bench, case, of_lse)
    figures = {}
    for i, (rows, keys) in enumerate(zip(case.rows(case.queries), case.rows(case.keys), strict=True)):
        parts = [x[None, part] for x, part in zip(qkv, (rows, keys, keys), strict=True)]
        slopes = None if dlse is None else dlse[None, :, rows]
        exact, limits = yardstick.gradients(*parts, do[None, rows], case.causal, case.softmax_scale, slopes)
        got = (x[None, part] for x, part in zip(found, (rows, keys, keys), strict=True))
        with explained(case, f"{promise + ': ' if promise else ''}sequence {i}"):
            for name, mine, due, limit in zip(NAMES, got, exact, limits, strict=True):
                figures = criteria.hold(name, "bmhd" if name == "dQ" else "bnhd", mine, due, limit) or figures
    return figures
