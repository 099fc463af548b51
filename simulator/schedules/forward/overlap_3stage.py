"""Three-stage overlap inside a warpgroup (FlashAttention-3 appendix B.3): softmax under both GEMMs.

Beside overlap_2stage.py, S of block j+1 is already issued while block j is in its softmax: two S blocks are live at
once, which costs registers and so a narrower tile. Both GEMMs are waited for before the next step: a compiler that finds
an accumulator in flight from one step to the next serialises all WGMMA. At head dim 256 the warpgroups take turns as
in fa3.py, since on an H200 they settle in step otherwise.
"""


def overlap_3stage(cta, tile):
    """PV of the block before and QK^T of the next one in flight under the softmax of this one."""
    Q = cta.private("Q", tile.q_bytes)
    K = cta.ring("K", tile.k_bytes, tile.stages)
    V = cta.ring("V", tile.v_bytes, tile.stages)
    O = cta.staging("O", tile.stage_bytes)
    turn = cta.baton(first=0) if tile.head_dim == 256 else None
    last = tile.kv_blocks[-1]

    load = cta.producer()
    for wg in cta.consumers():
        load.tma(Q[wg])
    for j in tile.kv_blocks[:2]:
        load.tma(K[j])
    for j in tile.kv_blocks[2:]:
        load.tma(V[j - 2])
        load.tma(K[j])
    for j in tile.kv_blocks[-2:]:
        load.tma(V[j])

    for wg in cta.consumers():
        wg.wait(Q[wg])
        S = wg.gemm("S", Q[wg], K[0])
        wg.wait(S)
        wg.free(K[0])
        if last == 0:
            wg.free(Q[wg])
        for j in tile.kv_blocks:
            if turn and j > 0:
                wg.take(turn)
            if j > 0:
                PV = wg.gemm("O", "P", V[j - 1], add=True)
            if j < last:
                S = wg.gemm("S", Q[wg], K[j + 1])
            if turn and j > 0:
                wg.give(turn)
            wg.softmax(j)  # under PV of block j-1 and QK^T of block j+1
            if j > 0:
                wg.wait(PV)
                wg.free(V[j - 1])
            if j < last:
                wg.wait(S)
                wg.free(K[j + 1])
            if j + 1 == last:
                wg.free(Q[wg])
            if j > 0:
                wg.rescale(j)
        PV = wg.gemm("O", "P", V[last], add=True)
        wg.wait(PV)
        wg.free(V[last])
        wg.normalize()
        wg.store("O", slot=O[wg])
        wg.store("LSE")
