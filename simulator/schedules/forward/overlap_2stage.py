"""Two-stage GEMM-softmax overlap inside a warpgroup (FlashAttention-3 section 3.2, Algorithm 2).

Beside warp_specialized.py the order of issue is the idea: S of block j is issued before O += PV of block j-1, so the
softmax of block j runs while PV of block j-1 still occupies the tensor cores. V of 8 bits is transposed as in fa3.py.
"""


def overlap_2stage(cta, tile):
    """QK^T of this block, PV of the last, and softmax between their ends."""
    Q = cta.private("Q", tile.q_bytes)
    K = cta.ring("K", tile.k_bytes, tile.stages)
    V = loaded = cta.ring("V", tile.v_bytes, tile.stages)
    O = cta.staging("O", tile.stage_bytes)
    last = tile.kv_blocks[-1]

    load = cta.producer()
    for wg in cta.consumers():
        load.tma(Q[wg])
    load.tma(K[0])
    for j in tile.kv_blocks[1:]:
        load.tma(K[j])
        load.tma(loaded[j - 1])
    load.tma(loaded[last])
    if tile.element_bytes == 1:
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
            S = wg.gemm("S", Q[wg], K[j])
            PV = wg.gemm("O", "P", V[j - 1], add=True, step=j - 1)
            wg.wait(S)
            wg.free(K[j])
            if j == last:
                wg.free(Q[wg])
            wg.softmax(j)  # under PV of block j-1
            wg.wait(PV)
            wg.free(V[j - 1])
            wg.rescale(j)
        PV = wg.gemm("O", "P", V[last], add=True, step=last)
        wg.wait(PV)
        wg.free(V[last])
        wg.normalize()
        wg.store("O", slot=O[wg])
        wg.store("LSE")
