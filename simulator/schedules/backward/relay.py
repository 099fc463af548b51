"""Head dimension 256 by three warpgroups that hand on to one another: S, P and dV; dP, dS and dK; dQ.

Beside halves.py each of two has all of the head dim of one gradient in its registers, and multiplies out what it has formed there;
P and dS go through shared memory once, to the next in line alone. Nobody waits for the one behind it but for room, so that the
three drift.
"""


def relay(cta, tile):
    """P of the blocks ahead, dS of this one, dQ of the one behind."""
    K = cta.ring("K", tile.nbytes("K"), stages=1)
    V = cta.ring("V", tile.nbytes("V"), stages=1)
    Q = cta.ring("Q", tile.nbytes("Q"), tile.stages)
    LSE = cta.ring("LSE", tile.nbytes("LSE"), tile.stages)
    dO = cta.ring("dO", tile.nbytes("dO"), stages=1)
    delta = cta.ring("delta", tile.nbytes("delta"), stages=1)
    P = cta.exchange("P", tile.nbytes("P"), stages=2)
    dS = cta.exchange("dS", tile.nbytes("dS"), stages=2)
    dQ = cta.outbox("dQ", tile.nbytes("dQaccum") // 2)
    way_out = cta.staging("dV", 1024)  # of its own here; the kernel sends two pieces at a time over P, and over dS

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

    first, second = cta.consumers()
    for i in tile.steps:
        drain.write_out("dQaccum", "dQ", i)
        for half in (0, 1):
            for box in (first, second):
                drain.wait(dQ[box, 2 * i + half])
                drain.add("dQ", "dQaccum", block=i, slot=dQ[box, 2 * i + half], step=i, half=half)
                drain.free(dQ[box, 2 * i + half])

    first.wait(K[0])
    for i in tile.steps:
        scores = first.gemm("S^T", K[0], Q[i], alone=True)
        first.read(LSE[i], of="S^T", alone=True)
        first.wait(scores)
        first.probabilities(i, of="S^T", alone=True)
        first.free(LSE[i])
        first.free(Q[i])
        first.put("P^T", P[i], alone=True)
        values = first.gemm("dV", "P^T", dO[i], add=True, alone=True)
        first.wait(values)
        first.free(dO[i])
    first.free(K[0])
    first.store("dV", slot=way_out[first], alone=True, rounds=2)

    second.wait(V[0])
    for i in tile.steps:
        products = second.gemm("dP^T", V[0], dO[i], alone=True)
        second.wait(P[i])
        second.read(delta[i], of="dP^T", alone=True)
        second.wait(products)
        second.gradient(i, of="dP^T", alone=True)
        second.free(P[i])
        second.free(delta[i])
        second.free(dO[i])
        second.put("dS^T", dS[i], alone=True)
        keys = second.gemm("dK", "dS^T", Q[i], add=True, alone=True)
        second.wait(keys)
        second.free(Q[i])
    second.free(V[0])
    second.store("dK", slot=way_out[second], alone=True, rounds=2)

    third.wait(K[0])
    for i in tile.steps:
        third.wait(dS[i])
        for half in (0, 1):
            for box in (first, second):
                queries = third.gemm("dQ", dS[i], K[0], loaded=True, step=i, half=half)
                third.wait(queries)
                if half and box is second:
                    third.free(dS[i])
                third.put("dQ", dQ[box, 2 * i + half], half=half)
    third.free(K[0])
