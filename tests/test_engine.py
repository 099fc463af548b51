"""The jitted engine: equal to the interpreter, deterministic, its spans and counters consistent, its cache never stale."""

from __future__ import annotations

import ast
import itertools
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from strategies import H200, Scene, scenes

from fasim.simulator.code.phase import Phase
from fasim.simulator.language.program import Program, trace
from fasim.simulator.predict import default_tile
from fasim.simulator.problem.tile import Tile
from fasim.simulator.problem.workload import Workload
from fasim.simulator.replay import engine, machine
from fasim.simulator.replay.engine import U_ALU, U_FMA, U_MUFU, U_TENSOR, U_TMA, Deadlock, Memory, Replay, replay
from fasim.simulator.replay.interpreter import interpret
from fasim.simulator.replay.machine import unit_lanes
from fasim.simulator.schedules import SCHEDULES, Kernel

MEMORY = Memory(l2=37.0, hbm=18.0, read_miss={"K": 0.3, "Q": 1.0}, write_through={"O": 0.5})
MANY_SPANS = 200_000
random_programs = settings(
    max_examples=500, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
KERNELS = [(name, kernel) for name, schedule in SCHEDULES.items() for kernel in schedule.kernels]
KERNEL_IDS = [f"{name}-{kernel.name}" for name, kernel in KERNELS]


def of_schedule(name: str, kernel: Kernel, dtype: str = "fp16") -> Program:
    workload = Workload(1, 1, 512, 64, dtype=dtype)
    return trace(kernel, workload, default_tile(workload, name, H200), [(3, 1), (1, 0)])


def run(scene: Scene) -> Replay:
    return replay(scene.programs, scene.device, scene.memory, list(scene.placement), MANY_SPANS, scene.eight_bit)


def assert_identical(one: Replay, other: Replay) -> None:
    assert one.cycles == other.cycles
    assert one.lanes == other.lanes and one.labels == other.labels
    assert np.array_equal(one.tile_ends, other.tile_ends)
    assert np.array_equal(one.busy, other.busy)
    assert np.array_equal(one.spans, other.spans)


def lane(replayed: Replay, name: str) -> np.ndarray:
    number = [lane.name for lane in replayed.lanes].index(name)
    return np.sort(replayed.spans[replayed.spans["lane"] == number], order="start")


# -- equal to the interpreter -------------------------------------------------------------------------------------------


@random_programs
@given(scenes())
def test_engine_equals_the_interpreter_on_random_legal_programs(scene):
    expected = interpret(scene.programs, scene.device, scene.memory, list(scene.placement), scene.eight_bit)
    assert_identical(run(scene), expected)


@pytest.mark.parametrize(("name", "kernel"), KERNELS, ids=KERNEL_IDS)
@pytest.mark.parametrize("arbitration", [0, 2])
def test_engine_equals_the_interpreter_on_every_schedule(name, kernel, arbitration):
    device = replace(H200, wgmma_arbitration_ksteps=arbitration)
    programs = [of_schedule(name, kernel)] * 3
    assert_identical(
        replay(programs, device, MEMORY, [0, 0, 1], MANY_SPANS), interpret(programs, device, MEMORY, [0, 0, 1])
    )


@pytest.mark.parametrize("name", [name for name, schedule in SCHEDULES.items() if "e4m3" in schedule.dtypes])
def test_engine_equals_the_interpreter_at_the_8_bit_rate(name):
    program = of_schedule(name, SCHEDULES[name].kernels[0], "e4m3")
    fast = replay([program], H200, MEMORY, None, MANY_SPANS, True)
    assert_identical(fast, interpret([program], H200, MEMORY, eight_bit=True))
    assert fast.busy[0, U_TENSOR] < replay([program], H200, MEMORY).busy[0, U_TENSOR]


# -- what any replay keeps to -------------------------------------------------------------------------------------------


@settings(random_programs, max_examples=200)
@given(scenes())
def test_same_inputs_give_bit_identical_replays(scene):
    assert_identical(run(scene), run(scene))


@settings(random_programs, max_examples=200)
@given(scenes())
def test_recording_spans_changes_nothing(scene):
    silent = replay(scene.programs, scene.device, scene.memory, list(scene.placement), 0, scene.eight_bit)
    assert_identical(replace(run(scene), spans=silent.spans), silent)


@settings(random_programs, max_examples=200)
@given(scenes())
def test_spans_of_a_lane_are_positive_and_do_not_overlap(scene):
    replayed = run(scene)
    assert (replayed.spans["end"] > replayed.spans["start"]).all()
    assert replayed.spans["end"].max() <= replayed.cycles == replayed.tile_ends.max()
    shared_by_ctas = {"barriers"} if scene.placement.count(0) > 1 else set()  # each CTA has a turn of its own
    for name in {lane.name for lane in replayed.lanes} - shared_by_ctas:
        spans = lane(replayed, name)
        assert (spans["start"][1:] >= spans["end"][:-1]).all(), name


@settings(random_programs, max_examples=200)
@given(scenes())
def test_unit_lanes_sum_to_the_busy_counters(scene):
    """Without what makes work slower beside other work, or for its operands, and the spacing of MUFU."""
    none = dict.fromkeys((f"{pipe}_beside_wgmma_cycles" for pipe in ("issue", "fma", "alu", "mufu")), 0.0)
    none |= {"load_interference_least": 0.0, "load_interference_most": 0.0, "load_beside_cycles": 0}
    none |= {"store_interference": 0.0, "matrix_interference": 0.0, "red_interference": 0.0, "wgmma_register_share": 0.0}
    none |= {"smem_bytes_per_cycle": 100_000}
    calm = replace(scene.device, **none, mufu_spacing_cycles=H200.mufu_cycles)
    replayed = run(replace(scene, device=calm))
    for unit in (U_TMA, U_TENSOR, U_MUFU, U_FMA):
        name = unit_lanes(scene.programs)[unit].name  # copies are TMA's, or the warps' own
        spans = lane(replayed, name)
        assert (spans["end"] - spans["start"]).sum() == replayed.busy[0, unit], name
    alu = lane(replayed, "ALU")  # the lane leaves out conversions, which have a pipe of their own
    assert (alu["end"] - alu["start"]).sum() <= replayed.busy[0, U_ALU]
    assert (replayed.busy[:, :U_ALU] <= replayed.cycles).all()


@settings(random_programs, max_examples=100)
@given(scenes())
def test_slower_beside_other_work_never_means_fewer_busy_cycles(scene):
    replayed = run(scene)
    for unit in (U_TMA, U_TENSOR, U_MUFU, U_FMA):
        name = unit_lanes(scene.programs)[unit].name
        spans = lane(replayed, name)
        floor = replayed.busy[0, unit] * (min(1, scene.device.mufu_spacing_cycles / 8) if unit == U_MUFU else 1)
        assert (spans["end"] - spans["start"]).sum() >= floor, name


def test_a_full_recording_keeps_the_first_spans():
    program = of_schedule("fa3", SCHEDULES["fa3"].kernels[0])
    whole, cut = (replay([program], H200, MEMORY, max_spans=room) for room in (MANY_SPANS, 50))
    assert len(cut.spans) == 50
    assert np.array_equal(cut.spans[["lane", "label", "start"]], whole.spans[:50][["lane", "label", "start"]])
    assert cut.cycles == whole.cycles


# -- the WGMMA queue ------------------------------------------------------------------------------------------------------


def gemms_only(cta, tile):
    """Every consumer issues its GEMMs back to back."""
    K = cta.ring("K", tile.k_bytes, 1)
    load = cta.producer()
    load.tma(K[0])
    for wg in cta.consumers():
        results = [wg.gemm("S", "Q", K[0]) for _ in range(6)]
        wg.wait(results[-1])
        wg.free(K[0])


def served(replayed: Replay) -> list[str]:
    """The warps in the order in which the tensor cores turn to them."""
    names = [replayed.lanes[span["warp"]].name for span in lane(replayed, "tensor cores")]
    return [name for name, _ in itertools.groupby(names)]


@pytest.fixture
def two_gemm_streams() -> Program:
    return trace(Kernel(gemms_only, "rows"), Workload(1, 1, 256, 128), Tile(128, 128, 1, 2), [(1, 0)])


@pytest.mark.parametrize("depth", [2, 6, 32])
def test_a_gemm_is_issued_as_the_queue_of_the_sm_takes_its_k_steps(depth):
    def body(cta, tile):
        K = cta.ring("K", tile.k_bytes, 1)
        cta.producer().tma(K[0])
        for wg in cta.consumers():
            first, second = wg.gemm("S", "Q", K[0]), wg.gemm("O", "P", K[0])
            wg.wait(first)
            wg.wait(second)
            wg.free(K[0])

    program = trace(Kernel(body, "rows"), Workload(1, 1, 256, 128), Tile(64, 128, 1, 1), [(1, 0)])
    replayed = replay([program], replace(H200, wgmma_queue_ksteps=depth), MEMORY, None, 999)
    spans, executed = lane(replayed, "WG0"), lane(replayed, "tensor cores")
    names = np.array(replayed.labels)
    issue = spans[(names[spans["label"]] == "O=PK") & (spans["wait"] == 0)]
    begin, each, steps = executed["start"].min(), 64, 16
    last = issue["end"].max() - H200.wgmma_step_issue_cycles
    if depth < steps:  # the last k step has room when so many before it have left the queue
        assert last >= begin + (steps - 1 - depth) * each
    else:
        assert last < begin + (steps // 2) * each, "both are issued while the first executes"
    assert executed["end"].max() == begin + steps * each


def test_results_go_to_shared_memory_slowly_beside_wgmma():
    def body(cta, tile):
        K = cta.ring("K", tile.k_bytes, 1)
        cta.producer().tma(K[0])
        for wg in cta.consumers():
            wg.wait(K[0])
            if wg.rank == 0:
                results = [wg.gemm("S", "Q", K[0]) for _ in range(6)]
                wg.wait(results[-1])
            else:
                wg.compute("stage", Phase(stsm=1, chunks=8))
            wg.free(K[0])

    def staged(device) -> int:
        program = trace(Kernel(body, "rows"), Workload(1, 1, 256, 128), Tile(128, 128, 1, 2), [(1, 0)])
        replayed = replay([program], device, MEMORY, None, 999)
        spans = lane(replayed, "WG1")
        own = spans[np.array(replayed.labels)[spans["label"]] == "stage"]
        return int((own["end"] - own["start"]).sum())

    alone = 8 * 2048 // H200.smem_bytes_per_cycle
    assert staged(replace(H200, store_beside_least=128.0)) == pytest.approx(alone, abs=16)
    left = H200.smem_bytes_per_cycle - 64  # Q is in registers, so K's 64 bytes a cycle are all
    assert left > H200.store_beside_most
    assert 2 * alone < staged(H200) <= alone * H200.smem_bytes_per_cycle / H200.store_beside_most + 16


@pytest.mark.parametrize(
    ("phase", "slower"),
    [(Phase(other=64, chunks=64), False), (Phase(fma=16, mufu=8, chunks=32), False), (Phase(fma=32, chunks=64), True)],
)
def test_gemms_are_slow_beside_a_run_of_fma_and_not_beside_addresses_or_exponentials(phase, slower):
    def body(cta, tile):
        K = cta.ring("K", tile.k_bytes, 1)
        cta.producer().tma(K[0])
        for wg in cta.consumers():
            wg.wait(K[0])
            if wg.rank == 0:
                wg.wait([wg.gemm("S", "Q", K[0]) for _ in range(6)][-1])
            else:
                wg.compute("beside", phase)
            wg.free(K[0])

    program = trace(Kernel(body, "rows"), Workload(1, 1, 256, 128), Tile(128, 128, 1, 2), [(1, 0)])
    replayed = replay([program], replace(H200, cold_fetch_cycles=0.0), MEMORY, None, 999)  # what repeats is a loop
    steps = lane(replayed, "tensor cores")
    executed = int((steps["end"] - steps["start"]).sum())
    alone = 6 * 8 * 64  # m64n128k16: N / 2 cycles a k step
    assert executed > 1.5 * alone if slower else executed == alone


@pytest.mark.parametrize("execute", [replay, interpret])
@pytest.mark.parametrize("own", [False, True])
def test_code_that_an_sm_runs_for_the_first_time_takes_what_l2_delivers_and_then_what_it_does(execute, own):
    def body(cta, tile):
        for wg in cta.consumers():
            for step in range(2):
                wg.compute("work", Phase(fma=8, chunks=100, own=own), step)

    program = trace(Kernel(body, "rows"), Workload(1, 1, 64, 128), Tile(64, 128, 1, 1), [(1, 0)] * 2)
    spans = execute([program], H200, MEMORY, **({"max_spans": 99} if execute is replay else {})).spans
    work = {(tile, step): end - start for _, _, _, step, tile, _, start, end in spans[spans["lane"] == 0].tolist() if step >= 0}
    cold, warm = int(800 * H200.cold_fetch_cycles), 800 + H200.dependent_latency_cycles
    assert abs(work[0, 0] - cold) <= 1 < cold - warm
    assert work == {(0, 0): work[0, 0], (0, 1): work[0, 0] if own else warm, (1, 0): warm, (1, 1): warm}


def test_arbitration_decides_how_two_warpgroups_take_turns(two_gemm_streams):
    turns = {
        steps: len(
            served(replay([two_gemm_streams], replace(H200, wgmma_arbitration_ksteps=steps), MEMORY, None, 9999))
        )
        for steps in (1, 2, 4, 8)
    }
    assert turns[1] > turns[2] > turns[4] > turns[8] > 2


@pytest.mark.parametrize("depth", [0, 1, 2, 5, 32, 64, 1000])
def test_any_queue_depth_keeps_the_tensor_cores_as_busy_as_two_streams_can(two_gemm_streams, depth):
    """A depth beyond MAX_QUEUE, or below one, is cut to fit; with room for two, warpgroups that only issue never leave a gap."""
    device = replace(H200, wgmma_queue_ksteps=depth)
    replayed = replay([two_gemm_streams], device, MEMORY, None, MANY_SPANS)
    assert_identical(replayed, interpret([two_gemm_streams], device, MEMORY))
    spans = lane(replayed, "tensor cores")
    assert replayed.busy[0, U_TENSOR] == 2 * 6 * 8 * 64
    assert replayed.busy[0, U_TENSOR] >= (0.98 if depth > 1 else 0.6) * (spans["end"].max() - spans["start"].min())


# -- deadlock -----------------------------------------------------------------------------------------------------------


def nobody_loads(cta, tile):
    K = cta.ring("K", tile.k_bytes, 2)
    cta.producer().tma(K[0])
    for wg in cta.consumers():
        wg.wait(K[0])
        wg.wait(K[1])


@pytest.mark.parametrize("execute", [replay, interpret])
def test_a_deadlock_is_an_error_naming_warp_verb_and_buffer(execute):
    program = trace(Kernel(nobody_loads, "rows"), Workload(1, 1, 256, 128), Tile(128, 128, 2, 2), [(1, 0)])
    with pytest.raises(Deadlock, match=r"^WG0 is stuck at 'wait K\[1\]'; WG1 is stuck at 'wait K\[1\]'$"):
        execute([program], H200, MEMORY)


# -- the cache on disk --------------------------------------------------------------------------------------------------


def jitted() -> dict:
    return {name: value for name, value in vars(engine).items() if hasattr(value, "py_func")}


def test_jitted_code_reads_only_what_engine_py_itself_defines():
    """Numba's cache sees changes in this one file: a constant or function from another would go stale silently."""
    tree = ast.parse(Path(engine.__file__).read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    derived = defaultdict(set)  # global -> names its value is computed from
    for node in tree.body:
        if isinstance(node, ast.Assign):
            read = {part.id for part in ast.walk(node.value) if isinstance(part, ast.Name)}
            for target in node.targets:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        derived[name.id] |= read
    assert len(jitted()) > 15
    for name, dispatcher in jitted().items():
        globals_read = set(dispatcher.py_func.__code__.co_names) & vars(engine).keys()
        assert not globals_read & imported, name
        for constant in globals_read:
            assert not derived[constant] & imported, (name, constant)


def test_only_the_loop_is_cached_on_disk():
    """One cache entry, so no unit can be older than its caller."""
    on_disk = {name for name, dispatcher in jitted().items() if type(dispatcher._cache).__name__ != "NullCache"}
    assert on_disk == {"_replay"}


def test_the_loops_signature_carries_every_record_layout():
    """A field that moves in machine.py, program.py or run.py makes another signature, so another cache entry."""
    replay([of_schedule("fa2", SCHEDULES["fa2"].kernels[0])], H200, MEMORY)
    (signature,) = engine._replay.signatures
    text = str(signature)
    for layout in ("MACHINE", "WARP", "BARRIER", "SM", "K_STEP", "CHIP", "TENSOR"):
        for field in getattr(machine, layout).names:
            assert f"{field}[type=int64" in text, (layout, field)
