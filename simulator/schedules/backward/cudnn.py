"""cuDNN's backward on Hopper (9.19, made at run time), as its machine code on an H200 has it; beside it stands peer:cudnn.

Beside keys_first.py: dP is issued when S is there, under a causal mask when LSE has been taken off and the mask put on too; about
half of the exponentials lie under dP, the others behind it; dK is waited for before the warpgroups meet over dS; and one of them
alone forms all of dQ, and puts it, while the other goes on when it has begun. Tiles are drawn, those of a head one after the other.
"""


def cudnn(cta, tile):
    """Four GEMMs of a warpgroup's own, two at a time at most, then dQ alone."""
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
    everyone, begun = cta.meeting(), cta.meeting()
    shares = cta.consumers()

    load, drain = cta.producer(), cta.drain()
    load.tma(K[0])
    load.tma(V[0])
    for i in tile.steps:
        for buffer in (Q, LSE, dO, delta):
            load.tma(buffer[i])

    for i in tile.steps:
        for wg in shares:
            drain.wait(dQ[wg, i])
            drain.add("dQ", "dQaccum", block=i, slot=dQ[wg, i], step=i)
            drain.free(dQ[wg, i])

    for wg in shares:
        wg.wait(K[0])
        wg.wait(V[0])
        for i in tile.steps:
            scores = wg.gemm("S^T", K[0], Q[i])
            wg.wait(dO[i])
            wg.wait(LSE[i])
            wg.wait(scores)
            if tile.workload.causal:
                wg.exponents(i, of="S^T")
            products = wg.gemm("dP^T", V[0], dO[i], loaded=True)
            if not tile.workload.causal:
                wg.exponents(i, of="S^T")
            wg.free(LSE[i])
            wg.probabilities(i, of="S^T", half=0, ready=True)
            wg.wait(delta[i])
            wg.wait(products)
            wg.probabilities(i, of="S^T", half=1, ready=True)
            wg.gradient(i, of="dP^T")
            wg.free(delta[i])
            values = wg.gemm("dV", "P^T", dO[i], add=True, loaded=True)
            wg.put("dS^T", dS[i])
            keys = wg.gemm("dK", "dS^T", Q[i], add=True, loaded=True)
            wg.wait(values)
            wg.free(dO[i])
            wg.wait(keys)
            wg.free(Q[i])
            if wg.rank == 0:
                wg.wait(dS[i])
                queries = wg.gemm("dQ", dS[i], K[0], loaded=True, step=i, alone=True)
                wg.meet(begun)
                wg.wait(queries)
                wg.free(dS[i])
                for half, share in enumerate(shares):
                    wg.put("dQ", dQ[share, i], alone=True, half=half)
            else:
                wg.meet(begun)
        wg.free(K[0])
        wg.free(V[0])
        wg.meet(everyone)
        wg.store("dV", slot=dV[0])
        wg.store("dK", slot=dK[0])
