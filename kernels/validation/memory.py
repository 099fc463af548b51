"""The group that watches memory: what is written, what is left unwritten, what is kept, and on which stream."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .check import Case, Fault, Skipped, Trial

if TYPE_CHECKING:
    from .bench import Bench

GUARD_ELEMENTS = 4096
_PATTERN = {1: 0x5A, 2: 0x7FDA, 4: 0x7FDADADA, 8: 0x7FFADADADADADADA}
"""Bits of a guard by element size: NaN in fp16, bf16, fp32 and fp64, so that reading a guard shows in O too."""

_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Guards:
    """Guard regions around tensors, and the search for writes into them."""

    def __init__(self) -> None:
        self._rooms: list[tuple[str, torch.Tensor, int, int]] = []

    def around(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the same shape, strides and values with a guard before and after it."""
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        span = span if tensor.numel() else 0
        room = torch.empty(span + 2 * GUARD_ELEMENTS, dtype=tensor.dtype, device=tensor.device)
        _bits(room).fill_(_PATTERN[tensor.element_size()])
        self._rooms.append((name, room, GUARD_ELEMENTS, GUARD_ELEMENTS + span))
        return room.as_strided(tensor.shape, tensor.stride(), GUARD_ELEMENTS).copy_(tensor)

    def fresh(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """As `around` for an output: what lies inside is NaN too, until the kernel writes it."""
        guarded = self.around(name, tensor)
        _, room, start, end = self._rooms[-1]
        if tensor.is_floating_point():
            _bits(room)[start:end] = _PATTERN[tensor.element_size()]
        return guarded

    def hold(self) -> int:
        """Raise Fault where a guard was written to; the number of guarded tensors otherwise."""
        for name, room, start, end in self._rooms:
            for side, guard, first in (("before", room[:start], -start), ("past", room[end:], 0)):
                hit = (_bits(guard) != _PATTERN[room.element_size()]).nonzero().flatten()
                if hit.numel():
                    at = int(hit[-1]) if side == "before" else int(hit[0])
                    distance = abs(first + at) if side == "before" else at + 1
                    got = guard[at].item()
                    raise Fault(
                        f"writes out of bounds: {hit.numel()} elements {side} the {'start' if side == 'before' else 'end'} "
                        f"of {name}, the nearest {distance} elements away is now {got:.6g}"
                    )
        return len(self._rooms)


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


class _GuardedAllocations(TorchDispatchMode):
    """Every torch.empty of the callable, also inside a custom op, is poisoned with NaN and guarded."""

    def __init__(self, guards: Guards) -> None:
        super().__init__()
        self.guards = guards

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace not in ("aten", "prim", "prims", "inductor", "profiler"):
            keys = {t.device.type for t in args if isinstance(t, torch.Tensor)}
            if len(keys) == 1 and hasattr(func, "redispatch"):
                key = {"cuda": "CUDA", "cpu": "CPU"}[keys.pop()]
                if torch._C._dispatch_has_computed_kernel_for_dispatch_key(func.name(), key):
                    with self:
                        return func.redispatch(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)), *args, **kwargs)
        answer = func(*args, **kwargs)
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in _ALLOCATIONS and answer.device.type in ("cuda", "cpu") and answer.numel() and not answer.is_complex():
            return self.guards.fresh(f"a tensor {tuple(answer.shape)} that the kernel allocated", answer)
        return answer


@contextmanager
def poisoned(guards: Guards) -> Iterator[None]:
    """What the callable allocates and does not write is NaN, guarded where PyTorch lets us see the allocation."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.use_deterministic_algorithms(True, warn_only=True)  # fills allocations made below Python
            torch.utils.deterministic.fill_uninitialized_memory = True
            with _GuardedAllocations(guards):
                yield
        finally:
            torch.use_deterministic_algorithms(was[0], warn_only=was[1])
            torch.utils.deterministic.fill_uninitialized_memory = fill


# -- the group --------------------------------------------------------------------------------------------------------


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
    yield Trial("backward, outputs poisoned and inputs unchanged", lambda: _backward(bench, Case(name="backward", **ragged)))


def _poisoned_outputs(bench: Bench, case: Case) -> dict:
    from .bench import explained

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
    from .bench import explained

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
    _hold_unchanged(case, ("q", "k", "v"), before, (q, k, v))
    return {}


def _hold_unchanged(case: Case, names: tuple, before: list, after: tuple) -> None:
    for name, old, new in zip(names, before, after, strict=True):
        changed = _bits(old.contiguous()) != _bits(new.contiguous())
        if changed.any():
            where = int(changed.flatten().to(torch.uint8).argmax())
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(where), new.shape))
            raise Fault(
                f"modifies its input {name}: {name}{list(index)} was {old[index].item():.6g} and is {new[index].item():.6g} "
                f"after the call, {int(changed.sum())} of {new.numel()} elements; inputs: {case}"
            )


def _same_addresses(bench: Bench, case: Case) -> dict:
    """Three sets of buffers in turn, twice round; in the second round they hold other numbers."""
    from .bench import explained

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
    from .bench import explained

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


def hold_own_memory(case: Case, results: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]) -> None:
    """Raise Fault where a result shares elements with another, with an input, or its elements with each other."""
    names = list(results)
    for i, name in enumerate(names):
        others = {other: results[other] for other in names[i + 1 :]} | inputs
        shared = next((other for other, x in others.items() if _overlap(results[name], x)), None)
        if shared:
            raise Fault(f"{name} shares memory with {shared}: who writes to one changes the other; inputs: {case}")
        if any(stride == 0 and size > 1 for size, stride in zip(results[name].shape, results[name].stride(), strict=True)):
            raise Fault(f"elements of {name} share memory with each other: strides {results[name].stride()}; inputs: {case}")


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have a byte in common; slices of one buffer that lie side by side have none."""
    if not a.numel() or not b.numel() or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    touched = []
    for x in (a, b):
        room = torch.zeros(x.untyped_storage().nbytes(), dtype=torch.bool)
        size = x.element_size()
        places = torch.zeros((), dtype=torch.long)
        for length, stride in zip(x.shape, x.stride(), strict=True):
            places = places[..., None] + torch.arange(length) * stride
        start = (places.flatten() + x.storage_offset()) * size
        room[(start[:, None] + torch.arange(size)).flatten()] = True
        touched.append(room)
    return bool((touched[0] & touched[1]).any())


def _renamed(case: Case, name: str) -> Case:
    return Case(**(vars(case) | {"name": name}))


def _earlier_result(bench: Bench, case: Case) -> dict:
    first, second = (bench.tensors(_renamed(case, f"{case.name} earlier {i}")) for i in range(2))
    out, lse = bench.call(*first, case)
    kept = [x.clone() for x in (out, lse) if x is not None]
    bench.call(*second, case)
    for name, before, after in zip(("O", "LSE"), kept, (out, lse), strict=False):
        if not torch.equal(_bits(before.contiguous()), _bits(after.contiguous())):
            raise Fault(f"{name} of an earlier call changes when the kernel is called again: they share a buffer; inputs: {case}")
    return {}


def _current_stream(bench: Bench, case: Case) -> dict:
    """Inputs that appear late on a side stream, and vanish right after the call."""
    from .bench import explained

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
    from . import criteria, yardstick
    from .bench import explained
    from .gradients import backward

    q, k, v = bench.tensors(case)
    do = bench.dout(case)
    before = [x.clone() for x in (q, k, v, do)]
    exact, bounds = yardstick.gradients(q, k, v, do, case.causal, case.softmax_scale)
    _poison_cache(bench, case)
    with explained(case, "every element of dQ, dK and dV is written"):
        with poisoned(Guards()):
            found = backward(bench, case, q, k, v, do)
        for name, axes, got, wanted, bound in zip(("dQ", "dK", "dV"), ("bmhd", "bnhd", "bnhd"), found, exact, bounds, strict=True):
            criteria.hold(name, axes, got, wanted, bound)
    _hold_unchanged(case, ("q", "k", "v", "dO"), before, (q, k, v, do))
    return {}
