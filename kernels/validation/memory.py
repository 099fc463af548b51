"""The group that watches memory: what is written, what is left unwritten, what is kept, and on which stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from . import differentiate
from .check import Case, Fault, Skipped, Trial, explained
from .guards import Guards, poisoned
from .ownership import hold_own_memory, hold_unchanged, same_bits
from .problem import Problem

if TYPE_CHECKING:
    from .bench import Bench


def trials(bench: Bench) -> Iterator[Trial]:
    """Poison, guards, inputs, rotated buffers, earlier results, streams; forward and backward."""
    tile, head_dim = bench.tile, bench.head_dims[0]
    whole = {"batch": 2, "seqlen_q": 2 * tile, "seqlen_k": 2 * tile, "head_dim": head_dim}
    ragged = {"seqlen_q": 3 * tile + 3, "seqlen_k": tile + 5, "head_dim": head_dim, "causal": True}
    for name, sizes in (("whole tiles", whole), ("ragged, with rows fully masked", ragged)):
        case = Case(name=name, **sizes)
        yield Trial(f"outputs poisoned, {name}", lambda case=case: _poisoned_outputs(bench, case))
        yield Trial(f"guard regions, {name}", lambda case=case: _guard_regions(bench, case))
        yield Trial(f"inputs unchanged, {name}", lambda case=case: _inputs_unchanged(bench, case))
    case = Case(name="rotated buffers", **whole)
    yield Trial("new values at the same addresses", lambda: _same_addresses(bench, case))
    hidden = Case(name="changed in place", inputs="one-hot", **whole)
    for tensor in "qkv":
        name = f"{tensor} changed in place, its sum and its ends as before"
        yield Trial(name, lambda tensor=tensor: _changed_in_place(bench, hidden, tensor))
    yield Trial("an earlier result stays", lambda: _earlier_result(bench, case))
    one = {"seqlen_q": 1, "seqlen_k": 1, "head_dim": head_dim}
    for name, sizes in (("whole tiles", whole), ("one row, one key", one)):
        single = Case(name=name, **sizes)
        yield Trial(f"outputs have memory of their own, {name}", lambda case=single: _own_memory(bench, case))
    yield Trial("the current stream", lambda: _current_stream(bench, case))
    yield Trial("backward, outputs poisoned", lambda: _backward(bench, Case(name="backward", **ragged)))


def _poisoned_outputs(bench: Bench, case: Case) -> dict:
    q, k, v = bench.tensors(case)
    wanted = bench.yardstick(case, q, k, v)
    with explained(case, "every element of O and LSE is written (NaN is what the call found there)"):
        _poison_cache(bench, case)
        with poisoned(Guards()):
            got = bench.call(q, k, v, case)
        return bench.compare(case, (q, k, v), got, wanted)


def _poison_cache(bench: Bench, case: Case) -> None:
    """On a GPU, leave blocks of NaN in the caching allocator for callables whose allocations PyTorch does not show."""
    if bench.on_gpu:
        elements = max(1, case.batch * case.heads * case.seqlen_q * case.head_dim_v)
        blocks = [torch.full((elements,), float("nan"), dtype=bench.dtype, device=bench.device) for _ in range(4)]
        blocks += [torch.full((elements // case.head_dim_v,), float("nan"), device=bench.device) for _ in range(4)]
        del blocks


def _guard_regions(bench: Bench, case: Case) -> dict:
    q, k, v = bench.tensors(case)
    wanted = bench.yardstick(case, q, k, v)
    guards = Guards()
    q, k, v = (guards.around(name, x) for name, x in zip("qkv", (q, k, v), strict=True))
    with explained(case):
        with poisoned(guards):
            got = bench.call(q, k, v, case)
        figures = {"guarded_tensors": guards.hold()}
        return figures | bench.compare(case, (q, k, v), got, wanted)


def _inputs_unchanged(bench: Bench, case: Case) -> dict:
    q, k, v = bench.tensors(case)
    before = [x.clone() for x in (q, k, v)]
    bench.call(q, k, v, case)
    hold_unchanged(case, ("q", "k", "v"), before, (q, k, v))
    return {}


def _same_addresses(bench: Bench, case: Case) -> dict:
    """Three sets of buffers in turn, twice round; in the second round they hold other numbers."""
    rounds = [[bench.tensors(_renamed(case, f"{case.name} {turn} {slot}")) for slot in range(3)] for turn in range(2)]
    buffers = [tuple(x.clone() for x in each) for each in rounds[0]]
    figures = {}
    for turn, sets in enumerate(rounds):
        for slot, (buffer, values) in enumerate(zip(buffers, sets, strict=True)):
            for target, source in zip(buffer, values, strict=True):
                target.copy_(source)
            numbered = _renamed(case, f"{case.name} {turn} {slot}")
            wanted = bench.yardstick(numbered, *values)
            with explained(case, f"call {3 * turn + slot + 1} on rotated buffers, no result of an earlier call may come back"):
                figures = bench.compare(numbered, values, bench.call(*buffer, case), wanted)
    return figures


def _changed_in_place(bench: Bench, case: Case, tensor: str) -> dict:
    """Two rows of one tensor change places, and nothing that a sample of it, or a version counter, would show."""
    q, k, v = bench.tensors(case)
    bench.call(q, k, v, case)
    chosen = {"q": q, "k": k, "v": v}[tensor]
    weights = torch.einsum("mhd,nhd->mnh", q[0].double(), k[0].double()).mean(-1)
    middle = slice(case.seqlen_q // 4, 3 * case.seqlen_q // 4)
    looked_at = weights[middle].argmax(-1)  # one-hot: the key that each of these rows takes
    first = case.seqlen_q // 2 if tensor == "q" else int(looked_at.clamp(1, case.seqlen_k - 3)[0])
    pair = [first, first + 1]
    chosen.data[:, pair] = chosen.data[:, pair[::-1]].clone()
    named = _renamed(case, f"{case.name}, {tensor}")
    wanted = bench.yardstick(named, q, k, v)
    with explained(case, f"rows {first} and {first + 1} of {tensor} changed places between two calls, and the answer must follow"):
        return bench.compare(named, (q, k, v), bench.call(q, k, v, named), wanted)


def _own_memory(bench: Bench, case: Case) -> dict:
    """O and LSE share memory with no input, with each other or within themselves."""
    q, k, v = bench.tensors(case)
    out, lse = bench.call(q, k, v, case)
    hold_own_memory(case, {"O": out} | ({"LSE": lse} if lse is not None else {}), {"q": q, "k": k, "v": v})
    return {}


def _renamed(case: Case, name: str) -> Case:
    return Case(**(vars(case) | {"name": name}))


def _earlier_result(bench: Bench, case: Case) -> dict:
    first, second = (bench.tensors(_renamed(case, f"{case.name} earlier {i}")) for i in range(2))
    out, lse = bench.call(*first, case)
    kept = [x.clone() for x in (out, lse) if x is not None]
    bench.call(*second, case)
    for name, before, after in zip(("O", "LSE"), kept, (out, lse), strict=False):
        if not same_bits(before, after):
            raise Fault(f"{name} of an earlier call changes when the kernel is called again: they share a buffer; inputs: {case}")
    return {}


def _current_stream(bench: Bench, case: Case) -> dict:
    """Inputs that appear late on a side stream, and vanish right after the call."""
    if not bench.on_gpu:
        raise Skipped("needs a GPU: the CPU has no streams")
    q, k, v = bench.tensors(case)
    wanted = bench.yardstick(case, q, k, v)
    bench.call(q, k, v, case)  # compile outside
    late = [torch.zeros_like(x) for x in (q, k, v)]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for target, source in zip(late, (q, k, v), strict=True):
            target.copy_(source)
        out, lse = bench.call(*late, case, wait=False)
        for target in late:
            target.zero_()
    side.synchronize()
    torch.cuda.synchronize()
    with explained(case, "work goes to the current stream, not the default one"):
        return bench.compare(case, (q, k, v), (out, lse), wanted)


def _backward(bench: Bench, case: Case) -> dict:
    problem = Problem(*bench.tensors(case), bench.dout(case))
    right = differentiate.wanted(bench, case, problem)
    _poison_cache(bench, case)
    with explained(case, "every element of dQ, dK and dV is written (NaN is what backward found there)"):
        with poisoned(Guards()):
            found = differentiate.backward(bench, case, *problem)
        return differentiate.hold(case, problem, found, right)
