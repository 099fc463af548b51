"""How q, k, v and dO may lie in memory: what models hand to a kernel without a copy."""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _as_made(x: torch.Tensor) -> torch.Tensor:
    return x


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """(B, H, S, D) in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _length_first(x: torch.Tensor) -> torch.Tensor:
    """(S, B, H, D) in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _head_dim_strided(x: torch.Tensor) -> torch.Tensor:
    """(B, S, D, H) in memory: heads are the channels."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def _rows_innermost(x: torch.Tensor) -> torch.Tensor:
    """(B, H, D, S) in memory, as of a cache that keeps K transposed."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _every_second_row(x: torch.Tensor) -> torch.Tensor:
    room = x.new_full((x.shape[0], 2 * x.shape[1], *x.shape[2:]), float("nan"))
    room[:, ::2] = x
    return room[:, ::2]


def _part_of_a_cache(x: torch.Tensor) -> torch.Tensor:
    """Some rows of some batch entries of a larger buffer."""
    room = x.new_full((x.shape[0] + 2, x.shape[1] + 11, *x.shape[2:]), float("nan"))
    room[1:-1, 4:-7] = x
    return room[1:-1, 4:-7]


def _off_alignment(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, but its first element lies two elements past a 16-byte boundary."""
    room = x.new_full((x.numel() + 2,), float("nan"))
    room[2:] = x.flatten()
    return room[2:].view(x.shape)


def _head_expanded(x: torch.Tensor) -> torch.Tensor:
    """The first head for all, head stride 0: K and V repeated for GQA without a copy."""
    return x[:, :, :1].expand_as(x)


def _batch_expanded(x: torch.Tensor) -> torch.Tensor:
    """The first batch entry for all, batch stride 0: a prompt that all share."""
    return x[:1].expand_as(x)


def _odd_where_one(x: torch.Tensor) -> torch.Tensor:
    """Dimensions of size 1 with a stride of 7, which no address depends on."""
    return x.as_strided(x.shape, [7 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)])


def _lazily_negated(x: torch.Tensor) -> torch.Tensor:
    """-x in memory and PyTorch's negative bit set, as of `z.conj().imag`."""
    return torch._neg_view(-x)


def _each(lay: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Tensors]:
    return lambda q, k, v: (lay(q), lay(k), lay(v))


def _packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
    """Slices of one buffer (B, S, hidden), as of one GEMM for Q, K and V."""
    widths = [x.shape[2] * x.shape[3] for x in (q, k, v)]
    room = q.new_full((q.shape[0], max(q.shape[1], k.shape[1]), sum(widths)), float("nan"))
    found, start = [], 0
    for x, width in zip((q, k, v), widths, strict=True):
        part = room[:, : x.shape[1], start : start + width].unflatten(-1, x.shape[2:])
        found.append(part.copy_(x))
        start += width
    return tuple(found)


LAYOUTS: dict[str, Callable[..., Tensors]] = {
    "contiguous": _each(_as_made),
    "heads before rows in memory": _each(_heads_first),
    "rows before batch in memory": _each(_length_first),
    "packed QKV": _packed,
    "every second row": _each(_every_second_row),
    "part of a larger cache": _each(_part_of_a_cache),
    "K heads before rows, V contiguous": lambda q, k, v: (q, _heads_first(k), v),
    "V heads before rows, K contiguous": lambda q, k, v: (q, k, _heads_first(v)),
    "Q, K and V each laid out otherwise": lambda q, k, v: (_length_first(q), _every_second_row(k), _heads_first(v)),
    "K and V heads of stride 0": lambda q, k, v: (q, _head_expanded(k), _head_expanded(v)),
    "K and V batch of stride 0": lambda q, k, v: (q, _batch_expanded(k), _batch_expanded(v)),
    "batch of stride 0": _each(_batch_expanded),
    "dimensions of size 1 with odd strides": _each(_odd_where_one),
    "head dim strided": _each(_head_dim_strided),
    "K with rows innermost": lambda q, k, v: (q, _rows_innermost(k), v),
    "lazily negated": _each(_lazily_negated),
    "base off 16 bytes": _each(_off_alignment),
}
"""How tensors (B, S, H, D) may lie in memory; what lies between their elements is NaN. Where a stride is 0 the values are
those of the first head or batch entry."""

HEAD_DIM_STRIDED = ("head dim strided", "K with rows innermost")
"""Layouts whose head dim is not contiguous."""

DOUT_LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one number, as of O.sum()": lambda x: x[:1, :1, :1, :1].expand_as(x),
    "one row, as of O.mean(1)": lambda x: x[:, :1].expand_as(x),
    "batch of stride 0": _batch_expanded,
    "heads before rows in memory": _heads_first,
    "rows before batch in memory": _length_first,
    "every second row": _every_second_row,
    "head dim strided": _head_dim_strided,
    "base off 16 bytes": _off_alignment,
    "lazily negated": _lazily_negated,
}
"""How dO may lie in memory; autograd hands over whatever the next operation's gradient was."""


def lay_out(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
    """q, k, v in the layout `name`."""
    return LAYOUTS[name](q, k, v)
