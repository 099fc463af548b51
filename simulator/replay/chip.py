"""Chip: composes what one SM does, replayed in detail, into the whole grid of a kernel.

CTAs of equal loop length in equal company behave alike, so each length is replayed once (long ones are extrapolated:
the loop is periodic), alone on an SM and with as many companions as fit. The grid is then dealt out in its real tile
order to the SMs. Left out: SMs that drift apart compete unevenly for L2 and HBM here and there; in the replay each has
its fair share. A brute-force replay of all SMs on small problems holds the composition to account (tests/test_chip.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ..devices.device import Device
from ..jit import SLICE, compiled, inlined
from ..language.program import Program, trace
from ..language.view import TileView
from ..problem.tile import Tile
from ..problem.workload import Workload
from ..results.breakdown import REASONS
from ..schedules import Kernel
from .engine import U_TENSOR, UNITS, Memory, replay
from .idle import Pieces

LONGEST_REPLAY = 64
"""Loops longer than this many blocks are extrapolated from half of it and all of it."""
STEADY_BLOCKS = 48
"""Free-running warpgroups meet differently at each short tile: as many tiles are replayed as make this many blocks, 3 to 8."""
REPLAYS = 9
"""At most this many lengths are replayed, the short ones densely; the rest is interpolated."""


BUSIEST = 0.9
"""Share of a server's rate up to which the waits were measured."""


def burst_rate(whole: float, sms: int, utilisation: float) -> float:
    """Bytes per cycle that one SM's burst gets from a server of `whole` bytes per cycle that `sms` SMs share.

    The others leave it idle 1 - utilisation of the time; when it is saturated each SM has its fair share.
    """
    return whole * max(1.0 / sms, 1.0 - utilisation)


def queue_wait(service: float, utilisation: float) -> float:
    """Cycles that a load waits for a server that is busy with those of other SMs, as they come at random (M/D/1).

    Above BUSIEST a server has no steady state: the loads then come as fast as it lets them.
    """
    busy = min(utilisation, BUSIEST)
    return service * busy / (2 * (1 - busy))


@dataclass(frozen=True)
class Durations:
    """Cycles of a CTA by loop length (rows) and companions (columns: 1 .. CTAs per SM CTAs on the SM)."""

    lengths: np.ndarray  # distinct loop lengths, ascending
    first: np.ndarray  # cycles of the first CTA (or tile) of an SM
    later: np.ndarray  # cycles each further one adds
    busy: np.ndarray  # (length, unit) busy cycles of one CTA, SMEM in bytes
    gemm_flops: np.ndarray  # (length,) FLOPs of one CTA's GEMMs, padding and all
    idle: np.ndarray  # (length, reason) cycles in which the tensor cores waited for one further CTA, in full company
    idle_first: np.ndarray  # the same, what the first CTA of an SM has more


def replayed_lengths(lengths: np.ndarray, longest: int = LONGEST_REPLAY) -> list[int]:
    """The loop lengths to replay so that the others can be interpolated or, beyond `longest`, extrapolated."""
    wanted = np.unique(np.minimum(lengths, longest))
    if lengths.max() > longest:
        wanted = np.union1d(wanted, [max(1, longest // 2)])
    if len(wanted) > REPLAYS:  # geometric picks among those that occur
        picks = np.geomspace(1, len(wanted), REPLAYS).round().astype(int) - 1
        wanted = wanted[np.unique(picks)]
    return [int(n) for n in wanted]


def _spread(known: np.ndarray, values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Piecewise linear through the replayed lengths, the last slope carried on."""
    out = np.interp(lengths, known, values)
    if len(known) > 1:
        beyond = lengths > known[-1]
        slope = (values[-1] - values[-2]) / (known[-1] - known[-2])
        out[beyond] = values[-1] + slope * (lengths[beyond] - known[-1])
    return out


def recorded(kernel: Kernel, workload: Workload, tile: Tile, blocks: int, masked: int, tiles: int) -> Program:
    """The kernel's program over `tiles` tiles of one length; no device decides it, so replays share it.

    Nor do batch, heads and lengths, which are in the length of the loop: workloads that differ in them share it too, unless the
    kernel is a user's own, or walks all Q blocks of a head.
    """
    if kernel.grid != "heads" and not kernel.where:
        group = workload.heads_per_kv
        one = {"batch": 1, "seqlen": None, "seqlen_q": tile.block_m, "seqlen_k": tile.block_n}
        packed = ((tile.block_m, tile.block_n),) if workload.lengths else None
        workload = replace(workload, heads=group, kv_heads=1, lengths=packed, **one)
    return _recorded(kernel, workload, tile, blocks, masked, tiles)


@lru_cache(maxsize=128)
def _recorded(kernel: Kernel, workload: Workload, tile: Tile, blocks: int, masked: int, tiles: int) -> Program:
    return trace(kernel, workload, tile, [(blocks, masked)] * tiles)


def measure_durations(
    kernel: Kernel, workload: Workload, tile: Tile, device: Device, memory: Memory, ctas_per_sm: int,
    lengths: np.ndarray, masked: Callable[[int], int], explain: bool = False,
) -> Durations:  # fmt: skip
    """Replay the kernel's CTA at a few loop lengths and spread the result over all of them.

    With `explain` also what the tensor cores waited for, which takes the spans of a replay; otherwise that is left zero.
    """
    lengths = np.unique(lengths)
    whole_head = kernel.grid == "heads"  # each K/V block is a long loop over Q of its own
    known = replayed_lengths(lengths, 2 if whole_head else LONGEST_REPLAY)
    first = np.zeros((len(known), ctas_per_sm))
    later = np.zeros((len(known), ctas_per_sm))
    busy = np.zeros((len(known), len(UNITS)))
    flops = np.zeros((len(known), 1))
    idle, idle_first = np.zeros((2, len(known), len(REASONS)))
    for row, n in enumerate(known):
        drains = int(kernel.persistent)  # only behind the last tile does it wait until O has left
        tiles = 2 if whole_head else min(8, max(3 + drains, STEADY_BLOCKS // max(1, n)))
        program = recorded(kernel, workload, tile, n, masked(n), tiles)
        flops[row] = program.gemm_flops
        for company in range(1, ctas_per_sm + 1):
            spans = program.most_spans * company if explain and company == ctas_per_sm else 0
            run = replay([program] * company, device, memory, max_spans=spans, eight_bit=workload.element_bytes == 1)
            ends = run.tile_ends.mean(axis=0)
            later[row, company - 1] = (ends[-1 - drains] - ends[0]) / (tiles - 1 - drains)
            first[row, company - 1] = ends[-1] - (tiles - 1) * later[row, company - 1] if drains else ends[0]
            busy[row] = run.busy[0] / (tiles * company)
            if spans:
                pieces = Pieces(program, run, int(run.busy[0, U_TENSOR]))
                idle[row] = pieces.within(ends[0], ends[-1 - drains]) / (tiles - 1 - drains)
                alone = pieces.within(0, ends[-1]) - (tiles - 1) * idle[row] if drains else pieces.within(0, ends[0])
                idle_first[row] = alone - idle[row]
                idle[row] /= company
    view = TileView(tile, workload, 1, splits=kernel.splits)
    steps = np.cumsum([len(view.q_blocks(j)) if whole_head else 1 for j in range(int(lengths.max()) + 1)])
    at, every = (np.append(0, steps)[n].astype(float) for n in (np.array(known), lengths))

    def spread(values: np.ndarray) -> np.ndarray:
        return np.stack([_spread(at, column, every) for column in values.T], axis=1)

    busy, company = spread(busy), np.arange(1, ctas_per_sm + 1)
    executes = busy[:, U_TENSOR, None] * company  # few replayed tiles may end closer together than their GEMMs take
    first, later = (np.maximum(spread(each), executes) for each in (first, later))
    return Durations(lengths, first, later, busy, spread(flops)[:, 0], spread(idle), spread(idle_first))


def compose(durations: Durations, loop_lengths: np.ndarray, sms: int, cluster: int) -> float:
    """Cycles until the last CTA of the grid is done; `loop_lengths` in dispatch order, clusters side by side."""
    return float(ends_of_sms(durations, loop_lengths, sms, cluster).max())


def ends_of_sms(durations: Durations, loop_lengths: np.ndarray, sms: int, cluster: int, strides: bool = False) -> np.ndarray:
    """When the last CTA of each SM is done, zero where none ran; SMs that make no whole cluster have none.

    CTAs are dealt to whoever is free, or, where a CTA alone on its SM `strides` over tiles, to the SMs in turn.
    """
    order = np.searchsorted(durations.lengths, loop_lengths[::cluster])
    groups, room = max(1, sms // cluster), durations.later.shape[1]
    resident, left = np.full((groups, room), -1), np.zeros((groups, room))
    clock, handed, queue = np.zeros((groups, 2)), np.zeros(1, np.int64), np.zeros(groups, np.int64)
    if strides and room == 1:
        cycles = np.append(durations.first[order[:groups], 0], durations.later[order[groups:], 0])
        clock[:, 0] = np.bincount(np.arange(len(order)) % groups, cycles, groups)
        order = order[:0]
    alike, waves = len(order) > 0 and (order == order[0]).all(), 0
    if alike:  # all CTAs of a wave end at once, so whole waves are alike too
        waves = max(0, len(order) // (groups * room) - 2)
        order = order[waves * groups * room :]
    while len(order) and deal(order, durations.first, durations.later, resident, left, clock, handed, queue, SLICE):
        pass
    if waves:
        clock[:, 0] += waves * durations.later[order[0], room - 1]
    ends = np.zeros(max(sms, groups * cluster))
    ends[: groups * cluster] = np.repeat(clock[:, 0], cluster)
    return ends


@compiled()
def deal(order, first, later, resident, left, clock, progress, queue, budget):
    """Hand CTAs out in order, each to the SM (or cluster) that has room first; whether there is more to do.

    CTAs that share an SM progress at the rate of their present company: 1 / later[length, company - 1] per cycle.
    `resident` has the length of each CTA on an SM (-1: none), `left` its share still to do, `clock` the time up to which
    an SM has been advanced and the time when its next CTA ends. `progress` counts the CTAs handed out so far; `queue` is room for
    a number per SM. Returns after about `budget` steps, to be called again.
    """
    sms, room = resident.shape
    total, handed = len(order), progress[0]
    if handed == 0:
        for slot in range(room):
            for s in range(sms):
                if handed < total:
                    k = order[handed]
                    resident[s, slot] = k
                    left[s, slot] = first[k, 0] / later[k, 0] if room == 1 else 1.0
                    handed += 1
        for s in range(sms):
            clock[s, 1] = _next_end(resident, left, later, s, 0.0)
    _in_order(queue, clock)  # a heap: no SM ends before the one at half its place
    for _ in range(max(1, budget // (8 + room * room))):
        s = queue[0]
        now = clock[s, 1]
        if now == np.inf:
            return False
        company = _company(resident, s)
        done = -1
        for slot in range(room):
            if resident[s, slot] >= 0:
                left[s, slot] -= (now - clock[s, 0]) / later[resident[s, slot], company - 1]
                if done < 0 or left[s, slot] < left[s, done]:
                    done = slot
        clock[s, 0] = now
        resident[s, done] = -1
        if handed < total:
            resident[s, done] = order[handed]
            left[s, done] = 1.0
            handed += 1
        clock[s, 1] = _next_end(resident, left, later, s, now)
        _sink(queue, clock)
        progress[0] = handed
    return True


@inlined
def _in_order(queue, clock):
    """The SMs, those first that end first: by insertion, since numpy's sort takes two seconds to compile."""
    for s in range(len(clock)):
        place = s
        while place > 0 and _sooner(clock, s, queue[place - 1]):
            queue[place] = queue[place - 1]
            place -= 1
        queue[place] = s


@inlined
def _sink(queue, clock):
    """The first of the queue goes down to its place: behind all that end sooner, or at the same time and are first in number."""
    moved, place = queue[0], 0
    while 2 * place + 1 < len(queue):
        child = 2 * place + 1
        if child + 1 < len(queue) and _sooner(clock, queue[child + 1], queue[child]):
            child += 1
        if _sooner(clock, moved, queue[child]):
            break
        queue[place] = queue[child]
        place = child
    queue[place] = moved


@inlined
def _sooner(clock, s, t):
    return clock[s, 1] < clock[t, 1] or (clock[s, 1] == clock[t, 1] and s < t)


@inlined
def _company(resident, s):
    """CTAs on SM s."""
    count = 0
    for slot in range(resident.shape[1]):
        if resident[s, slot] >= 0:
            count += 1
    return count


@inlined
def _next_end(resident, left, later, s, now):
    """When the first of SM s's CTAs ends if their company stays; never if there is none."""
    company = _company(resident, s)
    soonest = np.inf
    for slot in range(resident.shape[1]):
        if resident[s, slot] >= 0:
            ends = now + max(0.0, left[s, slot]) * later[resident[s, slot], company - 1]
            if ends < soonest:
                soonest = ends
    return soonest
