"""TMA and asynchronous WGMMA in one partition: the same warps start loads, wait for them, multiply and take the softmax.

Two warpgroups share a tile of Q. K and V of the next block are loaded while this one is worked on.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .attention import Problem, as_operand, barriers, divisor_of, place, shrink, start
from .verbs import LN_2, keys_seen, load_rows, multiply, softmax, tile_layout, tma_store

BLOCK_M = gl.constexpr(128)


@gluon.jit
def load_ahead(source, tiles, full, batch, kv_head, block, n, blocks, problem):
    """Load the n-th block of this tile where there is one: the last of the sequence first."""
    if n < blocks:
        stage = n % problem.STAGES
        load_rows(source, tiles.index(stage), full.index(stage), batch, kv_head, block * problem.BLOCK_N)


@gluon.jit
def attention_forward(
    q, k, v, o, lse, heads, sharing, seqlen_q, seqlen_k, m_tiles, section, tiles, scale_log2,
    BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """One program: one tile of 128 queries of one head."""
    dtype: gl.constexpr = q.dtype
    problem = Problem(
        q, k, v, o, lse, heads, sharing, seqlen_q, seqlen_k, m_tiles, section, tiles, scale_log2, BLOCK_N, HEAD_DIM, STAGES, CAUSAL
    )
    q_tile = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_M, HEAD_DIM], tile_layout(4, dtype))
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], tile_layout(4, dtype))
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], tile_layout(4, dtype))
    q_full = barriers(1, 1)
    k_full = barriers(STAGES, 1)
    v_full = barriers(STAGES, 1)

    head_index, m, blocks = place(problem, gl.program_id(0))
    batch = head_index // heads
    head = head_index % heads
    kv_head = head // sharing
    first_row = m * BLOCK_M
    load_rows(q, q_tile, q_full.index(0), batch, head, first_row)
    for n in gl.static_range(STAGES):
        load_ahead(k, k_tiles, k_full, batch, kv_head, blocks - 1 - n, n, blocks, problem)
        load_ahead(v, v_tiles, v_full, batch, kv_head, blocks - 1 - n, n, blocks, problem)

    acc, top, total = start(problem, BLOCK_M)
    queries = q_tile.reshape([BLOCK_M, HEAD_DIM])
    mbarrier.wait(q_full.index(0), 0)
    for j in range(blocks):
        stage = j % STAGES
        phase = (j // STAGES) & 1
        key = (blocks - 1 - j) * BLOCK_N
        mbarrier.wait(k_full.index(stage), phase)
        scores = multiply(queries, k_tiles.index(stage).reshape([BLOCK_N, HEAD_DIM]).permute((1, 0)))
        scores = warpgroup_mma_wait(0, deps=[scores])
        load_ahead(k, k_tiles, k_full, batch, kv_head, blocks - 1 - j - STAGES, j + STAGES, blocks, problem)
        scores = keys_seen(scores, first_row, key, seqlen_k, seqlen_k - seqlen_q, CAUSAL)
        weights, factor, top, total = softmax(scores, top, total, scale_log2, True)
        acc = shrink(acc, factor)
        mbarrier.wait(v_full.index(stage), phase)
        values = v_tiles.index(stage).reshape([BLOCK_N, HEAD_DIM])
        acc = warpgroup_mma(as_operand(weights, problem), values, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        load_ahead(v, v_tiles, v_full, batch, kv_head, blocks - 1 - j - STAGES, j + STAGES, blocks, problem)

    divisor = divisor_of(total, top)
    row = first_row + gl.arange(0, BLOCK_M, layout=top.type.layout)
    row_lse = (top * scale_log2 + gl.log2(divisor)) * LN_2
    gl.store(lse + head_index.to(gl.int64) * seqlen_q + row, row_lse, mask=row < seqlen_q)
    q_tile.reshape([BLOCK_M, HEAD_DIM]).store(shrink(acc, 1.0 / divisor).to(dtype))
    fence_async_shared()
    tma_store(o, [batch, head, first_row, 0], q_tile)
    tma.store_wait(0)
