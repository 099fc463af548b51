"""FlashAttention-2's forward in Triton with one walk over K and V where kernels/triton/fa2.py has two, and O stored by TMA.

Two walks, whole blocks and then masked ones, fill the pipeline of loads twice a tile; on short rows that is much of a tile's time.
Here a block that needs the mask takes a branch. Loads and stores go by tensor maps alone. It has not run on a GPU.
"""

import triton
import triton.language as tl

from ..triton.arithmetic import LN_2, gemm, in_registers, product
from ..triton.loads import place


@triton.jit
def _seen(scores, first_row, key, seqlen_k, offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """Scores with -inf at keys past the end and, causal, above the diagonal."""
    column = key + tl.arange(0, BLOCK_N)
    seen = (column < seqlen_k)[None, :]
    if CAUSAL:
        row = first_row + tl.arange(0, BLOCK_M)
        seen = seen & (column[None, :] <= row[:, None] + offset)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def attention_forward(
    q, k, v, o, lse, scale_log2, heads_total, heads, sharing, seqlen_q, seqlen_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
    WHOLE: tl.constexpr, OVERLAPPED: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One program: one tile of Q rows of one head. q, k, v, o: tensor maps of [B, H, S, D]; WHOLE where no score is masked."""
    tile, head_index = place(tl.program_id(0), tl.cdiv(seqlen_q, BLOCK_M), heads_total, TOGETHER, CAUSAL)
    batch = head_index // heads
    head = head_index % heads
    kv_head = head // sharing
    first_row = tile * BLOCK_M
    offset = seqlen_k - seqlen_q
    end = seqlen_k
    unmasked = seqlen_k // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.maximum(0, tl.minimum(seqlen_k, tl.minimum(first_row + BLOCK_M, seqlen_q) + offset))
        unmasked = tl.maximum(0, tl.minimum(seqlen_k, first_row + offset + 1)) // BLOCK_N * BLOCK_N

    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    rescale = tl.full([BLOCK_M], 1.0, tl.float32)
    queries = q.load([batch, head, first_row, 0]).reshape(BLOCK_M, HEAD_DIM)
    weights = tl.zeros([BLOCK_M, BLOCK_N], queries.dtype)
    for key in tl.range(0, end, BLOCK_N):
        keys = k.load([batch, kv_head, key, 0]).reshape(BLOCK_N, HEAD_DIM)
        if OVERLAPPED:  # before the first block weights are 0 and V, outside the tensor, too
            before = v.load([batch, kv_head, key - BLOCK_N, 0]).reshape(BLOCK_N, HEAD_DIM)
        scores = product(queries, keys.T)
        if OVERLAPPED:
            acc = gemm(in_registers(weights), before, acc * rescale[:, None])
        if not WHOLE:  # noqa: SIM102 - the first is of the compiler, the second of the kernel
            if key >= unmasked:
                scores = _seen(scores, first_row, key, seqlen_k, offset, BLOCK_M, BLOCK_N, CAUSAL)
        higher = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        pivot = higher
        if CAUSAL:  # a row that has seen no key has maximum -inf; 0 in its place gives exp2(-inf) = 0 and not NaN
            pivot = tl.where(higher == float("-inf"), 0.0, higher)
        fresh = tl.exp2(scores * scale_log2 - pivot[:, None])
        rescale = tl.exp2(top - pivot)
        total = total * rescale + tl.sum(fresh, 1)
        top = higher
        weights = fresh.to(queries.dtype)
        if not OVERLAPPED:
            acc = acc * rescale[:, None]
            values = v.load([batch, kv_head, key, 0]).reshape(BLOCK_N, HEAD_DIM)
            acc = gemm(weights, values, acc)
    if OVERLAPPED:
        last = v.load([batch, kv_head, (tl.cdiv(end, BLOCK_N) - 1) * BLOCK_N, 0]).reshape(BLOCK_N, HEAD_DIM)
        acc = gemm(in_registers(weights), last, acc * rescale[:, None])

    divisor = tl.where(total == 0.0, 1.0, total)
    o.store([batch, head, first_row, 0], (acc / divisor[:, None]).to(queries.dtype).reshape(1, 1, BLOCK_M, HEAD_DIM))
    row = first_row + tl.arange(0, BLOCK_M)
    address = lse + tl.cast(head_index, tl.int64) * seqlen_q + row
    tl.store(address, (top + tl.log2(divisor)) * LN_2, mask=row < seqlen_q)
