"""dQ straight from registers: beside fa3.py, each warpgroup adds its sums to memory itself (red.global.add.v4.f32), under dK.

It spares shared memory, past which dQ goes twice in fp32. But while red.global drains, WGMMA loses a third of its rate, and a bulk
copy that adds takes nothing from it (kernels/calibrate/reduce_add.py): so it is slower than fa3.
"""


def registers(cta, tile):
    """Five GEMMs in FlashAttention-3's order, no outbox and no draining warp."""
    K = cta.ring("K", tile.nbytes("K"), stages=1)
    V = cta.ring("V", tile.nbytes("V"), stages=1)
    Q = cta.ring("Q", tile.nbytes("Q"), tile.stages)
    LSE = cta.ring("LSE", tile.nbytes("LSE"), tile.stages)
    dO = cta.ring("dO", tile.nbytes("dO"), tile.stages)
    delta = cta.ring("delta", tile.nbytes("delta"), tile.stages)
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
            wg.wait(dS[i])
            queries = wg.gemm(*tile.dq(K[0], dS[i]), loaded=True, step=i)
            wg.wait(values)
            wg.free(dO[i])
            keys = wg.gemm("dK", "dS^T", Q[i], add=True, loaded=True)
            wg.wait(queries)
            wg.free(dS[i])
            wg.add(tile.dq_name, "dQaccum", block=i, step=i)
            wg.wait(keys)
            wg.free(Q[i])
        wg.free(K[0])
        wg.free(V[0])
        wg.meet(everyone)
        wg.store("dV", slot=dV[0])
        wg.store("dK", slot=dK[0])
