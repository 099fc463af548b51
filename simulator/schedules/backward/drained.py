"""dQ leaves by a warp of its own: beside warp_specialized.py, a warpgroup puts its sums into shared memory and goes on.

A draining warp adds them to memory by one bulk copy a warpgroup (cp.reduce.async.bulk), as FlashAttention-3's backward does.
"""


def drained(cta, tile):
    """As warp_specialized, with an outbox for dQ."""
    K = cta.ring("K", tile.nbytes("K"), stages=1)
    V = cta.ring("V", tile.nbytes("V"), stages=1)
    Q = cta.ring("Q", tile.nbytes("Q"), tile.stages)
    LSE = cta.ring("LSE", tile.nbytes("LSE"), tile.stages)
    dO = cta.ring("dO", tile.nbytes("dO"), tile.stages)
    delta = cta.ring("delta", tile.nbytes("delta"), tile.stages)
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
            wg.wait(wg.gemm("S^T", K[0], Q[i]))
            wg.read(LSE[i], of="S^T")
            wg.probabilities(i, of="S^T")
            wg.free(LSE[i])
            wg.wait(wg.gemm("dP^T", V[0], dO[i]))
            wg.read(delta[i], of="dP^T")
            wg.gradient(i, of="dP^T")
            wg.free(delta[i])
            wg.put("dS^T", dS[i])
            wg.wait(wg.gemm("dV", "P^T", dO[i], add=True, loaded=True))
            wg.free(dO[i])
            wg.wait(wg.gemm("dK", "dS^T", Q[i], add=True, loaded=True))
            wg.free(Q[i])
            wg.wait(dS[i])
            wg.wait(wg.gemm(*tile.dq(K[0], dS[i]), loaded=True, step=i))
            wg.free(dS[i])
            wg.put(tile.dq_name, dQ[wg, i])
        wg.free(K[0])
        wg.free(V[0])
        wg.meet(everyone)
        wg.store("dV", slot=dV[0])
        wg.store("dK", slot=dK[0])
