"""Traffic: bytes per tensor at three levels, by replaying the tile order of a kernel through a model of L2 (l2.py).

L2 is in partitions, each at home for an equal share of the lines of every tile. An SM asks the partition it is next to;
for a line at home elsewhere that partition keeps a copy; only when it has lost the copy does it ask the home, and only
when the home has lost the line does HBM deliver it. So data that all SMs read takes all of its size in each partition,
and K and V of the heads in flight outgrow an H200's 60 MiB at 30 (measured: all of a 28 MiB buffer stays, none of 36).

Within a partition the model is LRU over tiles, and lines fall into sets of `l2_ways`. A buffer that is contiguous in memory
fills all sets alike, so its cliff is sharp (`l2_effective_fraction` of the capacity in the mean, `l2_spread` its standard
deviation). Attention's working set is pieces: of each head every so many rows, of each tensor what is in flight. Its lines
fall into sets as if at random, and a set that got more than its share loses lines long before L2 as a whole is full: data
that was read D bytes of other data ago is still there if fewer than that many of those lines fell into its set. So capacity is
not one number but one for each stripe of L2. SMs differ in pace by `SM_SPREAD`, so over many tiles they drift apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from ..devices.device import Device
from ..jit import SLICE
from ..problem.workload import Workload
from ..results.run import Bytes, Traffic
from .l2 import (
    ACCESS,
    ASKED,
    FROM_HBM,
    KV,
    LAST,
    LOST,
    ON_EXIT,
    OWN,
    OWN_TILES,
    PAIR,
    ROW,
    SHARES,
    STRIPES,
    WALKED,
    WEIGHTS,
    flush,
    walk,
)  # fmt: skip

SM_SPREAD = 0.0005
"""Standard deviation of the SMs' pace: most pairs of two warpgroups' GEMMs last 0.16 to 0.21 % longer at the 95th than at
the 5th percentile (traces/recorded/calibration/contention.json, n176; other pairs less, softmax beside a GEMM more)."""


@dataclass(frozen=True)
class TensorLayout:
    """A tensor of the call, by its name in `Traffic.by_tensor`; one of rows may hold those of a `ring` of heads at a time."""

    name: str
    ring: int = 0


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
    written: int = 0  # of them


def replay_traffic(
    workload: Workload, launches: Sequence[Launch], tensors: Sequence[TensorLayout], device: Device, scattered: bool = True
) -> tuple[Traffic, dict[str, float], dict[str, float], list[Moved]]:
    """Bytes of one call (its kernels in sequence, L2 cold at the start); per tensor the share of reads that hit L2, and of
    those that are made while HBM delivers the data: where CTAs walk in step, all wait for what the first of them asked for;
    and what each launch moves.

    Bytes are exact for ragged tiles, but what TMA delivers to an SM is the whole tile. HBM writes include what is still dirty
    in L2 at the end; `dirty_bytes` counts that, and what is dirty when each kernel before ends.
    `smem_bytes` is left 0. `scattered` is False where all that is read is one contiguous buffer.
    """
    shares = SHARES * device.l2_partitions
    heads = alike_heads(workload, launches, device)
    if heads:  # what the first of them moves, and each further one more
        few, more = (_replay(*of_heads(workload, launches, n), tensors, device, scattered) for n in FEW_HEADS)
        times = (heads - FEW_HEADS[1]) / (FEW_HEADS[1] - FEW_HEADS[0])
        counted = _Counted(*(y + ((y - x) * times).astype(y.dtype) for x, y in zip(few, more, strict=True)))
        counted = counted._replace(dirty=more.dirty)
    else:
        counted = _replay(workload, launches, tensors, device, scattered)
    moved = [_moved(counts, shares, lookups) for counts, lookups in zip(counted.counts, counted.lookups, strict=True)]
    nothing = Moved(0, 0, 0, 0)
    each = [Moved(*(after - before for before, after in zip(vars(a).values(), vars(b).values(), strict=True)))
            for a, b in pairwise([nothing, *moved])]  # fmt: skip
    return *_report(counted, tensors, shares), each


ALIKE_OVER_L2, ALIKE_HEADS = 4, 6
FEW_HEADS = 2, 4
"""S of a head fills L2 so many times, and there are so many heads: then what one moves, all do."""


def alike_heads(workload: Workload, launches: Sequence[Launch], device: Device) -> int:
    """How many heads every launch goes through one after another, each in the same way and with much more of its own than L2
    holds, so that none finds there what another has left: kernels that hand S to each other through memory. 0 for all others."""
    heads = workload.batch * workload.heads
    scores = workload.seqlen_q * workload.seqlen_k * workload.element_bytes
    if workload.lengths or workload.heads_per_kv > 1 or heads < ALIKE_HEADS or scores < ALIKE_OVER_L2 * device.l2_bytes:
        return 0
    for launch in launches:
        if len(launch.items) % heads or PAIR not in launch.accesses["mode"]:
            return 0
        by_head = launch.items.reshape(heads, -1)
        if any((by_head[name] != by_head[name][:1]).any() for name in ("m", "n", "blocks")):
            return 0
        if (by_head["q_head"] != by_head["q_head"][:, :1]).any():
            return 0
    return heads


def of_heads(workload: Workload, launches: Sequence[Launch], count: int) -> tuple[Workload, list[Launch]]:
    """The first so many of alike heads, with a workload that has no more."""
    heads = workload.batch * workload.heads
    fewer = []
    for launch in launches:
        items = launch.items.reshape(heads, -1)[:count].copy()
        items["q_head"] = items["kv_head"] = np.arange(count)[:, None]
        fewer.append(replace(launch, items=items.ravel()))
    return replace(workload, batch=1, heads=count, kv_heads=count), fewer


class _Counted(NamedTuple):
    """Sums over all launches up to each, and in all; HBM's are per (weight, home) share, a fraction of a byte each."""

    counts: np.ndarray  # (launch, tensor, read and written of each level)
    lookups: np.ndarray  # (launch,) bytes
    late: np.ndarray  # (tensor,) bytes read in the turn in which HBM delivered them, in shares
    dirty: np.ndarray  # shares that are in L2 when a launch ends and were not when the one before did


def _replay(
    workload: Workload, launches: Sequence[Launch], tensors: Sequence[TensorLayout], device: Device, scattered: bool
) -> _Counted:
    layout = _Layout(workload, launches, tensors)
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
    counts = np.zeros((len(tensors), 6), np.int64)
    sharers = np.arange(max(launch.slots for launch in launches) + 1, dtype=np.float64)
    shared = sharers ** (1.0 - device.l2_sharing)  # lookups that so many SMs cause which read a tile in the same turn
    asked = np.full((layout.total, 2), -1, np.int64)  # turn in which the tile was read last, and by how many
    lookups = np.zeros(2)  # bytes; turns so far
    fetched = np.zeros((layout.total, 2))  # turn in which HBM delivered some of the tile last, and shares of it
    late = np.zeros(len(tensors))

    found = []
    dirty, earlier = 0, np.zeros(len(links), links.dtype)  # the stripes that were dirty when the launch before ended
    for launch in launches:
        slots = min(launch.slots, len(launch.items))
        item_of, position, steps = np.arange(slots), np.zeros(slots, np.int64), np.full(slots, 0.5)
        queue = np.array([slots, slots])
        items = _columns(launch.items, ("q_head", "kv_head", "m", "n", "blocks"))
        items = np.column_stack([items, *workload.lengths_of(launch.items["q_head"]), _last(launch, workload)])
        accesses = _columns(launch.accesses, ACCESS.names)
        sizes = np.array([launch.block_m, launch.block_n, launch.boxes], np.int64)
        near_of, pace = _partitions(slots, launch.cluster, homes), paces(slots)
        while queue[1] > 0:
            walk(
                SLICE, queue, steps, items, accesses, layout.first, workload.heads_per_kv, layout.m_tiles, layout.n_tiles,
                layout.rings, sizes, item_of, position, near_of, pace, launch.dealing, launch.cluster, launch.descending,
                block, links, capacity, used, oldest, counts, shared, asked, lookups, fetched, late,
            )  # fmt: skip
        found.append((counts.copy(), lookups[0]))
        left, before = counts.copy(), links[:, 3].copy()
        links[:, 3] &= ~earlier
        flush(homes, block, links, left)  # nothing is written back yet: it is counted, and the stripes are dirty again
        links[:, 3] = before
        dirty, earlier = dirty + int((left - counts)[:, FROM_HBM + 1].sum()), before
    flush(homes, block, links, counts)
    found[-1] = counts, lookups[0]
    each, looked_up = zip(*found, strict=True)
    return _Counted(np.stack(each), np.array(looked_up), late, np.array(dirty))


@lru_cache(maxsize=32)
def stripe_bytes(device: Device, scattered: bool = True) -> np.ndarray:
    """Bytes of the most recent tiles of which each stripe of a partition keeps its share, ascending."""
    at = [(lost + weight / 2) / SHARES for lost, weight in zip(LOST, WEIGHTS, strict=False)]
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
    return _paces(slots, SM_SPREAD)


@lru_cache(maxsize=32)
def _paces(slots: int, deviation: float) -> np.ndarray:
    ranks = np.argsort(np.argsort(np.arange(slots) * 0.6180339887498949 % 1.0, kind="stable"), kind="stable")
    normal = NormalDist(0.0, deviation)
    spread = np.array([normal.inv_cdf((rank + 0.5) / slots) for rank in ranks.tolist()])
    return 1.0 - (spread.max() - spread)


class _Layout:
    """A dense number for every tile of every tensor. Kernels that share a tensor must cut it alike."""

    def __init__(self, workload: Workload, launches: Sequence[Launch], tensors: Sequence[TensorLayout]):
        self.first = np.zeros(len(tensors), np.int64)
        self.m_tiles = np.ones(len(tensors), np.int64)
        self.n_tiles = np.ones(len(tensors), np.int64)
        self.rings = np.array([tensor.ring or 1 << 40 for tensor in tensors], np.int64)
        cuts: dict[int, tuple[int, int, int]] = {}
        for launch in launches:
            named = _columns(launch.accesses, ("tensor", "mode"))
            named[:, 1] %= WALKED
            for tensor, mode in np.unique(named, axis=0).tolist():
                cut = (mode, launch.block_m if mode in (ROW, PAIR) else 0, launch.block_n if mode in (KV, PAIR) else 0)
                if cuts.setdefault(tensor, cut) != cut:
                    raise ValueError(f"tensor {tensor} is cut as {cuts[tensor]} and as {cut} (mode, block_m, block_n)")
        self.total = 0
        for tensor, (mode, block_m, block_n) in cuts.items():
            m_tiles = -(-workload.seqlen_q // block_m) if block_m else 1
            n_tiles = -(-workload.seqlen_k // block_n) if block_n else 1
            each = min(workload.batch * (workload.kv_heads if mode == KV else workload.heads), int(self.rings[tensor]))
            if mode == OWN:
                each, n_tiles = max(launch.slots for launch in launches), OWN_TILES
            self.first[tensor] = self.total
            self.m_tiles[tensor], self.n_tiles[tensor] = m_tiles, n_tiles
            self.total += each * m_tiles * n_tiles


def _last(launch: Launch, workload: Workload) -> np.ndarray:
    """Of the blocks of queries that each item walks of a head, how many, from the first on, no item of later keys walks; of an item
    that walks none, whether no key sees its own."""
    items = launch.items
    if not (launch.accesses["mode"] % LAST >= WALKED).any():
        ends = (items["m"].astype(np.int64) + 1) * launch.block_m
        return (ends + workload.seqlen_k <= workload.seqlen_q) & workload.causal
    begins = np.full(int(items["n"].max()) + 2, 1 << 30, np.int64)
    begins[items["n"]] = items["m"]
    return np.minimum(begins[items["n"] + 1] - items["m"], items["blocks"] // workload.heads_per_kv)


def _columns(array: np.ndarray, names: Sequence[str]) -> np.ndarray:
    return np.stack([array[name] for name in names], axis=1).astype(np.int64)


def _moved(counts: np.ndarray, shares: int, lookups: float) -> Moved:
    """What all launches so far have moved."""
    hbm = -(-counts[:, FROM_HBM:] // shares)
    written = int(counts[:, ASKED + 1].sum())
    return Moved(
        l2=int(counts[:, ASKED].sum()) + written,
        lookups=round(lookups) + written,
        hbm=int(hbm.sum()),
        written=int(hbm[:, 1].sum()),
    )


def _report(
    counted: _Counted, tensors: Sequence[TensorLayout], shares: int
) -> tuple[Traffic, dict[str, float], dict[str, float]]:
    counts, late = counted.counts[-1].copy(), counted.late
    asked = [(tensor.name, n, shares * int(counts[n, ASKED])) for n, tensor in enumerate(tensors) if counts[n, ASKED]]
    hits = {name: 1.0 - int(counts[n, FROM_HBM]) / size for name, n, size in asked}
    waits = {name: float(late[n]) / size for name, n, size in asked}
    missed, requested = int(counts[:, FROM_HBM].sum()), int(counts[:, ASKED].sum())
    hit_rate = 1.0 - missed / (shares * requested) if requested else 0.0
    counts[:, FROM_HBM:] = -(-counts[:, FROM_HBM:] // shares)
    by_tensor = {t.name: Bytes(*(int(value) for value in row)) for t, row in zip(tensors, counts, strict=True)}
    looked_up = round(counted.lookups[-1])
    dirty = int(counted.dirty) // shares
    return Traffic(by_tensor, hit_rate, dirty_bytes=dirty, l2_lookup_bytes=looked_up), hits, waits


def _partitions(slots: int, cluster: int, homes: int) -> np.ndarray:
    """The partition each slot's SM is next to: as many to each, without a period that a tile order could have too."""
    rest = np.arange(slots) // cluster  # the CTAs of a cluster are neighbours
    near = np.zeros(slots, np.int64)
    while homes > 1 and rest.any():
        near += rest % homes
        rest //= homes
    return near % homes
