"""FlashAttention-2 backward (arXiv:2307.08691, Algorithm 2): P is recomputed from LSE, K/V outer, Q inner.

`_prepare` takes delta = rowsum(dO * O), once. `_keys_and_values` keeps dK and dV of one K/V tile in registers and walks
Q, so both are deterministic; it can also add each step's share of dQ into an fp32 buffer. `_queries` computes dQ
instead by its own walk over K/V, with two GEMMs more and a fixed order of addition.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .arithmetic import INTERPRETED, LOG2_E, gemm, product
from .loads import can_describe, describe, heads_together, load_tile, place, row_pointers, store_tile
from .tiles import BackwardTile, backward_tile

PADDING = 128
"""Rows of LSE and delta are padded to a multiple of this, so that the walks load them unmasked."""


@triton.jit
def _prepare(
    o, do, lse, dlse, lse2, delta, heads, seqlen_q, padded,
    o_stride_b, o_stride_s, o_stride_h, o_stride_d, do_stride_b, do_stride_s, do_stride_h, do_stride_d,
    lse_stride_b, lse_stride_h, lse_stride_s, dlse_stride_b, dlse_stride_h, dlse_stride_s,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O) - dLSE, and LSE in base 2; rows that do not exist or see no key get LSE +inf: P = 0."""
    row_tiles = tl.cdiv(padded, ROWS)
    first_row = tl.program_id(0) % row_tiles * ROWS
    head_index = tl.program_id(0) // row_tiles
    batch = head_index // heads
    head = head_index % heads
    row = first_row + tl.arange(0, ROWS)
    inside = row < seqlen_q
    output = load_tile(
        o, batch, head, first_row, seqlen_q, o_stride_b, o_stride_s, o_stride_h, o_stride_d, ROWS, HEAD_DIM, False, True
    )
    gradient = load_tile(
        do, batch, head, first_row, seqlen_q, do_stride_b, do_stride_s, do_stride_h, do_stride_d, ROWS, HEAD_DIM, False,
        True,
    )  # fmt: skip
    share = tl.sum(output.to(tl.float32) * gradient.to(tl.float32), 1)
    if HAS_DLSE:
        pointers = row_pointers(dlse, batch, head, row, dlse_stride_b, dlse_stride_h, dlse_stride_s)
        share -= tl.load(pointers, mask=inside, other=0.0)
    pointers = row_pointers(lse, batch, head, row, lse_stride_b, lse_stride_h, lse_stride_s)
    natural = tl.load(pointers, mask=inside, other=float("inf"))
    natural = tl.where(natural == float("-inf"), float("inf"), natural)
    target = tl.cast(head_index, tl.int64) * padded + row
    tl.store(lse2 + target, natural * LOG2_E)
    tl.store(delta + target, share)


@triton.jit
def _walk_queries(
    dk, dv, keys, values, q, do, dq, lse2, delta, batch, head, head_index, first_key, begin, end, seqlen_q, seqlen_k,
    padded, offset, scale_log2,
    q_stride_b, q_stride_s, q_stride_h, q_stride_d, do_stride_b, do_stride_s, do_stride_h, do_stride_d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    TMA: tl.constexpr, ADD_DQ: tl.constexpr,
):  # fmt: skip
    """Take the Q blocks of [begin, end) into dK and dV (dK lacks the scale); everything is held transposed."""
    for row in tl.range(begin, end, BLOCK_M):
        queries = load_tile(
            q, batch, head, row, seqlen_q, q_stride_b, q_stride_s, q_stride_h, q_stride_d,
            BLOCK_M, HEAD_DIM, TMA, True,
        )  # fmt: skip
        statistics = tl.cast(head_index, tl.int64) * padded + row + tl.arange(0, BLOCK_M)
        scores = product(keys, queries.T)
        weights = tl.exp2(scores * scale_log2 - tl.load(lse2 + statistics)[None, :])
        if MASKED:
            column = first_key + tl.arange(0, BLOCK_N)
            seen = (column < seqlen_k)[:, None]
            if CAUSAL:
                seen = seen & (column[:, None] <= (row + tl.arange(0, BLOCK_M))[None, :] + offset)
            weights = tl.where(seen, weights, 0.0)
        gradient = load_tile(
            do, batch, head, row, seqlen_q, do_stride_b, do_stride_s, do_stride_h, do_stride_d,
            BLOCK_M, HEAD_DIM, TMA, True,
        )  # fmt: skip
        dv = gemm(weights.to(gradient.dtype), gradient, dv)
        dweights = product(values, gradient.T)
        dscores = weights * (dweights - tl.load(delta + statistics)[None, :])
        if MASKED:
            dscores = tl.where(seen, dscores, 0.0)
        narrow = dscores.to(queries.dtype)
        dk = gemm(narrow, queries, dk)
        if ADD_DQ:
            share = product(narrow.T, keys)
            if TMA:
                dq.atomic_add([head_index, row, 0], share.reshape(1, BLOCK_M, HEAD_DIM))
            else:
                target = statistics[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
                tl.atomic_add(dq + target, share, sem="relaxed")
    return dk, dv


@triton.jit
def _keys_and_values(
    q, k, v, do, dq, dk, dv, lse2, delta, scale, scale_log2, heads_total, kv_heads, sharing, seqlen_q, seqlen_k, padded,
    q_stride_b, q_stride_s, q_stride_h, q_stride_d, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
    v_stride_b, v_stride_s, v_stride_h, v_stride_d, do_stride_b, do_stride_s, do_stride_h, do_stride_d,
    dk_stride_b, dk_stride_s, dk_stride_h, dk_stride_d, dv_stride_b, dv_stride_s, dv_stride_h, dv_stride_d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, WHOLE: tl.constexpr,
    TMA: tl.constexpr, ADD_DQ: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One program: one K/V tile of one K/V head, all the Q blocks of the heads that share it; dK and dV written once."""
    tile, kv_index = place(tl.program_id(0), tl.cdiv(seqlen_k, BLOCK_N), heads_total, TOGETHER, False)
    batch = kv_index // kv_heads
    kv_head = kv_index % kv_heads
    first_key = tile * BLOCK_N
    offset = seqlen_k - seqlen_q
    keys = load_tile(
        k, batch, kv_head, first_key, seqlen_k, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
        BLOCK_N, HEAD_DIM, TMA, True,
    )  # fmt: skip
    values = load_tile(
        v, batch, kv_head, first_key, seqlen_k, v_stride_b, v_stride_s, v_stride_h, v_stride_d,
        BLOCK_N, HEAD_DIM, TMA, True,
    )  # fmt: skip
    dkeys = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dvalues = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)

    begin = 0
    unmasked = 0
    if CAUSAL:
        begin = tl.maximum(0, first_key - offset) // BLOCK_M * BLOCK_M
        unmasked = tl.cdiv(tl.maximum(0, first_key + BLOCK_N - 1 - offset), BLOCK_M) * BLOCK_M
    if not WHOLE:
        # A tile that reaches past the last key is masked all along its walk.
        unmasked = tl.where(first_key + BLOCK_N > seqlen_k, tl.cdiv(seqlen_q, BLOCK_M) * BLOCK_M, unmasked)
        unmasked = tl.minimum(unmasked, tl.cdiv(seqlen_q, BLOCK_M) * BLOCK_M)
    for member in range(sharing):
        head = kv_head * sharing + member
        head_index = kv_index * sharing + member
        if not WHOLE:
            dkeys, dvalues = _walk_queries(
                dkeys, dvalues, keys, values, q, do, dq, lse2, delta, batch, head, head_index, first_key,
                begin, unmasked, seqlen_q, seqlen_k, padded, offset, scale_log2,
                q_stride_b, q_stride_s, q_stride_h, q_stride_d, do_stride_b, do_stride_s, do_stride_h, do_stride_d,
                BLOCK_M, BLOCK_N, HEAD_DIM, CAUSAL, True, TMA, ADD_DQ,
            )  # fmt: skip
        dkeys, dvalues = _walk_queries(
            dkeys, dvalues, keys, values, q, do, dq, lse2, delta, batch, head, head_index, first_key,
            unmasked, seqlen_q, seqlen_q, seqlen_k, padded, offset, scale_log2,
            q_stride_b, q_stride_s, q_stride_h, q_stride_d, do_stride_b, do_stride_s, do_stride_h, do_stride_d,
            BLOCK_M, BLOCK_N, HEAD_DIM, CAUSAL, False, TMA, ADD_DQ,
        )  # fmt: skip
    store_tile(
        dk, dkeys * scale, batch, kv_head, first_key, seqlen_k, dk_stride_b, dk_stride_s, dk_stride_h, dk_stride_d,
        BLOCK_N, HEAD_DIM,
    )  # fmt: skip
    store_tile(
        dv, dvalues, batch, kv_head, first_key, seqlen_k, dv_stride_b, dv_stride_s, dv_stride_h, dv_stride_d,
        BLOCK_N, HEAD_DIM,
    )  # fmt: skip


@triton.jit
def _walk_keys(
    dq, queries, gradient, k, v, lse_rows, delta_rows, batch, kv_head, first_row, begin, end, seqlen_k, offset,
    scale_log2, k_stride_b, k_stride_s, k_stride_h, k_stride_d, v_stride_b, v_stride_s, v_stride_h, v_stride_d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Take the K/V blocks of [begin, end) into dQ, which lacks the scale."""
    for key in tl.range(begin, end, BLOCK_N):
        keys = load_tile(
            k, batch, kv_head, key, seqlen_k, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
            BLOCK_N, HEAD_DIM, TMA, MASKED,
        )  # fmt: skip
        values = load_tile(
            v, batch, kv_head, key, seqlen_k, v_stride_b, v_stride_s, v_stride_h, v_stride_d,
            BLOCK_N, HEAD_DIM, TMA, MASKED,
        )  # fmt: skip
        scores = product(queries, keys.T)
        dweights = product(gradient, values.T)
        weights = tl.exp2(scores * scale_log2 - lse_rows[:, None])
        dscores = weights * (dweights - delta_rows[:, None])
        if MASKED:
            column = key + tl.arange(0, BLOCK_N)
            seen = (column < seqlen_k)[None, :]
            if CAUSAL:
                seen = seen & (column[None, :] <= (first_row + tl.arange(0, BLOCK_M))[:, None] + offset)
            dscores = tl.where(seen, dscores, 0.0)
        dq = gemm(dscores.to(keys.dtype), keys, dq)
    return dq


@triton.jit
def _queries(
    q, k, v, do, dq, lse2, delta, scale, scale_log2, heads_total, heads, sharing, seqlen_q, seqlen_k, padded,
    q_stride_b, q_stride_s, q_stride_h, q_stride_d, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
    v_stride_b, v_stride_s, v_stride_h, v_stride_d, do_stride_b, do_stride_s, do_stride_h, do_stride_d,
    dq_stride_b, dq_stride_s, dq_stride_h, dq_stride_d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, WHOLE: tl.constexpr,
    TMA: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One program: one Q tile of one head, all its K/V blocks; dQ written once."""
    tile, head_index = place(tl.program_id(0), tl.cdiv(seqlen_q, BLOCK_M), heads_total, TOGETHER, CAUSAL)
    batch = head_index // heads
    head = head_index % heads
    kv_head = head // sharing
    first_row = tile * BLOCK_M
    offset = seqlen_k - seqlen_q
    queries = load_tile(
        q, batch, head, first_row, seqlen_q, q_stride_b, q_stride_s, q_stride_h, q_stride_d,
        BLOCK_M, HEAD_DIM, TMA, True,
    )  # fmt: skip
    gradient = load_tile(
        do, batch, head, first_row, seqlen_q, do_stride_b, do_stride_s, do_stride_h, do_stride_d,
        BLOCK_M, HEAD_DIM, TMA, True,
    )  # fmt: skip
    statistics = tl.cast(head_index, tl.int64) * padded + first_row + tl.arange(0, BLOCK_M)
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
        acc, queries, gradient, k, v, lse_rows, delta_rows, batch, kv_head, first_row, 0, unmasked, seqlen_k, offset,
        scale_log2, k_stride_b, k_stride_s, k_stride_h, k_stride_d, v_stride_b, v_stride_s, v_stride_h, v_stride_d,
        BLOCK_M, BLOCK_N, HEAD_DIM, CAUSAL, False, TMA,
    )  # fmt: skip
    if not WHOLE:
        acc = _walk_keys(
            acc, queries, gradient, k, v, lse_rows, delta_rows, batch, kv_head, first_row, unmasked, past_last,
            seqlen_k, offset, scale_log2, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
            v_stride_b, v_stride_s, v_stride_h, v_stride_d,
            BLOCK_M, BLOCK_N, HEAD_DIM, CAUSAL, True, TMA,
        )  # fmt: skip
    store_tile(
        dq, acc * scale, batch, head, first_row, seqlen_q, dq_stride_b, dq_stride_s, dq_stride_h, dq_stride_d,
        BLOCK_M, HEAD_DIM,
    )  # fmt: skip


@triton.jit
def _finish_queries(
    added, dq, scale, heads, seqlen_q, padded, dq_stride_b, dq_stride_s, dq_stride_h, dq_stride_d,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """dQ = scale * the fp32 sum, in dQ's dtype."""
    row_tiles = tl.cdiv(padded, ROWS)
    first_row = tl.program_id(0) % row_tiles * ROWS
    head_index = tl.program_id(0) // row_tiles
    row = tl.cast(head_index, tl.int64) * padded + first_row + tl.arange(0, ROWS)
    tile = tl.load(added + row[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :])
    store_tile(
        dq, tile * scale, head_index // heads, head_index % heads, first_row, seqlen_q,
        dq_stride_b, dq_stride_s, dq_stride_h, dq_stride_d, ROWS, HEAD_DIM,
    )  # fmt: skip


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    softmax_scale: float,
    causal: bool = False,
    *,
    dlse: Tensor | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    deterministic: bool = False,
    tile: BackwardTile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV of a forward that gave o and lse; shapes and limits as in fa2.forward, do as o, dlse as lse.

    dK and dV are deterministic. dQ is where `deterministic` is set or the table says so; otherwise its fp32 sums are
    taken in the order in which programs finish. `dq`, `dk`, `dv` are written where given; `tile` replaces the table's.
    """
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads = k.shape[1:3]
    dq, dk, dv = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if given is None else given for x, given in ((q, dq), (k, dk), (v, dv))
    )
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    tile = tile or backward_tile(head_dim, causal, bool(INTERPRETED))
    add_dq = tile.add_dq and not deterministic
    sharing = heads // kv_heads
    padded = triton.cdiv(seqlen_q, PADDING) * PADDING
    lse2, delta = torch.empty(2, batch * heads, padded, dtype=torch.float32, device=q.device)
    rows = 16 if INTERPRETED else 64
    every_row = (triton.cdiv(padded, rows) * batch * heads,)
    slopes = lse if dlse is None else dlse
    _prepare[every_row](
        o, do, lse, slopes, lse2, delta, heads, seqlen_q, padded,
        *o.stride(), *do.stride(), *lse.stride(), *slopes.stride(),
        ROWS=rows, HEAD_DIM=head_dim, HAS_DLSE=dlse is not None,
    )  # fmt: skip

    by_tma = tile.tensor_descriptors and can_describe(q, k, v, do)
    scales = (softmax_scale, softmax_scale * LOG2_E.value)
    strides = (*q.stride(), *k.stride(), *v.stride(), *do.stride())

    def sources(rows: int, keys: int):
        return [describe(x, n) for x, n in zip((q, k, v, do), (rows, keys, keys, rows), strict=True)]

    added = dq
    if add_dq:
        added = torch.zeros(batch * heads, padded, head_dim, dtype=torch.float32, device=q.device)
    step = tile.keys_and_values
    target = added
    if add_dq and by_tma:
        target = TensorDescriptor.from_tensor(added, [1, step.block_m, head_dim])
    _keys_and_values[(triton.cdiv(seqlen_k, step.block_n) * batch * kv_heads,)](
        *(sources(step.block_m, step.block_n) if by_tma else (q, k, v, do)), target, dk, dv, lse2, delta, *scales,
        batch * kv_heads, kv_heads, sharing, seqlen_q, seqlen_k, padded, *strides, *dk.stride(), *dv.stride(),
        BLOCK_M=step.block_m, BLOCK_N=step.block_n, HEAD_DIM=head_dim, CAUSAL=causal,
        WHOLE=not causal and seqlen_k % step.block_n == 0, TMA=by_tma, ADD_DQ=add_dq,
        TOGETHER=heads_together(2 * seqlen_q, head_dim, q.element_size(), batch * kv_heads, 1, causal),
        **step.options(),
    )  # fmt: skip
    if add_dq:
        _finish_queries[every_row](added, dq, softmax_scale, heads, seqlen_q, padded, *dq.stride(), ROWS=rows, HEAD_DIM=head_dim)
        return dq, dk, dv
    step = tile.queries
    _queries[(triton.cdiv(seqlen_q, step.block_m) * batch * heads,)](
        *(sources(step.block_m, step.block_n) if by_tma else (q, k, v, do)), dq, lse2, delta, *scales,
        batch * heads, heads, sharing, seqlen_q, seqlen_k, padded, *strides, *dq.stride(),
        BLOCK_M=step.block_m, BLOCK_N=step.block_n, HEAD_DIM=head_dim, CAUSAL=causal,
        WHOLE=not causal and seqlen_k % step.block_n == 0, TMA=by_tma,
        TOGETHER=heads_together(seqlen_k, head_dim, q.element_size(), batch * heads, sharing, causal),
        **step.options(),
    )  # fmt: skip
    return dq, dk, dv
