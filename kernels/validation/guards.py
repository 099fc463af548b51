"""Guard regions and poison: writes out of bounds, and what a kernel allocates and leaves unwritten."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import state
from .check import Fault

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
        bits(room).fill_(_PATTERN[tensor.element_size()])
        self._rooms.append((name, room, GUARD_ELEMENTS, GUARD_ELEMENTS + span))
        return room.as_strided(tensor.shape, tensor.stride(), GUARD_ELEMENTS).copy_(tensor)

    def fresh(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """As `around` for an output: what lies inside is NaN too, until the kernel writes it."""
        guarded = self.around(name, tensor)
        _, room, start, end = self._rooms[-1]
        if tensor.is_floating_point():
            bits(room)[start:end] = _PATTERN[tensor.element_size()]
        return guarded

    def hold(self) -> int:
        """Raise Fault where a guard was written to; the number of guarded tensors otherwise."""
        for name, room, start, end in self._rooms:
            for side, guard, first in (("before", room[:start], -start), ("past", room[end:], 0)):
                hit = (bits(guard) != _PATTERN[room.element_size()]).nonzero().flatten()
                if hit.numel():
                    at = int(hit[-1]) if side == "before" else int(hit[0])
                    distance = abs(first + at) if side == "before" else at + 1
                    got = guard[at].item()
                    raise Fault(
                        f"writes out of bounds: {hit.numel()} elements {side} the {'start' if side == 'before' else 'end'} "
                        f"of {name}, the nearest {distance} elements away is now {got:.6g}"
                    )
        return len(self._rooms)


def bits(x: torch.Tensor) -> torch.Tensor:
    """Its elements as whole numbers, in place."""
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


class _WithoutCompile(_GuardedAllocations):
    """The same for a process that compiles nothing: keeping torch.compile out of it would import torch.compile first."""

    __torch_dispatch__ = inspect.unwrap(_GuardedAllocations.__torch_dispatch__)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


@contextmanager
def poisoned(guards: Guards) -> Iterator[None]:
    """What the callable allocates and does not write is NaN, guarded where PyTorch lets us see the allocation."""
    mode = _GuardedAllocations if "torch._dynamo" in sys.modules else _WithoutCompile
    was = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            state.set_determinism(1)  # fills allocations made below Python
            torch.utils.deterministic.fill_uninitialized_memory = True
            with mode(guards):
                yield
        finally:
            state.set_determinism(was)
            torch.utils.deterministic.fill_uninitialized_memory = fill
