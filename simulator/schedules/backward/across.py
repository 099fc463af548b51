"""80 queries: beside apart.py, as GEMMs of 64 columns whose A lies in shared memory ask it for more than it gives.

A GEMM has 64 rows, so dQ is formed across, dQ^T = K^T dS^T, 64 of the head dimension after the other. Registers: dK and dV 128,
S or dP 40; operands of GEMMs lie above the first 24 (ptxas), so three of the five k steps of dV, 12 registers of P, are issued
behind dP, and the other two behind dS, in dP's place. dK and dV leave by V's.
"""

FIRST = 3
"""k steps of dV, of 16 queries, that are issued behind dP."""


def across(cta, tile):
    """The consumers: S; exponentials; dP, most of dV; dS under it; the rest of dV, dK. The third: dQ^T, a half after the other."""
    K = cta.ring("K", tile.nbytes("K"), stages=1)
    V = cta.ring("V", tile.nbytes("V"), stages=1)
    Q = cta.ring("Q", tile.nbytes("Q"), tile.stages)
    LSE = cta.ring("LSE", tile.nbytes("LSE"), tile.stages)
    dO = cta.ring("dO", tile.nbytes("dO"), tile.stages)
    delta = cta.ring("delta", tile.nbytes("delta"), tile.stages)
    dS = cta.exchange("dS", tile.nbytes("dS"), stages=2)
    dQ = cta.outbox("dQ", tile.nbytes("dQaccum"))

    last = tile.tile.block_m // 16 - FIRST

    load, drain, third = cta.producer(), cta.drain(), cta.multiplier()
    load.tma(K[0])
    load.tma(V[0])
    for i in tile.steps:
        for buffer in (Q, LSE, dO, delta):
            load.tma(buffer[i])

    for i in tile.steps:
        for share in cta.consumers():
            drain.wait(dQ[share, i])
            drain.add("dQ", "dQaccum", block=i, slot=dQ[share, i], step=i)
            drain.free(dQ[share, i])

    third.wait(K[0])
    for i in tile.steps:
        third.wait(dS[i])
        for share in cta.consumers():
            queries = third.gemm("dQ^T", K[0], dS[i], loaded=True, step=i)
            third.wait(queries)
            if share.rank == tile.consumers - 1:
                third.free(dS[i])
            third.put("dQ^T", dQ[share, i])
    third.free(K[0])

    for wg in cta.consumers():
        wg.wait(K[0])
        for i in tile.steps:
            scores = wg.gemm("S^T", K[0], Q[i])
            wg.wait(LSE[i])
            wg.wait(scores)
            wg.probabilities(i, of="S^T")
            wg.free(LSE[i])
            if i == 0:
                wg.wait(V[0])
            products = wg.gemm("dP^T", V[0], dO[i])
            wg.gemm("dV", "P^T", dO[i], add=True, loaded=True, k_steps=FIRST)
            wg.wait(delta[i])
            wg.wait(products)
            wg.gradient(i, of="dP^T")  # under dV
            wg.free(delta[i])
            wg.put("dS^T", dS[i])
            values = wg.gemm("dV", "P^T", dO[i], add=True, loaded=True, k_steps=last)
            keys = wg.gemm("dK", "dS^T", Q[i], add=True, loaded=True)
            wg.wait(values)
            wg.free(dO[i])
            wg.wait(keys)
            wg.free(Q[i])
        wg.free(K[0])
        wg.store("dV")
        wg.store("dK", slot=V[0])
