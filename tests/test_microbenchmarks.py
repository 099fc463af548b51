"""The engine held to the recorded microbenchmarks: softmax and GEMM loops of one to three warpgroups on an H200.

The device's numbers come from these recordings one by one; here they act together, as in an attention kernel.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import fasim.traces
from fasim.simulator.devices.device import load_device
from fasim.simulator.language.program import trace
from fasim.simulator.problem.tile import Tile
from fasim.simulator.problem.workload import Workload
from fasim.simulator.replay.engine import Memory, replay
from fasim.simulator.schedules import Kernel

RECORDED = Path(fasim.traces.__file__).parent / "recorded" / "calibration" / "contention.json"
CASES = json.loads(RECORDED.read_text())["results"]["cases"]
ROLES = {"softmax", "qk", "pv"}
KNOWN = sorted(case for case in CASES if set(case.split("_")[1:]) <= ROLES)
REPEATS = 30

# The recorded loops also poll a flag, some 50 cycles a turn: a tenth of the shortest. What instructions cost beside WGMMA comes
# from single ones (`pipes_contended`); a whole online softmax beside a GEMM is up to 19 % slower than recorded, and a lone GEMM,
# whose issue and wait the softmax's instructions delay, up to 22 % faster.
TOLERANCE = {"apart": 0.10, "together": 0.23}


def modelled(width: int, roles: list[str]) -> list[float]:
    """Cycles per unit of work of each warpgroup while the first is at work."""

    def body(cta, tile):
        Q, K, V = (cta.ring(name, 1, 1) for name in "QKV")
        load = cta.producer()
        load.tma(K[0])
        load.tma(V[0])
        for wg, role in zip(cta.consumers(), roles, strict=True):
            wg.wait(K[0])
            wg.wait(V[0])
            for j in range(REPEATS if wg.rank == 0 else 4 * REPEATS):
                if role == "softmax":
                    wg.softmax(j)
                else:
                    wg.wait(wg.gemm(*(("S", Q[0], K[0]) if role == "qk" else ("O", "P", V[0]))))
            wg.free(K[0])
            wg.free(V[0])

    tile = Tile(64 * len(roles), width, 1, len(roles))
    program = trace(Kernel(body, "rows"), Workload(1, 1, 8448), tile, [(1, 0)])
    warm = replace(load_device("h200"), cold_fetch_cycles=0.0)  # what repeats is a loop
    run = replay([program], warm, Memory(40.0, 18.0, {}, {}), max_spans=100_000)
    lanes = {lane.name: i for i, lane in enumerate(run.lanes)}
    spans = run.spans
    until = spans["end"][spans["lane"] == lanes["WG0"]].max()
    cycles = []
    for rank, role in enumerate(roles):
        own = spans[(spans["lane"] == lanes[f"WG{rank}"]) & (spans["end"] <= until)]
        if role == "softmax":
            own = own[(own["wait"] == 0) & (own["step"] >= 0)]
            ends = sorted({int(step): int(end) for step, end in zip(own["step"], own["end"], strict=True)}.values())
        else:
            gemm = [i for i, text in enumerate(run.labels) if text.startswith("wait ") and "=" in text]
            ends = own["end"][[label in gemm for label in own["label"]]].tolist()
        cycles.append((ends[-1] - ends[2]) / (len(ends) - 3))
    return cycles


@pytest.mark.parametrize("case", KNOWN)
def test_warpgroups_that_share_an_sm_take_the_recorded_cycles(case):
    width, roles = int(case.split("_")[0][1:]), case.split("_")[1:]
    recorded = [CASES[case]["cycles_per_unit"][f"{rank}:{role}"]["median"] for rank, role in enumerate(roles)]
    kind = "together" if "softmax" in roles and set(roles) != {"softmax"} else "apart"
    for found, expected in zip(modelled(width, roles), recorded, strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE[kind])


def test_the_engine_is_right_on_average_beside_wgmma():
    """Over all online softmaxes that run beside a GEMM, the mean error is within 11 %: the model is slow there."""
    errors = []
    for case in KNOWN:
        width, roles = int(case.split("_")[0][1:]), case.split("_")[1:]
        if "softmax" in roles and len(set(roles)) > 1:
            for rank, (role, found) in enumerate(zip(roles, modelled(width, roles), strict=True)):
                if role == "softmax":
                    errors.append(found / CASES[case]["cycles_per_unit"][f"{rank}:softmax"]["median"] - 1)
    assert abs(sum(errors) / len(errors)) < 0.11, errors
