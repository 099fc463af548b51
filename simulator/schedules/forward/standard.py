"""Standard attention (FlashAttention Algorithm 0): three kernels, with S and P written to HBM and read back.

The softmax here is the three-pass one: maximum, sum, then probabilities, each pass reading the whole row of S. A kernel
takes a row at a time through all three, as kernels/triton/standard.py does, so the second and third reading find it in L2
(`Kernel.by_row`).
"""


def scores(cta, tile):
    """S = Q K^T: one CTA per tile of S; a causal mask saves nothing here."""
    Q = cta.ring("Q", tile.q_bytes, stages=1)
    K = cta.ring("K", tile.k_bytes, stages=1)
    for warps in cta.consumers():
        warps.cp_async(Q[0])
        warps.cp_async(K[0])
        warps.wait(Q[0])
        warps.mma("S", Q[0], K[0])
        warps.free(Q[0])
        warps.free(K[0])
        warps.store("S")


def softmax_three_pass(cta, tile):
    """P = softmax(S): the row's maximum over all blocks of S, then its sum, then the probabilities."""
    S = cta.ring("S", tile.s_bytes, stages=1)
    for warps in cta.consumers():
        for reading, of in enumerate(("row max", "row sum", "probabilities")):
            for j in tile.kv_blocks:
                block = S.again(j, reading, len(tile.kv_blocks))
                warps.cp_async(block)
                warps.wait(block)
                warps.reading(of, j)
                warps.free(block)
                if of == "probabilities":
                    warps.store("P", block=j, step=j)


def values(cta, tile):
    """O = P V: one CTA per row of O tiles."""
    P = cta.ring("P", tile.s_bytes, tile.stages)
    V = cta.ring("V", tile.v_bytes, tile.stages)
    ahead = tile.stages - 1
    for warps in cta.consumers():
        for j in tile.kv_blocks[:ahead]:
            warps.cp_async(P[j])
            warps.cp_async(V[j])
        for j in tile.kv_blocks:
            for following in tile.kv_blocks[j + ahead : j + ahead + 1]:
                warps.cp_async(P[following])
                warps.cp_async(V[following])
            warps.wait(P[j])
            warps.mma("O", P[j], V[j])
            warps.free(P[j])
            warps.free(V[j])
        warps.store("O")
