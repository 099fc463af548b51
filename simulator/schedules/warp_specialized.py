"""Warp specialisation alone (FlashAttention-3 section 3.1): a producer warp loads, consumer warpgroups compute.

The consumers are free-running: nothing but the tensor cores' own arbitration keeps their GEMMs and softmax apart.
"""


def warp_specialized(cta, tile):
    """Algorithm 1 of FlashAttention-3: GEMM, softmax, GEMM, one after the other in each warpgroup."""
    Q = cta.ring("Q", tile.q_bytes, stages=1)
    K = cta.ring("K", tile.k_bytes, tile.stages)
    V = cta.ring("V", tile.v_bytes, tile.stages)
    O = cta.ring("O", tile.o_bytes, stages=1, over=V)
    done = cta.meeting()

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
        for j in tile.kv_blocks:
            S = wg.gemm("S=QK^T", K[j])
            wg.wait(S)
            wg.free(K[j])
            wg.softmax(j)
            PV = wg.gemm("O+=PV", V[j])
            wg.wait(PV)
            wg.free(V[j])
        wg.free(Q[0])
        wg.normalize()
        wg.store("LSE")
        wg.meet(done)  # no one reads V any more
        wg.store("O", slot=O[0])
