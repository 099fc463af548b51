"""Instructions beside full tensor cores: the engine's cycles and the tensor cores' rate against those recorded on hardware."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

import fasim.traces
from fasim.simulator.code.phase import Phase
from fasim.simulator.devices.device import load_device
from fasim.simulator.language.program import trace
from fasim.simulator.problem.tile import Tile
from fasim.simulator.problem.workload import Workload
from fasim.simulator.replay.engine import Memory, replay
from fasim.simulator.schedules import Kernel

RECORDED = Path(fasim.traces.__file__).parent / "recorded" / "calibration" / "pipes_contended.json"
PATTERNS = json.loads(RECORDED.read_text())["results"]["cycles_per_copy"]
H200 = replace(load_device("h200"), cold_fetch_cycles=0.0)  # the patterns are loops
CHAINS = 8  # copies in a chunk
SOURCES = {"FFMA": Phase(fma=8), "FMNMX": Phase(alu=8), "MUFU.EX2": Phase(mufu=8), "EX2+4FFMA": Phase(mufu=8, fma=32)}
"""Patterns that device fields come from."""
OTHERS = {
    "FADD": Phase(fma=8), "FMUL": Phase(fma=8), "F2FP": Phase(convert=8), "EX2+FFMA": Phase(mufu=8, fma=8),
    "EX2+8FFMA": Phase(mufu=8, fma=64), "F2FP+EX2": Phase(mufu=8, convert=8), "FMNMX+2FFMA": Phase(alu=8, fma=16),
}  # fmt: skip


def side_by_side(phase: Phase, chunks: int, gemms: int) -> tuple[int, int]:
    """Cycles of one warpgroup's chunks and of two warpgroups' GEMMs (m64n128k128), begun together."""

    def body(cta, tile):
        K = cta.ring("K", tile.k_bytes, 1)
        cta.producer().tma(K[0])
        for wg in cta.consumers():
            wg.wait(K[0])
            if wg.rank == 0:
                wg.compute("pattern", replace(phase, chunks=chunks))
            else:
                wg.wait([wg.gemm("S", "Q", K[0]) for _ in range(gemms)][-1])
            wg.free(K[0])

    program = trace(Kernel(body, "rows"), Workload(1, 1, 192, 128), Tile(192, 128, 1, 3), [(1, 0)])
    replayed = replay([program], H200, Memory(1e7, 1e7, {}, {}), max_spans=100_000)
    names, labels = [lane.name for lane in replayed.lanes], np.array(replayed.labels)
    spans = replayed.spans
    pattern = spans[(spans["lane"] == names.index("WG0")) & (labels[spans["label"]] == "pattern")]
    tensor = spans[spans["lane"] == names.index("tensor cores")]
    return tuple(int(each["end"].max() - each["start"].min()) for each in (pattern, tensor))


def beside_full_tensor_cores(phase: Phase) -> tuple[float, float]:
    """(cycles a copy, share of their rate that the tensor cores keep), each of the longer of two runs less the shorter."""
    short, long = (side_by_side(phase, chunks, gemms=40)[0] for chunks in (20, 60))
    few, many = (side_by_side(phase, 3000, gemms)[1] for gemms in (5, 15))
    return (long - short) / 40 / CHAINS, 10 * 2 * 512 / (many - few)


def recorded(name: str, what: str) -> float:
    """The mean of GEMMs with A in shared memory and in registers."""
    return fmean(PATTERNS[name][f"{what}_busy_{a}"]["median"] for a in ("ss", "rs"))


@pytest.mark.parametrize("name", [*SOURCES, *OTHERS])
def test_a_pattern_takes_the_cycles_and_leaves_the_tensor_cores_the_rate_that_were_recorded(name):
    """Cycles within 9 %, the rate within 7 points, but for 10 points that EX2+8FFMA takes more than its instructions say."""
    cycles, rate = beside_full_tensor_cores((SOURCES | OTHERS)[name])
    assert cycles == pytest.approx(recorded(name, "cycles"), rel=0.09)
    more = 0.1 if name == "EX2+8FFMA" else 0.0
    assert rate == pytest.approx(recorded(name, "tensor_utilisation") + more, abs=0.07)


RATES = json.loads(RECORDED.with_name("fp8_rates.json").read_text())["results"]["patterns"]
OF_SHARED_MEMORY = {"PRMT": Phase(alu=8), "STSM": Phase(matrices=8), "LDSM.T": Phase(alu=32, matrices=8)}
"""By eight copies; that of LDSM.T makes its address and keeps what it loads, by four ALU instructions."""


def beside_e4m3(phase: Phase, gemms: str) -> tuple[float, float]:
    """The same beside two warpgroups' e4m3 GEMMs, m64n192k128 from shared memory or m64n128k192 with P in registers."""

    def body(chunks: int, count: int):
        def rows(cta, tile):
            Q, K, V = cta.ring("Q", tile.q_bytes, 1), cta.ring("K", tile.k_bytes, 1), cta.ring("V", tile.v_bytes, 1)
            load = cta.producer()
            for slot in (Q[0], K[0], V[0]):
                load.tma(slot)
            for wg in cta.consumers():
                for slot in (Q[0], K[0], V[0]):
                    wg.wait(slot)
                if wg.rank == 0:
                    wg.compute("pattern", replace(phase, chunks=chunks))
                for _ in range(count if wg.rank > 0 else 0):
                    wg.wait(wg.gemm("S", Q[0], K[0]) if gemms == "ss_n192" else wg.gemm("O", "P", V[0], add=True))
                for slot in (Q[0], K[0], V[0]):
                    wg.free(slot)

        return rows

    def lasts(chunks: int, count: int) -> tuple[int, int]:
        workload = Workload(1, 1, 192, 128, dtype="e4m3")
        program = trace(Kernel(body(chunks, count), "rows"), workload, Tile(192, 192, 1, 3), [(1, 0)])
        replayed = replay([program], H200, Memory(1e7, 1e7, {}, {}), max_spans=100_000, eight_bit=True)
        names, labels, spans = [each.name for each in replayed.lanes], np.array(replayed.labels), replayed.spans
        pattern = spans[(spans["lane"] == names.index("WG0")) & (labels[spans["label"]] == "pattern")]
        tensor = spans[spans["lane"] == names.index("tensor cores")]
        return tuple(int(each["end"].max() - each["start"].min()) for each in (pattern, tensor))

    short, long = (lasts(chunks, 80)[0] for chunks in (20, 60))
    few, many = (lasts(3000, count)[1] for count in (10, 30))
    return (long - short) / 40 / CHAINS, 20 * 2 * 384 / (many - few)


@pytest.mark.parametrize("gemms", ["ss_n192", "rs_n128"])
@pytest.mark.parametrize("name", OF_SHARED_MEMORY)
def test_what_transposes_v_takes_the_cycles_and_leaves_e4m3_gemms_the_rate_that_were_recorded(name, gemms):
    """Cycles of PRMT and STSM within 6 %, the rate within 8 points; LDSM.T with what is beside it up to a third too fast."""
    cycles, rate = beside_e4m3(OF_SHARED_MEMORY[name], gemms)
    seen = RATES[name][f"beside_2_{gemms}"]
    assert cycles == pytest.approx(seen["median"], rel=0.06 if name != "LDSM.T" else 0.34)
    assert rate == pytest.approx(seen["tensor_utilisation"], abs=0.08 if name != "STSM" or gemms == "rs_n128" else 0.1)
    assert (rate < 0.95) == (name != "PRMT"), "shared memory is taken from GEMMs"
