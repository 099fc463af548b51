"""Standard attention with the online softmax (Milakov and Gimelshein, arXiv:1805.02867): two readings of S, not three.

Beside standard.py only the middle kernel differs: maximum and sum come from one pass.
"""

from ...code.estimate import CHUNK, Phase, scores_per_thread


def softmax_online(cta, tile):
    """P = softmax(S): running maximum and sum over all blocks of S, then the probabilities."""
    S = cta.ring("S", tile.s_bytes, stages=1)
    chunks = -(-scores_per_thread(tile) // CHUNK)
    statistics = Phase(fma=3 * CHUNK, alu=CHUNK, mufu=CHUNK, chunks=chunks, latencies=2)
    probabilities = Phase(fma=2 * CHUNK, mufu=CHUNK, chunks=chunks)
    for warps in cta.consumers():
        for reading, (label, phase) in enumerate((("row max and sum", statistics), ("probabilities", probabilities))):
            for j in tile.kv_blocks:
                block = S.again(j, reading, len(tile.kv_blocks))
                warps.cp_async(block)
                warps.wait(block)
                warps.compute(label, phase, j)
                warps.free(block)
                if label == "probabilities":
                    warps.store("P", block=j, step=j)
