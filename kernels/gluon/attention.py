"""What the warp-specialised rungs share: shared memory, the walk over tiles, the producer, and the kernel around them.

A rung's file defines `consume`: how a consumer warpgroup takes its 64 queries through the K/V blocks of one tile. One warp loads;
two or three
warpgroups of four warps each work on 64 rows. A program takes tile after tile, whichever is next.
"""

import triton.language.core as core
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .verbs import LN_2, accumulator_layout, load_rows, of_threads, tile_layout, tma_store

ROWS = gl.constexpr(64)
"""Of a consumer warpgroup."""


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
    queue: gl.tensor
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
    CONSUMERS: gl.constexpr
    CAUSAL: gl.constexpr
    MASKED: gl.constexpr


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
    o: gl.shared_memory_descriptor
    work: gl.shared_memory_descriptor
    work_full: gl.shared_memory_descriptor
    work_free: gl.shared_memory_descriptor


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
        row = gl.minimum((m + 1) * (problem.CONSUMERS * ROWS), problem.seqlen_q)
        end = gl.minimum(end, row + problem.seqlen_k - problem.seqlen_q)
    # Rows that see no key still walk one block, all of it masked: O = 0.
    return head, m, gl.cdiv(gl.maximum(end, 1), problem.BLOCK_N)


@gluon.jit
def post(shared, number, count):
    """Tell the consumers the number of the next tile."""
    slot = count & 1
    mbarrier.wait(shared.work_free.index(slot), ((count >> 1) & 1) ^ 1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    shared.work.index(slot).store(gl.full([1], 0, gl.int32, layout) + number)
    mbarrier.arrive(shared.work_full.index(slot), count=1)


@gluon.jit
def next_tile(shared, count):
    """The number of the next tile, when the producer has posted it."""
    slot = count & 1
    mbarrier.wait(shared.work_full.index(slot), (count >> 1) & 1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    number = gl.max(shared.work.index(slot).load(layout), 0)
    mbarrier.arrive(shared.work_free.index(slot), count=1)
    return number


@gluon.jit
def produce(problem, shared):
    """The producer warp: Q, then K and V block by block, from the last to the first, V one block late.

    Its first tile is the program's number; each further one is drawn from a queue in memory, which the last program leaves at zero.
    """
    base = 0
    count = 0
    number = gl.program_id(0)
    post(shared, number, count)
    while number < problem.tiles:
        head_index, m, blocks = place(problem, number)
        batch = head_index // problem.heads
        head = head_index % problem.heads
        kv_head = head // problem.sharing
        load_block(problem.k, shared.k, shared.k_full, shared.k_free, batch, kv_head, blocks - 1, base, problem)
        for rank in gl.static_range(problem.CONSUMERS):
            mbarrier.wait(shared.q_free.index(rank), (count & 1) ^ 1)
            row = (m * problem.CONSUMERS + rank) * ROWS
            load_rows(problem.q, shared.q.index(rank), shared.q_full.index(rank), batch, head, row)
        for j in range(1, blocks):
            load_block(problem.k, shared.k, shared.k_full, shared.k_free, batch, kv_head, blocks - 1 - j, base + j, problem)
            load_block(problem.v, shared.v, shared.v_full, shared.v_free, batch, kv_head, blocks - j, base + j - 1, problem)
        base += blocks
        load_block(problem.v, shared.v, shared.v_full, shared.v_free, batch, kv_head, 0, base - 1, problem)
        count += 1
        number = gl.num_programs(0) + gl.atomic_add(problem.queue, 1)
        post(shared, number, count)
    if gl.atomic_add(problem.queue + 1, 1) == gl.num_programs(0) - 1:
        gl.store(problem.queue, 0)
        gl.store(problem.queue + 1, 0)


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
    mbarrier.wait(shared.turn.index(rank), turns & 1 if rank else (turns & 1) ^ 1)


@gluon.jit
def give(problem, shared, rank: gl.constexpr):
    """The turn is the next warpgroup's."""
    mbarrier.arrive(shared.turn.index((rank + 1) % problem.CONSUMERS), count=1)


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
    """A consumer warpgroup: its rows of every tile. O leaves by way of a tile of its own in shared memory, or of Q's."""
    OWN_TILE: gl.constexpr = shared.o.shape[0] > 1
    base = 0
    count = 0
    number = next_tile(shared, count)
    while number < problem.tiles:
        head_index, m, blocks = place(problem, number)
        first_row = (m * problem.CONSUMERS + rank) * ROWS
        seen_whole = problem.seqlen_k
        if problem.CAUSAL:
            seen_whole = gl.minimum(seen_whole, gl.maximum(0, first_row + 1 + problem.seqlen_k - problem.seqlen_q))
        masked = 0
        if problem.MASKED:
            masked = blocks - seen_whole // problem.BLOCK_N
        mbarrier.wait(shared.q_full.index(rank), count & 1)
        acc, top, total = consume(problem, shared, rank, count, first_row, base, blocks, masked)
        o_tile = shared.q.index(rank)
        if OWN_TILE:
            mbarrier.arrive(shared.q_free.index(rank), count=1)
            o_tile = shared.o.index(rank)
            tma.store_wait(0)  # of the tile before, which ran meanwhile
        divisor = divisor_of(total, top)
        o_tile.reshape([ROWS, problem.HEAD_DIM]).store(shrink(acc, 1.0 / divisor).to(problem.o.dtype))
        fence_async_shared()
        tma_store(problem.o, [head_index // problem.heads, head_index % problem.heads, first_row, 0], o_tile)
        row = first_row + gl.arange(0, ROWS, layout=top.type.layout)
        lse = (top * problem.scale_log2 + gl.log2(divisor)) * LN_2
        gl.store(problem.lse + head_index.to(gl.int64) * problem.seqlen_q + row, lse, mask=row < problem.seqlen_q)
        if not OWN_TILE:
            tma.store_wait(0)
            mbarrier.arrive(shared.q_free.index(rank), count=1)
        base += blocks
        count += 1
        number = next_tile(shared, count)
    tma.store_wait(0)


@gluon.jit
def run(
    consume, q, k, v, o, lse, queue, heads, sharing, seqlen_q, seqlen_k, m_tiles, section, tiles, scale_log2,
    BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, CAUSAL: gl.constexpr,
    MASKED: gl.constexpr, O_TILES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """The kernel of a rung: a partition for each consumer and one for the producer."""
    dtype: gl.constexpr = q.dtype
    problem = Problem(
        q, k, v, o, lse, queue, heads, sharing, seqlen_q, seqlen_k, m_tiles, section, tiles, scale_log2,
        BLOCK_N, HEAD_DIM, STAGES, CONSUMERS, CAUSAL, MASKED,
    )  # fmt: skip
    shared = Shared(
        gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, HEAD_DIM], tile_layout(4, dtype)),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], tile_layout(4, dtype)),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], tile_layout(4, dtype)),
        barriers(CONSUMERS, 1), barriers(CONSUMERS, 1),
        barriers(STAGES, 1), barriers(STAGES, CONSUMERS), barriers(STAGES, 1), barriers(STAGES, CONSUMERS),
        barriers(CONSUMERS, 1),
        gl.allocate_shared_memory(dtype, [O_TILES, 1, 1, ROWS if O_TILES > 1 else 8, HEAD_DIM], tile_layout(4, dtype)),
        gl.allocate_shared_memory(gl.int32, [2, 1], mbarrier.MBarrierLayout()),
        barriers(2, 1), barriers(2, CONSUMERS),
    )  # fmt: skip
    registers: gl.constexpr = CONSUMER_REGISTERS
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consumer, (consume, problem, shared, gl.constexpr(0))),
                (consumer, (consume, problem, shared, gl.constexpr(1))),
                (produce, (problem, shared)),
            ],
            [4, 1],
            [registers, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (consume, problem, shared, gl.constexpr(0))),
                (consumer, (consume, problem, shared, gl.constexpr(1))),
                (consumer, (consume, problem, shared, gl.constexpr(2))),
                (produce, (problem, shared)),
            ],
            [4, 4, 1],
            [registers, registers, PRODUCER_REGISTERS],
        )
