"""FlashAttention (arXiv:2205.14135, Algorithm 1): K/V outer, Q inner; O, l and m are read and written at every step.

Beside fa2.py the loops are swapped: K and V are read once, but Q and O travel once per K/V block.
"""


def fa1(cta, tile):
    """One CTA per (batch, head) walks all K/V blocks and, under each, all Q blocks."""
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
            for i in tile.q_blocks(j):
                for buffer in (Q, O, l, m):
                    warps.cp_async(buffer[step], block=i)
                warps.wait(Q[step])
                warps.mma("S", Q[step], K[j], step)
                warps.free(Q[step])
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
