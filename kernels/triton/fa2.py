"""FlashAttention-2 forward (arXiv:2307.08691, Algorithm 1): Q outer, K/V inner, O stays in registers.

The order of loops is `simulator/schedules/fa2.py`'s; loads are TMA and GEMMs are WGMMA where the GPU has them. Softmax is
taken in base 2 with the scale folded into one FMA, and the K/V walk is split in two: blocks that every row of the tile sees
whole, then blocks on the diagonal or past the end. A walk comes in two orders of issue, `_walk` and `_walk_overlapped`;
the tile says which.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import INTERPRETED, LN_2, LOG2_E, gemm, in_registers, product
from .loads import can_describe, describe, heads_together, load_tile, place, row_pointers, store_tile
from .tiles import TritonTile, forward_tile


@triton.jit
def _softmax(
    scores, total, top, scale_log2, first_row, key, seqlen_k, offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of S into weights exp2(S - maximum), the factor that what came before shrinks by, row sums and maxima."""
    if MASKED:
        column = key + tl.arange(0, BLOCK_N)
        seen = (column < seqlen_k)[None, :]
        if CAUSAL:
            row = first_row + tl.arange(0, BLOCK_M)
            seen = seen & (column[None, :] <= row[:, None] + offset)
        scores = tl.where(seen, scores * scale_log2, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen no key yet has maximum -inf; 0 in its place gives exp2(-inf) = 0 and not NaN.
        pivot = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - pivot[:, None])
    else:
        higher = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        pivot = higher
        weights = tl.exp2(scores * scale_log2 - pivot[:, None])
    rescale = tl.exp2(top - pivot)
    return weights, rescale, total * rescale + tl.sum(weights, 1), higher


@triton.jit
def _walk(
    acc, total, top, q, k, v, batch, kv_head, first_row, begin, end, seqlen_k, offset, scale_log2,
    k_stride_b, k_stride_s, k_stride_h, k_stride_d, v_stride_b, v_stride_s, v_stride_h, v_stride_d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Take the K/V blocks of [begin, end) into O, the row sums and the row maxima (base 2, scaled)."""
    for key in tl.range(begin, end, BLOCK_N):
        keys = load_tile(
            k, batch, kv_head, key, seqlen_k, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
            BLOCK_N, HEAD_DIM, TMA, MASKED,
        )  # fmt: skip
        scores = product(q, keys.T)
        weights, rescale, total, top = _softmax(
            scores, total, top, scale_log2, first_row, key, seqlen_k, offset, BLOCK_M, BLOCK_N, CAUSAL, MASKED
        )
        acc = acc * rescale[:, None]
        values = load_tile(
            v, batch, kv_head, key, seqlen_k, v_stride_b, v_stride_s, v_stride_h, v_stride_d,
            BLOCK_N, HEAD_DIM, TMA, MASKED,
        )  # fmt: skip
        acc = gemm(weights.to(values.dtype), values, acc)
    return acc, total, top


@triton.jit
def _walk_overlapped(
    acc, total, top, weights, rescale, q, k, v, batch, kv_head, first_row, begin, end, seqlen_k, offset, scale_log2,
    k_stride_b, k_stride_s, k_stride_h, k_stride_d, v_stride_b, v_stride_s, v_stride_h, v_stride_d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """As `_walk`, with P V one block late: it runs on the tensor cores under the softmax of the next block.

    `weights` and `rescale` are of the block before; before the first block weights are 0 and its V, outside the tensor, too.
    """
    for key in tl.range(begin, end, BLOCK_N):
        keys = load_tile(
            k, batch, kv_head, key, seqlen_k, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
            BLOCK_N, HEAD_DIM, TMA, MASKED,
        )  # fmt: skip
        values = load_tile(
            v, batch, kv_head, key - BLOCK_N, seqlen_k, v_stride_b, v_stride_s, v_stride_h, v_stride_d,
            BLOCK_N, HEAD_DIM, TMA, True,
        )  # fmt: skip
        scores = product(q, keys.T)
        acc = gemm(in_registers(weights), values, acc * rescale[:, None])
        fresh, rescale, total, top = _softmax(
            scores, total, top, scale_log2, first_row, key, seqlen_k, offset, BLOCK_M, BLOCK_N, CAUSAL, MASKED
        )
        weights = fresh.to(values.dtype)
    return acc, total, top, weights, rescale


@triton.jit
def _forward(
    q, k, v, o, lse, scale_log2, heads_total, heads, sharing, seqlen_q, seqlen_k,
    q_stride_b, q_stride_s, q_stride_h, q_stride_d, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
    v_stride_b, v_stride_s, v_stride_h, v_stride_d, o_stride_b, o_stride_s, o_stride_h, o_stride_d,
    lse_stride_b, lse_stride_h, lse_stride_s,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
    WHOLE: tl.constexpr, TMA: tl.constexpr, OVERLAPPED: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One program: one tile of Q rows of one head, all its K/V blocks, O and LSE written once."""
    tile, head_index = place(tl.program_id(0), tl.cdiv(seqlen_q, BLOCK_M), heads_total, TOGETHER, CAUSAL)
    batch = head_index // heads
    head = head_index % heads
    kv_head = head // sharing
    first_row = tile * BLOCK_M
    offset = seqlen_k - seqlen_q

    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    queries = load_tile(
        q, batch, head, first_row, seqlen_q, q_stride_b, q_stride_s, q_stride_h, q_stride_d,
        BLOCK_M, HEAD_DIM, TMA, True,
    )  # fmt: skip

    if CAUSAL:
        past_last = tl.maximum(0, tl.minimum(seqlen_k, tl.minimum(first_row + BLOCK_M, seqlen_q) + offset))
        unmasked = tl.maximum(0, tl.minimum(seqlen_k, first_row + offset + 1)) // BLOCK_N * BLOCK_N
    else:
        past_last = seqlen_k
        unmasked = seqlen_k // BLOCK_N * BLOCK_N
    if OVERLAPPED:
        weights = tl.zeros([BLOCK_M, BLOCK_N], queries.dtype)
        rescale = tl.full([BLOCK_M], 1.0, tl.float32)
        acc, total, top, weights, rescale = _walk_overlapped(
            acc, total, top, weights, rescale, queries, k, v, batch, kv_head, first_row, 0, unmasked, seqlen_k, offset,
            scale_log2, k_stride_b, k_stride_s, k_stride_h, k_stride_d, v_stride_b, v_stride_s, v_stride_h, v_stride_d,
            BLOCK_M, BLOCK_N, HEAD_DIM, CAUSAL, False, TMA,
        )  # fmt: skip
        if not WHOLE:
            acc, total, top, weights, rescale = _walk_overlapped(
                acc, total, top, weights, rescale, queries, k, v, batch, kv_head, first_row, unmasked, past_last, seqlen_k,
                offset, scale_log2, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
                v_stride_b, v_stride_s, v_stride_h, v_stride_d, BLOCK_M, BLOCK_N, HEAD_DIM, CAUSAL, True, TMA,
            )  # fmt: skip
        values = load_tile(
            v, batch, kv_head, (tl.cdiv(past_last, BLOCK_N) - 1) * BLOCK_N, seqlen_k,
            v_stride_b, v_stride_s, v_stride_h, v_stride_d, BLOCK_N, HEAD_DIM, TMA, True,
        )  # fmt: skip
        acc = gemm(in_registers(weights), values, acc * rescale[:, None])
    else:
        acc, total, top = _walk(
            acc, total, top, queries, k, v, batch, kv_head, first_row, 0, unmasked, seqlen_k, offset, scale_log2,
            k_stride_b, k_stride_s, k_stride_h, k_stride_d, v_stride_b, v_stride_s, v_stride_h, v_stride_d,
            BLOCK_M, BLOCK_N, HEAD_DIM, CAUSAL, False, TMA,
        )  # fmt: skip
        if not WHOLE:
            acc, total, top = _walk(
                acc, total, top, queries, k, v, batch, kv_head, first_row, unmasked, past_last, seqlen_k, offset, scale_log2,
                k_stride_b, k_stride_s, k_stride_h, k_stride_d, v_stride_b, v_stride_s, v_stride_h, v_stride_d,
                BLOCK_M, BLOCK_N, HEAD_DIM, CAUSAL, True, TMA,
            )  # fmt: skip

    divisor = tl.where(total == 0.0, 1.0, total)
    store_tile(
        o, acc / divisor[:, None], batch, head, first_row, seqlen_q, o_stride_b, o_stride_s, o_stride_h, o_stride_d,
        BLOCK_M, HEAD_DIM,
    )  # fmt: skip
    row = first_row + tl.arange(0, BLOCK_M)
    lse_rows = row_pointers(lse, batch, head, row, lse_stride_b, lse_stride_h, lse_stride_s)
    tl.store(lse_rows, (top + tl.log2(divisor)) * LN_2, mask=row < seqlen_q)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool = False,
    *,
    o: Tensor | None = None,
    lse: Tensor | None = None,
    tile: TritonTile | None = None,
) -> tuple[Tensor, Tensor]:
    """O (as q) and LSE (B, H, S_q, fp32, natural logarithm) of q (B, S_q, H, D), k, v (B, S_k, H_kv, D).

    fp16 or bf16, D of 64, 128 or 256, softmax_scale >= 0; any lengths and strides. `o` and `lse` are written where
    given; `tile` replaces the table's. Deterministic. Callers check their input; `ops.py` does.
    """
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads = k.shape[1:3]
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device) if o is None else o
    lse = torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=q.device) if lse is None else lse
    if o.numel() == 0:
        return o, lse
    tile = tile or forward_tile(head_dim, causal, bool(INTERPRETED), described=can_describe(q, k, v))
    whole = not causal and seqlen_k % tile.block_n == 0
    sharing = heads // max(1, kv_heads)
    by_tma = tile.tensor_descriptors and can_describe(q, k, v)
    sources = (describe(q, tile.block_m), describe(k, tile.block_n), describe(v, tile.block_n)) if by_tma else (q, k, v)
    programs = triton.cdiv(seqlen_q, tile.block_m) * batch * heads
    _forward[(programs,)](
        *sources, o, lse, softmax_scale * LOG2_E.value, batch * heads, heads, sharing, seqlen_q, seqlen_k,
        *q.stride(), *k.stride(), *v.stride(), *o.stride(), *lse.stride(),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, HEAD_DIM=head_dim, CAUSAL=causal,
        WHOLE=whole, TMA=by_tma, OVERLAPPED=tile.overlapped,
        TOGETHER=heads_together(seqlen_k, head_dim, q.element_size(), batch * heads, sharing, causal),
        **tile.options(),
    )  # fmt: skip
    return o, lse
