"""Two-stage overlap within a warpgroup: P V of one block runs under the softmax of the next."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .attention import as_operand, await_block, release, run, shrink, start
from .verbs import keys_seen, made_here, multiply, softmax


@gluon.jit
def step(problem, shared, first_row, key, queries, n, weights, acc, top, total, MASKED: gl.constexpr):
    """S of block n, and behind it P V of the block before, which runs under block n's softmax.

    P is carried from step to step in fp32: 16-bit elements would be unpacked and packed at the loop's edge.
    """
    operand = as_operand(weights, problem)
    keys = await_block(shared.k, shared.k_full, n, problem)
    scores = multiply(queries, keys.permute((1, 0)))
    values = await_block(shared.v, shared.v_full, n - 1, problem)
    acc = warpgroup_mma(operand, values, acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    release(shared.k_free, n, problem)
    if MASKED:
        scores = keys_seen(scores, first_row, key, problem.seqlen_k, problem.seqlen_k - problem.seqlen_q, problem.CAUSAL)
    weights, factor, top, total = softmax(scores, top, total, problem.scale_log2, MASKED)
    total = made_here(total)
    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
    release(shared.v_free, n - 1, problem)
    return weights, shrink(acc, factor), top, total


@gluon.jit
def consume(problem, shared, rank: gl.constexpr, count, first_row, base, blocks, masked):
    """The first block's S stands alone, and so does the last block's P V."""
    acc, top, total = start(problem, 64)
    queries = shared.q.index(rank).reshape([64, problem.HEAD_DIM])
    last = base + blocks - 1
    key = (blocks - 1) * problem.BLOCK_N
    keys = await_block(shared.k, shared.k_full, base, problem)
    scores = warpgroup_mma_wait(0, deps=[multiply(queries, keys.permute((1, 0)))])
    release(shared.k_free, base, problem)
    scores = keys_seen(scores, first_row, key, problem.seqlen_k, problem.seqlen_k - problem.seqlen_q, problem.CAUSAL)
    weights, _, top, total = softmax(scores, top, total, problem.scale_log2, True)
    masked = gl.maximum(masked, 1)
    for j in range(1, masked):
        key -= problem.BLOCK_N
        weights, acc, top, total = step(problem, shared, first_row, key, queries, base + j, weights, acc, top, total, True)
    for j in range(masked, blocks):
        weights, acc, top, total = step(problem, shared, first_row, 0, queries, base + j, weights, acc, top, total, False)
    values = await_block(shared.v, shared.v_full, last, problem)
    acc = warpgroup_mma(as_operand(weights, problem), values, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    release(shared.v_free, last, problem)
    return acc, top, total


@gluon.jit
def attention_forward(
    q, k, v, o, lse, heads, sharing, seqlen_q, seqlen_k, m_tiles, section, tiles, scale_log2,
    BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """The kernel; arguments as of attention.run."""
    run(
        consume, q, k, v, o, lse, heads, sharing, seqlen_q, seqlen_k, m_tiles, section, tiles, scale_log2,
        BLOCK_N, HEAD_DIM, STAGES, CAUSAL, CONSUMER_REGISTERS, PRODUCER_REGISTERS,
    )  # fmt: skip
