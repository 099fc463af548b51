"""FlashAttention-3 once more, for what lies around its loop: tiles from a queue, O in a place of its own, turns by named barriers.

Against `fa3`: the producer draws the next tile while this one is worked on, so that no program idles beside a longer one; Q of the
next tile is loaded while O leaves; O shrinks under S of the next block, and P lies ready by then; a step hands over warp by warp.
Where no score can need a mask, there is none.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .assembly import arrive_at, packed, unpacked, wait_at
from .attention import await_block, barriers, divisor_of, record, shrink, start
from .verbs import LN_2, accumulator_layout, in_quads, keys_seen, load_rows, made_here, multiply, softmax, tile_layout, tma_store

ROWS = gl.constexpr(64)
"""Of a consumer warpgroup."""
WARPGROUP = gl.constexpr(128)
WARP = gl.constexpr(32)
POSTED, K_FREE, V_FREE, TURN, READ = gl.constexpr(5), gl.constexpr(8), gl.constexpr(10), gl.constexpr(12), gl.constexpr(15)
"""Named barriers: one a consumer, two, two, one a consumer, and one; Triton's own are those below 5."""


@record
class Problem:
    """What is asked: tensor maps, sizes, the scale; and how it is done."""

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
    CAUSAL: gl.constexpr
    CONSUMERS: gl.constexpr
    MASKED: gl.constexpr
    NAMED: gl.constexpr


@record
class Shared:
    """Tiles in shared memory, and the mbarriers that say when each is full and when it is free again."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    o: gl.shared_memory_descriptor
    work: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    q_free: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    k_free: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_free: gl.shared_memory_descriptor
    turn: gl.shared_memory_descriptor


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
def post(problem, shared, number, count):
    """Tell the consumers the number of this program's `count`-th tile, from 1: each partition knows the first.

    By named barriers, at which every thread that has written or read arrives itself: an mbarrier is arrived at by one thread for
    its partition, and that is an order that racecheck does not follow (validation/hand_overs.py).
    """
    if count > 1:
        await_read(problem)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    shared.work.index(0).store(gl.full([1], 0, gl.int32, layout) + number)
    for rank in gl.static_range(problem.CONSUMERS):
        arrive_at(POSTED + rank, WARPGROUP + WARP)


@gluon.jit
def await_read(problem):
    """Wait until all consumers have read what was posted last."""
    wait_at(READ, problem.CONSUMERS * WARPGROUP + WARP)


@gluon.jit
def next_tile(problem, shared, rank: gl.constexpr):
    """The number of the next tile, when the producer has posted it."""
    wait_at(POSTED + rank, WARPGROUP + WARP)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    number = gl.max(shared.work.index(0).load(layout), 0)
    arrive_at(READ, problem.CONSUMERS * WARPGROUP + WARP)
    return number


@gluon.jit
def produce(problem, shared):
    """The producer warp: K of a tile's last block, Q, then K and V block by block, last to first, V one block late.

    Its first tile is the program's number; each further one is drawn from a queue in memory, which the last program leaves at zero.
    """
    base = 0
    count = 0
    number = gl.program_id(0)
    while number < problem.tiles:
        head_index, m, blocks = place(problem, number)
        batch = head_index // problem.heads
        head = head_index % problem.heads
        kv_head = head // problem.sharing
        load_block(problem.k, shared.k, shared.k_full, shared.k_free, K_FREE, batch, kv_head, blocks - 1, base, problem)
        if count > 0:
            post(problem, shared, number, count)
        for rank in gl.static_range(problem.CONSUMERS):
            mbarrier.wait(shared.q_free.index(rank), (count & 1) ^ 1)
            row = (m * problem.CONSUMERS + rank) * ROWS
            load_rows(problem.q, shared.q.index(rank), shared.q_full.index(rank), batch, head, row)
        for j in range(1, blocks):
            load_block(problem.k, shared.k, shared.k_full, shared.k_free, K_FREE, batch, kv_head, blocks - 1 - j, base + j, problem)
            load_block(problem.v, shared.v, shared.v_full, shared.v_free, V_FREE, batch, kv_head, blocks - j, base + j - 1, problem)
        base += blocks
        load_block(problem.v, shared.v, shared.v_full, shared.v_free, V_FREE, batch, kv_head, 0, base - 1, problem)
        count += 1
        number = gl.num_programs(0) + gl.atomic_add(problem.queue, 1)
    post(problem, shared, number, count)  # that there is none
    await_read(problem)
    if problem.NAMED:  # no barrier is left with arrivals that nobody awaited
        for n in range(gl.maximum(base - problem.STAGES, 0), base):
            await_free(shared.k_free, K_FREE, n + problem.STAGES, problem)
            await_free(shared.v_free, V_FREE, n + problem.STAGES, problem)
    if gl.atomic_add(problem.queue + 1, 1) == gl.num_programs(0) - 1:
        gl.store(problem.queue, 0)
        gl.store(problem.queue + 1, 0)


@gluon.jit
def load_block(source, tiles, full, free, FREE: gl.constexpr, batch, kv_head, block, n, problem):
    """Load K or V block `block` as the n-th of this program."""
    stage = n % problem.STAGES
    await_free(free, FREE, n, problem)
    load_rows(source, tiles.index(stage), full.index(stage), batch, kv_head, block * problem.BLOCK_N)


@gluon.jit
def await_free(free, FREE: gl.constexpr, n, problem):
    """Wait until every consumer is through with the block that the n-th takes the place of."""
    stage = n % problem.STAGES
    if problem.NAMED:
        if n >= problem.STAGES:
            wait_at(FREE + stage, problem.CONSUMERS * WARPGROUP + WARP)
    else:
        mbarrier.wait(free.index(stage), ((n // problem.STAGES) & 1) ^ 1)


@gluon.jit
def release(free, FREE: gl.constexpr, n, problem):
    """This consumer is through with the n-th block."""
    stage = n % problem.STAGES
    if problem.NAMED:
        arrive_at(FREE + stage, problem.CONSUMERS * WARPGROUP + WARP)
    else:
        mbarrier.arrive(free.index(stage), count=1)


@gluon.jit
def take(problem, shared, rank: gl.constexpr, turns):
    """Wait for this warpgroup's turn at the tensor cores; the first warpgroup has the first."""
    if problem.NAMED:
        wait_at(TURN + rank, 2 * WARPGROUP)
    else:
        mbarrier.wait(shared.turn.index(rank), turns & 1 if rank else (turns & 1) ^ 1)


@gluon.jit
def give(problem, shared, rank: gl.constexpr):
    """The turn is the next warpgroup's."""
    following: gl.constexpr = (rank + 1) % problem.CONSUMERS
    if problem.NAMED:
        arrive_at(TURN + following, 2 * WARPGROUP)
    else:
        mbarrier.arrive(shared.turn.index(following), count=1)


@gluon.jit
def as_operand(pairs, problem):
    """P as the left operand of P V, in registers as it lies."""
    layout: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(problem.HEAD_DIM, gl.num_warps()), 2)
    return gl.convert_layout(gl.reshape(unpacked(pairs, problem.v.dtype), [ROWS, problem.BLOCK_N]), layout)


@gluon.jit
def pairs_of(weights, dtype: gl.constexpr):
    """P as pairs of neighbouring columns."""
    even, odd = gl.split(in_quads(weights))
    return packed(even, odd, dtype)


@gluon.jit
def step(problem, shared, rank: gl.constexpr, first_row, key, queries, n, state, MASKED: gl.constexpr):
    """S of block n, and behind it P V of the block before, which runs under block n's softmax.

    V is awaited behind S: what makes P and O ready for the second GEMM is not moved in front of the first across that wait.
    """
    pairs, factor, acc, top, total = state
    operand = as_operand(pairs, problem)
    keys = await_block(shared.k, shared.k_full, n, problem)
    take(problem, shared, rank, n)
    scores = multiply(queries, keys.permute((1, 0)))
    values = await_block(shared.v, shared.v_full, n - 1, problem)
    acc = shrink(acc, factor)
    acc = warpgroup_mma(operand, values, acc, is_async=True)
    give(problem, shared, rank)  # the tensor cores are yours; I do softmax
    scores = warpgroup_mma_wait(1, deps=[scores])
    release(shared.k_free, K_FREE, n, problem)
    if MASKED:
        scores = keys_seen(scores, first_row, key, problem.seqlen_k, problem.seqlen_k - problem.seqlen_q, problem.CAUSAL)
    weights, factor, top, total = softmax(scores, top, total, problem.scale_log2, MASKED)
    pairs = pairs_of(weights, problem.v.dtype)
    total = made_here(total)
    acc, pairs = warpgroup_mma_wait(0, deps=[acc, pairs])
    release(shared.v_free, V_FREE, n - 1, problem)
    return pairs, factor, acc, top, total


@gluon.jit
def consume(problem, shared, rank: gl.constexpr, first_row, base, blocks, masked):
    """(O, maxima, row sums) of a tile. The first block's S stands alone, and so does the last block's P V."""
    acc, top, total = start(problem, 64)
    queries = shared.q.index(rank).reshape([64, problem.HEAD_DIM])
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
    weights, factor, top, total = softmax(scores, top, total, problem.scale_log2, problem.MASKED)
    state = pairs_of(weights, problem.v.dtype), factor, acc, top, total
    if problem.MASKED:
        for j in range(1, masked):
            key -= problem.BLOCK_N
            state = step(problem, shared, rank, first_row, key, queries, base + j, state, True)
    for j in range(gl.maximum(masked, 1), blocks):
        state = step(problem, shared, rank, first_row, 0, queries, base + j, state, False)
    pairs, factor, acc, top, total = state
    if shared.o.shape[0] > 1:
        mbarrier.arrive(shared.q_free.index(rank), count=1)
    values = await_block(shared.v, shared.v_full, last, problem)
    acc = warpgroup_mma(as_operand(pairs, problem), values, shrink(acc, factor), is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    release(shared.v_free, V_FREE, last, problem)
    return acc, top, total


@gluon.jit
def consumer(consume: gl.constexpr, problem, shared, rank: gl.constexpr):
    """A consumer warpgroup: its rows of every tile. O leaves by way of a tile of its own in shared memory, or of Q's."""
    OWN_TILE: gl.constexpr = shared.o.shape[0] > 1
    base = 0
    count = 0
    if problem.NAMED and rank == problem.CONSUMERS - 1:
        give(problem, shared, rank)  # the first turn is the first warpgroup's
    number = gl.program_id(0)
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
        acc, top, total = consume(problem, shared, rank, first_row, base, blocks, masked)
        o_tile = shared.q.index(rank)
        if OWN_TILE:
            o_tile = shared.o.index(rank)
            tma.store_wait(0)  # of the tile before, which left meanwhile
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
        number = next_tile(problem, shared, rank)
    if problem.NAMED and rank == 0:
        take(problem, shared, rank, base)  # the turn that is left over
    tma.store_wait(0)


@gluon.jit
def run(
    consume, q, k, v, o, lse, queue, heads, sharing, seqlen_q, seqlen_k, m_tiles, section, tiles, scale_log2,
    BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, CONSUMERS: gl.constexpr,
    MASKED: gl.constexpr, NAMED: gl.constexpr, O_TILES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """The kernel of a rung: partitions for consumers and producer. `queue`: two zeros, next tile, programs done."""
    dtype: gl.constexpr = q.dtype
    problem = Problem(
        q, k, v, o, lse, queue, heads, sharing, seqlen_q, seqlen_k, m_tiles, section, tiles, scale_log2,
        BLOCK_N, HEAD_DIM, STAGES, CAUSAL, CONSUMERS, MASKED, NAMED,
    )  # fmt: skip
    shared = Shared(
        gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, HEAD_DIM], tile_layout(4, dtype)),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], tile_layout(4, dtype)),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], tile_layout(4, dtype)),
        gl.allocate_shared_memory(dtype, [O_TILES, 1, 1, ROWS if O_TILES > 1 else 8, HEAD_DIM], tile_layout(4, dtype)),
        gl.allocate_shared_memory(gl.int32, [1, 1], mbarrier.MBarrierLayout()),
        barriers(CONSUMERS, 1), barriers(CONSUMERS, 1),
        barriers(STAGES, 1), barriers(STAGES, CONSUMERS), barriers(STAGES, 1), barriers(STAGES, CONSUMERS),
        barriers(CONSUMERS, 1),
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


@gluon.jit
def attention_forward(
    q, k, v, o, lse, queue, heads, sharing, seqlen_q, seqlen_k, m_tiles, section, tiles, scale_log2,
    BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, CONSUMERS: gl.constexpr,
    MASKED: gl.constexpr, NAMED: gl.constexpr, O_TILES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """The kernel; arguments as of run."""
    run(
        consume, q, k, v, o, lse, queue, heads, sharing, seqlen_q, seqlen_k, m_tiles, section, tiles, scale_log2,
        BLOCK_N, HEAD_DIM, STAGES, CAUSAL, CONSUMERS, MASKED, NAMED, O_TILES, CONSUMER_REGISTERS, PRODUCER_REGISTERS,
    )  # fmt: skip
