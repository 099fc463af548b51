"""dQ leaves under GEMMs: beside lagged.py, dP and dV are issued before dQ of the block before is waited for and put.

dQ then needs registers beside P and dP. At head_dim 64 they are there; at 128 our kernel does not compile so without spills.
"""


def covered(cta, tile):
    """S of this block, dQ of the last; then dP and dV, under which dQ leaves; and dK."""
    K = cta.ring("K", tile.nbytes("K"), stages=1)
    V = cta.ring("V", tile.nbytes("V"), stages=1)
    Q = cta.ring("Q", tile.nbytes("Q"), tile.stages)
    LSE = cta.ring("LSE", tile.nbytes("LSE"), tile.stages)
    dO = cta.ring("dO", tile.nbytes("dO"), tile.stages)
    delta = cta.ring("delta", tile.nbytes("delta"), tile.stages)
    dS = cta.exchange("dS", tile.nbytes("dS"), stages=2)
    dQ = cta.outbox("dQ", tile.nbytes("dQaccum"))
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
        for wg in cta.consumers():
            drain.wait(dQ[wg, i])
            drain.add("dQ", "dQaccum", block=i, slot=dQ[wg, i], step=i)
            drain.free(dQ[wg, i])

    for wg in cta.consumers():
        wg.wait(K[0])
        wg.wait(V[0])
        for i in tile.steps:
            scores = wg.gemm("S^T", K[0], Q[i])
            if i > 0:
                wg.wait(dS[i - 1])
                queries = wg.gemm(*tile.dq(K[0], dS[i - 1]), loaded=True, step=i - 1)
            wg.read(LSE[i], of="S^T")
            wg.wait(scores)
            wg.probabilities(i, of="S^T")  # under dQ
            wg.free(LSE[i])
            products = wg.gemm("dP^T", V[0], dO[i])
            values = wg.gemm("dV", "P^T", dO[i], add=True, loaded=True)
            if i > 0:
                wg.wait(queries)
                wg.free(dS[i - 1])
                wg.put(tile.dq_name, dQ[wg, i - 1])
            wg.read(delta[i], of="dP^T")
            wg.wait(products)
            wg.gradient(i, of="dP^T")  # under dV
            wg.free(delta[i])
            wg.put("dS^T", dS[i])
            keys = wg.gemm("dK", "dS^T", Q[i], add=True, loaded=True)
            wg.wait(values)
            wg.free(dO[i])
            wg.wait(keys)
            wg.free(Q[i])
        wg.wait(dS[last])
        queries = wg.gemm(*tile.dq(K[0], dS[last]), loaded=True, step=last)
        wg.wait(queries)
        wg.free(dS[last])
        wg.put(tile.dq_name, dQ[wg, last])
        wg.free(K[0])
        wg.free(V[0])
        wg.meet(everyone)
        wg.store("dV", slot=dV[0])
        wg.store("dK", slot=dK[0])
