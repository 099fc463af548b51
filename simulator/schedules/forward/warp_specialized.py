"""Warp specialisation alone (FlashAttention-3 section 3.1): a producer warp loads, consumer warpgroups compute.

The consumers are free-running: nothing but the tensor cores' own arbitration keeps their GEMMs and softmax apart.
"""


def warp_specialized(cta, tile):
    """Algorithm 1 of FlashAttention-3: GEMM, softmax, GEMM, one after the other in each warpgroup."""
    Q = cta.private("Q", tile.q_bytes)
    K = cta.ring("K", tile.k_bytes, tile.stages)
    V = cta.ring("V", tile.v_bytes, tile.stages)
    O = cta.staging("O", tile.stage_bytes)
    last = tile.kv_blocks[-1]

    load = cta.producer()
    for wg in cta.consumers():
        load.tma(Q[wg])
    for j in tile.kv_blocks:
        load.tma(K[j])
        load.tma(V[j])

    for wg in cta.consumers():
        wg.wait(Q[wg])
        for j in tile.kv_blocks:
            S = wg.gemm("S", Q[wg], K[j])
            wg.wait(S)
            wg.free(K[j])
            if j == last:
                wg.free(Q[wg])
            wg.softmax(j)
            wg.rescale(j)
            PV = wg.gemm("O", "P", V[j], add=True)
            wg.wait(PV)
            wg.free(V[j])
        wg.normalize()
        wg.store("O", slot=O[wg])
        wg.store("LSE")
