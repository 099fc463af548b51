"""Machine code between two points, in pieces: each instruction where it stands, and what one warp alone waits for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fasim.simulator.code import sass
from fasim.simulator.code.phase import Phase
from fasim.simulator.code.pipeline import phases_of
from fasim.simulator.code.sass import Code, Instruction
from fasim.simulator.devices.device import load_device
from fasim.simulator.language.program import trace
from fasim.simulator.problem.tile import Tile
from fasim.simulator.problem.workload import Workload
from fasim.simulator.replay.engine import Memory, replay
from fasim.simulator.schedules.kernel import Kernel

NONE = 7


def instruction(name: str, stall: int = 1, sets: int = NONE, waits: int = 0) -> Instruction:
    return Instruction(0, "", name, "R1, R2", stall, (sets, NONE), waits)


def code(*instructions: Instruction) -> Code:
    return Code("kernel", instructions, {})


def pieces(*instructions: Instruction) -> list[sass.Segment]:
    return list(sass.parts(code(*instructions), range(len(instructions)), finely=True))


@pytest.mark.parametrize("name", sorted(sass.LATENCY))
def test_a_result_is_waited_for_as_far_as_what_stands_between_does_not_hide_it(name):
    between = [instruction("FADD", 2)] * 3
    asked, reads = instruction(name, sets=2), instruction("FMUL", waits=1 << 2)
    assert sass.alone(code(asked, *between, reads), range(5)) == [1, 2, 2, 2, sass.LATENCY[name] - 7 + 1]
    far = [instruction("FADD", 15)] * 3
    assert sass.alone(code(asked, *far, reads), range(5))[-1] == 1


def test_what_is_not_announced_by_a_scoreboard_that_is_awaited_costs_its_stall_count():
    other = instruction("FMUL", stall=3, waits=1 << 4)
    found = code(instruction("MUFU", sets=2), other, instruction("LDG", sets=1), instruction("FADD", waits=2))
    assert sass.alone(found, range(4)) == [1, 3, 1, 1]


def test_pieces_have_the_instructions_that_stand_there():
    exponentials = [each for _ in range(6) for each in (instruction("MUFU", 2), instruction("FADD"), instruction("F2FP"))]
    found = pieces(*[instruction("FMNMX", 4)] * 20, *exponentials, *[instruction("FMUL")] * 40)
    counts = [part.pipes for part in found]
    assert counts[0] == {"alu": 16} and counts[1] == {"fma": 4, "alu": 4, "mufu": 4, "convert": 4}
    assert counts[2]["mufu"] == 2 and all("mufu" not in each for each in counts[3:])
    assert sum(part.instructions for part in found) == 78
    assert max(part.pipes.get("mufu", 0) for part in found) == sass.PIECE_MUFU
    whole = list(sass.parts(code(*[instruction("FADD")] * 40), range(40)))
    assert [part.instructions for part in whole] == [40]


def test_alike_pieces_are_chunks_of_one_phase():
    found = phases_of(pieces(*[instruction("FMNMX", 4)] * 16 * 3, *[instruction("FMUL", 2)] * 16))
    assert found == (Phase(alu=16, stalls=64, chunks=3, goes_on=True), Phase(fma=16, stalls=32, goes_on=True))


@pytest.mark.parametrize(("pipe", "latency"), [("mufu", "mufu_latency_cycles"), ("fma", "dependent_latency_cycles")])
def test_code_that_goes_on_does_not_wait_for_its_last_results(pipe, latency):
    device = replace(load_device("h200"), cold_fetch_cycles=0.0)  # code that comes for the first time would be waited for longer

    def cycles(**more) -> int:
        def body(cta, tile):
            for wg in cta.consumers():
                wg.compute("work", Phase(**{pipe: 8}, chunks=4, **more), 0)

        program = trace(Kernel(body, "rows"), Workload(1, 1, 128, 128), Tile(64, 128, 1, 1), [(1, 0)])
        spans = replay([program], device, Memory(1e9, 1e9, {}, {}), None, 99).spans
        return int(np.sum(spans["end"] - spans["start"], where=spans["lane"] == spans["lane"][0]))

    assert cycles() - cycles(goes_on=True) == getattr(device, latency)
