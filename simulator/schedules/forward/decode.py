"""Few queries against many keys: packed GQA and split-KV (Flash-Decoding; FlashAttention-2, arXiv:2307.08691, section 3.1, for the
merge by LSE). As kernels/decode runs it in Triton: cp.async and mma.sync.

The rows of a tile are the query rows of all heads that share a K/V head, so K and V are read once. Nothing but HBM is busy: what
counts is how many blocks are on their way, `stages - 1` of K and of V.
"""


def walk_part(cta, tile):
    """One part of the keys for one tile of packed rows; where there are several, O and LSE go to memory in fp32."""
    Q = cta.ring("Q", tile.q_bytes, stages=1)
    ahead = max(1, tile.stages - 1)  # Triton has a buffer less than stages: the copies into one follow the last read of it
    K = cta.ring("K", tile.k_bytes, ahead)
    V = cta.ring("V", tile.v_bytes, ahead)
    part = "part" if tile.parts > 1 else ""

    for warps in cta.consumers():
        warps.cp_async(Q[0])
        warps.wait(Q[0])  # it goes through registers, and the first copies of K are asked for behind it
        for j in tile.kv_blocks[:ahead]:
            warps.cp_async(K[j])
            warps.cp_async(V[j])
        for j in tile.kv_blocks:
            warps.mma("S", Q[0], K[j])
            warps.free(K[j])
            warps.softmax(j)
            warps.mma("O", "P", V[j], add=True)
            warps.free(V[j])
            for following in tile.kv_blocks[j + ahead : j + ahead + 1]:
                warps.cp_async(K[following])
                warps.cp_async(V[following])
        warps.free(Q[0])
        warps.normalize()
        warps.store(f"LSE{part}")
        warps.store(f"O{part}")


def combine(cta, tile):
    """O and LSE of a tile from its parts, in their order."""
    slots = max(1, min(COMBINED, ROOM_BYTES // tile.nbytes("Opart")))
    parts = cta.ring("Opart", tile.nbytes("Opart"), slots)
    levels = cta.ring("LSEpart", tile.nbytes("LSEpart"), slots)

    for warps in cta.consumers():
        for j in tile.steps[:slots]:
            warps.cp_async(levels[j])
            warps.cp_async(parts[j])
        for j in tile.steps:
            warps.wait(levels[j])
            warps.wait(parts[j])
            warps.arithmetic("combine", j)
            warps.free(levels[j])
            warps.free(parts[j])
            for following in tile.steps[j + slots : j + slots + 1]:
                warps.cp_async(levels[following])
                warps.cp_async(parts[following])
        warps.store("LSE")
        warps.store("O")


COMBINED, ROOM_BYTES = 16, 128 << 10
"""Parts whose rows a CTA has on their way at a time, where they fit; Triton's kernel has 32 of one row, in registers."""
