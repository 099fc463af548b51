"""What a kernel is measured against: the fp64 oracle, and PyTorch's math attention in the kernel's own precision.

All functions take (B, S, H, D) tensors, GQA and any lengths, and follow FlashAttention's conventions: causal is aligned
bottom right; a row that sees no key gives O = 0, LSE = -inf.
"""

from __future__ import annotations

import torch

from ..reference import attention_backward, attention_forward, default_scale
from .criteria import Bound


def sees(seqlen_q: int, seqlen_k: int, causal: bool, device: torch.device) -> torch.Tensor:
    """(Sq, Sk) bool: which key a row sees."""
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    return seen.tril(seqlen_k - seqlen_q) if causal else seen


def expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, softmax_scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """O and LSE in fp64, by the oracle."""
    found = attention_forward(q.detach(), k.detach(), v.detach(), softmax_scale, causal)
    return found.o, found.lse


def bound(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, softmax_scale: float | None) -> tuple:
    """O and LSE in fp64, and the Bound that the baseline's error sets for O."""
    out, lse = expected(q, k, v, causal, softmax_scale)
    return out, lse, Bound.of(baseline(q, k, v, causal, softmax_scale), out, lse, k.shape[1])


def baseline(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, softmax_scale: float | None
) -> torch.Tensor:
    """PyTorch's math attention that keeps S and P in the precision of the inputs, as in FlashAttention's tests.

    Where S overflows fp16 it is computed in fp32, so that an overflow never loosens the bound. Differentiable.
    """
    scale = softmax_scale if softmax_scale is not None else default_scale(q.shape[-1])
    if k.shape[1] == 0:
        return torch.zeros_like(q)
    seen = sees(q.shape[1], k.shape[1], causal, q.device)
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2).transpose(1, 2) for x in (k, v))
    q = q.transpose(1, 2)
    s = q @ (k * scale).transpose(-1, -2)
    if q.dtype != torch.float64 and not torch.isfinite(s).all():
        s = (q.float() @ k.float().transpose(-1, -2)) * scale
    empty = ~seen.any(-1)[:, None]
    s = s.masked_fill(~seen, float("-inf")).masked_fill(empty, 0.0)
    p = torch.softmax(s.to(torch.promote_types(s.dtype, torch.float32)), -1).to(q.dtype).masked_fill(empty, 0.0)
    return (p @ v).transpose(1, 2)


def gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor, causal: bool, softmax_scale: float | None
) -> tuple[tuple[torch.Tensor, ...], tuple[Bound, ...]]:
    """(dQ, dK, dV) by the oracle in fp64, and the Bound of each by autograd through the baseline."""
    q, k, v = (x.detach() for x in (q, k, v))
    exact = tuple(attention_backward(q, k, v, do, softmax_scale, causal))
    _, lse = expected(q, k, v, causal, softmax_scale)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    plain = torch.autograd.grad(baseline(*leaves, causal, softmax_scale), leaves, do)
    keys = max(q.shape[1], k.shape[1])
    units = 1.0  # delta comes from the rounded O: a gradient of nearly nothing keeps that error
    return exact, tuple(Bound.of(near, far, lse, keys, units) for near, far in zip(plain, exact, strict=True))
