"""Pingpong (FlashAttention-3 section 3.1): one warpgroup's softmax hides under the other's GEMMs.

Beside warp_specialized.py the baton is the idea: a warpgroup holds the turn from its second GEMM of one block to its
first GEMM of the next, and does its softmax while the other holds it.
"""


def pingpong(cta, tile):
    """Named barriers order the GEMMs: WG0's PV and next QK^T, then WG1's, and so on."""
    Q = cta.ring("Q", tile.q_bytes, stages=1)
    K = cta.ring("K", tile.k_bytes, tile.stages)
    V = cta.ring("V", tile.v_bytes, tile.stages)
    O = cta.ring("O", tile.o_bytes, stages=1, over=V)
    done = cta.meeting()
    turn = cta.baton(first=0)

    load = cta.producer()
    load.tma(Q[0])
    load.tma(K[0])
    load.reclaim(O[0])
    load.tma(V[0])
    for j in tile.kv_blocks[1:]:
        load.tma(K[j])
        load.tma(V[j])

    for wg in cta.consumers():
        wg.wait(Q[0])
        wg.take(turn)
        for j in tile.kv_blocks:
            S = wg.gemm("S=QK^T", K[j])
            wg.give(turn)  # the tensor cores are yours; I do softmax
            wg.wait(S)
            wg.free(K[j])
            wg.softmax(j)
            wg.take(turn)
            PV = wg.gemm("O+=PV", V[j])
            wg.wait(PV)
            wg.free(V[j])
        wg.give(turn)
        wg.free(Q[0])
        wg.normalize()
        wg.store("LSE")
        wg.meet(done)  # no one reads V any more
        wg.store("O", slot=O[0])
