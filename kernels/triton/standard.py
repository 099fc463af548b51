"""Standard attention (FlashAttention, arXiv:2205.14135, Algorithm 0): three kernels, S and P written to memory.

The schedule is `simulator/schedules/standard.py`. S travels in fp32, because large logits overflow fp16 and round away in
bf16; P travels in the inputs' dtype. A causal mask saves nothing here but the reading of what it hides.

Bytes: the simulator counts 2 for an element of S, as the papers' standard attention moves it. This kernel moves 4 at each
writing and reading of S, so a measured run has more bytes than the predicted one, and no fp16 score can overflow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import INTERPRETED, LN_2, LOG2_E, gemm, product
from .loads import load_tile, row_pointers, store_tile
from .tiles import TritonTile, standard_tile


@triton.jit
def _scores(
    q, k, s, scale_log2, heads, sharing, seqlen_q, seqlen_k,
    q_stride_b, q_stride_s, q_stride_h, q_stride_d, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """S = scale * log2(e) * Q K^T, one program per tile of S, -inf where the mask hides a key."""
    row_tiles = tl.cdiv(seqlen_q, BLOCK_M)
    key_tiles = tl.cdiv(seqlen_k, BLOCK_N)
    row = tl.program_id(0) % row_tiles * BLOCK_M
    key = tl.program_id(0) // row_tiles % key_tiles * BLOCK_N
    index = tl.program_id(0) // row_tiles // key_tiles
    head = index % heads
    queries = load_tile(
        q, index // heads, head, row, seqlen_q, q_stride_b, q_stride_s, q_stride_h, q_stride_d,
        BLOCK_M, HEAD_DIM, False, True,
    )  # fmt: skip
    keys = load_tile(
        k, index // heads, head // sharing, key, seqlen_k, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
        BLOCK_N, HEAD_DIM, False, True,
    )  # fmt: skip
    scores = product(queries, keys.T) * scale_log2
    rows, columns = row + tl.arange(0, BLOCK_M), key + tl.arange(0, BLOCK_N)
    if CAUSAL:
        scores = tl.where(columns[None, :] <= rows[:, None] + seqlen_k - seqlen_q, scores, float("-inf"))
    line = tl.cast(index, tl.int64) * seqlen_q + rows
    inside = (rows < seqlen_q)[:, None] & (columns < seqlen_k)[None, :]
    tl.store(s + line[:, None] * seqlen_k + columns[None, :], scores, mask=inside)


@triton.jit
def _softmax(
    s, p, lse, heads, seqlen_q, seqlen_k, lse_stride_b, lse_stride_h, lse_stride_s, BLOCK_N: tl.constexpr
):  # fmt: skip
    """P = softmax(S), one program per row, three readings of S: maximum, sum, probabilities."""
    row = tl.program_id(0) % seqlen_q
    index = tl.cast(tl.program_id(0) // seqlen_q, tl.int64)
    line = (index * seqlen_q + row) * seqlen_k
    column = tl.arange(0, BLOCK_N)

    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for key in range(0, seqlen_k, BLOCK_N):
        scores = tl.load(s + line + key + column, mask=key + column < seqlen_k, other=float("-inf"))
        highest = tl.maximum(highest, scores)
    top = tl.max(highest, 0)
    pivot = tl.where(top == float("-inf"), 0.0, top)

    sums = tl.zeros([BLOCK_N], tl.float32)
    for key in range(0, seqlen_k, BLOCK_N):
        scores = tl.load(s + line + key + column, mask=key + column < seqlen_k, other=float("-inf"))
        sums += tl.exp2(scores - pivot)
    total = tl.sum(sums, 0)
    divisor = tl.where(total == 0.0, 1.0, total)

    for key in range(0, seqlen_k, BLOCK_N):
        inside = key + column < seqlen_k
        scores = tl.load(s + line + key + column, mask=inside, other=float("-inf"))
        weights = tl.exp2(scores - pivot) / divisor
        tl.store(p + line + key + column, weights.to(p.dtype.element_ty), mask=inside)
    target = row_pointers(lse, index // heads, index % heads, row, lse_stride_b, lse_stride_h, lse_stride_s)
    tl.store(target, (top + tl.log2(divisor)) * LN_2)


@triton.jit
def _values(
    p, v, o, heads, sharing, seqlen_q, seqlen_k,
    v_stride_b, v_stride_s, v_stride_h, v_stride_d, o_stride_b, o_stride_s, o_stride_h, o_stride_d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """O = P V, one program per tile of O rows."""
    row_tiles = tl.cdiv(seqlen_q, BLOCK_M)
    row = tl.program_id(0) % row_tiles * BLOCK_M
    index = tl.program_id(0) // row_tiles
    head = index % heads
    rows = row + tl.arange(0, BLOCK_M)
    line = tl.cast(index, tl.int64) * seqlen_q + rows
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for key in range(0, seqlen_k, BLOCK_N):
        columns = key + tl.arange(0, BLOCK_N)
        inside = (rows < seqlen_q)[:, None] & (columns < seqlen_k)[None, :]
        weights = tl.load(p + line[:, None] * seqlen_k + columns[None, :], mask=inside, other=0.0)
        values = load_tile(
            v, index // heads, head // sharing, key, seqlen_k, v_stride_b, v_stride_s, v_stride_h, v_stride_d,
            BLOCK_N, HEAD_DIM, False, True,
        )  # fmt: skip
        acc = gemm(weights, values, acc)
    store_tile(o, acc, index // heads, head, row, seqlen_q, o_stride_b, o_stride_s, o_stride_h, o_stride_d, BLOCK_M, HEAD_DIM)


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
    """O and LSE as fa2.forward gives them. S and P take 6 bytes for each (batch, head, query, key)."""
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads = k.shape[1:3]
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device) if o is None else o
    lse = torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=q.device) if lse is None else lse
    if o.numel() == 0:
        return o, lse
    tile = tile or standard_tile(head_dim, bool(INTERPRETED))
    whole = (batch * heads, seqlen_q, seqlen_k)
    s = torch.empty(whole, dtype=torch.float32, device=q.device)
    p = torch.empty(whole, dtype=q.dtype, device=q.device)
    sharing = heads // max(1, kv_heads)
    row_tiles = triton.cdiv(seqlen_q, tile.block_m)
    if seqlen_k:
        _scores[(row_tiles * triton.cdiv(seqlen_k, tile.block_n) * batch * heads,)](
            q, k, s, softmax_scale * LOG2_E.value, heads, sharing, seqlen_q, seqlen_k, *q.stride(), *k.stride(),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, HEAD_DIM=head_dim, CAUSAL=causal, **tile.options(),
        )  # fmt: skip
    _softmax[(seqlen_q * batch * heads,)](
        s, p, lse, heads, seqlen_q, seqlen_k, *lse.stride(), BLOCK_N=64 if INTERPRETED else 1024, num_warps=4
    )
    _values[(row_tiles * batch * heads,)](
        p, v, o, heads, sharing, seqlen_q, seqlen_k, *v.stride(), *o.stride(),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, HEAD_DIM=head_dim, **tile.options(),
    )  # fmt: skip
    return o, lse
