"""A schedule of your own: rename the function, change the order, and predict it.

    fasim predict --schedule ./mine.py:my_schedule
    fasim timeline --schedule ./mine.py:my_schedule
    fasim disasm --schedule ./mine.py:my_schedule

The file is Python and is run as such. The function only says who does what and in which order; it is recorded, checked for
deadlocks, leaks and races, and replayed. It starts out as warp specialisation (FlashAttention-3, section 3.1): a producer warp
loads, consumer warpgroups compute. Ideas to try: issue the next S = Q K^T before this block's softmax (overlap within a
warpgroup); make the warpgroups take turns with `turn = cta.baton(first=0)`, `wg.take(turn)`, `wg.give(turn)` (pingpong).
"""


def my_schedule(cta, tile):
    """What one CTA does for one tile of Q: tile.kv_blocks are the K/V blocks it walks."""
    # Buffers in shared memory: a ring has tile.stages slots, K[j] is load j; a private buffer has a part for each consumer.
    Q = cta.private("Q", tile.q_bytes)
    K = cta.ring("K", tile.k_bytes, tile.stages)
    V = cta.ring("V", tile.v_bytes, tile.stages)
    O = cta.staging("O", tile.stage_bytes)
    last = tile.kv_blocks[-1]

    load = cta.producer()
    for wg in cta.consumers():
        load.tma(Q[wg])
    for j in tile.kv_blocks:
        load.tma(K[j])  # waits by itself until the slot is free
        load.tma(V[j])

    for wg in cta.consumers():
        wg.wait(Q[wg])
        for j in tile.kv_blocks:
            S = wg.gemm("S", Q[wg], K[j])  # S = Q K^T: is issued, and runs on without the warpgroup
            wg.wait(S)
            wg.free(K[j])  # the producer may load over it
            if j == last:
                wg.free(Q[wg])
            wg.softmax(j)
            wg.rescale(j)
            PV = wg.gemm("O", "P", V[j], add=True)  # O += P V
            wg.wait(PV)
            wg.free(V[j])
        wg.normalize()
        wg.store("O", slot=O[wg])
        wg.store("LSE")
