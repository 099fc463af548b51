"""A producer warp and two consumer warpgroups; a block's GEMMs and softmax one after the other."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .attention import as_operand, await_block, release, run, shrink, start
from .verbs import keys_seen, multiply, softmax


@gluon.jit
def step(problem, shared, first_row, key, queries, n, acc, top, total, MASKED: gl.constexpr):
    """Block n: S = Q K^T, softmax, O += P V."""
    keys = await_block(shared.k, shared.k_full, n, problem)
    scores = multiply(queries, keys.permute((1, 0)))
    scores = warpgroup_mma_wait(0, deps=[scores])
    release(shared.k_free, n, problem)
    if MASKED:
        scores = keys_seen(scores, first_row, key, problem.seqlen_k, problem.seqlen_k - problem.seqlen_q, problem.CAUSAL)
    weights, factor, top, total = softmax(scores, top, total, problem.scale_log2, MASKED)
    operand = as_operand(weights, problem)
    acc = shrink(acc, factor)
    values = await_block(shared.v, shared.v_full, n, problem)
    acc = warpgroup_mma(operand, values, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    release(shared.v_free, n, problem)
    return acc, top, total


@gluon.jit
def consume(problem, shared, rank: gl.constexpr, count, first_row, base, blocks, masked):
    """Masked blocks first, then those that every row sees whole."""
    acc, top, total = start(problem, 64)
    queries = shared.q.index(rank).reshape([64, problem.HEAD_DIM])
    for j in range(masked):
        key = (blocks - 1 - j) * problem.BLOCK_N
        acc, top, total = step(problem, shared, first_row, key, queries, base + j, acc, top, total, True)
    for j in range(masked, blocks):
        acc, top, total = step(problem, shared, first_row, 0, queries, base + j, acc, top, total, False)
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
