"""What the warp-specialised rungs share: shared memory, the walk over tiles, the producer, and the kernel around them.

A rung's file defines `consume`: how a consumer warpgroup takes its 64 queries through the K/V blocks of one tile. One warp loads;
two warpgroups of four warps each work on 64 rows. A program walks tiles `program, program + programs, ..`.
"""

import triton.language.core as core
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .verbs import LN_2, accumulator_layout, load_rows, of_threads, tile_layout, tma_store

CONSUMERS = gl.constexpr(2)
ROWS = gl.constexpr(64)


def record(cls):
    """A kernel's struct, from a class of annotations: `cls(*values)` in their order. Triton 3.6 makes no constructor itself."""

    def __init__(self, *values):
        for name, value in zip(cls.__annotations__, values, strict=True):
            setattr(self, name, value)

    __init__.__triton_builtin__ = True  # as Triton 3.9 marks the constructors that it makes: not code of the kernel
    cls.__init__ = __init__
    return core._aggregate(cls)


@record
class Problem:
    """What is asked: tensor maps, sizes, the scale; and the tile."""

    q: tma.tensor_descriptor
    k: tma.tensor_descriptor
    v: tma.tensor_descriptor
    o: tma.tensor_descriptor
    lse: gl.tensor
    heads: gl.tensor
    sharing: gl.tensor
    seqlen_q: gl.tensor
    seqlen_k: gl.tensor
    m_tiles: gl.tensor
    section: gl.tensor
    tiles: gl.tensor
    scale_log2: gl.tensor
    BLOCK_N: gl.constexpr
    HEAD_DIM: gl.constexpr
    STAGES: gl.constexpr
    CAUSAL: gl.constexpr


@record
class Shared:
    """Tiles in shared memory, and the mbarriers that say when each is full and when it is free again."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    q_free: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    k_free: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_free: gl.shared_memory_descriptor
    turn: gl.shared_memory_descriptor


@gluon.jit
def barriers(number: gl.constexpr, count: gl.constexpr):
    """`number` mbarriers of `count` arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(bars.index(i), count=count)
    return bars


@gluon.jit
def place(problem, number):
    """(batch and head, query tile, K/V blocks) of a tile by its number: by sections of heads, the last tile of every head first."""
    section_tiles = problem.section * problem.m_tiles
    first = number // section_tiles * problem.section
    inside = number - first * problem.m_tiles
    width = gl.minimum(problem.section, problem.tiles // problem.m_tiles - first)
    m = inside // width
    head = first + inside - m * width
    m = problem.m_tiles - 1 - m
    end = problem.seqlen_k
    if problem.CAUSAL:
        row = gl.minimum((m + 1) * (CONSUMERS * ROWS), problem.seqlen_q)
        end = gl.minimum(end, row + problem.seqlen_k - problem.seqlen_q)
    # Rows that see no key still walk one block, all of it masked: O = 0.
    return head, m, gl.cdiv(gl.maximum(end, 1), problem.BLOCK_N)


@gluon.jit
def produce(problem, shared):
    """The producer warp: Q, then K and V block by block, from the last to the first, V one block late."""
    base = 0
    count = 0
    for number in range(gl.program_id(0), problem.tiles, gl.num_programs(0)):
        head_index, m, blocks = place(problem, number)
        batch = head_index // problem.heads
        head = head_index % problem.heads
        kv_head = head // problem.sharing
        for rank in gl.static_range(CONSUMERS):
            mbarrier.wait(shared.q_free.index(rank), (count & 1) ^ 1)
            load_rows(problem.q, shared.q.index(rank), shared.q_full.index(rank), batch, head, (m * CONSUMERS + rank) * ROWS)
        for j in range(blocks + 1):
            if j < blocks:
                load_block(problem.k, shared.k, shared.k_full, shared.k_free, batch, kv_head, blocks - 1 - j, base + j, problem)
            if j > 0:
                load_block(problem.v, shared.v, shared.v_full, shared.v_free, batch, kv_head, blocks - j, base + j - 1, problem)
        base += blocks
        count += 1  # noqa: SIM113


@gluon.jit
def load_block(source, tiles, full, free, batch, kv_head, block, n, problem):
    """Load K or V block `block` as the n-th of this program."""
    stage = n % problem.STAGES
    mbarrier.wait(free.index(stage), ((n // problem.STAGES) & 1) ^ 1)
    load_rows(source, tiles.index(stage), full.index(stage), batch, kv_head, block * problem.BLOCK_N)


@gluon.jit
def await_block(tiles, full, n, problem):
    """The n-th K or V block as (rows, D), when it has landed."""
    stage = n % problem.STAGES
    mbarrier.wait(full.index(stage), (n // problem.STAGES) & 1)
    return tiles.index(stage).reshape([problem.BLOCK_N, problem.HEAD_DIM])


@gluon.jit
def release(free, n, problem):
    """This consumer is through with the n-th block."""
    mbarrier.arrive(free.index(n % problem.STAGES), count=1)


@gluon.jit
def take(shared, rank: gl.constexpr, turns):
    """Wait for this warpgroup's turn at the tensor cores; the first warpgroup has the first."""
    mbarrier.wait(shared.turn.index(rank), (turns & 1) ^ (1 - rank))


@gluon.jit
def give(shared, rank: gl.constexpr):
    """The turn is the other's."""
    mbarrier.arrive(shared.turn.index(1 - rank), count=1)


@gluon.jit
def start(problem, ROWS: gl.constexpr):
    """(O, maxima, row sums) of some rows before the first block."""
    out: gl.constexpr = accumulator_layout(problem.HEAD_DIM, gl.num_warps())
    scores: gl.constexpr = accumulator_layout(problem.BLOCK_N, gl.num_warps())
    acc = gl.zeros([ROWS, problem.HEAD_DIM], gl.float32, out)
    top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, scores))
    return acc, top, of_threads(gl.zeros([ROWS, problem.BLOCK_N], gl.float32, scores))


@gluon.jit
def shrink(acc, factor):
    """O times a factor per row."""
    return acc * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout)), 1)


@gluon.jit
def divisor_of(total, top):
    """Row sums, over the lanes of a quad; 1 for a row that has seen no key."""
    total = gl.convert_layout(gl.sum(total, 1), top.type.layout)
    return gl.where(total == 0.0, 1.0, total)


@gluon.jit
def as_operand(weights, problem):
    """P as the left operand of P V, in registers as it lies."""
    layout: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(problem.HEAD_DIM, gl.num_warps()), 2)
    return gl.convert_layout(weights.to(problem.v.dtype), layout)


@gluon.jit
def consumer(consume: gl.constexpr, problem, shared, rank: gl.constexpr):
    """A consumer warpgroup: its rows of every tile, O by way of Q's place in shared memory."""
    base = 0
    count = 0
    for number in range(gl.program_id(0), problem.tiles, gl.num_programs(0)):
        head_index, m, blocks = place(problem, number)
        first_row = (m * CONSUMERS + rank) * ROWS
        seen_whole = problem.seqlen_k
        if problem.CAUSAL:
            seen_whole = gl.minimum(seen_whole, gl.maximum(0, first_row + 1 + problem.seqlen_k - problem.seqlen_q))
        masked = blocks - seen_whole // problem.BLOCK_N
        mbarrier.wait(shared.q_full.index(rank), count & 1)
        acc, top, total = consume(problem, shared, rank, count, first_row, base, blocks, masked)

        divisor = divisor_of(total, top)
        q_tile = shared.q.index(rank)
        q_tile.reshape([ROWS, problem.HEAD_DIM]).store(shrink(acc, 1.0 / divisor).to(problem.o.dtype))
        fence_async_shared()
        tma_store(problem.o, [head_index // problem.heads, head_index % problem.heads, first_row, 0], q_tile)
        row = first_row + gl.arange(0, ROWS, layout=top.type.layout)
        lse = (top * problem.scale_log2 + gl.log2(divisor)) * LN_2
        gl.store(problem.lse + head_index.to(gl.int64) * problem.seqlen_q + row, lse, mask=row < problem.seqlen_q)
        tma.store_wait(0)
        mbarrier.arrive(shared.q_free.index(rank), count=1)
        base += blocks
        count += 1  # noqa: SIM113


@gluon.jit
def run(
    consume, q, k, v, o, lse, heads, sharing, seqlen_q, seqlen_k, m_tiles, section, tiles, scale_log2,
    BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """The kernel of a rung: three partitions."""
    dtype: gl.constexpr = q.dtype
    problem = Problem(
        q, k, v, o, lse, heads, sharing, seqlen_q, seqlen_k, m_tiles, section, tiles, scale_log2, BLOCK_N, HEAD_DIM, STAGES, CAUSAL
    )
    shared = Shared(
        gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, HEAD_DIM], tile_layout(4, dtype)),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], tile_layout(4, dtype)),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], tile_layout(4, dtype)),
        barriers(CONSUMERS, 1), barriers(CONSUMERS, 1),
        barriers(STAGES, 1), barriers(STAGES, CONSUMERS), barriers(STAGES, 1), barriers(STAGES, CONSUMERS),
        barriers(CONSUMERS, 1),
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consumer, (consume, problem, shared, gl.constexpr(0))),
            (consumer, (consume, problem, shared, gl.constexpr(1))),
            (produce, (problem, shared)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
