"""Packed sequences in fp64: each by the oracle of `kernels/reference.py`, alone; only for this are the lengths read on the host."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import reference


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> reference.Output:
    """O (total_q, H, D_v) and LSE (H, total_q), fp64; arguments as of operator.flash_attn_varlen_func."""
    total_q, heads, _ = q.shape
    o = torch.zeros(total_q, heads, v.shape[-1], dtype=torch.float64, device=q.device)
    lse = torch.full((heads, total_q), -math.inf, dtype=torch.float64, device=q.device)
    for rows, keys in sequences(cu_seqlens_q, cu_seqlens_k):
        alone = reference.attention_forward(q[rows][None], k[keys][None], v[keys][None], softmax_scale, causal)
        o[rows], lse[:, rows] = alone.o[0], alone.lse[0]
    return reference.Output(o, lse)


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    dlse: Tensor | None = None,
) -> reference.Gradients:
    """Gradients of sum(do * O) + sum(dlse * LSE) in fp64; rows of no sequence have none."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in (q, k, v))
    for rows, keys in sequences(cu_seqlens_q, cu_seqlens_k):
        of_lse = None if dlse is None else dlse[:, rows][None]
        alone = reference.attention_backward(
            q[rows][None], k[keys][None], v[keys][None], do[rows][None], softmax_scale, causal, of_lse
        )
        dq[rows], dk[keys], dv[keys] = (x[0] for x in alone)
    return reference.Gradients(dq, dk, dv)


def sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """The rows of q and the rows of k and v of each sequence."""
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(q) - 1):
        yield slice(q[i], q[i + 1]), slice(k[i], k[i + 1])
