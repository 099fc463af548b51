"""FlashAttention-3 as its authors ship it: the program behind the papers' figures and the tables of other kernels.

Beside fa3.py, pingpong.py and warp_specialized.py the GEMMs come in the same order. Another softmax (the maximum of every
block first), other tiles, one Q for all consumers that is loaded again after the epilogue, and O staged over V, for which
the consumers meet.
"""


def fa3_published(cta, tile):
    """Pingpong and two-stage overlap: fa3.py's steps."""
    Q, K, V, O, done = _buffers(cta, tile)
    turn = cta.baton(first=0)
    last = tile.kv_blocks[-1]

    load = cta.producer()
    load.tma(Q[0])
    load.tma(K[0])
    load.reclaim(O[0])
    for j in tile.kv_blocks[1:]:
        load.tma(K[j])
        load.tma(V[j - 1])
    load.tma(V[last])

    for wg in cta.consumers():
        wg.wait(Q[0])
        S = wg.gemm("S", Q[0], K[0])
        wg.wait(S)
        wg.free(K[0])
        wg.softmax(0)
        for j in tile.kv_blocks[1:]:
            wg.take(turn)
            S = wg.gemm("S", Q[0], K[j])
            PV = wg.gemm("O", "P", V[j - 1], add=True)
            wg.give(turn)
            wg.wait(S)
            wg.free(K[j])
            wg.softmax(j)
            wg.wait(PV)
            wg.free(V[j - 1])
            wg.rescale(j)
        wg.free(Q[0])
        PV = wg.gemm("O", "P", V[last], add=True)
        wg.wait(PV)
        wg.free(V[last])
        _epilogue(wg, O, done)


def pingpong_published(cta, tile):
    """pingpong.py's steps."""
    Q, K, V, O, done = _buffers(cta, tile)
    turn = cta.baton(first=0)
    _load_in_turn(cta.producer(), Q, K, V, O, tile)
    for wg in cta.consumers():
        wg.wait(Q[0])
        wg.take(turn)
        for j in tile.kv_blocks:
            S = wg.gemm("S", Q[0], K[j])
            wg.give(turn)
            wg.wait(S)
            wg.free(K[j])
            wg.softmax(j)
            wg.take(turn)
            PV = wg.gemm("O", "P", V[j], add=True)
            wg.wait(PV)
            wg.free(V[j])
        wg.give(turn)
        wg.free(Q[0])
        _epilogue(wg, O, done)


def warp_specialized_published(cta, tile):
    """warp_specialized.py's steps."""
    Q, K, V, O, done = _buffers(cta, tile)
    _load_in_turn(cta.producer(), Q, K, V, O, tile)
    for wg in cta.consumers():
        wg.wait(Q[0])
        for j in tile.kv_blocks:
            S = wg.gemm("S", Q[0], K[j])
            wg.wait(S)
            wg.free(K[j])
            wg.softmax(j)
            PV = wg.gemm("O", "P", V[j], add=True)
            wg.wait(PV)
            wg.free(V[j])
        wg.free(Q[0])
        _epilogue(wg, O, done)


def _buffers(cta, tile):
    Q = cta.ring("Q", tile.q_bytes, stages=1)
    K = cta.ring("K", tile.k_bytes, tile.stages)
    V = cta.ring("V", tile.v_bytes, tile.stages)
    return Q, K, V, cta.ring("O", tile.o_bytes, stages=1, over=V), cta.meeting()


def _load_in_turn(load, Q, K, V, O, tile):
    load.tma(Q[0])
    load.tma(K[0])
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
