"""Head dimension 256, as FlashAttention-4 has it on Hopper: dK and dV transposed, so that two warpgroups can hold them.

Beside registers.py: a warpgroup holds 128 of the head dim for all keys of the tile, so S and dP are shared by their keys, and P
goes through shared memory as dS does. That leaves no room there for dQ, nor in registers for more than half of it at a time.
"""


def wide(cta, tile):
    """S and dP; dV^T = dO^T P; dQ in two halves of the head dim, each added from registers; dK^T = Q^T dS."""
    K = cta.ring("K", tile.nbytes("K"), stages=1)
    V = cta.ring("V", tile.nbytes("V"), stages=1)
    Q = cta.ring("Q", tile.nbytes("Q"), tile.stages)
    LSE = cta.ring("LSE", tile.nbytes("LSE"), tile.stages)
    dO = cta.ring("dO", tile.nbytes("dO"), stages=1)
    delta = cta.ring("delta", tile.nbytes("delta"), stages=1)
    P = cta.exchange("P", tile.nbytes("P"))
    dS = cta.exchange("dS", tile.nbytes("dS"))
    dV = cta.ring("dV", tile.nbytes("dV"), stages=1, over=V)
    dK = cta.ring("dK", tile.nbytes("dK"), stages=1, over=K)
    everyone = cta.meeting()

    load = cta.producer()
    load.tma(K[0])
    load.tma(V[0])
    for i in tile.steps:
        for buffer in (Q, LSE, dO, delta):
            load.tma(buffer[i])

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
            wg.put("dS", dS[i])
            values = wg.gemm("dV^T", dO[i], P[i], add=True)
            wg.wait(dS[i])
            queries = wg.gemm("dQ", dS[i], K[0], loaded=True, step=i, half=0)
            wg.wait(values)
            wg.free(dO[i])
            wg.free(P[i])
            keys = wg.gemm("dK^T", Q[i], dS[i], add=True, loaded=True)
            wg.wait(queries)
            wg.add("dQ", "dQaccum", block=i, step=i, half=0)
            queries = wg.gemm("dQ", dS[i], K[0], loaded=True, step=i, half=1)
            wg.wait(keys)
            wg.free(Q[i])
            wg.wait(queries)
            wg.free(dS[i])
            wg.add("dQ", "dQaccum", block=i, step=i, half=1)
        wg.free(K[0])
        wg.free(V[0])
        wg.meet(everyone)
        wg.store("dV", slot=dV[0])
        wg.store("dK", slot=dK[0])
