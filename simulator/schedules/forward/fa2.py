"""FlashAttention-2 (arXiv:2307.08691, Algorithm 1): Q outer, K/V inner, O stays in registers.

As it runs on A100 and Hopper alike: cp.async loads issued by the computing warps themselves, mma.sync GEMMs, one K and
one V buffer, overlap only between the CTAs that share an SM.
"""


def fa2(cta, tile):
    """Load V under QK^T and the next K under PV."""
    Q = cta.ring("Q", tile.q_bytes, stages=1)
    K = cta.ring("K", tile.k_bytes, tile.stages)
    V = cta.ring("V", tile.v_bytes, tile.stages)

    for warps in cta.consumers():
        warps.cp_async(Q[0])
        warps.cp_async(K[0])
        warps.wait(Q[0])
        for j in tile.kv_blocks:
            warps.cp_async(V[j])
            warps.mma("S", Q[0], K[j])
            warps.free(K[j])
            for following in tile.kv_blocks[j + 1 : j + 2]:
                warps.cp_async(K[following])
            warps.softmax(j)
            warps.mma("O", "P", V[j], add=True)
            warps.free(V[j])
        warps.free(Q[0])
        warps.normalize()
        warps.store("LSE")
        warps.store("O")
