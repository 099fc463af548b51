"""Standard attention with the online softmax (Milakov and Gimelshein, arXiv:1805.02867): two readings of S, not three.

Beside standard.py only the middle kernel differs: maximum and sum come from one pass.
"""


def softmax_online(cta, tile):
    """P = softmax(S): running maximum and sum over all blocks of S, then the probabilities."""
    S = cta.ring("S", tile.s_bytes, stages=1)
    for warps in cta.consumers():
        for reading, of in enumerate(("row max and sum", "probabilities")):
            for j in tile.kv_blocks:
                block = S.again(j, reading, len(tile.kv_blocks))
                warps.cp_async(block)
                warps.wait(block)
                warps.reading(of, j)
                warps.free(block)
                if of == "probabilities":
                    warps.store("P", block=j, step=j)
