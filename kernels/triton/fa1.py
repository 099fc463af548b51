"""FlashAttention (arXiv:2205.14135, Algorithm 1): K/V outer, Q inner; O, l and m are read and written at every step.

The schedule is `simulator/schedules/fa1.py`: one program per batch entry and head. O is kept normalised in fp32 memory
between steps, because rounding it to 16 bits at every step would add up; the last write rounds it once.

Bytes: the simulator counts 2 for an element of O at each reading and writing, as Algorithm 1 has it in the inputs' precision.
This kernel moves 4, and once more 4 and 2 for the last rounding: a measured run has more.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import INTERPRETED, LN_2, LOG2_E, gemm, product
from .loads import load_tile, row_pointers, store_tile
from .tiles import TritonTile, fa1_tile


@triton.jit
def _forward(
    q, k, v, o, total, top, scale_log2, heads, sharing, seqlen_q, seqlen_k,
    q_stride_b, q_stride_s, q_stride_h, q_stride_d, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
    v_stride_b, v_stride_s, v_stride_h, v_stride_d, o_stride_b, o_stride_s, o_stride_h, o_stride_d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Walk all K/V blocks of one head and, under each, the Q blocks that see it; m (`top`) is in base 2, scaled."""
    index = tl.program_id(0)
    batch = index // heads
    head = index % heads
    offset = seqlen_k - seqlen_q
    for key in range(0, seqlen_k, BLOCK_N):
        keys = load_tile(
            k, batch, head // sharing, key, seqlen_k, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
            BLOCK_N, HEAD_DIM, False, True,
        )  # fmt: skip
        values = load_tile(
            v, batch, head // sharing, key, seqlen_k, v_stride_b, v_stride_s, v_stride_h, v_stride_d,
            BLOCK_N, HEAD_DIM, False, True,
        )  # fmt: skip
        columns = key + tl.arange(0, BLOCK_N)
        begin = tl.maximum(0, key - offset) // BLOCK_M * BLOCK_M if CAUSAL else 0
        for row in range(begin, seqlen_q, BLOCK_M):
            rows = row + tl.arange(0, BLOCK_M)
            inside = rows < seqlen_q
            line = tl.cast(index, tl.int64) * seqlen_q + rows
            queries = load_tile(
                q, batch, head, row, seqlen_q, q_stride_b, q_stride_s, q_stride_h, q_stride_d,
                BLOCK_M, HEAD_DIM, False, True,
            )  # fmt: skip
            before = load_tile(
                o, batch, head, row, seqlen_q, o_stride_b, o_stride_s, o_stride_h, o_stride_d,
                BLOCK_M, HEAD_DIM, False, True,
            )  # fmt: skip
            total_before = tl.load(total + line, mask=inside, other=0.0)
            top_before = tl.load(top + line, mask=inside, other=float("-inf"))

            scores = product(queries, keys.T) * scale_log2
            seen = (columns < seqlen_k)[None, :]
            if CAUSAL:
                seen = seen & (columns[None, :] <= rows[:, None] + offset)
            scores = tl.where(seen, scores, float("-inf"))
            top_after = tl.maximum(top_before, tl.max(scores, 1))
            pivot = tl.where(top_after == float("-inf"), 0.0, top_after)
            weights = tl.exp2(scores - pivot[:, None])
            rescaled = total_before * tl.exp2(top_before - pivot)
            total_after = rescaled + tl.sum(weights, 1)
            after = gemm(weights.to(values.dtype), values, before * rescaled[:, None])
            after = after / tl.where(total_after == 0.0, 1.0, total_after)[:, None]

            # Other threads of the program read these rows in the next round.
            tl.debug_barrier()
            store_tile(o, after, batch, head, row, seqlen_q, o_stride_b, o_stride_s, o_stride_h, o_stride_d, BLOCK_M, HEAD_DIM)
            tl.store(total + line, total_after, mask=inside)
            tl.store(top + line, top_after, mask=inside)
            tl.debug_barrier()


@triton.jit
def _finish(
    work, total, top, o, lse, heads, seqlen_q,
    work_stride_b, work_stride_s, work_stride_h, work_stride_d, o_stride_b, o_stride_s, o_stride_h, o_stride_d,
    lse_stride_b, lse_stride_h, lse_stride_s, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """O in its own dtype, LSE from l and m."""
    row_tiles = tl.cdiv(seqlen_q, BLOCK_M)
    row = tl.program_id(0) % row_tiles * BLOCK_M
    index = tl.program_id(0) // row_tiles
    rows = row + tl.arange(0, BLOCK_M)
    done = load_tile(
        work, index // heads, index % heads, row, seqlen_q, work_stride_b, work_stride_s, work_stride_h, work_stride_d,
        BLOCK_M, HEAD_DIM, False, True,
    )  # fmt: skip
    store_tile(
        o, done, index // heads, index % heads, row, seqlen_q, o_stride_b, o_stride_s, o_stride_h, o_stride_d,
        BLOCK_M, HEAD_DIM,
    )  # fmt: skip
    line = tl.cast(index, tl.int64) * seqlen_q + rows
    sums = tl.load(total + line, mask=rows < seqlen_q, other=1.0)
    highest = tl.load(top + line, mask=rows < seqlen_q, other=0.0)
    natural = (highest + tl.log2(tl.where(sums == 0.0, 1.0, sums))) * LN_2
    target = row_pointers(lse, index // heads, index % heads, rows, lse_stride_b, lse_stride_h, lse_stride_s)
    tl.store(target, natural, mask=rows < seqlen_q)


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
    """O and LSE as fa2.forward gives them."""
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads = k.shape[1:3]
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device) if o is None else o
    lse = torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=q.device) if lse is None else lse
    if o.numel() == 0:
        return o, lse
    tile = tile or fa1_tile(head_dim, bool(INTERPRETED))
    work = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    total = torch.zeros(batch, heads, seqlen_q, dtype=torch.float32, device=q.device)
    top = torch.full_like(total, -math.inf)
    _forward[(batch * heads,)](
        q, k, v, work, total, top, softmax_scale * LOG2_E.value, heads, heads // max(1, kv_heads), seqlen_q, seqlen_k,
        *q.stride(), *k.stride(), *v.stride(), *work.stride(),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, HEAD_DIM=head_dim, CAUSAL=causal, **tile.options(),
    )  # fmt: skip
    _finish[(triton.cdiv(seqlen_q, tile.block_m) * batch * heads,)](
        work, total, top, o, lse, heads, seqlen_q, *work.stride(), *o.stride(), *lse.stride(),
        BLOCK_M=tile.block_m, HEAD_DIM=head_dim,
    )  # fmt: skip
    return o, lse
