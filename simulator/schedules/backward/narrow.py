"""Head dimension 256, as FlashAttention-4 has it on Hopper since its 4.0: beside wide.py, so few keys that dQ fits shared memory.

With 48 keys a tile dQ leaves whole, by a warp of its own in bulk copies, under dK, as in fa3.py. The two warpgroups share the keys
of S and dP, 24 each, whose GEMMs wait for their operands.
"""


def narrow(cta, tile):
    """S and dP; dV^T = dO^T P; dQ, half of the head dim each; dK^T = Q^T dS, under which dQ leaves."""
    K = cta.ring("K", tile.nbytes("K"), stages=1)
    V = cta.ring("V", tile.nbytes("V"), stages=1)
    Q = cta.ring("Q", tile.nbytes("Q"), tile.stages)
    LSE = cta.ring("LSE", tile.nbytes("LSE"), tile.stages)
    dO = cta.ring("dO", tile.nbytes("dO"), stages=1)
    delta = cta.ring("delta", tile.nbytes("delta"), stages=1)
    P = cta.exchange("P", tile.nbytes("P"))
    dS = cta.exchange("dS", tile.nbytes("dS"))
    dQ = cta.outbox("dQ", tile.nbytes("dQaccum"))
    dV = cta.ring("dV", tile.nbytes("dV"), stages=1, over=V)
    dK = cta.ring("dK", tile.nbytes("dK"), stages=1, over=K)
    everyone = cta.meeting()

    load, drain = cta.producer(), cta.drain()
    load.tma(K[0])
    load.tma(V[0])
    for i in tile.steps:
        for buffer in (Q, LSE, dO, delta):
            load.tma(buffer[i])

    for i in tile.steps:
        for wg in cta.consumers():
            drain.wait(dQ[wg, i])
            drain.add("dQ", "dQaccum", block=i, slot=dQ[wg, i], step=i)
            drain.free(dQ[wg, i])

    for wg in cta.consumers():
        wg.wait(K[0])
        wg.wait(V[0])
        for i in tile.steps:
            wg.wait(Q[i])
            scores = wg.gemm("S", Q[i], K[0], loaded=True, step=i)
            wg.wait(dO[i])
            products = wg.gemm("dP", dO[i], V[0], loaded=True, step=i)
            wg.wait(LSE[i])
            wg.wait(scores)
            wg.probabilities(i, of="S")
            wg.free(LSE[i])
            wg.put("P", P[i])
            wg.wait(delta[i])
            wg.wait(products)
            wg.gradient(i, of="dP")
            wg.free(delta[i])
            wg.wait(P[i])
            wg.put("dS", dS[i])
            values = wg.gemm("dV^T", dO[i], P[i], add=True, loaded=True)
            wg.wait(dS[i])
            queries = wg.gemm("dQ", dS[i], K[0], loaded=True, step=i)
            wg.wait(values)
            wg.free(dO[i])
            wg.free(P[i])
            keys = wg.gemm("dK^T", Q[i], dS[i], add=True, loaded=True)
            wg.wait(queries)
            wg.put("dQ", dQ[wg, i])
            wg.wait(keys)
            wg.free(Q[i])
            wg.free(dS[i])
        wg.free(K[0])
        wg.free(V[0])
        wg.meet(everyone)
        wg.store("dV", slot=dV[0])
        wg.store("dK", slot=dK[0])
