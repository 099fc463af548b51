"""Three-stage overlap inside a warpgroup (FlashAttention-3 appendix B.3): softmax under both GEMMs.

Beside overlap_2stage.py, S of block j+1 is already issued while block j is in its softmax: two S blocks are live at
once, which costs registers and so a narrower tile.
"""


def overlap_3stage(cta, tile):
    """QK^T of the next block, PV of the last, and softmax of this one in flight together."""
    Q = cta.ring("Q", tile.q_bytes, stages=1)
    K = cta.ring("K", tile.k_bytes, tile.stages)
    V = cta.ring("V", tile.v_bytes, tile.stages)
    O = cta.ring("O", tile.o_bytes, stages=1, over=V)
    done = cta.meeting()
    first, last = tile.kv_blocks[0], tile.kv_blocks[-1]

    load = cta.producer()
    load.tma(Q[0])
    for j in tile.kv_blocks[:2]:
        load.tma(K[j])
    load.reclaim(O[0])
    for j in tile.kv_blocks[2:]:
        load.tma(V[j - 2])
        load.tma(K[j])
    for j in tile.kv_blocks[-2:]:
        load.tma(V[j])

    for wg in cta.consumers():
        wg.wait(Q[0])
        S = [wg.gemm("S=QK^T", K[j]) for j in tile.kv_blocks[:2]]
        wg.wait(S[first])
        wg.free(K[first])
        wg.softmax(first)
        for j in tile.kv_blocks[1:-1]:
            wg.wait(S[j])
            wg.free(K[j])
            PV = wg.gemm("O+=PV", V[j - 1])
            S.append(wg.gemm("S=QK^T", K[j + 1]))
            wg.softmax_apart(j)  # under PV of block j-1 and QK^T of block j+1
            wg.wait(PV)
            wg.free(V[j - 1])
            wg.convert(j)
            wg.rescale(j)
        for j in tile.kv_blocks[1:][-1:]:
            wg.wait(S[j])
            wg.free(K[j])
            PV = wg.gemm("O+=PV", V[j - 1])
            wg.softmax_apart(j)
            wg.wait(PV)
            wg.free(V[j - 1])
            wg.convert(j)
            wg.rescale(j)
        wg.free(Q[0])
        PV = wg.gemm("O+=PV", V[last])
        wg.wait(PV)
        wg.free(V[last])
        wg.normalize()
        wg.store("LSE")
        wg.meet(done)  # no one reads V any more
        wg.store("O", slot=O[0])
