"""Head dimension 256, by halves of it: one warpgroup forms S and P, the other dP and dS, and each its half of dV, dK and dQ.

Beside wide.py no GEMM has fewer than 64 columns, and what a warpgroup has formed it multiplies out of registers; the other reads it
from shared memory. That leaves room there for a warp's rows of dQ, which it sends in bulk copies by itself.
"""


def halves(cta, tile):
    """WG0: S of the next block under dQ on its way out. WG1: dP of this block under the last of the block before's dQ."""
    K = cta.ring("K", tile.nbytes("K"), stages=1)
    V = cta.ring("V", tile.nbytes("V"), stages=1)
    Q = cta.ring("Q", tile.nbytes("Q"), tile.stages)
    LSE = cta.ring("LSE", tile.nbytes("LSE"), tile.stages)
    dO = cta.ring("dO", tile.nbytes("dO"), stages=1)
    delta = cta.ring("delta", tile.nbytes("delta"), stages=1)
    P = cta.exchange("P", tile.nbytes("P"), stages=2)
    dS = cta.exchange("dS", tile.nbytes("dS"))
    dQ = cta.outbox("dQ", tile.nbytes("dQaccum") // 2)
    dV = cta.ring("dV", tile.nbytes("dV"), stages=1, over=V)
    dK = cta.ring("dK", tile.nbytes("dK"), stages=1, over=K)
    everyone = cta.meeting()
    last = tile.steps[-1]

    load, drain = cta.producer(), cta.drain()
    load.tma(K[0])
    load.tma(V[0])
    for i in tile.steps:
        for buffer in (Q, LSE, dO, delta):
            load.tma(buffer[i])

    for i in tile.steps:
        for half in (0, 1):
            for wg in cta.consumers():
                drain.wait(dQ[wg, 2 * i + half])
                drain.add("dQ", "dQaccum", block=i, slot=dQ[wg, 2 * i + half], step=i, half=half)
                drain.free(dQ[wg, 2 * i + half])

    first, second = cta.consumers()
    for wg in (first, second):
        wg.wait(K[0])
    first.wait(Q[0])
    scores = first.gemm("S^T", K[0], Q[0], loaded=True, alone=True)
    first.wait(scores)
    for i in tile.steps:
        first.read(LSE[i], of="S^T", alone=True)
        first.probabilities(i, of="S^T", alone=True)
        first.free(LSE[i])
        first.put("P^T", P[i], alone=True)
        first.gemm("dV", "P^T", dO[i], add=True)
        first.wait(dS[i])
        queries = first.gemm("dQ", dS[i], K[0], loaded=True, step=i, half=0)
        first.gemm("dK", dS[i], Q[i], add=True, loaded=True)
        first.wait(queries)
        first.free(dO[i])
        first.put("dQ", dQ[first, 2 * i], half=0)
        queries = first.gemm("dQ", dS[i], K[0], loaded=True, step=i, half=1)
        first.wait(queries)
        first.free(dS[i])
        first.free(Q[i])
        if i < last:
            scores = first.gemm("S^T", K[0], Q[i + 1], alone=True)
        first.put("dQ", dQ[first, 2 * i + 1], half=1)
        if i < last:
            first.wait(scores)

    second.wait(V[0])
    for i in tile.steps:
        products = second.gemm("dP^T", V[0], dO[i], alone=True)
        if i > 0:
            second.put("dQ", dQ[second, 2 * i - 1], half=1)
        second.wait(P[i])
        second.gemm("dV", P[i], dO[i], add=True, loaded=True)
        second.read(delta[i], of="dP^T", alone=True)
        second.wait(products)
        second.gradient(i, of="dP^T", alone=True)
        second.free(delta[i])
        second.put("dS^T", dS[i], alone=True)
        second.wait(Q[i])
        second.gemm("dK", "dS^T", Q[i], add=True, loaded=True)
        second.wait(dS[i])
        queries = second.gemm("dQ", dS[i], K[0], loaded=True, step=i, half=0)
        second.wait(queries)
        second.free(P[i])
        second.free(dO[i])
        second.free(Q[i])
        second.put("dQ", dQ[second, 2 * i], half=0)
        queries = second.gemm("dQ", dS[i], K[0], loaded=True, step=i, half=1)
        second.wait(queries)
        second.free(dS[i])
    second.put("dQ", dQ[second, 2 * last + 1], half=1)

    for wg in (first, second):
        wg.free(K[0])
    second.free(V[0])
    for wg in (first, second):
        wg.meet(everyone)
        wg.store("dV", slot=dV[0])
        wg.store("dK", slot=dK[0])
