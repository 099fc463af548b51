"""Traffic: bytes per tensor at three levels, by replaying the tile order of a kernel through a model of L2.

L2 is in partitions, each at home for an equal share of the lines of every tile. An SM asks the partition it is next to;
for a line at home elsewhere that partition keeps a copy; only when it has lost the copy does it ask the home, and only
when the home has lost the line does HBM deliver it. So data that all SMs read takes all of its size in each partition,
and K and V of the heads in flight outgrow an H200's 60 MiB at 30 (measured: all of a 28 MiB buffer stays, none of 36).

Within a partition the model is LRU over tiles, and lines fall into sets of `l2_ways`. A buffer that is contiguous in memory
fills all sets alike, so its cliff is sharp (`l2_effective_fraction` of the capacity in the mean, `l2_spread` its standard
deviation). Attention's working set is pieces: of each head every so many rows, of each tensor what is in flight. Its lines
fall into sets as if at random, and a set that got more than its share loses lines long before L2 as a whole is full: data
that was read D bytes of other data ago is still there if fewer than that many of those lines fell into its set. So capacity is
not one number: L2 is cut into stripes, every tile has its share of its bytes in each, and the stripes keep different
amounts of the most recent data. All stripes share one recency list, so an access costs O(1).

Writes go to the home without a fetch and reach HBM when evicted, or at the end. CTAs in flight advance one loop step a
turn; SMs differ in pace by `SM_SPREAD`, so over many tiles they drift apart. Left out: L2 policies other than recency (of
data that each SM reads alone, an H200 loses little at 44 MiB and nearly all at 64; the model most of it at 44, all from 48 on).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np
from numba import njit

from ..devices.device import Device
from ..jit import SLICE, compiled
from ..problem.workload import Workload
from ..results.run import Bytes, Traffic

ROW, KV, PAIR = 0, 1, 2
"""How an access finds its tile: of queries (q_head, m), of keys (kv_head, block), or of both (q_head, m, block)."""
WALKED = 3
"""Added to ROW or PAIR where the loop walks queries: the block counts them, through every query head of the group."""

ACCESS = np.dtype(
    [
        ("tensor", "i4"),  # index into the call's list of tensors
        ("mode", "i4"),  # ROW, KV or PAIR, or of the first and the last WALKED
        ("m_offset", "i4"),  # query tile, added to the item's m
        ("block", "i4"),  # key tile, in the order it is walked, added to the item's n; of ROW, query tiles below it are left out
        ("step", "i4"),  # loop step, -1 outside the loop
        ("elements", "i4"),  # per row (PAIR: not used, a row is as long as the key tile)
        ("element_bytes", "i4"),
        ("write", "i4"),  # 1 for a store, 2 for one that adds to what is there, as L2 does
        ("multicast", "i4"),  # 1 where one load serves the whole cluster
    ]
)

WEIGHTS = (1, 1, 2, 4, 8, 16, 16, 16)
"""Shares of a tile in each stripe, fine where a rare loss matters: a K/V block is walked hundreds of times."""
STRIPES = len(WEIGHTS)
_SHARES = sum(WEIGHTS)
_LOST = tuple(sum(WEIGHTS[:k]) for k in range(STRIPES + 1))  # by how many stripes have lost it: the smallest lose first

SM_SPREAD = 0.0005
"""Standard deviation of the SMs' pace: most pairs of two warpgroups' GEMMs last 0.16 to 0.21 % longer at the 95th than at
the 5th percentile (traces/recorded/calibration/contention.json, n176; other pairs less, softmax beside a GEMM more)."""
ON_EXIT, STATIC = 0, 1
"""How a slot gets its next item: the next one waiting when it is done, as the hardware hands out CTAs and as a producer does
that draws from a queue beside its last load; or every slots-th."""

_ALGORITHMIC, _L2, _HBM = 0, 2, 4  # columns of the counters: read, then write


@dataclass(frozen=True)
class TensorLayout:
    """A tensor of the call, by the name it has in `Traffic.by_tensor`."""

    name: str


@dataclass(frozen=True)
class Launch:
    """One kernel: its items in dispatch order, and what one CTA loads and stores."""

    items: np.ndarray  # ITEM
    accesses: np.ndarray  # ACCESS: program order of the longest item; shorter ones leave out later steps
    slots: int  # CTAs in flight: SMs x CTAs per SM
    block_m: int
    block_n: int
    cluster: int = 1
    descending: bool = False  # the loop walks K/V from the item's last block to the first
    dealing: int = ON_EXIT  # or STATIC
    boxes: bool = False  # whether it loads by TMA, which delivers whole tiles: rows beyond a tensor's end as zeros


@dataclass(frozen=True)
class Moved:
    """Bytes that one launch asks of the servers all SMs share; what is dirty in L2 at the end counts for the last one."""

    l2: int  # read and written
    lookups: int  # as Traffic.l2_lookup_bytes, and written
    hbm: int  # read and written


def replay_traffic(
    workload: Workload, launches: Sequence[Launch], tensors: Sequence[TensorLayout], device: Device, scattered: bool = True
) -> tuple[Traffic, dict[str, float], dict[str, float], list[Moved]]:
    """Bytes of one call (its kernels in sequence, L2 cold at the start); per tensor the share of reads that hit L2, and of
    those that are made while HBM delivers the data: where CTAs walk in step, all wait for what the first of them asked for;
    and what each launch moves.

    Bytes are exact for ragged tiles, but what TMA delivers to an SM is the whole tile. HBM writes include what is still dirty
    in L2 at the end, which `dirty_bytes` counts.
    `smem_bytes` is left 0. `scattered` is False where all that is read is one contiguous buffer.
    """
    layout = _Layout(workload, launches, len(tensors))
    homes = device.l2_partitions
    entries = homes * homes * layout.total  # (partition, tile, home): at home where both are the same, else a copy
    block = np.zeros((layout.total, 2), np.int32)  # bytes, tensor
    # one row per entry: previous and next in recency, stripes that have evicted it, dirty stripes as bits; the last rows
    # are the heads of the lists
    links = np.full((entries + homes, 4), (-1, -1, STRIPES, 0), np.int32)
    links[entries:, :2] = np.arange(entries, entries + homes)[:, None]
    capacity = stripe_bytes(device, scattered)
    used = np.zeros((homes, STRIPES), np.int64)
    oldest = np.repeat(np.arange(entries, entries + homes)[:, None], STRIPES, axis=1)
    counts = np.zeros((len(tensors), 6), np.int64)  # HBM columns per (weight, home) share: a fraction of a byte each
    sharers = np.arange(max(launch.slots for launch in launches) + 1, dtype=np.float64)
    shared = sharers ** (1.0 - device.l2_sharing)  # lookups that so many SMs cause which read a tile in the same turn
    asked = np.full((layout.total, 2), -1, np.int64)  # turn in which the tile was read last, and by how many
    lookups = np.zeros(2)  # bytes; turns so far
    fetched = np.zeros((layout.total, 2))  # turn in which HBM delivered some of the tile last, and shares of it
    late = np.zeros(len(tensors))  # bytes read in the turn in which HBM delivered them, in shares as `counts`

    shares, moved = _SHARES * homes, [Moved(0, 0, 0)]  # all launches up to each
    for launch in launches:
        slots = min(launch.slots, len(launch.items))
        item_of, position, steps = np.arange(slots), np.zeros(slots, np.int64), np.full(slots, 0.5)
        queue = np.array([slots, slots])
        items = _columns(launch.items, ("q_head", "kv_head", "m", "n", "blocks"))
        accesses = _columns(launch.accesses, ACCESS.names)
        sizes = np.array([workload.seqlen_q, workload.seqlen_k, launch.block_m, launch.block_n, launch.boxes], np.int64)
        near_of, pace = _partitions(slots, launch.cluster, homes), paces(slots)
        while queue[1] > 0:
            _replay(
                SLICE, queue, steps, items, accesses, layout.first, workload.heads_per_kv, layout.m_tiles, layout.n_tiles, sizes,
                item_of, position, near_of, pace, launch.dealing, launch.cluster, launch.descending,
                block, links, capacity, used, oldest, counts, shared, asked, lookups, fetched, late,
            )  # fmt: skip
        moved.append(_moved(counts, shares, lookups[0]))
    written = int(counts[:, _HBM + 1].sum())
    _flush(homes, block, links, counts)
    moved[-1] = _moved(counts, shares, lookups[0])
    each = [Moved(b.l2 - a.l2, b.lookups - a.lookups, b.hbm - a.hbm) for a, b in pairwise(moved)]
    return *_report(counts, late, tensors, shares, int(counts[:, _HBM + 1].sum()) - written, lookups[0]), each


def stripe_bytes(device: Device, scattered: bool = True) -> np.ndarray:
    """Bytes of the most recent tiles of which each stripe of a partition keeps its share, ascending."""
    at = [(lost + weight / 2) / _SHARES for lost, weight in zip(_LOST, WEIGHTS, strict=False)]
    if scattered:
        load = np.linspace(0.01, 4.0, 4000)  # other lines per line of capacity
        others = device.l2_ways * load
        kept = np.zeros_like(load)  # fewer than a set holds of them in one set, Poisson
        term = np.exp(-others)
        for k in range(device.l2_ways):
            kept += term
            term = term * others / (k + 1)
        fractions = np.interp(at, 1.0 - kept, load) * min(1.0, device.l2_effective_fraction)
    else:
        normal = NormalDist(device.l2_effective_fraction, max(device.l2_spread, 1e-9))
        fractions = [normal.inv_cdf(share) for share in at]
    return np.array([max(0.05, fraction) * device.l2_bytes for fraction in fractions], np.int64)


def paces(slots: int) -> np.ndarray:
    """Loop steps a turn of each slot's SM, the fastest 1, normally distributed and in no order."""
    ranks = np.argsort(np.argsort(np.arange(slots) * 0.6180339887498949 % 1.0, kind="stable"), kind="stable")
    normal = NormalDist(0.0, SM_SPREAD)
    spread = np.array([normal.inv_cdf((rank + 0.5) / slots) for rank in ranks.tolist()])
    return 1.0 - (spread.max() - spread)


class _Layout:
    """A dense number for every tile of every tensor. Kernels that share a tensor must cut it alike."""

    def __init__(self, workload: Workload, launches: Sequence[Launch], tensors: int):
        self.first = np.zeros(tensors, np.int64)
        self.m_tiles = np.ones(tensors, np.int64)
        self.n_tiles = np.ones(tensors, np.int64)
        cuts: dict[int, tuple[int, int, int]] = {}
        for launch in launches:
            named = _columns(launch.accesses, ("tensor", "mode"))
            named[:, 1] %= WALKED
            for tensor, mode in np.unique(named, axis=0).tolist():
                cut = (mode, launch.block_m if mode != KV else 0, launch.block_n if mode != ROW else 0)
                if cuts.setdefault(tensor, cut) != cut:
                    raise ValueError(f"tensor {tensor} is cut as {cuts[tensor]} and as {cut} (mode, block_m, block_n)")
        self.total = 0
        for tensor, (mode, block_m, block_n) in cuts.items():
            m_tiles = -(-workload.seqlen_q // block_m) if block_m else 1
            n_tiles = -(-workload.seqlen_k // block_n) if block_n else 1
            heads = workload.batch * (workload.kv_heads if mode == KV else workload.heads)
            self.first[tensor] = self.total
            self.m_tiles[tensor], self.n_tiles[tensor] = m_tiles, n_tiles
            self.total += heads * m_tiles * n_tiles


def _columns(array: np.ndarray, names: Sequence[str]) -> np.ndarray:
    return np.stack([array[name] for name in names], axis=1).astype(np.int64)


def _moved(counts: np.ndarray, shares: int, lookups: float) -> Moved:
    """What all launches so far have moved."""
    hbm = -(-counts[:, _HBM:] // shares)
    written = int(counts[:, _L2 + 1].sum())
    return Moved(
        l2=int(counts[:, _L2].sum()) + written,
        lookups=round(lookups) + int(hbm[:, 0].sum()) + written,
        hbm=int(hbm.sum()),
    )


def _report(
    counts: np.ndarray, late: np.ndarray, tensors: Sequence[TensorLayout], shares: int, flushed: int, lookups: float
) -> tuple[Traffic, dict[str, float], dict[str, float]]:
    hits = {
        tensor.name: 1.0 - int(row[_HBM]) / (shares * int(row[_L2]))
        for tensor, row in zip(tensors, counts, strict=True)
        if row[_L2]
    }
    waits = {t.name: float(late[n]) / (shares * int(counts[n, _L2])) for n, t in enumerate(tensors) if counts[n, _L2]}
    missed, requested = int(counts[:, _HBM].sum()), int(counts[:, _L2].sum())
    hit_rate = 1.0 - missed / (shares * requested) if requested else 0.0
    counts = counts.copy()
    counts[:, _HBM:] = -(-counts[:, _HBM:] // shares)
    by_tensor = {t.name: Bytes(*(int(value) for value in row)) for t, row in zip(tensors, counts, strict=True)}
    looked_up = round(lookups) + sum(bytes_.hbm_read for bytes_ in by_tensor.values())  # what HBM delivers is looked up again
    return Traffic(by_tensor, hit_rate, dirty_bytes=flushed // shares, l2_lookup_bytes=looked_up), hits, waits


def _partitions(slots: int, cluster: int, homes: int) -> np.ndarray:
    """The partition each slot's SM is next to: as many to each, without a period that a tile order could have too."""
    rest = np.arange(slots) // cluster  # the CTAs of a cluster are neighbours
    near = np.zeros(slots, np.int64)
    while homes > 1 and rest.any():
        near += rest % homes
        rest //= homes
    return near % homes


# -- jitted: one call graph, all of it in this file (numba's cache does not see changes in other files) ----------------


@compiled()
def _replay(budget, queue, steps, items, accesses, first, group, m_tiles, n_tiles, sizes,
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
                    _access(i, p, again, near_of[slot], items, accesses, first, group, m_tiles, n_tiles, sizes, cluster, descending,
                            block, links, capacity, used, oldest, counts, shared, asked, lookups, fetched, late)  # fmt: skip
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


@njit(forceinline=True)
def _same_tile(accesses, p):
    """Whether access p reads the tile that the access before it read."""
    for column in range(4):
        if accesses[p, column] != accesses[p - 1, column]:
            return False
    return accesses[p - 1, 7] == 0


@njit(forceinline=True)
def _access(i, p, again, near, items, accesses, first, group, m_tiles, n_tiles, sizes, cluster, descending,
            block, links, capacity, used, oldest, counts, shared, asked, lookups, fetched, late):  # fmt: skip
    """One load or store of item i: find the tile, count its bytes, and let L2 answer."""
    tensor = accesses[p, 0]
    how = accesses[p, 1] % WALKED
    m = items[i, 2] + accesses[p, 2]
    n = items[i, 3] + (items[i, 4] - 1 - accesses[p, 3] if descending else accesses[p, 3])
    head = items[i, 1] if how == KV else items[i, 0]
    walked = accesses[p, 1] >= WALKED
    if walked:
        of_head = max(1, items[i, 4] // group)
        m = items[i, 2] + accesses[p, 3] % of_head
        n = items[i, 3]
        head += accesses[p, 3] // of_head
    rows = max(0, min(sizes[2], sizes[0] - m * sizes[2]))
    keys = max(0, min(sizes[3], sizes[1] - n * sizes[3]))
    if how == ROW:
        if m < accesses[p, 3] and not walked:
            return
        number = first[tensor] + head * m_tiles[tensor] + m
        size = rows * accesses[p, 5] * accesses[p, 6]
    elif how == KV:
        number = first[tensor] + head * n_tiles[tensor] + n
        size = keys * accesses[p, 5] * accesses[p, 6]
    else:
        number = first[tensor] + (head * m_tiles[tensor] + m) * n_tiles[tensor] + n
        size = rows * keys * accesses[p, 6]
    if size == 0:
        return
    adds = accesses[p, 7] == 2
    write = min(1, accesses[p, 7])
    counts[tensor, _ALGORITHMIC + write] += size
    if adds:  # without a cache in front of it, memory has to read what it adds to
        counts[tensor, _ALGORITHMIC] += size
    if accesses[p, 8] == 1 and cluster > 1:
        leader = i - i % cluster
        if i != leader and items[leader, 1] == items[i, 1] and items[leader, 4] == items[i, 4]:
            return  # the cluster's first CTA has fetched it for all
    delivered = size
    if sizes[4] and not write and how != PAIR:
        delivered = (sizes[2] if how == ROW else sizes[3]) * accesses[p, 5] * accesses[p, 6]
    counts[tensor, _L2 + write] += delivered
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
            missed = min(missed, _touch(x, partition, size, block, links, capacity, used, oldest, counts))
            if partition == home or missed == 0:
                break
            partition = home
        if write:
            links[x, 3] = (1 << STRIPES) - 1
            if adds:
                counts[tensor, _HBM] += _LOST[missed] * size
        else:
            counts[tensor, _HBM] += _LOST[missed] * size
            from_hbm += _LOST[missed]
    if not write:
        if from_hbm > 0:
            fetched[number, 0], fetched[number, 1] = lookups[1], from_hbm
        if lookups[1] - fetched[number, 0] < items[i, 4]:
            late[tensor] += fetched[number, 1] * size


@njit(forceinline=True)
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
                links[y, 3] &= ~(1 << k) & 255
                counts[block[tile, 1], _HBM + 1] += WEIGHTS[k] * block[tile, 0]
            if k == STRIPES - 1:
                older, newer = links[y, 0], links[y, 1]
                links[older, 1] = newer
                links[newer, 0] = older
    return absent


@compiled()
def _flush(homes, block, links, counts):
    """Write back every dirty stripe."""
    for x in range(len(links) - homes):
        tile = x // homes % len(block)
        for k in range(STRIPES):
            if links[x, 3] >> k & 1:
                counts[block[tile, 1], _HBM + 1] += WEIGHTS[k] * block[tile, 0]
        links[x, 3] = 0
