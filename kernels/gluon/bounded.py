"""`persistent` without a search for maxima: weights from the maximum so far, while the sum of a block's weights bounds them.

Weights are taken from the maximum of the blocks before. While no thread's share of a row sum passes a limit, neither the maximum
nor O has to change; a warp in which one does looks for its maxima and takes its weights again. That branch of a warp is said in
PTX (assembly.py): to Gluon a branch is a whole partition's. Maxima and row sums are (rows, 4), one for each lane of a quad.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .assembly import conversion, packed, shrunk_if_grown, shrunk_if_grown_operands, weights_anew, weights_anew_operands
from .attention import await_block
from .persistent import K_FREE, ROWS, V_FREE, as_operand, give, release, run, take
from .verbs import accumulator_layout, in_quads, keys_seen, multiply


@gluon.jit
def _first(a, b):
    return a


@gluon.jit
def of_lanes(x):
    """(rows, groups, 4), of which only the first group means anything, as (rows, 4)."""
    return gl.reduce(x, 1, _first)


@gluon.jit
def for_groups(x, like):
    """The inverse: (rows, 4) for every group of columns."""
    return gl.expand_dims(x, 1) + gl.zeros_like(like)


@gluon.jit
def weights_by(even, odd, top, scale_log2):
    """exp2(scale (S - top)) of even and of odd columns, and each thread's sums of them, (rows, 4)."""
    shift = gl.expand_dims(top * scale_log2, 1)
    even = gl.exp2(even * scale_log2 - shift)
    odd = gl.exp2(odd * scale_log2 - shift)
    return even, odd, gl.sum(even + odd, 1)


@gluon.jit
def first_softmax(scores, scale_log2, dtype: gl.constexpr, MASKED: gl.constexpr):
    """P as pairs, maxima and row sums of a tile's first block, from its own maximum."""
    even, odd = gl.split(in_quads(scores))
    lanes: gl.constexpr = gl.SliceLayout(1, even.type.layout)
    top = gl.expand_dims(gl.convert_layout(gl.max(scores, 1), gl.SliceLayout(1, lanes)), 1)
    top += gl.full([ROWS, 4], 0.0, gl.float32, lanes)
    pivot = top
    if MASKED:  # a row that has seen no key has maximum -inf; 0 in its place gives exp2(-inf) = 0 and not NaN
        pivot = gl.where(top == float("-inf"), 0.0, top)
    even, odd, total = weights_by(even, odd, pivot, scale_log2)
    return packed(even, odd, dtype), top, total


@gluon.jit
def softmax(scores, top, total, scale_log2, dtype: gl.constexpr):
    """P as pairs, the factor that shrinks what came before, maxima and row sums: of most blocks by the maximum that is known.

    Of a row that has seen no key it is -inf, which makes sums that are none.
    """
    even, odd = gl.split(in_quads(scores))
    even_weights, odd_weights, sums = weights_by(even, odd, top, scale_log2)
    pairs = packed(even_weights, odd_weights, dtype)
    PAIRS: gl.constexpr = 2 * even.shape[1]
    scale = gl.zeros_like(even) + scale_log2
    pairs, total, top, factor = gl.inline_asm_elementwise(
        weights_anew(PAIRS, conversion(dtype)), weights_anew_operands(PAIRS),
        [even, odd, pairs, for_groups(sums, even), for_groups(total, even), for_groups(top, even), scale],
        dtype=[gl.int32, gl.float32, gl.float32, gl.float32], is_pure=False, pack=PAIRS,
    )  # fmt: skip
    return pairs, of_lanes(factor), of_lanes(top), of_lanes(total)


@gluon.jit
def shrink_if_grown(acc, factor):
    """O times its factors, by warps in which a maximum has grown."""
    quads = in_quads(acc)
    lanes: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, quads.type.layout))
    factor = gl.expand_dims(gl.expand_dims(gl.convert_layout(factor, lanes), 1), 3) + gl.zeros_like(quads)
    ELEMENTS: gl.constexpr = acc.shape[1] // 2
    quads = gl.inline_asm_elementwise(
        shrunk_if_grown(ELEMENTS), shrunk_if_grown_operands(ELEMENTS), [quads, factor],
        dtype=gl.float32, is_pure=False, pack=ELEMENTS,
    )  # fmt: skip
    return gl.convert_layout(gl.reshape(quads, [ROWS, acc.shape[1]]), acc.type.layout)


@gluon.jit
def step(problem, shared, rank: gl.constexpr, first_row, key, queries, n, state, MASKED: gl.constexpr):
    """S of block n, and behind it P V of the block before, which runs under block n's softmax."""
    pairs, acc, top, total = state
    operand = as_operand(pairs, problem)
    keys = await_block(shared.k, shared.k_full, n, problem)
    take(problem, shared, rank, n)
    scores = multiply(queries, keys.permute((1, 0)))
    values = await_block(shared.v, shared.v_full, n - 1, problem)  # behind S: see persistent.py
    acc = warpgroup_mma(operand, values, acc, is_async=True)
    give(problem, shared, rank)  # the tensor cores are yours; I do softmax
    scores = warpgroup_mma_wait(1, deps=[scores])
    release(shared.k_free, K_FREE, n, problem)
    if MASKED:
        scores = keys_seen(scores, first_row, key, problem.seqlen_k, problem.seqlen_k - problem.seqlen_q, problem.CAUSAL)
    pairs, factor, top, total = softmax(scores, top, total, problem.scale_log2, problem.v.dtype)
    acc, pairs = warpgroup_mma_wait(0, deps=[acc, pairs])
    release(shared.v_free, V_FREE, n - 1, problem)
    return pairs, shrink_if_grown(acc, factor), top, total


@gluon.jit
def consume(problem, shared, rank: gl.constexpr, first_row, base, blocks, masked):
    """(O, maxima, row sums) of a tile. The first block's S stands alone, and so does the last block's P V."""
    queries = shared.q.index(rank).reshape([ROWS, problem.HEAD_DIM])
    last = base + blocks - 1
    key = (blocks - 1) * problem.BLOCK_N
    keys = await_block(shared.k, shared.k_full, base, problem)
    take(problem, shared, rank, base)
    scores = multiply(queries, keys.permute((1, 0)))
    give(problem, shared, rank)
    scores = warpgroup_mma_wait(0, deps=[scores])
    release(shared.k_free, K_FREE, base, problem)
    if problem.MASKED:
        scores = keys_seen(scores, first_row, key, problem.seqlen_k, problem.seqlen_k - problem.seqlen_q, problem.CAUSAL)
    pairs, top, total = first_softmax(scores, problem.scale_log2, problem.v.dtype, problem.MASKED)
    out: gl.constexpr = accumulator_layout(problem.HEAD_DIM, gl.num_warps())
    state = pairs, gl.zeros([ROWS, problem.HEAD_DIM], gl.float32, out), top, total
    if problem.MASKED:
        for j in range(1, masked):
            key -= problem.BLOCK_N
            state = step(problem, shared, rank, first_row, key, queries, base + j, state, True)
    for j in range(gl.maximum(masked, 1), blocks):
        state = step(problem, shared, rank, first_row, 0, queries, base + j, state, False)
    pairs, acc, top, total = state
    if shared.o.shape[0] > 1:
        mbarrier.arrive(shared.q_free.index(rank), count=1)
    values = await_block(shared.v, shared.v_full, last, problem)
    acc = warpgroup_mma(as_operand(pairs, problem), values, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    release(shared.v_free, V_FREE, last, problem)
    return acc, gl.convert_layout(gl.max(top, 1), gl.SliceLayout(1, out)), total


@gluon.jit
def attention_forward(
    q, k, v, o, lse, queue, heads, sharing, seqlen_q, seqlen_k, m_tiles, section, tiles, scale_log2,
    BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, CONSUMERS: gl.constexpr,
    MASKED: gl.constexpr, NAMED: gl.constexpr, O_TILES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """The kernel; arguments as of persistent.run."""
    run(
        consume, q, k, v, o, lse, queue, heads, sharing, seqlen_q, seqlen_k, m_tiles, section, tiles, scale_log2,
        BLOCK_N, HEAD_DIM, STAGES, CAUSAL, CONSUMERS, MASKED, NAMED, O_TILES, CONSUMER_REGISTERS, PRODUCER_REGISTERS,
    )  # fmt: skip
