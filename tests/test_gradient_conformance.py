"""The backward's in-kernel trace beside its schedule and its prediction: the order is held, phases add up, both are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from fasim.simulator.language.program import trace
from fasim.simulator.predict import default_tile
from fasim.simulator.problem.workload import Workload
from fasim.simulator.results.run import Activity, Bottleneck, Bytes, Measurement, Run, Traffic
from fasim.simulator.schedules import find_schedule
from fasim.traces import store
from fasim.traces.conformance import conforms, recorded, said
from fasim.traces.gradient_trace import LABELS, recording
from fasim.traces.kernel_trace import BLOCKS, ROWS, SLOTS
from fasim.traces.overlay import one_cta, pair
from fasim.traces.stamped import BACKWARD

FULL = Workload(1, 4, 1024, 128, "bf16", direction="backward")
SCHEDULES = {"fa3": 128, "lagged": 128, "ahead": 128, "covered": 64}
"""Schedules of the CUDA backward that stamp, and a head dim of each."""


def workload_of(schedule: str) -> Workload:
    """FULL at the head dim of a schedule."""
    return replace(FULL, head_dim=SCHEDULES[schedule])


def slots(schedule: str, loops: Sequence[int], unstamped: Sequence[int] = ()) -> list[list[tuple[int, int]]]:
    """Where each warpgroup stamps, in order, on tiles of these lengths: (block, slot); not at the ends of those `unstamped`."""
    workload = workload_of(schedule)
    kernel = next(each for each in find_schedule(schedule, "backward").kernels if each.grid == "columns")
    program = trace(kernel, workload, default_tile(workload, schedule, "h200"), [(n, 0) for n in loops])
    first, events = np.append(0, np.cumsum(loops)), said(program, BACKWARD)
    return [
        [
            (int(first[tile]) + (loops[tile] - 1 if label == "store dK" else step), LABELS.index(label))
            for tile, label, step in events[f"WG{rank}"]
            if not (label == "store dK" and tile in unstamped)
        ]
        for rank in (0, 1)
    ]


def stamps(schedule: str, loops: Sequence[int], unstamped: Sequence[int] = (), apart: int = 100) -> np.ndarray:
    """A trace buffer of one CTA: a stamp every `apart` cycles, over a wrap of the clock."""
    words = np.zeros((1, ROWS, BLOCKS, SLOTS), np.uint32)
    for rank, places in enumerate(slots(schedule, loops, unstamped)):
        for number, place in enumerate(places):
            words[(0, 1 + rank, *place)] = (2**32 - 5003 + 7 * rank + apart * number) % 2**32
    return words


def measured(schedule: str, words: np.ndarray, warpgroups: int = 2) -> Run:
    """A measured run that holds the trace of CTA 0."""
    workload, found = workload_of(schedule), recording(words, [0], warpgroups)
    taken = Measurement(
        kernel=schedule, implementation="cuda", gpu="NVIDIA H200", driver="580", cuda="13.0", date="2026-11-30", regime="burst",
        l2="cold", buffers=3, launch="stream", calls=10, time_s=1e-4, time_p10_s=1e-4, time_p90_s=1e-4, trace_overhead=0.01,
    )  # fmt: skip
    return Run(
        origin="measured", workload=workload, schedule=schedule, tile=default_tile(workload, schedule, "h200"), device="h200",
        cycles=150_000, sm_clock_hz=1.5e9, power_w=None, activity=Activity(132, None, None, None, None, None),
        traffic=Traffic({"all": Bytes(None, None, None, None, None, None)}, None, None, None),
        bottleneck=Bottleneck("unknown", "none"), measurement=taken, lanes=found.lanes, labels=found.labels, spans=found.spans,
    )  # fmt: skip


def blocks(schedule: str) -> int:
    """Q blocks of a tile of FULL."""
    return -(-FULL.seqlen_q // default_tile(workload_of(schedule), schedule, "h200").block_m)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_kernel_that_does_as_its_schedule_says_conforms(schedule):
    whole = blocks(schedule)
    found = conforms(measured(schedule, stamps(schedule, [whole, whole])))
    assert found.holds, found.differences
    assert found.warps == 2 and found.events > 2 * 2 * whole * 10


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_events_in_the_other_order_do_not(schedule):
    words, places = stamps(schedule, [blocks(schedule)]), slots(schedule, [blocks(schedule)])[1]
    for at in range(3, 60, 7):
        swapped, (here, there) = words.copy(), ((0, 2, *places[n]) for n in (at, at + 1))
        swapped[here], swapped[there] = words[there], words[here]
        found = conforms(measured(schedule, swapped))
        assert len(found.differences) == 1 and found.differences[0].startswith(f"CTA0 WG1: event {at + 1} is")


@pytest.mark.parametrize("schedule", ["lagged", "ahead", "covered"])
def test_a_tile_that_two_ctas_share_ends_without_a_stamp(schedule):
    """Its part may have any length; the tile behind it is whole."""
    loops = [3, blocks(schedule)]
    found = conforms(measured(schedule, stamps(schedule, loops, unstamped=[0])))
    assert found.holds, found.differences
    gone = stamps(schedule, loops, unstamped=[0])
    gone[(0, 1, *slots(schedule, loops, unstamped=[0])[0][20])] = 0
    assert not conforms(measured(schedule, gone)).holds


def test_a_warpgroup_beside_the_consumers_has_their_tiles_and_another_name():
    """It stamps no tile's end: its blocks are counted on."""
    loops = [3, blocks("lagged")]
    words = stamps("lagged", loops)
    words[0, 3, : sum(loops) + 2, LABELS.index("put dQ")] = np.arange(1, sum(loops) + 3) * 50
    run = measured("lagged", words, warpgroups=3)
    assert [lane.name for lane in one_cta(run, "CTA0").lanes] == ["WG0", "WG1", "multiplier"]
    beside = recorded(run)["CTA0"]["multiplier"]
    assert [(event.tile, event.step) for event in beside] == [(tile, step) for tile, n in enumerate(loops) for step in range(n)]


def test_a_longer_tile_than_the_workload_has_is_told():
    longest = 2 * blocks("fa3")  # a tile, and before it a part of one that another CTA shares
    assert conforms(measured("fa3", stamps("fa3", [longest]))).holds
    found = conforms(measured("fa3", stamps("fa3", [longest + 1])))
    assert f"a tile of {longest + 1} Q blocks, which" in found.differences[0]


@pytest.mark.parametrize("schedule", ["lagged", "covered"])
def test_phases_add_up_to_the_block_and_waits_are_among_them(schedule):
    whole = blocks(schedule)
    both = pair("one", measured(schedule, stamps(schedule, [whole])))
    found = {phase.name: phase for phase in both.phases}
    labels = [name for name in found if name in LABELS]
    for side in ("predicted", "measured"):
        parts = sum(getattr(found[name], side) or 0 for name in labels)
        assert parts == pytest.approx(getattr(found["whole block"], side))
    assert {"dQ=dSK", "put dQ", "wait dK+=dS^TQ", "dS^T"} <= found.keys() and found["put dQ"].predicted > 0
    assert found["epilogue"].measured == pytest.approx(100 - both.stamp_cycles) and found["epilogue"].predicted > 0


def test_the_command_draws_both_and_says_that_the_order_holds(tmp_path, fasim):
    path, picture = tmp_path / "one.run.json.gz", tmp_path / "both.svg"
    store.save(measured("ahead", stamps("ahead", [blocks("ahead")])), path)
    status, out, _ = fasim("compare", "--timeline", str(path), "--svg", str(picture), "--width", "120")
    assert status == 0 and "WG1 measured" in out and "in the schedule's order" in out and "put dQ" in out
    assert "WG1 measured" in picture.read_text(encoding="utf-8")
