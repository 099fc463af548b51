"""The sentence that says which schedule, by how much, why, and where that turns."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fasim.simulator.results.breakdown import Breakdown
from fasim.simulator.results.run import Run
from fasim.traces.answers import verdict
from fasim.traces.predictions import Question

EVEN = Breakdown(**dict.fromkeys(Breakdown.__dataclass_fields__, 0.0) | {"useful": 0.8, "softmax": 0.2})


@pytest.fixture
def runs(pingpong_run) -> list[Run]:
    """Pingpong, and a schedule that takes a tenth longer since it waits for softmax."""
    first = replace(pingpong_run, breakdown=EVEN)
    lost = replace(EVEN, useful=0.8 / 1.1, softmax=0.2 / 1.1 + 0.1 / 1.1)
    return [replace(first, schedule="warp-specialized", cycles=first.cycles * 11 // 10, breakdown=lost), first]


def at(runs: list[Run], seqlen: int, factor: float, causal: bool = False) -> dict:
    """The two at another length, pingpong so many times as fast as the other."""
    workload = replace(runs[1].workload, seqlen=seqlen, seqlen_q=seqlen, seqlen_k=seqlen, causal=causal)
    one, other = (replace(run, workload=workload) for run in (runs[1], runs[0]))
    return {workload: (one, replace(other, cycles=int(one.cycles * factor)))}


def test_it_says_by_how_much_and_why(runs):
    said = verdict.of_schedules(runs)
    assert said.startswith("pingpong is 10.0% faster than warp-specialized, 3.53 ms against 3.88 ms; exposed softmax is 20% of")
    assert said.endswith(".") and "\n" not in said


def test_it_says_where_it_turns(runs):
    said = verdict.of_schedules(runs, at(runs, 2048, 0.9) | at(runs, 16384, 1.3))
    assert "it turns at 2k (11.1%), where warp-specialized is faster" in said and "16k" not in said
    assert "it stays ahead at 16k, 8448 causal" in verdict.of_schedules(runs, at(runs, 16384, 1.3) | at(runs, 8448, 1.2, True))
    some = at(runs, 2048, 1) | at(runs, 16384, 1.3)
    assert "at 2k they are level, of 2k, 16k it turns nowhere" in verdict.of_schedules(runs, some)


def test_what_the_model_cannot_tell_apart_is_level(runs):
    near = [replace(runs[0], cycles=int(runs[1].cycles * 1.01)), runs[1]]
    said = verdict.of_schedules(near, at(runs, 2048, 0.9) | at(runs, 16384, 1.3))
    assert "as fast as each other" in said and "1.0% is less than the model can tell" in said
    assert "pingpong is faster at 16k (30.0%), warp-specialized is faster at 2k (11.1%)" in said
    assert "so they are at 2k." in verdict.of_schedules(near, at(runs, 2048, 1.0))


def test_level_ones_say_what_the_one_saves_and_pays_again(runs):
    quiet = replace(runs[1], breakdown=replace(EVEN, softmax=0.05, latency=0.15))
    said = verdict.of_schedules([quiet, replace(runs[0], cycles=runs[1].cycles, breakdown=EVEN)])
    assert "what pingpong saves in exposed softmax (15%) it pays in gaps between GEMMs (15%)" in said
    assert " it pays " not in verdict.of_schedules([runs[1], replace(runs[0], cycles=runs[1].cycles, breakdown=EVEN)])


def test_another_head_dim_may_be_where_it_turns(runs):
    wide = replace(runs[1].workload, head_dim=256)
    pair = tuple(replace(run, workload=wide) for run in (runs[1], replace(runs[0], cycles=runs[1].cycles * 4 // 5)))
    assert "it turns at d256 (25.0%), where warp-specialized is faster" in verdict.of_schedules(runs, {wide: pair})


def test_a_higher_clock_is_a_reason(runs):
    slower = replace(runs[0], sm_clock_hz=runs[1].sm_clock_hz * 0.9)
    assert "its clock is 11.1% higher" in verdict.of_schedules([slower, runs[1]])


def test_runs_of_one_schedule_are_told_apart(runs):
    there = replace(runs[1], device="h200", cycles=runs[1].cycles * 2)
    assert verdict.of_schedules([runs[1], there]).startswith("pingpong on h100-sxm is 100.0% faster than pingpong on h200")


def test_a_change_is_told_by_time_cycles_and_clock(runs):
    before, after = runs
    assert verdict.of_change(before, replace(before, cycles=after.cycles), "hbm x2").startswith(
        "hbm x2 saves warp-specialized 9.1% of its time, 3.88 ms to 3.53 ms, all of it cycles"
    )
    assert "; exposed softmax is 27% of it before, 20% after." in verdict.of_change(before, after, "mufu x2")
    assert "costs" in verdict.of_change(after, before, "hbm x0.5")
    assert "cycles +0.0%, clock +10.0%" in verdict.of_change(before, replace(before, sm_clock_hz=before.sm_clock_hz * 1.1), "it")
    assert "changes nothing" in verdict.of_change(before, before, "it")


def test_what_lies_beside_keeps_the_tokens_and_is_quick():
    asked = Question(replace(QUICK, batch=4), "fa3")
    every = verdict._beside(asked.workload)
    shapes = [work for work in every if work.head_dim == asked.workload.head_dim]
    assert {(work.seqlen * work.batch, work.heads) for work in shapes} == {(1024, 1)}
    assert sorted({work.seqlen for work in shapes}) == [64, 128, 256, 512, 1024]
    assert [work.causal for work in shapes].count(True) == 1
    assert [(work.head_dim, work.heads, work.seqlen) for work in every if work not in shapes] == [(64, 2, 256), (256, 1, 256)]
    assert not verdict._quick(replace(asked, workload=replace(QUICK, heads=4096, kv_heads=4096, batch=1024)))
    assert verdict.neighbours(asked, replace(asked, schedule="./mine.py:mine")) == {}


def test_the_first_line_of_several_schedules_is_the_verdict(fasim):
    status, out, _ = fasim("predict", "fa3", "warp-specialized", "--batch", "1", "--heads", "1", "--seqlen", "256")
    assert status == 0 and (" faster than " in out.splitlines()[0] or "as fast as" in out.splitlines()[0])


QUICK = verdict.Workload(1, 1, 256)
