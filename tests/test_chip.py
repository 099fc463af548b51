"""The composition of the chip from one SM, held to a brute-force replay of every SM at once on small problems."""

from dataclasses import fields, replace
from functools import cache
from heapq import heapify, heappop, heappush

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasim.simulator.devices.device import load_device
from fasim.simulator.language.program import trace
from fasim.simulator.predict import default_tile, laid_out
from fasim.simulator.problem.order import work_items
from fasim.simulator.problem.workload import Workload
from fasim.simulator.replay.chip import (
    LONGEST_REPLAY,
    REPLAYS,
    Durations,
    burst_rate,
    compose,
    deal,
    ends_of_sms,
    measure_durations,
    recorded,
    replayed_lengths,
)
from fasim.simulator.replay.engine import Memory, replay
from fasim.simulator.replay.settle import _start
from fasim.simulator.schedules import SCHEDULES, find_schedule

H200 = load_device("h200")
MISSES = {"Q": 0.2, "K": 0.2, "V": 0.2}
SHARE = 80.0, 20.0  # L2 and HBM bytes per cycle, over the number of SMs: an H200's


def both(name: str, workload: Workload, sms: int) -> tuple[float, int]:
    """Cycles by composition, and by replaying all SMs together with L2 and HBM shared among them."""
    device = replace(load_device("h200"), sms=sms)
    schedule = SCHEDULES[name]
    kernel, tile = schedule.kernels[0], replace(default_tile(workload, name, device), cluster=1)
    room = 1 if schedule.hopper else 2
    order = "grid" if not kernel.persistent else "longest-first" if workload.causal else "persistent"
    items = work_items(workload, tile.block_m, tile.block_n, order)
    lengths = items["blocks"].astype(np.int64)
    masked = np.zeros(lengths.max() + 1, int)
    np.maximum.at(masked, items["blocks"], items["masked"])

    kv_bytes = 2 * tile.block_n * workload.head_dim * 2 * int(lengths.sum())
    memory = Memory(*SHARE, MISSES, {})
    for _ in range(2):
        durations = measure_durations(kernel, workload, tile, device, memory, room, lengths, lambda n: int(masked[n]))
        composed = compose(durations, lengths, sms, 1)
        l2, hbm = (
            burst_rate(share * sms, sms, min(1.0, moved / composed / (share * sms)))
            for moved, share in zip((kv_bytes, MISSES["K"] * kv_bytes), SHARE, strict=True)
        )
        memory = Memory(l2, hbm, MISSES, {})

    ready = [(0.0, slot) for slot in range(sms * room)]
    heapify(ready)
    sequences = [[] for _ in ready]
    for n in lengths.tolist():
        at, slot = heappop(ready)
        sequences[slot].append((n, int(masked[n])))
        heappush(ready, (at + durations.later[np.searchsorted(durations.lengths, n), room - 1], slot))
    used = [(slot, sequence) for slot, sequence in enumerate(sequences) if sequence]
    traced = cache(lambda sequence: trace(kernel, workload, tile, sequence))
    programs = [traced(tuple(sequence)) for _, sequence in used]
    whole = Memory(SHARE[0] * sms, SHARE[1] * sms, MISSES, {})
    return composed, replay(programs, device, whole, [slot % sms for slot, _ in used]).cycles


PROBLEMS = [
    (Workload(1, 4, 1024), 4),
    (Workload(2, 4, 2048, 64), 4),
    (Workload(1, 3, 700, causal=True), 4),
    (Workload(1, 4, 1000, causal=True), 4),
    (Workload(1, 8, 4096, causal=True), 8),
]


@pytest.mark.parametrize("name", ["fa2", *(name for name, schedule in SCHEDULES.items() if schedule.hopper)])
@pytest.mark.parametrize(("workload", "sms"), PROBLEMS, ids=str)
def test_composition_agrees_with_all_sms_together(name, workload, sms):
    """Within 4 % where something orders the warpgroups: turns, or mma.sync that waits. It errs on the fast side: loads of
    other SMs sometimes stand in the way, here they do so on average. Free-running warpgroups can settle in one of
    several alignments, and which one depends on the tiles before; there the composition holds to 9 % only.
    """
    composed, brute = both(name, workload, sms)
    assert composed == pytest.approx(brute, rel=0.04 if name in ("fa2", "pingpong", "fa3") else 0.09)


@given(st.lists(st.integers(0, 2000), min_size=1, max_size=60))
def test_a_handful_of_lengths_is_replayed_whatever_the_problem(lengths):
    known = replayed_lengths(np.array(lengths))
    assert len(known) <= REPLAYS + 1
    assert known == sorted(set(known))
    assert min(min(lengths), LONGEST_REPLAY) in known
    assert min(max(lengths), LONGEST_REPLAY) in known
    assert len(known) > 1 or max(lengths) <= LONGEST_REPLAY


def run_deal(order, later, sms):
    later = np.array(later, float)
    room = later.shape[1]
    resident, left, clock = np.full((sms, room), -1), np.zeros((sms, room)), np.zeros((sms, 2))
    handed, queue = np.zeros(1, np.int64), np.zeros(sms, np.int64)
    while deal(np.array(order), later, later, resident, left, clock, handed, queue, 1):  # a CTA at a time
        pass
    return clock[:, 0].max()


@pytest.mark.parametrize(("strides", "last"), [(False, 6), (True, 7)])
def test_tiles_of_a_fixed_stride_are_not_dealt_to_whoever_is_free(strides, last):
    """Tiles of 4, 1, 1, 3 and 2 blocks on two SMs: in turn 4 + 1 + 2 and 1 + 3; to whoever is free 4 + 2 and 1 + 1 + 3."""
    cycles = np.arange(1.0, 5.0)[:, None]
    durations = Durations(np.arange(1, 5), cycles, cycles, *(np.zeros((4, 1)) for _ in range(4)))
    ends = ends_of_sms(durations, np.array([4, 1, 1, 3, 2]), 2, 1, strides)
    assert (ends.max(), ends.sum()) == (last, 11)


@given(st.integers(1, 90), st.integers(1, 6), st.integers(1, 3), st.integers(1, 2))
def test_waves_of_ctas_of_one_length_are_as_long_as_if_each_was_dealt(ctas, sms, room, cluster):
    """Beside lengths that are two in name and one in cycles."""
    later = np.tile([[6.0, 10.0, 13.0][:room]], (2, 1))
    durations = Durations(np.arange(1, 3), later + (room == 1), later, *(np.zeros((2, 1)) for _ in range(4)))
    named = np.repeat(np.arange(ctas) % 2 + 1, cluster)
    each, waves = (ends_of_sms(durations, lengths, sms * cluster, cluster) for lengths in (named, np.ones_like(named)))
    assert waves == pytest.approx(each)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 6))
def test_dealing_one_cta_per_sm_is_list_scheduling(order, sms):
    cycles = [5.0, 7.0, 11.0]
    ready = [0.0] * sms
    for kind in order:
        soonest = ready.index(min(ready))
        ready[soonest] += cycles[kind]
    assert run_deal(order, [[c] for c in cycles], sms) == pytest.approx(max(ready))


def test_ctas_that_share_an_sm_speed_up_when_the_other_leaves():
    """Two together take 10 each, one alone 6: the third runs its first part in company, the rest alone."""
    assert run_deal([0, 0], [[6.0, 10.0]], 1) == pytest.approx(10.0)
    assert run_deal([0, 0, 0], [[6.0, 10.0]], 1) == pytest.approx(16.0)


def test_a_loop_beyond_the_longest_replay_goes_on_as_it_did():
    """Twice the length from there on costs twice the difference: the loop is periodic."""
    workload = Workload(1, 1, 176 * 256)
    device, kernel = load_device("h200"), SCHEDULES["fa3"].kernels[0]
    tile = replace(default_tile(workload, "fa3", device), cluster=1)
    lengths = np.array([96, 256])
    found = measure_durations(kernel, workload, tile, device, Memory(*SHARE, MISSES, {}), 1, lengths, lambda n: 0)
    for row, n in enumerate(lengths):
        program = trace(kernel, workload, tile, [(int(n), 0)])
        assert found.first[row, 0] == pytest.approx(replay([program], device, Memory(*SHARE, MISSES, {})).cycles, rel=0.01)


def test_the_first_loads_of_all_ctas_wait_for_each_other():
    """128 CTAs ask for 4 MB of Q and 16 heads' first keys at once; a single CTA waits for nobody."""
    many = laid_out(Workload(1, 16, 1024), "fa3", "h200")
    start = _start(many.grids[0], H200, 1.9e9)
    tile = many.tile
    first = 16 * 1024 * 128 * 2 + 16 * tile.block_n * 128 * 2
    alone = (tile.block_m + tile.block_n) * 128 * 2 / H200.l2_bytes_per_cycle_per_sm
    assert start == pytest.approx(first / H200.hbm_achieved_bytes_per_s * 1.9e9 - alone, rel=0.01) and start > 1000
    assert _start(laid_out(Workload(1, 1, 128), "fa3", "h200").grids[0], H200, 1.9e9) == 0.0
    slow = replace(H200, hbm_bytes_per_s=H200.hbm_bytes_per_s / 2)
    assert _start(many.grids[0], slow, 1.9e9) > 2 * start


@pytest.mark.parametrize(("name", "direction"), [("fa3", "forward"), ("standard", "forward"), ("fa2", "backward")])
def test_batch_heads_and_lengths_are_no_part_of_a_program(name, direction):
    """What is recorded once for many workloads is what each of them would record."""
    odd = Workload(3, 8, seqlen_q=500, seqlen_k=1000, kv_heads=2, causal=True)
    for workload in (odd, Workload(1, 4, 256)):
        workload = replace(workload, direction=direction)
        schedule = find_schedule(name, workload.direction)
        tile = default_tile(workload, name, "h200")
        for kernel in schedule.kernels:
            shared, own = recorded(kernel, workload, tile, 4, 1, 2), trace(kernel, workload, tile, [(4, 1)] * 2)
            for field in fields(own):
                ours, theirs = getattr(shared, field.name), getattr(own, field.name)
                assert np.array_equal(ours, theirs) if isinstance(theirs, np.ndarray) else ours == theirs, field.name
