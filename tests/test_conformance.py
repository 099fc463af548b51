"""The in-kernel trace: stamps become spans and stay readable, and their order is held to the schedule's."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fasim
from fasim.simulator.errors import UsageError
from fasim.simulator.language.program import trace
from fasim.simulator.predict import default_tile
from fasim.simulator.problem.workload import Workload
from fasim.simulator.results.run import Activity, Bottleneck, Bytes, Measurement, Run, Traffic
from fasim.simulator.schedules import SCHEDULES
from fasim.traces import store
from fasim.traces.conformance import TURNS, Event, conforms, said
from fasim.traces.kernel_trace import BLOCKS, LABELS, ROWS, SLOTS, STAMPS, recording
from fasim.traces.overlay import ctas, one_cta, overlay, pair, phases
from fasim.traces.perfetto import chrome_trace
from fasim.traces.window import by_iterations

KERNELS = ("warp-specialized", "pingpong", "overlap-2stage", "overlap-3stage", "fa3")
FULL = Workload(1, 16, 1024)
CAUSAL = replace(FULL, causal=True)

SLOT = {name: number for number, name in enumerate(STAMPS)}


def slots(schedule: str, workload: Workload, loops: list[int]) -> list[list[tuple[int, int]]]:
    """Where the kernel of a schedule stamps, by row and in order, on tiles of these lengths: (block, slot)."""
    tile = default_tile(workload, schedule, "h200")
    program = trace(SCHEDULES[schedule].kernels[0], workload, tile, [(n, 0) for n in loops])
    return [_slots(schedule, events, loops) for events in said(program).values()]


def _slots(schedule: str, events: list[Event], loops: list[int]) -> list[tuple[int, int]]:
    first = np.append(0, np.cumsum(loops))
    turns: Counter[Event] = Counter()
    out = []
    for event in events:
        name = next(name for name, label in STAMPS.items() if label == event.label)
        block = max(event.step, 0)
        if event.label == "store O":
            block = loops[event.tile] - 1
        if event.label in TURNS:
            block = turns[event]
            turns[event] += 1
            if schedule != "pingpong":
                block += 1  # the first has none
            elif name == "TAKE":  # one before the first block and one in each
                name, block = ("TAKE", block - 1) if block else ("OPEN", 0)
            elif block == loops[event.tile]:
                name, block = "CLOSE", block - 1
        out.append((int(first[event.tile]) + block, SLOT[name]))
    return out


def stamps(schedule: str, workload: Workload, loops: list[int], clock: int = 2**32 - 5003, apart: int = 100) -> np.ndarray:
    """What it would leave of one CTA, (ROWS, BLOCKS, SLOTS); the loads but the first, row 0, behind all that frees their stages."""
    words = np.zeros((ROWS, BLOCKS, SLOTS), np.uint32)
    where = slots(schedule, workload, loops)
    for row, places in enumerate(where):
        for number, at in enumerate(places):
            behind = max(map(len, where)) if row == 0 < number else 0
            words[row][at] = (clock + row * 7 + (behind + number) * apart) % 2**32
    return words


def measured(schedule: str, workload: Workload, words: np.ndarray, numbers=(0,), keep: int = 1000) -> Run:
    """A measured run that holds the trace of some CTAs."""
    tile = default_tile(workload, schedule, "h200")
    kept = recording(words, numbers, tile.consumers, keep)
    taken = Measurement(
        kernel=schedule, implementation="cuda", gpu="NVIDIA H200", driver="580", cuda="13.0", date="2026-11-21", regime="burst",
        l2="cold", buffers=3, launch="stream", calls=10, time_s=1e-4, time_p10_s=1e-4, time_p90_s=1e-4, trace_overhead=0.01,
    )  # fmt: skip
    return Run(
        origin="measured", workload=workload, schedule=schedule, tile=tile, device="h200", cycles=150_000, sm_clock_hz=1.5e9,
        power_w=None, activity=Activity(132, None, None, None, None, None),
        traffic=Traffic({"all": Bytes(None, None, None, None, None, None)}, None, None, None),
        bottleneck=Bottleneck("unknown", "none"), measurement=taken, lanes=kept.lanes, labels=kept.labels, spans=kept.spans,
    )  # fmt: skip


def loops_of(schedule: str, workload: Workload, tiles: int = 3) -> list[int]:
    """K/V blocks of a few tiles that the workload has."""
    from fasim.simulator.problem.order import work_items

    tile = default_tile(workload, schedule, "h200")
    items = work_items(workload, tile.block_m, tile.block_n, "longest-first" if workload.causal else "persistent")
    return [int(n) for n in items["blocks"][:: max(1, len(items) // tiles)][:tiles]]


def test_labels_and_sizes_are_those_of_the_header():
    header = (Path(fasim.__file__).parent / "kernels" / "cuda" / "trace.cuh").read_text(encoding="utf-8")
    enum = re.search(r"enum class Label : u32 \{([^}]*)\}", header)[1]
    assert [name.strip() for name in enum.split(",")] == list(STAMPS)
    for name, number in (("ROWS", ROWS), ("BLOCKS", BLOCKS), ("SLOTS", SLOTS)):
        assert int(re.search(rf"TRACE_{name} = (\d+)", header)[1]) == number
    assert len(STAMPS) <= SLOTS


@pytest.mark.parametrize("schedule", KERNELS)
@pytest.mark.parametrize(
    "workload", [FULL, CAUSAL, replace(FULL, head_dim=64), Workload(1, 1, seqlen_q=200, seqlen_k=90, causal=True)], ids=str
)
def test_a_kernel_that_does_as_its_schedule_says_conforms(schedule, workload):
    loops = loops_of(schedule, workload)
    run = measured(schedule, workload, stamps(schedule, workload, loops)[None])
    found = conforms(run)
    assert found.holds, found.differences
    assert found.warps == 1 + run.tile.consumers and found.events == len(run.spans)
    assert run.spans["tile"].max() == len(loops) - 1
    assert found.frees == 2 * run.tile.consumers * max(0, sum(loops) - run.tile.stages)


@pytest.mark.parametrize("schedule", KERNELS)
def test_a_stage_that_is_loaded_before_its_reader_is_done_with_it_is_a_race(schedule):
    """The order of each warp is right; only the times of two show it."""
    loops = loops_of(schedule, FULL)
    words, where = stamps(schedule, FULL, loops), slots(schedule, FULL, loops)
    load = next(at for at in where[0] if at == (2, SLOT["LOAD_V"]))
    read = next(at for at in where[1] if at == (0, SLOT["VALUES_DONE"]))
    late = (int(words[0][load]) - int(words[1][read]) + 10) % 2**32
    for at in where[1]:  # all of this consumer a little later
        words[1][at] = (int(words[1][at]) + late) % 2**32
    found = conforms(measured(schedule, FULL, words[None]))
    assert any("'load V' number 3 is issued 10 cycles before WG0 has waited" in each for each in found.differences)


@pytest.mark.parametrize("schedule", KERNELS)
def test_a_tile_that_was_cut_off_is_held_to_the_schedule_as_far_as_it_goes(schedule):
    loops = loops_of(schedule, FULL)
    words = stamps(schedule, FULL, loops)[None]
    run = measured(schedule, FULL, words, keep=20)
    assert [int((run.spans["lane"] == lane).sum()) for lane in (1, 2)] == [20, 20] and conforms(run).holds
    whole = measured(schedule, FULL, words, keep=70)  # the first tile, whole
    assert set(whole.spans["tile"]) == {0} and conforms(whole).holds


@pytest.mark.parametrize("schedule", KERNELS)
@pytest.mark.parametrize("row", [0, 1, 2])
def test_two_events_in_the_other_order_do_not(schedule, row):
    loops = loops_of(schedule, FULL)
    words, where = stamps(schedule, FULL, loops), slots(schedule, FULL, loops)[row]
    for at in range(3, 25):
        swapped = words.copy()
        swapped[row][where[at]], swapped[row][where[at + 1]] = words[row][where[at + 1]], words[row][where[at]]
        found = conforms(measured(schedule, FULL, swapped[None]))
        who = f"CTA0 {'producer' if row == 0 else f'WG{row - 1}'}: event {at + 1} is"
        assert len(found.differences) == 1 and found.differences[0].startswith(who)


def test_another_kernels_trace_does_not():
    words = stamps("overlap-2stage", FULL, loops_of("overlap-2stage", FULL))[None]
    found = conforms(measured("fa3", FULL, words))
    assert not found.holds and "where the schedule says 'take turn'" in found.differences[0]


def test_a_missing_event_and_a_wrong_length_are_told():
    loops = loops_of("fa3", FULL)
    words = stamps("fa3", FULL, loops)
    gone = words.copy()
    gone[1][slots("fa3", FULL, loops)[1][9]] = 0
    assert "CTA0 WG0: event 10 is" in conforms(measured("fa3", FULL, gone[None])).differences[0]
    short = stamps("fa3", FULL, [loops[0] - 1])
    assert "K/V blocks, which" in conforms(measured("fa3", FULL, short[None])).differences[0]


def test_spans_fill_a_lane_from_stamp_to_stamp_over_a_wrap_of_the_clock():
    run = measured("pingpong", FULL, stamps("pingpong", FULL, [8, 8], apart=333)[None])
    for number in range(len(run.lanes)):
        spans = run.spans[run.spans["lane"] == number]
        assert (spans["start"][1:] == spans["end"][:-1]).all()
        assert set(np.diff(spans["end"])[int(number == 0) :]) == {333}
    assert run.spans["start"].min() == 0


def test_stamps_are_read_in_order_of_time_wherever_they_lie():
    """V of a block is loaded behind K of the next: a slot of an earlier block, a later time."""
    run = measured("fa3", FULL, stamps("fa3", FULL, [8, 8])[None])
    producer = run.spans[run.spans["lane"] == 0]
    assert [(run.labels[s["label"]], int(s["step"])) for s in producer[:4]] == [
        ("load Q", -1), ("load K", 0), ("load K", 1), ("load V", 0)
    ]  # fmt: skip
    assert (np.diff(producer["end"]) > 0).all()


@pytest.mark.parametrize(
    ("words", "numbers", "says"),
    [
        (np.zeros((2, 3, BLOCKS, SLOTS), np.uint32), [0], "not \\(2, 3"),
        (np.zeros((2, ROWS, BLOCKS, SLOTS), np.uint32), [0], "CTA 0 left no stamp"),
        (np.full((2, ROWS, BLOCKS, SLOTS), 200, np.uint32), [0], f"stamped {SLOTS - 1}"),
        (np.zeros((2, ROWS, BLOCKS, SLOTS), np.uint32), [5], "none of number 5"),
    ],
)
def test_what_is_no_trace_is_refused_in_one_sentence(words, numbers, says):
    with pytest.raises(UsageError, match=says):
        recording(words, numbers, 2)


def test_a_run_without_a_trace_is_refused(pingpong_run):
    with pytest.raises(UsageError, match="holds no in-kernel trace"):
        conforms(replace(pingpong_run, spans=pingpong_run.spans[:0]))


@pytest.fixture(scope="module")
def two_ctas() -> Run:
    loops = loops_of("fa3", FULL)
    return measured("fa3", FULL, np.stack([stamps("fa3", FULL, loops), stamps("fa3", FULL, loops, apart=170)]), numbers=(0, 1))


def test_a_timeline_is_kept_like_any_run(tmp_path, two_ctas):
    path = tmp_path / store.file_name(two_ctas)
    store.save(two_ctas, path)
    back = store.load(path)
    assert path.name.endswith(".run.json.gz") and back.measurement.trace_overhead == 0.01
    assert np.array_equal(back.spans, two_ctas.spans) and conforms(back) == conforms(two_ctas)


def test_a_file_of_the_version_before_reads_without_what_came_later(tmp_path, two_ctas):
    path = tmp_path / "old.run.json"
    store.save(replace(two_ctas, spans=two_ctas.spans[:0]), path)
    document = json.loads(path.read_text())
    del document["run"]["measurement"]["trace_overhead"]
    document |= {"schema": f"{store.SCHEMA}/1", "sha256": store._checksum(document["run"])}
    path.write_text(json.dumps(document))
    assert store.load(path).measurement.trace_overhead is None
    path.write_text(json.dumps(document | {"schema": f"{store.SCHEMA}/{store.VERSION}"}))
    with pytest.raises(UsageError, match="trace_overhead"):
        store.load(path)


def test_the_overlay_has_each_measured_warp_under_its_prediction_aligned_at_the_first_gemm(two_ctas):
    found = pair("one", two_ctas, cta="CTA1")
    both = found.both
    names = [lane.name for lane in both.lanes]
    assert names[:6] == ["producer", "producer measured", "WG0", "WG0 measured", "WG1", "WG1 measured"]
    ends = [
        min(s["end"] for s in both.spans if names[s["lane"]] == name and both.labels[s["label"]] == "S=QK^T" and s["step"] == 0)
        for name in ("WG0", "WG0 measured")
    ]
    assert abs(ends[0] - ends[1]) == 0
    assert both.spans["start"].min() == 0
    assert len(both.spans) == len(found.predicted.spans) + len(one_cta(two_ctas, "CTA1").spans)
    window = by_iterations(both, 1, 3)
    assert {row.name for row in window.rows} >= {"WG0", "WG0 measured", "tensor cores"}
    assert window.warpgroups == ("WG0", "WG1")


def test_the_trace_file_holds_both(two_ctas, assert_chrome_rules):
    assert_chrome_rules(chrome_trace(pair("one", two_ctas).both))


def test_phases_add_up_to_the_block(two_ctas):
    found, stamp = {phase.name: phase for phase in pair("one", two_ctas).phases}, 700 * 0.01 / 1.01 / 7
    labels = [name for name in found if name in LABELS]
    for side in ("predicted", "measured"):
        parts = sum(getattr(found[name], side) or 0 for name in labels)
        assert parts == pytest.approx(getattr(found["whole block"], side))
    assert found["whole block"].measured == pytest.approx(7 * (100 - stamp))  # an event of fa3's block every 100 cycles
    assert found["softmax"].difference == pytest.approx(found["softmax"].predicted - (100 - stamp))
    assert found["epilogue"].measured == pytest.approx(100 - stamp) and found["epilogue"].predicted > 0
    assert pair("one", two_ctas).stamp_cycles == pytest.approx(stamp)


def test_a_run_set_beside_itself_differs_nowhere(two_ctas):
    one = one_cta(two_ctas, "CTA0")
    assert all(phase.difference == 0 for phase in phases(one, one))
    assert len(overlay(one, one).lanes) == 2 * len(one.lanes)


def test_a_cta_that_was_not_kept_is_refused(two_ctas):
    assert ctas(two_ctas) == ("CTA0", "CTA1")
    with pytest.raises(UsageError, match="holds no CTA7 \\(CTA0, CTA1\\)"):
        one_cta(two_ctas, "CTA7")


def test_the_command_draws_both_and_says_whether_the_order_holds(tmp_path, two_ctas, fasim):
    path = tmp_path / "one.run.json.gz"
    store.save(two_ctas, path)
    picture, file = tmp_path / "both.svg", tmp_path / "both.json"
    status, out, _ = fasim("compare", "--timeline", str(path), "--svg", str(picture), "--trace", str(file), "--width", "120")
    assert status == 0 and "WG0 measured" in out and "in the schedule's order" in out and "stamping costs the kernel +1.0%" in out
    assert "WG1 measured" in picture.read_text() and "WG1 measured" in file.read_text()
    status, out, _ = fasim("compare", "--timeline", str(path), "--json")
    (answer,) = json.loads(out)
    assert answer["conformance"]["holds"] and answer["trace_overhead"] == 0.01
    assert {"softmax", "whole block", "epilogue"} <= {phase["phase"] for phase in answer["phases"]}


def test_the_command_exits_1_where_the_order_does_not_hold(tmp_path, fasim):
    words = stamps("overlap-2stage", FULL, loops_of("overlap-2stage", FULL))[None]
    path = tmp_path / "other.run.json.gz"
    store.save(measured("fa3", FULL, words), path)
    status, out, _ = fasim("compare", "--timeline", str(path))
    assert status == 1 and "not the schedule's order: CTA0 WG0" in " ".join(out.split())


@pytest.mark.parametrize("schedule", ["fa3", "overlap-3stage"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_schedules_shared_memory_is_the_kernels(schedule, head_dim):
    from fasim.kernels.compile import build
    from fasim.kernels.cuda.config import config_for
    from fasim.simulator.predict import programs

    if build.compiler_version() is None:
        pytest.skip("NVRTC is not installed")
    compiled = build.build(config_for(schedule, "fp16", head_dim, causal=False).source)
    (program,) = programs(replace(FULL, head_dim=head_dim), schedule, "h200")
    assert sum(program.smem_parts.values()) == compiled.report.dynamic_smem_bytes


# -- recording ---


def test_a_recording_keeps_three_ctas_of_the_traced_build_and_what_tracing_costs(monkeypatch):
    from fasim.kernels.measure import timeline
    from fasim.kernels.measure.plan import Entry

    loops = loops_of("fa3", FULL)
    words = np.stack([stamps("fa3", FULL, loops, apart=100 + n) for n in range(5)])
    timed = replace(measured("fa3", FULL, words), lanes=(), spans=measured("fa3", FULL, words).spans[:0])

    class MadeUpTrace:
        def __init__(self, entry):
            self.entry = entry

        def stamps(self, q, k, v):
            assert (q, k, v) == ("q", "k", "v")
            return words

    class MadeUpBench:
        def measure(self, entry, attend=None):
            return replace(timed, cycles=102_000 if isinstance(attend, MadeUpTrace) else 100_000)

        def inputs(self, workload):
            return [("q", "k", "v")]

    monkeypatch.setattr(timeline, "Traced", MadeUpTrace)
    run = timeline.record(MadeUpBench(), Entry("fa3", FULL))
    assert ctas(run) == ("CTA0", "CTA2", "CTA4") and conforms(run).holds
    assert run.measurement.trace_overhead == pytest.approx(0.02)
    with pytest.raises(UsageError, match="torch-cudnn has no in-kernel trace"):
        timeline.record(MadeUpBench(), Entry("torch-cudnn", FULL))


def test_counters_and_a_timeline_are_not_of_one_build():
    pytest.importorskip("torch")
    from fasim.kernels.measure import runs as measure
    from fasim.kernels.measure.plan import Entry

    with pytest.raises(UsageError, match="take them apart"):
        list(measure.measure_all([Entry("fa3", FULL)], counters=True, timeline=True))


def test_the_plan_has_a_timeline_of_every_schedule():
    from fasim.kernels.measure.plan import read

    assert {entry.kernel for entry in read(store.TIMELINES / "plan.toml")} == set(KERNELS)


@pytest.mark.parametrize("schedule", KERNELS)
@pytest.mark.parametrize("workload", [FULL, replace(CAUSAL, seqlen_q=1000, seqlen_k=1300, batch=8)], ids=str)
def test_on_a_gpu_every_kernel_conforms(schedule, workload):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no GPU of compute capability 9.0")
    from fasim.kernels.measure.bench import random_inputs
    from fasim.kernels.measure.plan import Entry
    from fasim.kernels.measure.timeline import Traced

    words = Traced(Entry(schedule, workload)).stamps(*random_inputs(workload))
    found = conforms(measured(schedule, workload, words, range(0, len(words), 7)))
    assert found.holds, found.differences
