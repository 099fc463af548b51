"""dK before dQ: beside fa3.py, dK is issued before the warpgroups meet over dS, which dQ needs whole and dK does not.

What a warpgroup waits for the other then lies under dV and dK. dQ comes last, and leaves under the next block's scores: these read
both operands from shared memory, so that it is put there at half the pace that it has under dK. It gains at d64 alone.
"""


def keys_first(cta, tile):
    """dK needs this warpgroup's dS alone, so it does not wait for the others'."""
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
            scores = wg.gemm("S^T", K[0], Q[i])
            products = wg.gemm("dP^T", V[0], dO[i])
            wg.read(LSE[i], of="S^T")
            wg.wait(scores)
            wg.probabilities(i, of="S^T")
            wg.free(LSE[i])
            wg.read(delta[i], of="dP^T")
            wg.wait(products)
            wg.gradient(i, of="dP^T")
            wg.free(delta[i])
            values = wg.gemm("dV", "P^T", dO[i], add=True, loaded=True)
            wg.put("dS^T", dS[i])
            keys = wg.gemm("dK", "dS^T", Q[i], add=True, loaded=True)
            wg.wait(dS[i])
            queries = wg.gemm(*tile.dq(K[0], dS[i]), loaded=True, step=i)
            wg.wait(values)
            wg.free(dO[i])
            wg.wait(keys)
            wg.free(Q[i])
            wg.wait(queries)
            wg.free(dS[i])
            wg.put(tile.dq_name, dQ[wg, i])
        wg.free(K[0])
        wg.free(V[0])
        wg.meet(everyone)
        wg.store("dV", slot=dV[0])
        wg.store("dK", slot=dK[0])
