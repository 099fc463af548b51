"""FlashAttention-2's backward (arXiv:2307.08691, Algorithm 2): K/V outer, Q inner; dK and dV stay in registers.

As it runs on A100 and Hopper alike: cp.async and mma.sync, P and dS through shared memory, since dV and dK need them
transposed and dQ needs all of dS; dQ leaves by atomic adds of single floats, since CTAs of other K/V blocks add to it too.
"""


def fa2(cta, tile):
    """Five GEMMs a block: S and dP, then dV, dQ and dK; the next Q is loaded under all of them, the next dO under the last two."""
    K = cta.ring("K", tile.nbytes("K"), stages=1)
    V = cta.ring("V", tile.nbytes("V"), stages=1)
    Q = cta.ring("Q", tile.nbytes("Q"), tile.stages)
    dO = cta.ring("dO", tile.nbytes("dO"), stages=1)
    LSE = cta.ring("LSE", tile.nbytes("LSE"), stages=1)
    delta = cta.ring("delta", tile.nbytes("delta"), stages=1)
    P = cta.exchange("P", tile.nbytes("P"))
    dS = cta.exchange("dS", tile.nbytes("dS"))
    last = tile.steps[-1]

    for warps in cta.consumers():
        for buffer in (K, V, Q, dO, LSE, delta):
            warps.cp_async(buffer[0])
        warps.wait(K[0])
        warps.wait(V[0])
        for i in tile.steps:
            warps.wait(Q[i])
            if i < last and tile.stages > 1:
                warps.cp_async(Q[i + 1])
            warps.mma("S", Q[i], K[0], step=i, loaded=True)
            warps.wait(LSE[i])
            warps.probabilities(i, of="S")
            warps.free(LSE[i])
            warps.put("P", P[i])
            warps.wait(dO[i])
            warps.mma("dP", dO[i], V[0], step=i, loaded=True)
            warps.wait(delta[i])
            warps.gradient(i, of="dP")
            warps.free(delta[i])
            warps.put("dS", dS[i])
            warps.wait(P[i])
            warps.mma("dV", P[i], dO[i], add=True, loaded=True)
            warps.free(P[i])
            warps.free(dO[i])
            if i < last:
                for buffer in (dO, LSE, delta):
                    warps.cp_async(buffer[i + 1])
            warps.wait(dS[i])
            warps.mma("dQ", dS[i], K[0], step=i, loaded=True)
            warps.add("dQ", "dQaccum", block=i, step=i)
            warps.mma("dK", dS[i], Q[i], add=True, loaded=True)
            warps.free(dS[i])
            warps.free(Q[i])
            if i < last and tile.stages == 1:
                warps.cp_async(Q[i + 1])
        warps.free(K[0])
        warps.free(V[0])
        warps.store("dK")
        warps.store("dV")
