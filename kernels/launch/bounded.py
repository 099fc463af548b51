"""FlashAttention-2's forward in Triton with weights from the maximum so far, as kernels/gluon/bounded.py has them.

A warp looks for maxima and shrinks O only where the sum of a block's weights has passed a limit; that branch is said in PTX, the
text of kernels/gluon/assembly.py, since a branch of Triton's is a whole program's. Where kernels/triton/fa2.py has two walks over
K and V, whole blocks and then masked ones, there may be one, in which a block that needs the mask takes a branch: the pipeline of
loads is filled once. Loads and stores go by tensor maps alone. Maxima and row sums are (rows, 4), one for each lane of a quad.
"""

import triton
import triton.language as tl

from ..gluon.assembly import (
    conversion,
    shrunk_if_grown,
    shrunk_if_grown_operands,
    weights_anew,
    weights_anew_operands,
)
from ..triton.arithmetic import LN_2, gemm, product
from ..triton.loads import place


@triton.jit
def _first(a, b):
    return a


@triton.jit
def _in_quads(x):
    """(rows, columns) as (rows, columns / 8, 4, 2): what a thread holds of an accumulator's row, its lane in the quad, a pair."""
    ROWS: tl.constexpr = x.shape[0]
    GROUPS: tl.constexpr = x.shape[1] // 8
    return tl.reshape(x, [ROWS, GROUPS, 4, 2])


@triton.jit
def _softmax(scores, top, total, scale_log2, dtype: tl.constexpr):
    """P as pairs, the factor that shrinks what came before, maxima and row sums: of most blocks by the maximum that is known.

    Of a row that has seen no key it is -inf, which makes sums that are none.
    """
    even, odd = tl.split(_in_quads(scores))
    shift = tl.expand_dims(top * scale_log2, 1)
    even_weights = tl.exp2(even * scale_log2 - shift)
    odd_weights = tl.exp2(odd * scale_log2 - shift)
    nothing = tl.zeros_like(even)
    sums = tl.expand_dims(tl.sum(even_weights + odd_weights, 1), 1) + nothing
    CONVERT: tl.constexpr = conversion(dtype)
    pairs = tl.inline_asm_elementwise(
        CONVERT + " $0, $2, $1;", "=r,f,f", [even_weights, odd_weights], dtype=tl.int32, is_pure=True, pack=1
    )
    PAIRS: tl.constexpr = 2 * even.shape[1]
    before, old = tl.expand_dims(total, 1) + nothing, tl.expand_dims(top, 1) + nothing
    pairs, total, top, factor = tl.inline_asm_elementwise(
        weights_anew(PAIRS, CONVERT), weights_anew_operands(PAIRS),
        [even, odd, pairs, sums, before, old, nothing + scale_log2],
        dtype=[tl.int32, tl.float32, tl.float32, tl.float32], is_pure=False, pack=PAIRS,
    )  # fmt: skip
    return pairs, tl.reduce(factor, 1, _first), tl.reduce(top, 1, _first), tl.reduce(total, 1, _first)


@triton.jit
def _as_operand(pairs, dtype: tl.constexpr, BLOCK_N: tl.constexpr):
    """P as the left operand of P V."""
    even, odd = tl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs], dtype=[tl.int16, tl.int16], is_pure=True, pack=1
    )
    return tl.reshape(tl.join(even.to(dtype, bitcast=True), odd.to(dtype, bitcast=True)), [pairs.shape[0], BLOCK_N])


@triton.jit
def _shrink_if_grown(acc, factor):
    """O times its factors, by warps in which a maximum has grown."""
    quads = _in_quads(acc)
    factor = tl.expand_dims(tl.expand_dims(factor, 1), 3) + tl.zeros_like(quads)
    ELEMENTS: tl.constexpr = acc.shape[1] // 2
    quads = tl.inline_asm_elementwise(
        shrunk_if_grown(ELEMENTS), shrunk_if_grown_operands(ELEMENTS), [quads, factor],
        dtype=tl.float32, is_pure=False, pack=ELEMENTS,
    )  # fmt: skip
    return tl.reshape(quads, [acc.shape[0], acc.shape[1]])


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
def _walk(
    state, queries, k, v, scale_log2, batch, kv_head, first_row, begin, end, unmasked, seqlen_k, offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """Take the K/V blocks of [begin, end) into O, those from `unmasked` on with the mask where MASKED."""
    pairs, factor, acc, top, total = state
    dtype: tl.constexpr = queries.dtype
    for key in tl.range(begin, end, BLOCK_N):
        keys = k.load([batch, kv_head, key, 0]).reshape(BLOCK_N, HEAD_DIM)
        if OVERLAPPED:  # before the first block weights are 0 and V, outside the tensor, too
            before = v.load([batch, kv_head, key - BLOCK_N, 0]).reshape(BLOCK_N, HEAD_DIM)
        scores = product(queries, keys.T)
        if OVERLAPPED:
            acc = gemm(_as_operand(pairs, dtype, BLOCK_N), before, _shrink_if_grown(acc, factor))
        if MASKED:  # noqa: SIM102 - the first is of the compiler, the second of the kernel
            if key >= unmasked:
                scores = _seen(scores, first_row, key, seqlen_k, offset, BLOCK_M, BLOCK_N, CAUSAL)
        pairs, factor, top, total = _softmax(scores, top, total, scale_log2, dtype)
        if not OVERLAPPED:
            values = v.load([batch, kv_head, key, 0]).reshape(BLOCK_N, HEAD_DIM)
            acc = gemm(_as_operand(pairs, dtype, BLOCK_N), values, _shrink_if_grown(acc, factor))
    return pairs, factor, acc, top, total


@triton.jit
def attention_forward(
    q, k, v, o, lse, scale_log2, heads_total, heads, sharing, seqlen_q, seqlen_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
    WHOLE: tl.constexpr, ONE_WALK: tl.constexpr, OVERLAPPED: tl.constexpr, TOGETHER: tl.constexpr,
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

    queries = q.load([batch, head, first_row, 0]).reshape(BLOCK_M, HEAD_DIM)
    dtype: tl.constexpr = queries.dtype
    pairs = tl.zeros([BLOCK_M, BLOCK_N // 8, 4], tl.int32)
    factor = tl.full([BLOCK_M, 4], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    top = tl.full([BLOCK_M, 4], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M, 4], tl.float32)
    state = pairs, factor, acc, top, total
    MASKED: tl.constexpr = not WHOLE
    first_walk_ends = end if ONE_WALK else unmasked
    state = _walk(
        state, queries, k, v, scale_log2, batch, kv_head, first_row, 0, first_walk_ends, unmasked, seqlen_k, offset,
        BLOCK_M, BLOCK_N, HEAD_DIM, CAUSAL, MASKED and ONE_WALK, OVERLAPPED,
    )  # fmt: skip
    if MASKED and not ONE_WALK:
        state = _walk(
            state, queries, k, v, scale_log2, batch, kv_head, first_row, unmasked, end, unmasked, seqlen_k, offset,
            BLOCK_M, BLOCK_N, HEAD_DIM, CAUSAL, True, OVERLAPPED,
        )  # fmt: skip
    pairs, factor, acc, top, total = state
    if OVERLAPPED:
        last = v.load([batch, kv_head, (tl.cdiv(end, BLOCK_N) - 1) * BLOCK_N, 0]).reshape(BLOCK_N, HEAD_DIM)
        acc = gemm(_as_operand(pairs, dtype, BLOCK_N), last, _shrink_if_grown(acc, factor))

    total = tl.sum(total, 1)
    divisor = tl.where(total == 0.0, 1.0, total)
    o.store([batch, head, first_row, 0], (acc / divisor[:, None]).to(dtype).reshape(1, 1, BLOCK_M, HEAD_DIM))
    row = first_row + tl.arange(0, BLOCK_M)
    address = lse + tl.cast(head_index, tl.int64) * seqlen_q + row
    tl.store(address, (tl.max(top, 1) * scale_log2 + tl.log2(divisor)) * LN_2, mask=row < seqlen_q)
