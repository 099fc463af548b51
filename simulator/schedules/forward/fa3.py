"""FlashAttention-3: pingpong between warpgroups and two-stage overlap within each (sections 3.1 and 3.2 together).

Beside overlap_2stage.py, the baton brackets the issue of the two GEMMs; beside pingpong.py, they are those of
neighbouring blocks. V of 8 bits is transposed by the producer warpgroup's other warps, from one ring into another (section 3.3).
"""


def fa3(cta, tile):
    """One warpgroup issues QK^T and PV while the other does softmax; its own softmax also runs under its PV."""
    Q = cta.private("Q", tile.q_bytes)
    K = cta.ring("K", tile.k_bytes, tile.stages)
    V = loaded = cta.ring("V", tile.v_bytes, tile.stages)
    O = cta.staging("O", tile.stage_bytes)
    turn = cta.baton(first=0)
    last = tile.kv_blocks[-1]

    load = cta.producer()
    for wg in cta.consumers():
        load.tma(Q[wg])
    load.tma(K[0])
    for j in tile.kv_blocks[1:]:
        load.tma(K[j])
        load.tma(loaded[j - 1])
    load.tma(loaded[last])
    if tile.element_bytes == 1:  # WGMMA takes 8-bit operands only with what is summed over contiguous
        V, warps = cta.exchange("V^T", tile.v_bytes, tile.stages), cta.transposers()
        for j in tile.kv_blocks:
            warps.transpose(loaded[j], V[j])

    for wg in cta.consumers():
        wg.wait(Q[wg])
        S = wg.gemm("S", Q[wg], K[0])
        wg.wait(S)
        wg.free(K[0])
        if last == 0:
            wg.free(Q[wg])
        wg.softmax(0)
        for j in tile.kv_blocks[1:]:
            wg.take(turn)
            S = wg.gemm("S", Q[wg], K[j])
            PV = wg.gemm("O", "P", V[j - 1], add=True, step=j - 1)
            wg.give(turn)  # the tensor cores are yours; I do softmax
            wg.wait(S)
            wg.free(K[j])
            if j == last:
                wg.free(Q[wg])
            wg.softmax(j)  # under PV of block j-1 and the other warpgroup's GEMMs
            wg.wait(PV)
            wg.free(V[j - 1])
            wg.rescale(j)
        PV = wg.gemm("O", "P", V[last], add=True, step=last)
        wg.wait(PV)
        wg.free(V[last])
        wg.normalize()
        wg.store("O", slot=O[wg])
        wg.store("LSE")
