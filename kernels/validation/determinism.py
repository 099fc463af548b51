"""The group that asks for the same bits every time, on a GPU that is busy with something else, and in whatever batch.

Other bits in another batch are a note: a kernel may cut its work by the size of the batch. Another answer is a failure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .check import Case, Fault, Noted, Trial, explained
from .ownership import same_bits

if TYPE_CHECKING:
    from .bench import Bench


def trials(bench: Bench) -> Iterator[Trial]:
    """Forward, full and causal; dK, dV and dQ; batch invariance."""
    length = (4 if bench.subject.slow else 8) * bench.tile + 1
    for causal in (False, True):
        mask = "causal" if causal else "full"
        case = Case(name=f"forward, {mask}", batch=2, seqlen_q=length, seqlen_k=length, head_dim=bench.head_dims[0], causal=causal)
        yield Trial(case.name, lambda case=case: repeated(bench, case))
    for causal in (False, True):
        mask = "causal" if causal else "full"
        case = Case(name=f"backward, {mask}", seqlen_q=length, seqlen_k=length, head_dim=bench.head_dims[0], causal=causal)
        yield Trial(case.name, lambda case=case: _backward(bench, case))
    for causal, sizes in ((False, {"seqlen_q": 3}), (True, {})):
        name = f"batch of 3 and one by one, {'decoding 3 rows' if sizes else 'causal'}"
        sizes = {"seqlen_q": bench.tile + 1, "seqlen_k": 4 * bench.tile + 1, "head_dim": bench.head_dims[0]} | sizes
        case = Case(name=name, batch=3, kv_heads=1, causal=causal, **sizes)
        yield Trial(case.name, lambda case=case: _batch(bench, case))


def _batch(bench: Bench, case: Case) -> dict:
    """An entry of a batch gives what it gives alone."""
    qkv = bench.tensors(case)
    together = bench.call(*qkv, case)
    right = bench.yardstick(case, *qkv)
    other, figures = [], {}
    for entry in range(case.batch):
        alone = replace(case, batch=1, name=f"{case.name}, entry {entry}")
        parts = tuple(x[entry : entry + 1] for x in qkv)
        due = tuple(x[entry : entry + 1] for x in right[:2])
        got = bench.call(*parts, alone)
        of_batch = tuple(None if x is None else x[entry : entry + 1] for x in together)
        with explained(alone, f"batch entry {entry} gives in a batch of {case.batch} what it gives alone"):
            for answer in (of_batch, got):
                figures = bench.compare(alone, parts, answer, (*due, right[2]))
        for name, x, y in zip(("O", "LSE"), of_batch, got, strict=True):
            if x is not None and not same_bits(x, y):
                other.append(f"{name} of entry {entry}")
    if other:
        raise Noted(f"not batch invariant: other bits in a batch of {case.batch} than alone in {', '.join(other)}; {case}", figures)
    return figures


def _repeats(bench: Bench) -> int:
    return (10 if bench.quick else 50) if bench.at_scale else 4


def repeated(bench: Bench, case: Case) -> dict:
    q, k, v = bench.tensors(case)
    out, lse = bench.call(q, k, v, case)
    first = {"O": out.clone()} | ({"LSE": lse.clone()} if lse is not None else {})
    for repeat in range(1, _repeats(bench)):
        with _busy(bench):
            out, lse = bench.call(q, k, v, case)
        _same(first, {"O": out, "LSE": lse}, repeat, case)
    return {"repeats": _repeats(bench)}


def _backward(bench: Bench, case: Case) -> dict:
    from .differentiate import backward

    q, k, v = bench.tensors(case)
    do = bench.dout(case, f"dO of {case.name}")
    names = ("dQ", "dK", "dV")
    first = dict(zip(names, (g.clone() for g in backward(bench, case, q, k, v, do)), strict=True))
    held = names if bench.subject.dq_is_deterministic else names[1:]
    for repeat in range(1, max(2, _repeats(bench) // 2)):
        with _busy(bench):
            found = dict(zip(names, backward(bench, case, q, k, v, do), strict=True))
        _same({name: first[name] for name in held}, found, repeat, case)
    return {"repeats": max(2, _repeats(bench) // 2), "dq_held": "dQ" in held}


def _same(first: dict[str, torch.Tensor], again: dict[str, torch.Tensor | None], repeat: int, case: Case) -> None:
    """Raise Fault where a tensor's bits differ from the first run's."""
    for name, before in first.items():
        after = again[name]
        differs = before.contiguous().view(torch.uint8) != after.contiguous().view(torch.uint8)
        if differs.any():
            elements = int((before != after).sum())
            size = (before.double() - after.double()).abs().nan_to_num(0.0, 0.0, 0.0).max().item()
            raise Fault(
                f"{name} is not deterministic: run {repeat + 1} differs from run 1 in {elements} of {before.numel()} "
                f"elements, by up to {size:.3g}; inputs: {case}"
            )


@contextmanager
def _busy(bench: Bench) -> Iterator[None]:
    """Matrix products on another stream, so that CTAs of the subject start and end in a different order."""
    if not bench.on_gpu:
        yield
        return
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        a = torch.ones(2048, 2048, dtype=torch.float16, device=bench.device)
        for _ in range(8):
            a = (a @ a).clamp_(-1, 1)
    yield
    side.synchronize()
