"""Pingpong by mbarriers: one warpgroup's softmax runs under the other's GEMMs."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .attention import as_operand, await_block, give, release, run, shrink, start, take
from .verbs import keys_seen, multiply, softmax


@gluon.jit
def step(problem, shared, rank: gl.constexpr, turn, first_row, key, queries, n, acc, top, total, MASKED: gl.constexpr):
    """Block n: the turn is held from its second GEMM on, and over the first of the next block."""
    keys = await_block(shared.k, shared.k_full, n, problem)
    scores = multiply(queries, keys.permute((1, 0)))
    give(shared, rank)  # the tensor cores are yours; I do softmax
    scores = warpgroup_mma_wait(0, deps=[scores])
    release(shared.k_free, n, problem)
    if MASKED:
        scores = keys_seen(scores, first_row, key, problem.seqlen_k, problem.seqlen_k - problem.seqlen_q, problem.CAUSAL)
    weights, factor, top, total = softmax(scores, top, total, problem.scale_log2, MASKED)
    operand = as_operand(weights, problem)
    acc = shrink(acc, factor)
    values = await_block(shared.v, shared.v_full, n, problem)
    take(shared, rank, turn)
    acc = warpgroup_mma(operand, values, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    release(shared.v_free, n, problem)
    return acc, top, total


@gluon.jit
def consume(problem, shared, rank: gl.constexpr, count, first_row, base, blocks, masked):
    """The turn is taken once more than there are blocks, before the first."""
    acc, top, total = start(problem, 64)
    queries = shared.q.index(rank).reshape([64, problem.HEAD_DIM])
    turn = base + count
    take(shared, rank, turn)
    for j in range(masked):
        key = (blocks - 1 - j) * problem.BLOCK_N
        acc, top, total = step(problem, shared, rank, turn + 1 + j, first_row, key, queries, base + j, acc, top, total, True)
    for j in range(masked, blocks):
        acc, top, total = step(problem, shared, rank, turn + 1 + j, first_row, 0, queries, base + j, acc, top, total, False)
    give(shared, rank)
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
