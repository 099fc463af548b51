"""Whose memory it is: tensors that a call must leave alone, and results that must have memory of their own."""

from __future__ import annotations

import torch

from .check import Case, Fault
from .guards import bits


def hold_unchanged(case: Case, names: tuple, before: list, after: tuple, who: str = "the call modifies") -> None:
    """Raise Fault where a tensor's bits are not those `before`."""
    for name, old, new in zip(names, before, after, strict=True):
        changed = bits(old.contiguous()) != bits(new.contiguous())
        if changed.any():
            where = int(changed.flatten().to(torch.uint8).argmax())
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(where), new.shape))
            raise Fault(
                f"{who} {name}: {name}{list(index)} was {old[index].item():.6g} and is {new[index].item():.6g} "
                f"afterwards, {int(changed.sum())} of {new.numel()} elements; inputs: {case}"
            )


def same_bits(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether two tensors are equal bit by bit, NaN included."""
    return torch.equal(bits(before.contiguous()), bits(after.contiguous()))


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
