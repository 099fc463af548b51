"""FlashAttention-2's forward on packed sequences, in Triton: the walks of triton/fa2.py from the first row of a sequence."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton.arithmetic import INTERPRETED, LN_2, LOG2_E
from ..triton.fa2 import _walk
from ..triton.loads import load_tile, store_tile
from ..triton.tiles import TritonTile, forward_tile


@triton.jit
def bounds(cu_seqlens, entry, total):
    """(first row, length) of a sequence, within the tensor whatever cu_seqlens hold."""
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens + entry), 0), total)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + entry + 1), start), total)
    return start, end - start


@triton.jit(do_not_specialize=["tiles", "total_q", "total_k", "lse_stride_h"])  # batches differ in them
def _forward(
    q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, scale_log2, heads, sharing, tiles, total_q, total_k,
    q_stride_s, q_stride_h, q_stride_d, k_stride_s, k_stride_h, k_stride_d, v_stride_s, v_stride_h, v_stride_d,
    o_stride_s, o_stride_h, o_stride_d, lse_stride_h, lse_stride_s,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One program: one tile of Q rows of one head of one sequence, all its K/V blocks. Those past a sequence's end have none."""
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
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    queries = load_tile(
        q + start_q.to(tl.int64) * q_stride_s, none, head, first_row, seqlen_q, none, q_stride_s, q_stride_h, q_stride_d,
        BLOCK_M, HEAD_DIM, False, True,
    )  # fmt: skip
    if CAUSAL:
        past_last = tl.maximum(0, tl.minimum(seqlen_k, tl.minimum(first_row + BLOCK_M, seqlen_q) + offset))
        unmasked = tl.maximum(0, tl.minimum(seqlen_k, first_row + offset + 1)) // BLOCK_N * BLOCK_N
    else:
        past_last = seqlen_k
        unmasked = seqlen_k // BLOCK_N * BLOCK_N
    acc, total, top = _walk(
        acc, total, top, queries, k, v, none, kv_head, first_row, 0, unmasked, seqlen_k, offset, scale_log2,
        none, k_stride_s, k_stride_h, k_stride_d, none, v_stride_s, v_stride_h, v_stride_d,
        BLOCK_M, BLOCK_N, HEAD_DIM, CAUSAL, False, False,
    )  # fmt: skip
    acc, total, top = _walk(
        acc, total, top, queries, k, v, none, kv_head, first_row, unmasked, past_last, seqlen_k, offset, scale_log2,
        none, k_stride_s, k_stride_h, k_stride_d, none, v_stride_s, v_stride_h, v_stride_d,
        BLOCK_M, BLOCK_N, HEAD_DIM, CAUSAL, True, False,
    )  # fmt: skip
    divisor = tl.where(total == 0.0, 1.0, total)
    store_tile(
        o + start_q.to(tl.int64) * o_stride_s, acc / divisor[:, None], none, head, first_row, seqlen_q,
        none, o_stride_s, o_stride_h, o_stride_d, BLOCK_M, HEAD_DIM,
    )  # fmt: skip
    row = first_row + tl.arange(0, BLOCK_M)
    to = lse + head.to(tl.int64) * lse_stride_h + (start_q + row).to(tl.int64) * lse_stride_s
    tl.store(to, (top + tl.log2(divisor)) * LN_2, mask=row < seqlen_q)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool = False,
    *,
    tile: TritonTile | None = None,
) -> tuple[Tensor, Tensor]:
    """O (as q) and LSE (H, total_q, fp32, natural logarithm) of q (total_q, H, D), k, v (total_k, H_kv, D).

    fp16 or bf16, D of 64, 128 or 256, softmax_scale >= 0; any strides. No sequence has more than max_seqlen_q queries: rows past
    them, and rows of no sequence, have O = 0 and LSE = -inf. Deterministic. Callers check their input.
    """
    (total_q, heads, head_dim), (total_k, kv_heads, _) = q.shape, k.shape
    o = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((heads, total_q), float("-inf"), dtype=torch.float32, device=q.device)
    if o.numel() == 0 or k.numel() == 0:
        return o, lse
    tile = tile or forward_tile(head_dim, causal, bool(INTERPRETED), described=False)
    tiles = triton.cdiv(max_seqlen_q, tile.block_m)
    if programs := tiles * heads * (len(cu_seqlens_q) - 1):
        _forward[(programs,)](
            q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale * LOG2_E.value, heads, heads // kv_heads, tiles,
            total_q, total_k, *q.stride(), *k.stride(), *v.stride(), *o.stride(), *lse.stride(),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, HEAD_DIM=head_dim, CAUSAL=causal, **tile.options(),
        )  # fmt: skip
    return o, lse
