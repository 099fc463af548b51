"""Sums: when the SMs are done with a kernel that keeps dQ's sums of a few heads at a time, and writes them out itself.

A CTA that would add to a head waits until the head that had the sums before has been written out, which other warps do when
every tile of keys has added to it, head after head; so whoever is far ahead waits for the longest tile of a head far behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heapreplace

import numpy as np

from ..devices.device import Device
from .chip import Durations

AHEAD = 2
"""Blocks that a CTA goes on before it is held up by what it cannot add: dQ in its outbox, dS in its buffers."""


@dataclass(frozen=True)
class Sums:
    """Of the items of such a kernel, which of them CTAs share, and how its warps write a head out."""

    ring: int  # query heads that have sums at a time
    heads: int  # of all
    group: int  # that share K and V
    m_tiles: int  # blocks of queries of a head
    shares: int  # that a block is written out in, each by one warp
    warps: int  # of a CTA, beside those of the main loop
    rounds: int  # in which one of them reads a share
    parts: np.ndarray  # PART of the first tiles

    def ends(self, durations: Durations, items: np.ndarray, sms: int, in_turn: bool, device: Device) -> tuple[np.ndarray, float]:
        """When each SM is done with its last tile, and when the last head is out: cycles from the kernel's start.

        Items behind the shared ones go to the SMs `in_turn`, else to whoever is free first.
        """
        ctas = min(sms, len(items))
        free = np.zeros(ctas)
        fresh = np.ones(ctas, bool)
        head = _Heads(self, items, device)

        def work(cta: int, item: int, begin: int, blocks: int, start: float) -> float:
            k = np.searchsorted(durations.lengths, blocks)
            lasts = durations.first[k, 0] if fresh[cta] else durations.later[k, 0]
            fresh[cta] = False
            return head.walk(item, begin, blocks, start, lasts / blocks)

        for part in self.parts.tolist():
            cta = part[0]
            free[cta] = work(*part, free[cta])
        done = int(self.parts["item"].max()) + 1 if len(self.parts) else 0
        blocks = items["blocks"].tolist()
        if in_turn:
            for number in range(done, len(items)):
                cta = (number - done) % ctas
                free[cta] = work(cta, number, 0, blocks[number], free[cta])
        else:
            queue = [(0.0, cta) for cta in range(ctas)]
            heapify(queue)
            for number in range(len(items)):
                at, cta = queue[0]
                free[cta] = work(cta, number, 0, blocks[number], at)
                heapreplace(queue, (free[cta], cta))
        ends = np.zeros(sms)
        ends[:ctas] = free
        return ends, head.out + head.latency


class _Heads:
    """Of each query head, how many blocks have yet to be added, until when they were, and when it is out."""

    def __init__(self, sums: Sums, items: np.ndarray, device: Device):
        self.sums = sums
        each = items["blocks"] // sums.group
        self.left = np.bincount(items["q_head"], each, sums.heads)
        for k in range(1, sums.group):
            self.left[k :: sums.group] = self.left[:: sums.group]
        self.left, self.first = self.left.tolist(), items["q_head"].tolist()
        self.each = each.tolist()
        self.added, self.written = [0.0] * sums.heads, [0.0] * sums.heads
        self.out, self.next = 0.0, 0
        # a counter is added to and read, a share drawn; its sums come in so many rounds
        self.latency = 3 * device.draw_latency_cycles + sums.rounds * device.l2_hit_latency_cycles
        self.busy = sums.m_tiles * sums.shares * self.latency / (device.sms * sums.warps)

    def walk(self, item: int, begin: int, blocks: int, at: float, each: float) -> float:
        """The time at which so many blocks of an item, from the `begin`-th on, are done, begun at `at`, each taking so long."""
        ring, of_head = self.sums.ring, self.each[item]
        end = begin + blocks
        while begin < end:
            head = self.first[item] + begin // of_head
            now = min(end, (begin // of_head + 1) * of_head) - begin
            if head >= ring:
                at = max(at, self.written[head - ring] - AHEAD * each)
            at += now * each
            self.added[head] = max(self.added[head], at)
            self.left[head] -= now
            begin += now
            while self.next < self.sums.heads and self.left[self.next] <= 0:
                self.out = max(self.out, self.added[self.next]) + self.busy
                self.written[self.next] = self.out + self.latency
                self.next += 1
        return at

