"""Pingpong (FlashAttention-3 section 3.1): one warpgroup's softmax hides under the other's GEMMs.

Beside warp_specialized.py the baton is the idea: a warpgroup holds the turn from its second GEMM of one block to its
first GEMM of the next, and does its softmax while the other holds it.
"""


def pingpong(cta, tile):
    """Named barriers order the GEMMs: WG0's PV and next QK^T, then WG1's, and so on."""
    Q = cta.private("Q", tile.q_bytes)
    K = cta.ring("K", tile.k_bytes, tile.stages)
    V = cta.ring("V", tile.v_bytes, tile.stages)
    O = cta.staging("O", tile.stage_bytes)
    turn = cta.baton(first=0)
    last = tile.kv_blocks[-1]

    load = cta.producer()
    for wg in cta.consumers():
        load.tma(Q[wg])
    for j in tile.kv_blocks:
        load.tma(K[j])
        load.tma(V[j])

    for wg in cta.consumers():
        wg.wait(Q[wg])
        wg.take(turn)
        for j in tile.kv_blocks:
            S = wg.gemm("S", Q[wg], K[j])
            wg.give(turn)  # the tensor cores are yours; I do softmax
            wg.wait(S)
            wg.free(K[j])
            if j == last:
                wg.free(Q[wg])
            wg.softmax(j)
            wg.rescale(j)
            wg.take(turn)
            PV = wg.gemm("O", "P", V[j], add=True)
            wg.wait(PV)
            wg.free(V[j])
        wg.give(turn)
        wg.normalize()
        wg.store("O", slot=O[wg])
        wg.store("LSE")
