"""L2: the accesses of a kernel's items, tile by tile, through the partitions of L2, compiled.

Partitions and the sets of lines within them are what traffic.py says. L2 is cut into stripes, every tile has its share of its
bytes in each, and the stripes keep different amounts of the most recent data. All stripes share one recency list, so an access
costs O(1). Writes go to the home without a fetch and reach HBM when evicted, or at the end. CTAs in flight advance one loop step
a turn. Left out: policies other than recency (of data that each SM reads alone, an H200 loses little at 44 MiB and nearly all at
64; the model most of it at 44, all from 48 on).
"""

from __future__ import annotations

import numpy as np

from ..jit import compiled, inlined

ROW, KV, PAIR, OWN = 0, 1, 2, 3
"""How an access finds its tile: of queries (q_head, m), of keys (kv_head, block), of both (q_head, m, block), or what a slot has
for itself, whichever item is in it."""
OWN_TILES = 2
"""What a slot has: what is touched once a block, and what once an item."""
WALKED = 4
"""Added to ROW or PAIR where the loop walks queries: the block counts them, through every query head of the group."""
LAST = 8
"""Added to those where only the last item that walks a block of queries does it; where none is walked, items that no key sees."""

ACCESS = np.dtype(
    [
        ("tensor", "i4"),  # index into the call's list of tensors
        ("mode", "i4"),  # ROW, KV or PAIR, or of the first and the last WALKED, and LAST
        ("m_offset", "i4"),  # query tile, added to the item's m; of OWN, which of the slot's
        ("block", "i4"),  # key tile, in the order it is walked, added to the item's n; of ROW, query tiles below it are left out
        ("step", "i4"),  # loop step, -1 outside the loop
        ("elements", "i4"),  # per row (PAIR: not used, a row is as long as the key tile); of OWN, in all
        ("element_bytes", "i4"),
        ("write", "i4"),  # 1 for a store, 2 for one that adds to what is there, as L2 does
        ("multicast", "i4"),  # 1 where one load serves the whole cluster
    ]
)

WEIGHTS = (1, 1, 2, 4, 8, 16, 32, 64, 64, 64)
"""Shares of a tile in each stripe, fine where a rare loss matters: a K/V block is walked hundreds of times."""
STRIPES = len(WEIGHTS)
SHARES = sum(WEIGHTS)
LOST = tuple(sum(WEIGHTS[:k]) for k in range(STRIPES + 1))  # by how many stripes have lost it: the smallest lose first

ON_EXIT, STATIC = 0, 1
"""How a slot gets its next item: the next one waiting when it is done, as the hardware hands out CTAs and as a producer does
that draws from a queue beside its last load; or every slots-th."""

COUNTED, ASKED, FROM_HBM = 0, 2, 4  # columns of the counters: read, then write


# -- jitted: one call graph, all of it in this file (numba's cache does not see changes in other files) ----------------


@compiled()
def walk(budget, queue, steps, items, accesses, first, group, m_tiles, n_tiles, rings, sizes,
         item_of, position, near_of, pace, dealing, cluster, descending,
         block, links, capacity, used, oldest, counts, shared, asked, lookups, fetched, late):  # fmt: skip
    """Hand out items to slots in order; each turn every busy slot performs the accesses of its next loop step.

    It goes on from where it was, for about `budget` accesses or until no slot is busy: `queue` holds the next item that waits and
    the slots that are busy, `item_of`, `position` and `steps` the item of each slot, its next access and the steps it may take.

    A slot whose pace is below 1 sits out a turn whenever it is a whole step behind.
    Outside the loop a turn ends behind a store, so that kernels which load and store in turns interleave too.
    """
    total = len(items)
    longest = 0
    for i in range(total):
        longest = max(longest, items[i, 4])
    slots = len(item_of)
    waiting, busy = queue
    end = len(accesses)
    done = 0
    while busy > 0 and done < budget:
        lookups[1] += 1.0
        done += slots
        for slot in range(slots):
            i = item_of[slot]
            if i < 0:
                continue
            steps[slot] += pace[slot]
            if steps[slot] < 1.0:
                continue
            steps[slot] -= 1.0
            limit = items[i, 4] if items[i, 4] < longest else 1 << 40
            p = position[slot]
            while p < end and accesses[p, 4] >= limit:
                p += 1
            if p < end:
                step, stored, begun = accesses[p, 4], 0, p
                while p < end and accesses[p, 4] == step and accesses[p, 7] >= stored:
                    stored = accesses[p, 7]
                    again = p > begun and stored == 0 and _same_tile(accesses, p)
                    _access(i, slot, p, again, near_of[slot], items, accesses, first, group, m_tiles, n_tiles, rings, sizes,
                            cluster, descending, block, links, capacity, used, oldest, counts, shared, asked, lookups, fetched,
                            late)  # fmt: skip
                    p += 1
                    done += 1
                while p < end and accesses[p, 4] >= limit:
                    p += 1
            if p < end:
                position[slot] = p
                continue
            if dealing == STATIC:
                following = i + slots
            else:
                following = waiting
                waiting += 1
            position[slot] = 0
            item_of[slot] = following if following < total else -1
            busy -= following >= total
    queue[0], queue[1] = waiting, busy


@inlined
def _same_tile(accesses, p):
    """Whether access p reads the tile that the access before it read."""
    for column in range(4):
        if accesses[p, column] != accesses[p - 1, column]:
            return False
    return accesses[p - 1, 7] == 0


@inlined
def _access(i, slot, p, again, near, items, accesses, first, group, m_tiles, n_tiles, rings, sizes, cluster, descending,
            block, links, capacity, used, oldest, counts, shared, asked, lookups, fetched, late):  # fmt: skip
    """One load or store of item i: find the tile, count its bytes, and let L2 answer."""
    tensor = accesses[p, 0]
    how = accesses[p, 1] % WALKED
    m = items[i, 2] + accesses[p, 2]
    n = items[i, 3] + (items[i, 4] - 1 - accesses[p, 3] if descending else accesses[p, 3])
    head = items[i, 1] if how == KV else items[i, 0]
    walked = accesses[p, 1] % LAST >= WALKED
    if walked:
        of_head = max(1, items[i, 4] // group)
        if accesses[p, 1] >= LAST and accesses[p, 3] % of_head >= items[i, 7]:
            return
        m = items[i, 2] + accesses[p, 3] % of_head
        n = items[i, 3]
        head += accesses[p, 3] // of_head
    elif accesses[p, 1] >= LAST and items[i, 7] == 0:
        return
    rows = max(0, min(sizes[0], items[i, 5] - m * sizes[0]))
    keys = max(0, min(sizes[1], items[i, 6] - n * sizes[1]))
    if how == ROW:
        if m < accesses[p, 3] and not walked:
            return
        number = first[tensor] + head % rings[tensor] * m_tiles[tensor] + m
        size = rows * accesses[p, 5] * accesses[p, 6]
    elif how == KV:
        number = first[tensor] + head * n_tiles[tensor] + n
        size = keys * accesses[p, 5] * accesses[p, 6]
    elif how == OWN:
        number = first[tensor] + slot * n_tiles[tensor] + accesses[p, 2]
        size = accesses[p, 5] * accesses[p, 6]
    else:
        number = first[tensor] + (head * m_tiles[tensor] + m) * n_tiles[tensor] + n
        size = rows * keys * accesses[p, 6]
    if size == 0:
        return
    adds = accesses[p, 7] == 2
    write = min(1, accesses[p, 7])
    counts[tensor, COUNTED + write] += size
    if adds:  # without a cache in front of it, memory has to read what it adds to
        counts[tensor, COUNTED] += size
    if accesses[p, 8] == 1 and cluster > 1:
        leader = i - i % cluster
        if i != leader and items[leader, 1] == items[i, 1] and items[leader, 4] == items[i, 4]:
            return  # the cluster's first CTA has fetched it for all
    delivered = size
    if sizes[2] and not write and how != PAIR:
        delivered = (sizes[0] if how == ROW else sizes[1]) * accesses[p, 5] * accesses[p, 6]
    counts[tensor, ASKED + write] += delivered
    if again:
        return  # the CTA has read this very tile a moment ago
    if not write:
        asked[number, 1] = asked[number, 1] + 1 if asked[number, 0] == lookups[1] else 1
        asked[number, 0] = lookups[1]
        lookups[0] += size * (shared[asked[number, 1]] - shared[asked[number, 1] - 1])
    block[number, 0] = size
    block[number, 1] = tensor
    homes, from_hbm = len(used), 0
    for home in range(homes):
        partition = home if write else near
        missed = STRIPES
        while True:
            x = (partition * len(block) + number) * homes + home
            if partition != near and not write and 2 * LOST[missed] < SHARES and links[x, 2] == 0:
                missed = 0  # the home has all, and is asked for so few lines that the tile's place there stays what it was
                break
            missed = min(missed, _touch(x, partition, size, block, links, capacity, used, oldest, counts))
            if partition == home or missed == 0:
                break
            if not write:  # what the near half has not is looked up once more, in its home; what is at home there is not
                lookups[0] += LOST[missed] * size / (SHARES * homes)
            partition = home
        if write:
            links[x, 3] = (1 << STRIPES) - 1
            if adds:
                counts[tensor, FROM_HBM] += LOST[missed] * size
        else:
            counts[tensor, FROM_HBM] += LOST[missed] * size
            from_hbm += LOST[missed]
    if not write:
        if from_hbm > 0:
            fetched[number, 0], fetched[number, 1] = lookups[1], from_hbm
        if lookups[1] - fetched[number, 0] < items[i, 4]:
            late[tensor] += fetched[number, 1] * size


@inlined
def _touch(x, partition, size, block, links, capacity, used, oldest, counts):
    """Make entry x its partition's most recent, evict what no longer fits; returns in how many stripes it was absent.

    `oldest[partition, k]` is the least recent entry that stripe k still holds. A stripe holds the most recent entries
    up to its capacity, so what stripe k has lost all smaller ones have lost too: one number per entry says which.
    """
    homes = len(used)
    head = len(links) - homes + partition
    absent = links[x, 2]
    if links[head, 1] != x or absent == STRIPES:
        if absent < STRIPES:
            before, after = links[x, 0], links[x, 1]
            for k in range(absent, STRIPES):
                if oldest[partition, k] == x:
                    oldest[partition, k] = before
            links[before, 1] = after
            links[after, 0] = before
        front = links[head, 1]
        links[x, 0] = head
        links[x, 1] = front
        links[front, 0] = x
        links[head, 1] = x
    links[x, 2] = 0
    for k in range(absent):
        used[partition, k] += size
        if oldest[partition, k] == head:
            oldest[partition, k] = x
        while used[partition, k] > capacity[k] and oldest[partition, k] != x:
            y = oldest[partition, k]
            tile = y // homes % len(block)
            oldest[partition, k] = links[y, 0]
            used[partition, k] -= block[tile, 0]
            links[y, 2] = k + 1
            if links[y, 3] >> k & 1:
                links[y, 3] &= ~(1 << k) & ((1 << STRIPES) - 1)
                counts[block[tile, 1], FROM_HBM + 1] += WEIGHTS[k] * block[tile, 0]
            if k == STRIPES - 1:
                older, newer = links[y, 0], links[y, 1]
                links[older, 1] = newer
                links[newer, 0] = older
    return absent


@compiled()
def flush(homes, block, links, counts):
    """Write back every dirty stripe."""
    for x in range(len(links) - homes):
        tile = x // homes % len(block)
        for k in range(STRIPES):
            if links[x, 3] >> k & 1:
                counts[block[tile, 1], FROM_HBM + 1] += WEIGHTS[k] * block[tile, 0]
        links[x, 3] = 0
