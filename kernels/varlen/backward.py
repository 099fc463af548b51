"""FlashAttention-2's backward on packed sequences, in Triton: the walks of triton/fa2_backward.py within a sequence.

Deterministic: dK and dV by a walk over Q, dQ by one over K and V. LSE and delta of a sequence lie PADDING rows further from those
of the one before than its queries do, so that the walks read them unmasked. What differs from batch to batch (`do_not_specialize`)
is no reason to compile anew.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton.arithmetic import INTERPRETED, LOG2_E
from ..triton.fa2_backward import PADDING, _walk_keys, _walk_queries
from ..triton.loads import load_tile, store_tile
from ..triton.tiles import BackwardTile, backward_tile
from .forward import bounds


@triton.jit(do_not_specialize=["tiles", "total_q", "padded", "lse_stride_h", "dlse_stride_h"])
def _prepare(
    o, do, lse, dlse, lse2, delta, cu_seqlens_q, heads, tiles, total_q, padded, GAP: tl.constexpr,
    o_stride_s, o_stride_h, o_stride_d, do_stride_s, do_stride_h, do_stride_d,
    lse_stride_h, lse_stride_s, dlse_stride_h, dlse_stride_s,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O) - dLSE, and LSE in base 2; rows that do not exist or see no key get LSE +inf: P = 0."""
    head = tl.program_id(0) % heads
    first_row = tl.program_id(0) // heads % tiles * ROWS
    entry = tl.program_id(0) // heads // tiles
    start, seqlen = bounds(cu_seqlens_q, entry, total_q)
    if first_row >= tl.cdiv(seqlen, GAP) * GAP:
        return
    none = entry * 0
    row = first_row + tl.arange(0, ROWS)
    inside = row < seqlen
    output = load_tile(
        o + start.to(tl.int64) * o_stride_s, none, head, first_row, seqlen, none, o_stride_s, o_stride_h, o_stride_d,
        ROWS, HEAD_DIM, False, True,
    )  # fmt: skip
    gradient = load_tile(
        do + start.to(tl.int64) * do_stride_s, none, head, first_row, seqlen, none, do_stride_s, do_stride_h, do_stride_d,
        ROWS, HEAD_DIM, False, True,
    )  # fmt: skip
    share = tl.sum(output.to(tl.float32) * gradient.to(tl.float32), 1)
    if HAS_DLSE:
        pointers = dlse + head.to(tl.int64) * dlse_stride_h + (start + row).to(tl.int64) * dlse_stride_s
        share -= tl.load(pointers, mask=inside, other=0.0)
    pointers = lse + head.to(tl.int64) * lse_stride_h + (start + row).to(tl.int64) * lse_stride_s
    natural = tl.load(pointers, mask=inside, other=float("inf"))
    natural = tl.where(natural == float("-inf"), float("inf"), natural)
    target = head.to(tl.int64) * padded + start + entry * GAP + row
    tl.store(lse2 + target, natural * LOG2_E)
    tl.store(delta + target, share)


@triton.jit(do_not_specialize=["tiles", "total_q", "total_k", "padded"])
def _keys_and_values(
    q, k, v, do, dk, dv, lse2, delta, cu_seqlens_q, cu_seqlens_k, scale, scale_log2, kv_heads, sharing, tiles, total_q, total_k,
    padded, GAP: tl.constexpr,
    q_stride_s, q_stride_h, q_stride_d, k_stride_s, k_stride_h, k_stride_d, v_stride_s, v_stride_h, v_stride_d,
    do_stride_s, do_stride_h, do_stride_d, dk_stride_s, dk_stride_h, dk_stride_d, dv_stride_s, dv_stride_h, dv_stride_d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One program: one K/V tile of one K/V head of one sequence, all Q blocks of the heads that share it."""
    kv_head = tl.program_id(0) % kv_heads
    first_key = tl.program_id(0) // kv_heads % tiles * BLOCK_N
    entry = tl.program_id(0) // kv_heads // tiles
    start_q, seqlen_q = bounds(cu_seqlens_q, entry, total_q)
    start_k, seqlen_k = bounds(cu_seqlens_k, entry, total_k)
    if first_key >= seqlen_k:
        return
    none = entry * 0
    offset = seqlen_k - seqlen_q
    q += start_q.to(tl.int64) * q_stride_s
    do += start_q.to(tl.int64) * do_stride_s
    lse2 += start_q + entry * GAP
    delta += start_q + entry * GAP
    keys = load_tile(
        k + start_k.to(tl.int64) * k_stride_s, none, kv_head, first_key, seqlen_k, none, k_stride_s, k_stride_h, k_stride_d,
        BLOCK_N, HEAD_DIM, False, True,
    )  # fmt: skip
    values = load_tile(
        v + start_k.to(tl.int64) * v_stride_s, none, kv_head, first_key, seqlen_k, none, v_stride_s, v_stride_h, v_stride_d,
        BLOCK_N, HEAD_DIM, False, True,
    )  # fmt: skip
    dkeys = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dvalues = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    begin = none
    unmasked = none
    last = tl.cdiv(seqlen_q, BLOCK_M) * BLOCK_M
    if CAUSAL:
        begin = tl.maximum(0, first_key - offset) // BLOCK_M * BLOCK_M
        unmasked = tl.cdiv(tl.maximum(0, first_key + BLOCK_N - 1 - offset), BLOCK_M) * BLOCK_M
    # A tile that reaches past the last key is masked all along its walk.
    unmasked = tl.minimum(tl.where(first_key + BLOCK_N > seqlen_k, last, unmasked), last)
    for member in range(sharing):
        head = kv_head * sharing + member
        dkeys, dvalues = _walk_queries(
            dkeys, dvalues, keys, values, q, do, q, lse2, delta, none, head, head, first_key, begin, unmasked,
            seqlen_q, seqlen_k, padded, offset, scale_log2,
            none, q_stride_s, q_stride_h, q_stride_d, none, do_stride_s, do_stride_h, do_stride_d,
            BLOCK_M, BLOCK_N, HEAD_DIM, CAUSAL, True, False, False,
        )  # fmt: skip
        dkeys, dvalues = _walk_queries(
            dkeys, dvalues, keys, values, q, do, q, lse2, delta, none, head, head, first_key, unmasked, seqlen_q,
            seqlen_q, seqlen_k, padded, offset, scale_log2,
            none, q_stride_s, q_stride_h, q_stride_d, none, do_stride_s, do_stride_h, do_stride_d,
            BLOCK_M, BLOCK_N, HEAD_DIM, CAUSAL, False, False, False,
        )  # fmt: skip
    store_tile(
        dk + start_k.to(tl.int64) * dk_stride_s, dkeys * scale, none, kv_head, first_key, seqlen_k,
        none, dk_stride_s, dk_stride_h, dk_stride_d, BLOCK_N, HEAD_DIM,
    )  # fmt: skip
    store_tile(
        dv + start_k.to(tl.int64) * dv_stride_s, dvalues, none, kv_head, first_key, seqlen_k,
        none, dv_stride_s, dv_stride_h, dv_stride_d, BLOCK_N, HEAD_DIM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tiles", "total_q", "total_k", "padded"])
def _queries(
    q, k, v, do, dq, lse2, delta, cu_seqlens_q, cu_seqlens_k, scale, scale_log2, heads, sharing, tiles, total_q, total_k,
    padded, GAP: tl.constexpr,
    q_stride_s, q_stride_h, q_stride_d, k_stride_s, k_stride_h, k_stride_d, v_stride_s, v_stride_h, v_stride_d,
    do_stride_s, do_stride_h, do_stride_d, dq_stride_s, dq_stride_h, dq_stride_d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One program: one Q tile of one head of one sequence, all its K/V blocks; dQ written once."""
    head = tl.program_id(0) % heads
    first_row = (tiles - 1 - tl.program_id(0) // heads % tiles) * BLOCK_M
    entry = tl.program_id(0) // heads // tiles
    start_q, seqlen_q = bounds(cu_seqlens_q, entry, total_q)
    start_k, seqlen_k = bounds(cu_seqlens_k, entry, total_k)
    if first_row >= seqlen_q:
        return
    none = entry * 0
    kv_head = head // sharing
    offset = seqlen_k - seqlen_q
    k += start_k.to(tl.int64) * k_stride_s
    v += start_k.to(tl.int64) * v_stride_s
    queries = load_tile(
        q + start_q.to(tl.int64) * q_stride_s, none, head, first_row, seqlen_q, none, q_stride_s, q_stride_h, q_stride_d,
        BLOCK_M, HEAD_DIM, False, True,
    )  # fmt: skip
    gradient = load_tile(
        do + start_q.to(tl.int64) * do_stride_s, none, head, first_row, seqlen_q, none, do_stride_s, do_stride_h, do_stride_d,
        BLOCK_M, HEAD_DIM, False, True,
    )  # fmt: skip
    statistics = head.to(tl.int64) * padded + start_q + entry * GAP + first_row + tl.arange(0, BLOCK_M)
    lse_rows = tl.load(lse2 + statistics)
    delta_rows = tl.load(delta + statistics)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    if CAUSAL:
        past_last = tl.maximum(0, tl.minimum(seqlen_k, tl.minimum(first_row + BLOCK_M, seqlen_q) + offset))
        unmasked = tl.maximum(0, tl.minimum(seqlen_k, first_row + offset + 1)) // BLOCK_N * BLOCK_N
    else:
        past_last = seqlen_k
        unmasked = seqlen_k // BLOCK_N * BLOCK_N
    acc = _walk_keys(
        acc, queries, gradient, k, v, lse_rows, delta_rows, none, kv_head, first_row, 0, unmasked, seqlen_k, offset, scale_log2,
        none, k_stride_s, k_stride_h, k_stride_d, none, v_stride_s, v_stride_h, v_stride_d,
        BLOCK_M, BLOCK_N, HEAD_DIM, CAUSAL, False, False,
    )  # fmt: skip
    acc = _walk_keys(
        acc, queries, gradient, k, v, lse_rows, delta_rows, none, kv_head, first_row, unmasked, past_last, seqlen_k, offset,
        scale_log2, none, k_stride_s, k_stride_h, k_stride_d, none, v_stride_s, v_stride_h, v_stride_d,
        BLOCK_M, BLOCK_N, HEAD_DIM, CAUSAL, True, False,
    )  # fmt: skip
    store_tile(
        dq + start_q.to(tl.int64) * dq_stride_s, acc * scale, none, head, first_row, seqlen_q,
        none, dq_stride_s, dq_stride_h, dq_stride_d, BLOCK_M, HEAD_DIM,
    )  # fmt: skip


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool = False,
    *,
    dlse: Tensor | None = None,
    tile: BackwardTile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV of a forward that gave o and lse; shapes and limits as in forward.forward, do as o, dlse as lse.

    No sequence has more queries or keys than max_seqlen_q and max_seqlen_k say. Rows of no sequence get 0. Deterministic.
    """
    (total_q, heads, head_dim), (total_k, kv_heads, _) = q.shape, k.shape
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    batch = len(cu_seqlens_q) - 1
    if 0 in (q.numel(), k.numel(), batch, max_seqlen_q, max_seqlen_k):
        return dq, dk, dv
    tile = tile or backward_tile(head_dim, causal, bool(INTERPRETED))
    sharing, padded = heads // kv_heads, total_q + batch * PADDING
    lse2, delta = torch.empty(2, heads, padded, dtype=torch.float32, device=q.device)
    rows = 16 if INTERPRETED else 64
    slopes = lse if dlse is None else dlse
    tiles = triton.cdiv(max_seqlen_q, PADDING) * PADDING // rows
    _prepare[(tiles * heads * batch,)](
        o, do, lse, slopes, lse2, delta, cu_seqlens_q, heads, tiles, total_q, padded, PADDING,
        *o.stride(), *do.stride(), *lse.stride(), *slopes.stride(), ROWS=rows, HEAD_DIM=head_dim, HAS_DLSE=dlse is not None,
    )  # fmt: skip
    scales, lengths = (softmax_scale, softmax_scale * LOG2_E.value), (total_q, total_k, padded, PADDING)
    strides = (*q.stride(), *k.stride(), *v.stride(), *do.stride())
    step = tile.keys_and_values
    tiles = triton.cdiv(max_seqlen_k, step.block_n)
    _keys_and_values[(tiles * kv_heads * batch,)](
        q, k, v, do, dk, dv, lse2, delta, cu_seqlens_q, cu_seqlens_k, *scales, kv_heads, sharing, tiles, *lengths,
        *strides, *dk.stride(), *dv.stride(),
        BLOCK_M=step.block_m, BLOCK_N=step.block_n, HEAD_DIM=head_dim, CAUSAL=causal, **step.options(),
    )  # fmt: skip
    step = tile.queries
    tiles = triton.cdiv(max_seqlen_q, step.block_m)
    _queries[(tiles * heads * batch,)](
        q, k, v, do, dq, lse2, delta, cu_seqlens_q, cu_seqlens_k, *scales, heads, sharing, tiles, *lengths,
        *strides, *dq.stride(),
        BLOCK_M=step.block_m, BLOCK_N=step.block_n, HEAD_DIM=head_dim, CAUSAL=causal, **step.options(),
    )  # fmt: skip
    return dq, dk, dv
