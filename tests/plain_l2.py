"""L2 and the walk of a kernel's items in plain Python, which the compiled replay of traffic must equal."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from fasim.simulator.replay.l2 import KV, OWN, PAIR, ROW, STATIC, WEIGHTS
from fasim.simulator.replay.traffic import paces, stripe_bytes


class PlainL2:
    """The same L2 by ordered dicts, one per partition and stripe, and entries named (tile, home)."""

    def __init__(self, device, counts):
        self.homes = range(device.l2_partitions)
        self.capacity = stripe_bytes(device)
        self.held = [[OrderedDict() for _ in WEIGHTS] for _ in self.homes]  # entry -> [bytes, tensor, dirty]
        self.counts = counts

    def touch(self, partition, entry, size, tensor, dirty):
        """The weight of the stripes that did not hold the entry; a store marks all of them dirty."""
        missed = 0
        for stripe, most, weight in zip(self.held[partition], self.capacity, WEIGHTS, strict=True):
            old = stripe.pop(entry, None)
            missed += weight * (old is None)
            stripe[entry] = [size, tensor, dirty or bool(old and old[2])]
            while sum(kept[0] for kept in stripe.values()) > most and len(stripe) > 1:
                gone, owner, was_dirty = stripe.popitem(last=False)[1]
                self.counts[owner, 5] += weight * gone * was_dirty
        return missed

    def access(self, near, tile, size, tensor, write):
        for home in self.homes:
            entry = (tile, home)
            if write:
                self.touch(home, entry, size, tensor, True)
                continue
            missed = self.touch(near, entry, size, tensor, False)
            if home != near and missed:
                few = 2 * missed < sum(WEIGHTS) and all(entry in stripe for stripe in self.held[home])
                missed = 0 if few else min(missed, self.touch(home, entry, size, tensor, False))
            self.counts[tensor, 4] += missed * size

    def flush(self):
        for partition in self.held:
            for stripe, weight in zip(partition, WEIGHTS, strict=True):
                for size, owner, dirty in stripe.values():
                    self.counts[owner, 5] += weight * size * dirty


def plain_replay(work, launch, tensors, device):
    """The traffic counters of one launch, by the plain L2 and tiles named by their coordinates."""
    counts = np.zeros((tensors, 6), np.int64)
    l2 = PlainL2(device, counts)
    items, rows = launch.items, launch.accesses
    longest = items["blocks"].max()

    def access(i, slot, row):
        item, tensor = items[i], int(row["tensor"])
        m = int(item["m"] + row["m_offset"])
        n = int(item["n"] + (item["blocks"] - 1 - row["block"] if launch.descending else row["block"]))
        queries = min(launch.block_m, work.seqlen_q - m * launch.block_m)
        keys = min(launch.block_n, work.seqlen_k - n * launch.block_n)
        tile, size = {
            ROW: ((tensor, int(item["q_head"]), m), queries * row["elements"] * row["element_bytes"]),
            KV: ((tensor, int(item["kv_head"]), n), keys * row["elements"] * row["element_bytes"]),
            PAIR: ((tensor, int(item["q_head"]), m, n), queries * keys * row["element_bytes"]),
            OWN: ((tensor, slot, int(row["m_offset"])), row["elements"] * row["element_bytes"]),
        }[int(row["mode"])]
        write = int(row["write"])
        counts[tensor, write] += size
        leader = items[i - i % launch.cluster]
        if row["multicast"] and i % launch.cluster and all(leader[f] == item[f] for f in ("kv_head", "blocks")):
            return
        counts[tensor, 2 + write] += size
        l2.access((slot // launch.cluster).bit_count() % device.l2_partitions, tile, size, tensor, write)

    slots = min(launch.slots, len(items))
    waiting = iter(range(slots, len(items)))

    def steps(i):
        """The accesses of each loop step of item i, one group a turn."""
        groups = []
        for row in rows:
            last = groups[-1][-1] if groups else None
            if groups and last["step"] == row["step"] and last["write"] <= row["write"]:
                groups[-1].append(row)
            else:
                groups.append([row])
        whole = items[i]["blocks"] == longest
        return iter([(i, group) for group in groups if whole or group[0]["step"] < items[i]["blocks"]])

    present = list(range(slots))
    turns = [steps(i) for i in present]
    left = [len(list(steps(i))) for i in present]
    behind, pace = [0.5] * slots, paces(slots)
    while any(left):
        for slot in range(slots):
            if left[slot] == 0:
                continue
            behind[slot] += pace[slot]
            if behind[slot] < 1:
                continue
            behind[slot] -= 1
            i, group = next(turns[slot])
            for row in group:
                access(i, slot, row)
            left[slot] -= 1
            if left[slot]:
                continue
            static = i + slots if i + slots < len(items) else None
            new = static if launch.dealing == STATIC else next(waiting, None)
            if new is not None:
                turns[slot] = steps(new)
                left[slot] = len(list(steps(new)))
    l2.flush()
    counts[:, 4:] = -(-counts[:, 4:] // (sum(WEIGHTS) * device.l2_partitions))
    return counts
