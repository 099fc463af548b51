"""FlashAttention-3 as its authors ship it: the program behind the papers' figures and the tables of other kernels.

Beside fa3.py, pingpong.py and warp_specialized.py the GEMMs come in the same order. Another softmax (the maximum of every
block first), other tiles, one Q for all consumers that is loaded again after the epilogue, and O staged over V, for which
the consumers meet.
"""


def fa3_published(cta, tile):
    """Two-stage overlap, and pingpong where FlashAttention-3 has it: fa3.py's steps, in the variant that its source takes.

    In 16 bits it has turns up to head dim 128 and in 8 bits from 128 on (`UseSchedulerBarrier`); O of 16 bits beyond 128 is
    rescaled under the next S (`RescaleOBeforeGemm`); P goes through shared memory where registers do not hold it. In its machine
    code (wheel fa3-fwd 0.0.3) K is handed back behind the first part of the softmax, in every variant.
    """
    Q, K, V, O, done = _buffers(cta, tile, ahead=True)
    walk = _variant(tile)
    for wg in cta.consumers():
        wg.wait(Q[0])
        S = wg.gemm("S", Q[0], K[0])
        wg.wait(S)
        wg.free(K[0])
        wg.softmax(0)
        walk(cta, wg, tile, Q, K, V)
        _epilogue(wg, O, done)


def _variant(tile):
    if not tile.holds_weights:
        return _through_shared_memory
    if tile.element_bytes == 2:
        return _in_turns if tile.head_dim <= 128 else _rescaled_under_scores
    return _in_turns if tile.head_dim >= 128 else _free_running


def _in_turns(cta, wg, tile, Q, K, V):
    turn = cta.baton(first=0)
    for j in tile.kv_blocks[1:]:
        wg.wait(K[j])
        wg.take(turn)
        S = wg.gemm("S", Q[0], K[j], loaded=True)
        PV = wg.gemm("O", "P", V[j - 1], add=True)
        wg.give(turn)
        wg.wait(S)
        wg.softmax(j)  # compiled: the maximum and a quarter of the exponentials, the rest when PV is done
        wg.free(K[j])
        wg.wait(PV)
        wg.free(V[j - 1])
        wg.rescale(j)
    wg.free(Q[0])
    _product(wg, "P", V[tile.kv_blocks[-1]])


def _through_shared_memory(cta, wg, tile, Q, K, V):
    turn, P = cta.baton(first=0), cta.outbox("P", tile.nbytes("P"))
    operand = _operand(wg, P, 0)
    for j in tile.kv_blocks[1:]:
        wg.wait(K[j])
        wg.take(turn)
        S = wg.gemm("S", Q[0], K[j], loaded=True)
        PV = wg.gemm("O", operand, V[j - 1], add=True)
        wg.give(turn)
        wg.wait(S)
        wg.softmax(j)  # compiled: the maximum and a quarter of the exponentials, the rest when PV is done
        wg.free(K[j])
        wg.wait(PV)
        wg.free(V[j - 1])
        wg.free(operand)
        wg.rescale(j)
        operand = _operand(wg, P, j)
    wg.free(Q[0])
    _product(wg, operand, V[tile.kv_blocks[-1]])


def _rescaled_under_scores(cta, wg, tile, Q, K, V):
    for j in tile.kv_blocks[1:]:
        S = wg.gemm("S", Q[0], K[j])
        wg.rescale(j - 1, "O")
        PV = wg.gemm("O", "P", V[j - 1], add=True)
        wg.wait(S)
        wg.softmax(j)  # compiled: the maximum and a quarter of the exponentials, the rest when PV is done
        wg.free(K[j])
        wg.wait(PV)
        wg.free(V[j - 1])
        wg.rescale(j, "P")
    wg.rescale(tile.kv_blocks[-1], "O")
    wg.free(Q[0])
    _product(wg, "P", V[tile.kv_blocks[-1]])


def _free_running(cta, wg, tile, Q, K, V):
    for j in tile.kv_blocks[1:]:
        S = wg.gemm("S", Q[0], K[j])
        PV = wg.gemm("O", "P", V[j - 1], add=True)
        wg.wait(S)
        wg.softmax(j)  # compiled: the maximum and a quarter of the exponentials, the rest when PV is done
        wg.free(K[j])
        wg.wait(PV)
        wg.free(V[j - 1])
        wg.rescale(j)
    wg.free(Q[0])
    _product(wg, "P", V[tile.kv_blocks[-1]])


def pingpong_published(cta, tile):
    """pingpong.py's steps."""
    Q, K, V, O, done = _buffers(cta, tile, ahead=False)
    P = None if tile.holds_weights else cta.outbox("P", tile.nbytes("P"))
    turn = cta.baton(first=0)
    for wg in cta.consumers():
        wg.wait(Q[0])
        wg.take(turn)
        for j in tile.kv_blocks:
            S = wg.gemm("S", Q[0], K[j])
            wg.give(turn)
            wg.wait(S)
            wg.free(K[j])
            wg.softmax(j)
            operand = _operand(wg, P, j)
            wg.take(turn)
            _product(wg, operand, V[j])
        wg.give(turn)
        wg.free(Q[0])
        _epilogue(wg, O, done)


def warp_specialized_published(cta, tile):
    """warp_specialized.py's steps."""
    Q, K, V, O, done = _buffers(cta, tile, ahead=False)
    P = None if tile.holds_weights else cta.outbox("P", tile.nbytes("P"))
    for wg in cta.consumers():
        wg.wait(Q[0])
        for j in tile.kv_blocks:
            S = wg.gemm("S", Q[0], K[j])
            wg.wait(S)
            wg.free(K[j])
            wg.softmax(j)
            _product(wg, _operand(wg, P, j), V[j])
        wg.free(Q[0])
        _epilogue(wg, O, done)


def _operand(wg, P, j):
    """The weights of block j as an operand: in registers, or put into shared memory."""
    if P is None:
        return "P"
    wg.put("P", P[wg, j])
    wg.wait(P[wg, j])
    return P[wg, j]


def _product(wg, operand, V):
    PV = wg.gemm("O", operand, V, add=True)
    wg.wait(PV)
    wg.free(V)
    if operand != "P":
        wg.free(operand)


def _buffers(cta, tile, ahead):
    """Buffers as the consumers read them, and what fills them: V behind the next K (`ahead`), or each K and V together.

    V of 8 bits is first transposed, since WGMMA takes 8-bit operands only with what is summed over contiguous (section 3.3):
    by warps of the producer's warpgroup, from one ring into another.
    """
    Q = cta.ring("Q", tile.q_bytes, stages=1)
    K = cta.ring("K", tile.k_bytes, tile.stages)
    V = cta.ring("V", tile.v_bytes, tile.stages)
    if tile.element_bytes > 1:
        O = cta.ring("O", tile.o_bytes, stages=1, over=V)
        (_load_ahead if ahead else _load_in_turn)(cta.producer(), Q, K, V, O, tile)
        return Q, K, V, O, cta.meeting()
    across = cta.exchange("V^T", tile.v_bytes, tile.stages)
    O = cta.ring("O", tile.o_bytes, stages=1, over=across)
    load, warps = cta.producer(), cta.transposers()
    load.tma(V[0])
    load.tma(K[0])
    load.tma(Q[0])
    warps.reclaim(O[0])
    for j in tile.kv_blocks[1:]:
        load.tma(V[j])
        load.tma(K[j])
    for j in tile.kv_blocks:
        warps.transpose(V[j], across[j])
    return Q, K, across, O, cta.meeting()


def _load_ahead(load, Q, K, V, O, tile):
    load.tma(K[0])
    load.tma(Q[0])
    load.reclaim(O[0])
    for j in tile.kv_blocks[1:]:
        load.tma(K[j])
        load.tma(V[j - 1])
    load.tma(V[tile.kv_blocks[-1]])


def _load_in_turn(load, Q, K, V, O, tile):
    load.tma(K[0])
    load.tma(Q[0])
    load.reclaim(O[0])
    load.tma(V[0])
    for j in tile.kv_blocks[1:]:
        load.tma(K[j])
        load.tma(V[j])


def _epilogue(wg, O, done):
    wg.normalize()
    wg.store("LSE")
    wg.meet(done)  # no one reads V any more
    wg.store("O", slot=O[0])
