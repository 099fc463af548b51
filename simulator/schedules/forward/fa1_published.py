"""FlashAttention-1 as its later kernels (1.0.9, fmha_fprop_kernel_1xN.h) run it.

Beside fa1.py two things: a head's Q blocks are dealt to as many CTAs as fill the SMs, and the next Q is loaded under the
softmax. Left out: their 16-row tiles, and O in fp32 from one K/V block to the next.
"""


def fa1_published(cta, tile):
    """One CTA walks all K/V blocks of a head and, under each, its share of the Q blocks."""
    K = cta.ring("K", tile.k_bytes, tile.stages)
    V = cta.ring("V", tile.v_bytes, tile.stages)
    Q = cta.ring("Q", tile.q_bytes, stages=1)
    O = cta.ring("O", tile.o_bytes, stages=1)
    l = cta.ring("l", tile.row_bytes, stages=1)
    m = cta.ring("m", tile.row_bytes, stages=1)

    for warps in cta.consumers():
        step = 0
        for j in tile.kv_blocks:
            warps.cp_async(K[j])
            warps.cp_async(V[j])
            blocks = tile.q_blocks(j)
            for i in blocks[:1]:
                warps.cp_async(Q[step], block=i)
            for n, i in enumerate(blocks):
                for buffer in (O, l, m):
                    warps.cp_async(buffer[step], block=i)
                warps.wait(Q[step])
                warps.mma("S", Q[step], K[j], step)
                warps.free(Q[step])
                for following in blocks[n + 1 : n + 2]:
                    warps.cp_async(Q[step + 1], block=following)
                warps.softmax(step)
                for buffer in (O, l, m):
                    warps.wait(buffer[step])
                warps.mma("O", "P", V[j], step, add=True)
                warps.normalize(step)
                for buffer in (O, l, m):
                    warps.free(buffer[step])
                    warps.store(buffer.name, block=i, step=step)
                step += 1
            warps.free(K[j])
            warps.free(V[j])
