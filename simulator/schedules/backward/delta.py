"""What stands before and after a fused backward: delta = rowsum(dO O) with dQ's sum cleared, and that sum made into dQ.

Two small kernels, a CTA per tile of queries; the main kernel between them adds to dQ's sum in fp32 (FlashAttention-2,
arXiv:2307.08691, Algorithm 2, line 4).
"""


def preprocess(cta, tile):
    """Each query's delta (its derivative of the row sum), and zeros to add to."""
    O = cta.ring("O", tile.nbytes("O"), stages=1)
    dO = cta.ring("dO", tile.nbytes("dO"), stages=1)
    for warps in cta.consumers():
        warps.cp_async(O[0])
        warps.cp_async(dO[0])
        warps.wait(O[0])
        warps.wait(dO[0])
        warps.arithmetic("row dot")
        warps.free(O[0])
        warps.free(dO[0])
        warps.store("delta")
        warps.store("dQaccum")


def prepare(cta, tile):
    """Each query's delta, and LSE to base 2, where the main kernel itself keeps the sums of few heads and makes dQ of them."""
    O = cta.ring("O", tile.nbytes("O"), stages=1)
    dO = cta.ring("dO", tile.nbytes("dO"), stages=1)
    for warps in cta.consumers():
        warps.cp_async(O[0])
        warps.cp_async(dO[0])
        warps.wait(O[0])
        warps.wait(dO[0])
        warps.arithmetic("row dot")
        warps.free(O[0])
        warps.free(dO[0])
        warps.store("LSE")
        warps.store("delta")
        if warps.rank == 0:
            warps.write_out("dQaccum", "dQ")  # of queries that see no key; the main kernel does it


def postprocess(cta, tile):
    """dQ in 16 bits, scaled."""
    dQ = cta.ring("dQaccum", tile.nbytes("dQaccum"), stages=1)
    for warps in cta.consumers():
        warps.cp_async(dQ[0])
        warps.wait(dQ[0])
        warps.arithmetic("scale dQ")
        warps.free(dQ[0])
        warps.store("dQ")
