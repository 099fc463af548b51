"""dQ apart: beside lagged.py, a third warpgroup forms dQ from both consumers' dS and puts it.

The consumers share nothing of a block: they wait neither for one another nor for dQ's way out. Three warpgroups that drift keep
the tensor cores busy, where two that meet over dS go in step. Registers: dK and dV 128, scores 48 of each consumer, dQ 32.
"""


def apart(cta, tile):
    """The consumers: S; exponentials; dP, dV; dS under dV; dK. The third: dQ, a half after the other.

    At head_dim 64 S of the next block is issued behind dK, ahead of the wait for it, and dP amid the exponentials.
    """
    K = cta.ring("K", tile.nbytes("K"), stages=1)
    V = cta.ring("V", tile.nbytes("V"), stages=1)
    Q = cta.ring("Q", tile.nbytes("Q"), tile.stages)
    LSE = cta.ring("LSE", tile.nbytes("LSE"), tile.stages)
    dO = cta.ring("dO", tile.nbytes("dO"), tile.stages)
    delta = cta.ring("delta", tile.nbytes("delta"), tile.stages)
    dS = cta.exchange("dS", tile.nbytes("dS"), stages=2)
    dQ = cta.outbox("dQ", tile.nbytes("dQaccum"))
    dV = cta.staging("dV", tile.nbytes("dV"))

    ahead = tile.workload.head_dim == 64  # registers hold S of the next block beside dS, and dP beside a half of S

    load, drain, third = cta.producer(), cta.drain(), cta.multiplier()
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
        for share in cta.consumers():
            drain.wait(dQ[share, i])
            drain.add("dQ", "dQaccum", block=i, slot=dQ[share, i], step=i)
            drain.free(dQ[share, i])

    third.wait(K[0])
    for i in tile.steps:
        third.wait(dS[i])
        for share in cta.consumers():
            queries = third.gemm("dQ", dS[i], K[0], loaded=True, step=i)
            third.wait(queries)
            if share.rank == tile.consumers - 1:
                third.free(dS[i])
            third.put("dQ", dQ[share, i])
    third.free(K[0])

    for wg in cta.consumers():
        wg.wait(K[0])
        if ahead:
            scores = wg.gemm("S^T", K[0], Q[0])
        for i in tile.steps:
            if not ahead:
                scores = wg.gemm("S^T", K[0], Q[i])
            wg.read(LSE[i], of="S^T")
            wg.wait(scores)
            wg.probabilities(i, of="S^T", half=0 if ahead else None)
            wg.free(LSE[i])
            if i == 0:
                wg.wait(V[0])
            products = wg.gemm("dP^T", V[0], dO[i])
            if ahead:
                wg.probabilities(i, of="S^T", half=1)
            values = wg.gemm("dV", "P^T", dO[i], add=True, loaded=True)
            wg.read(delta[i], of="dP^T")
            wg.wait(products)
            wg.gradient(i, of="dP^T")  # under dV
            wg.free(delta[i])
            wg.put("dS^T", dS[i])
            keys = wg.gemm("dK", "dS^T", Q[i], add=True, loaded=True)
            wg.wait(values)
            wg.free(dO[i])
            if ahead and i < tile.steps[-1]:
                scores = wg.gemm("S^T", K[0], Q[i + 1])
            wg.wait(keys)
            wg.free(Q[i])
        wg.free(K[0])
        wg.free(V[0])
        wg.store("dV", slot=dV[wg])
        wg.store("dK", slot=dV[wg])
