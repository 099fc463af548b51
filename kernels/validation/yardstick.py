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


def baseline(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, softmax_scale: float | None) -> torch.Tensor:
    """O of `plain`."""
    return plain(q, k, v, causal, softmax_scale)[0]


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, softmax_scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """O and LSE of PyTorch's math attention that keeps S and P in the precision of the inputs, as in FlashAttention's tests.

    Where S overflows fp16 it is computed in fp32, so that an overflow never loosens the bound. Differentiable.
    """
    scale = softmax_scale if softmax_scale is not None else default_scale(q.shape[-1])
    wide = torch.promote_types(q.dtype, torch.float32)
    if k.shape[1] == 0 or k.shape[2] == 0:
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=wide)
        return q.new_zeros(*q.shape[:3], v.shape[-1]), lse
    seen = sees(q.shape[1], k.shape[1], causal, q.device)
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2).transpose(1, 2) for x in (k, v))
    q = q.transpose(1, 2)
    s = q @ (k * scale).transpose(-1, -2)
    if q.dtype != torch.float64 and not torch.isfinite(s).all():
        s = (q.float() @ k.float().transpose(-1, -2)) * scale
    empty = ~seen.any(-1)[:, None]
    s = s.masked_fill(~seen, float("-inf")).masked_fill(empty, 0.0).to(wide)
    p = torch.softmax(s, -1).to(q.dtype).masked_fill(empty, 0.0)
    lse = torch.logsumexp(s, -1).masked_fill(empty[..., 0], float("-inf"))
    return (p @ v).transpose(1, 2), lse


def gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    causal: bool,
    softmax_scale: float | None,
    dlse: torch.Tensor | None = None,
) -> tuple[tuple[torch.Tensor, ...], tuple[Bound, ...]]:
    """(dQ, dK, dV) of sum(dO * O) + sum(dLSE * LSE) by the oracle in fp64, and the Bound of each by autograd through
    `plain`."""
    q, k, v = (x.detach() for x in (q, k, v))
    exact = tuple(attention_backward(q, k, v, do, softmax_scale, causal, dlse))
    _, lse = expected(q, k, v, causal, softmax_scale)
    if 0 in (q.numel(), k.numel()):
        near = tuple(torch.zeros_like(x) for x in (q, k, v))
    else:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, plain_lse = plain(*leaves, causal, softmax_scale)
        wanted = (out, do) if dlse is None else ((out, plain_lse), (do, dlse))
        near = torch.autograd.grad(wanted[0], leaves, wanted[1])
    keys = max(q.shape[1], k.shape[1])
    units = 1.0  # delta comes from the rounded O: a gradient of nearly nothing keeps that error
    return exact, tuple(Bound.of(x, far, lse, keys, units) for x, far in zip(near, exact, strict=True))
