"""What the FP8 operators take, and the one sentence that says so where they are given something else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...simulator.errors import UsageError
from ..arguments import HEAD_DIMS, MAX_SEQLEN, is_dense
from .keyed import GROUP
from .plain import E4M3

OUTPUTS = (torch.bfloat16, torch.float16)
NAMES = ("q_descale", "k_descale", "v_descale")

Descales = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of q, k and v; None stands for 1."""


def check(
    q: Tensor, k: Tensor, v: Tensor, descales: Descales, scale: float | None, dtype: torch.dtype, blocks: Sequence[int] = ()
) -> None:
    """Raise UsageError, one sentence, unless the FP8 kernels can take these tensors; `blocks` are rows to a descale of each."""
    for name, x in zip("qkv", (q, k, v), strict=True):
        if not isinstance(x, Tensor):
            raise UsageError(f"{name} is a {type(x).__name__}; it must be a torch.Tensor")
        if x.dtype != E4M3:
            raise UsageError(f"{name} is {x.dtype} and FP8 attention takes q, k and v in torch.float8_e4m3fn alike: convert {name}")
        if not is_dense(x) or x.dim() != 4:
            raise UsageError(f"{name} must be dense and (batch, seqlen, heads, head_dim), and has shape {tuple(x.shape)}")
        if x.device != q.device:
            raise UsageError(f"{name} is on {x.device} and q on {q.device}: move them to one device")
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads = k.shape[1:3]
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != head_dim:
        shapes = f"k {tuple(k.shape)} and v {tuple(v.shape)}"
        raise UsageError(f"{shapes} must be equal and share batch and head_dim with q {tuple(q.shape)}")
    if head_dim not in HEAD_DIMS:
        raise UsageError(f"head_dim={head_dim} is not supported in FP8 ({', '.join(map(str, HEAD_DIMS))})")
    if heads and (not kv_heads or heads % kv_heads):
        raise UsageError(f"{heads} query heads cannot share {kv_heads} K/V heads: the first must be a multiple of the second")
    if max(seqlen_q, seqlen_k) > MAX_SEQLEN:
        raise UsageError(f"seqlen {max(seqlen_q, seqlen_k):,} is not supported: the kernels take up to {MAX_SEQLEN:,}")
    if blocks:
        rows = tuple(-(-n // block) for n, block in zip((seqlen_q, seqlen_k, seqlen_k), blocks, strict=True))
        shapes = [(batch, h, n) for h, n in zip((heads, kv_heads, kv_heads), rows, strict=True)]
    else:
        shapes = [(batch, kv_heads)] * 3
    for name, x, shape in zip(NAMES, descales, shapes, strict=True):
        if x is not None:
            _check_descale(name, x, shape, q.device, "(B, H, blocks)" if blocks else "(B, H_kv)")
    if scale is not None and not scale > 0:
        raise UsageError(f"softmax_scale={scale} is not above 0, as the FP8 kernels need it")
    if dtype not in OUTPUTS:
        raise UsageError(f"dtype={dtype} is not supported for O ({', '.join(map(str, OUTPUTS))})")


def _check_descale(name: str, x: object, shape: tuple[int, ...], device: torch.device, means: str) -> None:
    if not isinstance(x, Tensor):
        raise UsageError(f"{name} is a {type(x).__name__}; it must be an fp32 tensor of {means} = {shape}")
    if tuple(x.shape) != shape or x.dtype != torch.float32 or x.device != device or not is_dense(x):
        found = f"{x.dtype} of {tuple(x.shape)} on {x.device}"
        raise UsageError(f"{name} must be fp32 of {means} = {shape} on {device}, and is {found}")


def check_rows_of_keys(k: Tensor, v: Tensor) -> None:
    """Raise UsageError where v is not V of k's shape as rows of keys."""
    batch, seqlen, heads, head_dim = k.shape
    shape = (batch, heads, head_dim, -(-seqlen // GROUP) * GROUP)
    if v.shape != shape or not v.is_contiguous() or v.dtype != k.dtype or v.device != k.device:
        raise UsageError(
            f"v is {v.dtype} of {tuple(v.shape)}; as rows of keys it must be contiguous, {k.dtype} of {shape} beside k"
        )


def check_forward_only(*tensors: Tensor | None) -> None:
    """Raise UsageError where a gradient is wanted."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors):
        raise UsageError("FP8 attention is forward only: call it under torch.no_grad(), or detach q, k, v and the descales")


def two_level_of(two_level: object) -> int:
    """K/V blocks whose P V is added up apart; 0 for None, which leaves it to the tensor cores. UsageError for what is none."""
    if two_level is None:
        return 0
    if type(two_level) is int and two_level > 0:
        return two_level
    raise UsageError(f"two_level={two_level!r} is not possible: give a number of K/V blocks above 0, or None")
