"""Standard attention's backward (FlashAttention, arXiv:2205.14135, Algorithm 3): P, dP and dS go through HBM.

Five kernels, each a GEMM or the softmax's derivative over the whole problem; P is what the forward has left there.
"""


def dv(cta, tile):
    """dV = P^T dO: one CTA per tile of keys."""
    _columns(cta, tile, "P", "dO", "dV")


def dp(cta, tile):
    """dP = dO V^T: one CTA per tile of it."""
    dO = cta.ring("dO", tile.nbytes("dO"), stages=1)
    V = cta.ring("V", tile.nbytes("V"), stages=1)
    for warps in cta.consumers():
        warps.cp_async(dO[0])
        warps.cp_async(V[0])
        warps.wait(dO[0])
        warps.mma("dP", dO[0], V[0])
        warps.free(dO[0])
        warps.free(V[0])
        warps.store("dP")


def ds(cta, tile):
    """dS = P (dP - rowsum(P dP)): a row twice, the second time out of L2."""
    P = cta.ring("P", tile.nbytes("P"), stages=1)
    dP = cta.ring("dP", tile.nbytes("dP"), stages=1)
    for warps in cta.consumers():
        for reading, of in enumerate(("row sum of P dP", "P (dP - delta)")):
            for j in tile.kv_blocks:
                blocks = [ring.again(j, reading, len(tile.kv_blocks)) for ring in (P, dP)]
                for block in blocks:
                    warps.cp_async(block)
                for block in blocks:
                    warps.wait(block)
                warps.arithmetic(of, j)
                for block in blocks:
                    warps.free(block)
                if reading == 1:
                    warps.store("dS", block=j, step=j)


def dq(cta, tile):
    """dQ = dS K: one CTA per row of tiles."""
    dS = cta.ring("dS", tile.nbytes("dS"), tile.stages)
    K = cta.ring("K", tile.nbytes("K"), tile.stages)
    _product(cta, tile, tile.kv_blocks, dS, K, "dQ")


def dk(cta, tile):
    """dK = dS^T Q: one CTA per tile of keys."""
    _columns(cta, tile, "dS", "Q", "dK")


def _columns(cta, tile, left, right, result):
    """A tile of keys walks all queries."""
    a = cta.ring(left, tile.nbytes(left), tile.stages)
    b = cta.ring(right, tile.nbytes(right), tile.stages)
    _product(cta, tile, tile.steps, a, b, result)


def _product(cta, tile, steps, a, b, result):
    """result += a b over all steps, which each warp loads as many ahead as there are stages."""
    ahead = tile.stages - 1
    for warps in cta.consumers():
        for j in steps[:ahead]:
            warps.cp_async(a[j])
            warps.cp_async(b[j])
        for j in steps:
            for following in steps[j + ahead : j + ahead + 1]:
                warps.cp_async(a[following])
                warps.cp_async(b[following])
            warps.wait(a[j])
            warps.mma(result, a[j], b[j], add=True)
            warps.free(a[j])
            warps.free(b[j])
        warps.store(result)
