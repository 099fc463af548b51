"""dQ a block behind: beside fa3.py, a block's dQ is formed with the next block's scores, not with its own dK.

dQ needs both warpgroups' dS, so in fa3 they meet in every block and then take their exponentials together, while the tensor cores
have nothing. Here a warpgroup goes on when its own dS is written; dQ of the block before runs under its exponentials, and is put
before dP is issued, which takes its registers. dS takes two buffers. As kernels/cuda/backward/lagged.cu has it.
"""


def lagged(cta, tile):
    """S of this block, dQ of the last, which leaves; then dP and dV, and dK."""
    K = cta.ring("K", tile.nbytes("K"), stages=1)
    V = cta.ring("V", tile.nbytes("V"), stages=1)
    Q = cta.ring("Q", tile.nbytes("Q"), tile.stages)
    LSE = cta.ring("LSE", tile.nbytes("LSE"), tile.stages)
    dO = cta.ring("dO", tile.nbytes("dO"), tile.stages)
    delta = cta.ring("delta", tile.nbytes("delta"), tile.stages)
    dS = cta.exchange("dS", tile.nbytes("dS"), stages=2)
    dQ = cta.outbox("dQ", tile.nbytes("dQaccum"))
    dV = cta.staging("dV", tile.nbytes("dV"))
    last = tile.steps[-1]

    load, drain = cta.producer(), cta.drain()
    for i in tile.steps:
        load.tma(Q[i])
        load.tma(LSE[i])
        if i == 0:
            load.tma(K[0])
        load.tma(dO[i])
        load.tma(delta[i])
        if i == 0:
            load.tma(V[0])

    for i in tile.steps:
        drain.write_out("dQaccum", "dQ", i)
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
            if i > 0:
                wg.wait(queries)
                wg.free(dS[i - 1])
                wg.put(tile.dq_name, dQ[wg, i - 1])
            products = wg.gemm("dP^T", V[0], dO[i])
            values = wg.gemm("dV", "P^T", dO[i], add=True, loaded=True)
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
        wg.free(V[0])
        wg.wait(dS[last])
        queries = wg.gemm(*tile.dq(K[0], dS[last]), loaded=True, step=last)
        wg.store("dV", slot=dV[wg])
        wg.wait(queries)
        wg.free(K[0])
        wg.free(dS[last])
        wg.put(tile.dq_name, dQ[wg, last])
        wg.store("dK", slot=dV[wg])
