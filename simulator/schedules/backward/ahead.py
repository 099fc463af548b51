"""Scores ahead: beside lagged.py, a block's S is issued behind dK of the block before and ahead of the wait for it, and dP amid the
exponentials.

A warpgroup in lagged has nothing on the tensor cores between dK and S, nor while it puts dQ and waits for dP. Here its next S is in
the queue while dK runs; dP is issued as soon as dQ is out of the registers that dP takes, after one half of the exponentials, and
runs under the other. At head_dim 128 alone: at 64 the scores do not fit beside dS and dQ.
"""


def ahead(cta, tile):
    """dK of the last block and S of this one together; dQ of the last; dP amid the exponentials; dV."""
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
            if i > 0:
                keys = wg.gemm("dK", "dS^T", Q[i - 1], add=True, loaded=True, step=i - 1)
            scores = wg.gemm("S^T", K[0], Q[i])
            if i > 0:
                wg.wait(keys)
                wg.free(Q[i - 1])
                wg.wait(dS[i - 1])
                queries = wg.gemm(*tile.dq(K[0], dS[i - 1]), loaded=True, step=i - 1)
            wg.read(LSE[i], of="S^T")
            wg.wait(scores)
            wg.probabilities(i, of="S^T", half=0)  # under dQ
            wg.free(LSE[i])
            if i > 0:
                wg.wait(queries)
                wg.free(dS[i - 1])
                wg.put(tile.dq_name, dQ[wg, i - 1])
                products = wg.gemm("dP^T", V[0], dO[i])
            wg.probabilities(i, of="S^T", half=1)
            if i == 0:
                products = wg.gemm("dP^T", V[0], dO[i])
            values = wg.gemm("dV", "P^T", dO[i], add=True, loaded=True)
            wg.read(delta[i], of="dP^T")
            wg.wait(products)
            wg.gradient(i, of="dP^T")  # under dV
            wg.free(delta[i])
            wg.put("dS^T", dS[i])
            wg.wait(values)
            wg.free(dO[i])
        keys = wg.gemm("dK", "dS^T", Q[last], add=True, loaded=True)
        wg.wait(dS[last])
        queries = wg.gemm(*tile.dq(K[0], dS[last]), loaded=True, step=last)
        wg.wait(keys)
        wg.free(Q[last])
        wg.wait(queries)
        wg.free(dS[last])
        wg.put(tile.dq_name, dQ[wg, last])
        wg.free(K[0])
        wg.free(V[0])
        wg.meet(everyone)
        wg.store("dV", slot=dV[0])
        wg.store("dK", slot=dK[0])
