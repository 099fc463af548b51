"""Attention in fp64: the only oracle. Every kernel is judged by it, and it never runs in another precision.

Rows of Q are walked in chunks, so that one chunk of S is all that exists of S: 16k x 16k fits anywhere.
Semantics are FlashAttention's: layout (B, S, H, D); LSE (B, H, S_q), natural logarithm; a causal mask is bottom-right
aligned, so query i sees keys 0 .. i + S_k - S_q; a fully masked row gives O = 0 and LSE = -inf; fewer K/V heads than
query heads are shared in order (GQA).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import default_scale, scale_of

__all__ = ["attention_backward", "attention_forward", "default_scale"]

CHUNK_ELEMENTS = 1 << 26
"""Elements of one chunk of S: 512 MiB in fp64."""


class Output(NamedTuple):
    """O (B, S_q, H, D) and LSE (B, H, S_q), both fp64."""

    o: Tensor
    lse: Tensor


class Gradients(NamedTuple):
    """dQ, dK and dV, shaped as Q, K and V, in fp64."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


def attention_forward(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False) -> Output:
    """O = softmax(scale * Q K^T) V and its log-sum-exp, computed in fp64 from inputs of any dtype, on their device.

    q is (B, S_q, H, D), k (B, S_k, H_kv, D), v (B, S_k, H_kv, D_v) and O (B, S_q, H, D_v); `softmax_scale` defaults to
    1/sqrt(D). NaN and infinities travel as they do in PyTorch's math attention. FlashAttention (arXiv:2205.14135) Algorithm 0.
    """
    batch, seqlen_q, heads, head_dim = q.shape
    scale = scale_of(softmax_scale, head_dim)
    o = torch.zeros(batch, seqlen_q, heads, v.shape[-1], dtype=torch.float64, device=q.device)
    lse = torch.full((batch, heads, seqlen_q), -math.inf, dtype=torch.float64, device=q.device)
    for part in _parts(q, k, causal):
        keys, values = (x[part.batch, : part.keys, part.kv_head].double() for x in (k, v))
        queries = _gather(q, part)
        scores = _scores(queries, keys, scale, part, causal)
        top = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - top)
        total = weights.sum(-1, keepdim=True)
        o[part.batch, part.rows, part.heads] = (weights @ values / total).transpose(0, 1)
        lse[part.batch, part.heads, part.rows] = (top + total.log()).squeeze(-1)
    return Output(o, lse)


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    dlse: Tensor | None = None,
) -> Gradients:
    """Gradients of sum(do * O) + sum(dlse * LSE) in fp64; shapes as in attention_forward, do as O, dlse as LSE.

    FlashAttention-2 (arXiv:2307.08691) section 2.3: dS = P * (dP - delta), delta = rowsum(dO * O) - dLSE.
    """
    scale = scale_of(softmax_scale, q.shape[-1])
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in (q, k, v))
    for part in _parts(q, k, causal):
        seen = (part.batch, slice(0, part.keys), part.kv_head)
        keys, values = k[seen].double(), v[seen].double()
        queries, gradient = _gather(q, part), _gather(do, part)
        weights = torch.softmax(_scores(queries, keys, scale, part, causal), -1)
        dweights = gradient @ values.T
        delta = (weights * dweights).sum(-1, keepdim=True)
        if dlse is not None:
            delta = delta - dlse[part.batch, part.heads, part.rows].double().unsqueeze(-1)
        dscores = weights * (dweights - delta) * scale
        dq[part.batch, part.rows, part.heads] = (dscores @ keys).transpose(0, 1)
        dk[seen] += (dscores.transpose(-1, -2) @ queries).sum(0)
        dv[seen] += (weights.transpose(-1, -2) @ gradient).sum(0)
    return Gradients(dq, dk, dv)


class _Part(NamedTuple):
    """Some rows of the query heads that share one K/V head of one batch entry, and the keys any of them sees."""

    batch: int
    kv_head: int
    heads: slice
    rows: slice
    keys: int
    offset: int


def _parts(q: Tensor, k: Tensor, causal: bool) -> Iterator[_Part]:
    """All rows that see at least one key, in chunks; the others keep O = 0 and LSE = -inf."""
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k, kv_heads = k.shape[1:3]
    if min(batch, seqlen_q, heads, seqlen_k, kv_heads) == 0:
        return
    sharing = heads // kv_heads
    offset = seqlen_k - seqlen_q
    first = max(0, -offset) if causal else 0
    height = max(1, CHUNK_ELEMENTS // (sharing * seqlen_k))
    for entry in range(batch):
        for kv_head in range(kv_heads):
            group = slice(kv_head * sharing, (kv_head + 1) * sharing)
            for start in range(first, seqlen_q, height):
                stop = min(start + height, seqlen_q)
                keys = min(seqlen_k, stop + offset) if causal else seqlen_k
                yield _Part(entry, kv_head, group, slice(start, stop), keys, offset)


def _gather(x: Tensor, part: _Part) -> Tensor:
    """The rows of `part` as (heads, rows, D) in fp64."""
    return x[part.batch, part.rows, part.heads].transpose(0, 1).double()


def _scores(queries: Tensor, keys: Tensor, scale: float, part: _Part, causal: bool) -> Tensor:
    """scale * Q K^T of one part, (heads, rows, keys), with -inf where the mask hides a key."""
    scores = queries @ keys.T * scale
    if causal:
        row = torch.arange(part.rows.start, part.rows.stop, device=keys.device)
        hidden = torch.arange(part.keys, device=keys.device) > row[:, None] + part.offset
        scores.masked_fill_(hidden, -math.inf)
    return scores
