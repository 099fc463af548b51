"""Standard attention with the online softmax (Milakov and Gimelshein, arXiv:1805.02867): two readings of S, not three.

Beside standard.py only the middle kernel differs: maximum and sum come from one pass.
"""

from ..softmax import CHUNK, Phase, scores_per_thread


def softmax_online(cta, tile):
    """P = softmax(S): running maximum and sum in the first reading, probabilities in the second."""
    S = cta.ring("S", tile.s_bytes, stages=1)
    chunks = -(-scores_per_thread(tile) // CHUNK)
    statistics = Phase(fma=3 * CHUNK, alu=CHUNK, mufu=CHUNK, chunks=chunks, latencies=2)
    probabilities = Phase(fma=2 * CHUNK, mufu=CHUNK, chunks=chunks)
    for warps in cta.consumers():
        for j in tile.kv_blocks:
            for reading, phase in enumerate((statistics, probabilities)):
                warps.cp_async(S[2 * j + reading], block=j)
                warps.wait(S[2 * j + reading])
                warps.compute(("row max and sum", "probabilities")[reading], phase, j)
                warps.free(S[2 * j + reading])
            warps.store("P", block=j, step=j)
