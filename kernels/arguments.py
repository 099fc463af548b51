"""What the kernels take, and the one sentence that says so where they are given something else."""

from __future__ import annotations

import math
from numbers import Integral, Real

import numpy
import torch
from torch import Tensor

from ..simulator.errors import UsageError

HEAD_DIMS = (64, 128, 256)
MAX_SEQLEN = 1 << 30
"""Rows are numbered in 32 bits, with room for a tile past the last."""
SMALLEST_SCALE = 2.0**-126
"""The smallest normal fp32 number; what lies below it is 0 to the GPU's arithmetic."""
LARGEST_SCALE = 2.0**16
"""P comes of scale * S in fp32, so with a relative error of |scale * S| 2^-24: here 2^-8, bf16's own rounding, for |S| = 1."""


def default_scale(head_dim: int) -> float:
    """1/sqrt(D), the scale of every paper."""
    return 1.0 / math.sqrt(head_dim)


def scale_of(softmax_scale: float | None, head_dim: int) -> float:
    """The scale that is computed with: None is 1/sqrt(D), what is 0 in fp32 is 0, of either sign.

    Raises UsageError for what is no number, for NaN and for magnitudes above LARGEST_SCALE, infinity among them.
    """
    if softmax_scale is None:
        return default_scale(head_dim)
    if type(softmax_scale) is not float:
        softmax_scale = _number(softmax_scale)
    size = abs(softmax_scale)
    if SMALLEST_SCALE <= size <= LARGEST_SCALE:
        return softmax_scale
    if size < SMALLEST_SCALE:
        return 0.0
    raise UsageError(
        f"softmax_scale={softmax_scale!r} is not possible: it must lie within {-LARGEST_SCALE:,.0f} and {LARGEST_SCALE:,.0f},"
        " beyond which fp32 no longer tells scores apart"
    )


def _number(softmax_scale: object) -> float:
    """A Python or numpy number as float. A tensor is none: its gradient would be lost, and reading it waits for the GPU."""
    if isinstance(softmax_scale, Real) and not isinstance(softmax_scale, bool):
        try:
            return float(softmax_scale)
        except OverflowError:
            return math.inf
    name = type(softmax_scale).__name__
    hint = "multiply q by it and give softmax_scale=1.0" if isinstance(softmax_scale, Tensor) else "give a number or None"
    raise UsageError(f"softmax_scale is a {name} and must be a number: {hint}")


def flag_of(value: object, name: str = "causal") -> bool:
    """A flag as bool: True, False, 0, 1, and numpy's. Raises UsageError for anything else, which is often another argument."""
    if type(value) is bool:
        return value
    if isinstance(value, Integral | numpy.bool_) and value in (0, 1):
        return bool(value)
    raise UsageError(f"{name} is {_shown(value)} and must be True or False")


def is_dense(x: Tensor) -> bool:
    """Whether a tensor has strides, as neither a sparse nor a nested one has."""
    return x.layout is torch.strided and not x.is_nested


def check_inputs(q: Tensor, k: Tensor, v: Tensor, name: str = "fa2") -> None:
    """Raise UsageError, one sentence, unless the kernels can take these tensors; `name` is the schedule asked for."""
    for tensor, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise UsageError(f"{tensor} is a {type(x).__name__}; it must be a torch.Tensor")
        if not is_dense(x):
            kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
            raise UsageError(f"{tensor} is a {kind} tensor; the kernels take dense ones: pad it or convert it with .to_dense()")
        if x.dim() != 4:
            raise UsageError(f"{tensor} has shape {tuple(x.shape)}; it must be (batch, seqlen, heads, head_dim)")
        if x.dtype not in (torch.float16, torch.bfloat16):
            raise UsageError(f"{tensor} is {x.dtype}; the kernels take float16 and bfloat16: convert it with {tensor}.half()")
    if not q.dtype == k.dtype == v.dtype:
        raise UsageError(f"q, k and v have different dtypes ({q.dtype}, {k.dtype}, {v.dtype}); convert them to one")
    if not q.device == k.device == v.device:
        raise UsageError(f"q, k and v are on different devices ({q.device}, {k.device}, {v.device}); move them to one")
    if k.shape != v.shape:
        raise UsageError(f"k has shape {tuple(k.shape)} but v has {tuple(v.shape)}; they must be the same")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise UsageError(f"q of shape {tuple(q.shape)} and k of {tuple(k.shape)} must agree in batch and head_dim")
    if q.shape[3] not in HEAD_DIMS:
        raise UsageError(
            f"head_dim={q.shape[3]} is not supported by {name!r} ({', '.join(map(str, HEAD_DIMS))});"
            " pad q, k and v with zeros and give softmax_scale, or use torch's scaled_dot_product_attention"
        )
    if (k.shape[2] == 0 and q.shape[2] != 0) or (k.shape[2] and q.shape[2] % k.shape[2]):
        raise UsageError(f"k's {k.shape[2]} heads do not divide q's {q.shape[2]}; repeat or drop heads of k and v")
    if q.shape[1] > MAX_SEQLEN or k.shape[1] > MAX_SEQLEN:
        raise UsageError(f"seqlen {max(q.shape[1], k.shape[1]):,} is not supported: the kernels take up to {MAX_SEQLEN:,}")


def check_gradients(do: Tensor, q: Tensor, o: Tensor, lse: Tensor, dlse: Tensor | None) -> None:
    """Raise UsageError, one sentence, unless do and o are like q, lse and dlse (B, H, S_q) in fp32, all on q's device."""
    rows = (q.shape[0], q.shape[2], q.shape[1])
    wanted = (("do", do, q.shape, q.dtype), ("o", o, q.shape, q.dtype))
    wanted += (("lse", lse, rows, torch.float32), ("dlse", dlse, rows, torch.float32))
    for name, x, shape, dtype in wanted:
        if x is not None and (tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device != q.device):
            raise UsageError(
                f"{name} is {tuple(x.shape)}, {x.dtype}, {x.device}; it must be {tuple(shape)}, {dtype}, {q.device} for this q"
            )


def check_storage(x: Tensor) -> None:
    """Raise UsageError where the memory behind a tensor ends before its last element, as after `untyped_storage().resize_(0)`."""
    if x.numel() == 0:
        return
    last = x.storage_offset() + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    needed, held = (last + 1) * x.element_size(), x.untyped_storage().nbytes()
    if held < needed:
        raise UsageError(
            f"a tensor of shape {tuple(x.shape)} and strides {x.stride()} needs {needed:,} bytes and its storage holds {held:,}:"
            " it was freed or shrunk, as sharded training does between uses; gather it before the call"
        )


def _shown(value: object) -> str:
    text = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return text if len(text) < 40 else f"{text[:40]}..."
