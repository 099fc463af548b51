"""The engine held to what `reduce_add` recorded: what stores to shared memory, and adds to memory, get and take beside WGMMA."""

import json
from pathlib import Path

import pytest

import fasim.traces
from fasim.simulator.code.gradients import Gradients
from fasim.simulator.devices.device import load_device
from fasim.simulator.language.program import trace
from fasim.simulator.problem.tile import Tile
from fasim.simulator.problem.workload import Workload
from fasim.simulator.replay.engine import Memory, replay
from fasim.simulator.schedules import Kernel

CALIBRATION = Path(fasim.traces.__file__).parent / "recorded" / "calibration"
RECORDED, SHARED = (json.loads((CALIBRATION / f"{name}.json").read_text())["results"] for name in ("reduce_add", "shared_operands"))
H200 = load_device("h200")
WORKLOAD = Workload(1, 1, 8448, 128, direction="backward")
GEMMS = {f"ss{n}": (("S^T", "K", "Q"), n) for n in (64, 80, 128)} | {"rs128": (("dV", "P^T", "dO"), 128)}
"""Kind -> the GEMM, and the queries of a tile; its columns are those, or the head dim."""
REPEATS = 60


def modelled(kind, other):
    """(GEMMs a cycle of two streams, bytes a cycle that a third warpgroup stores meanwhile)."""
    (destination, a, b), rows = GEMMS[kind]
    stored = []

    def body(cta, view):
        rings = {name: cta.ring(name, 1024, 1) for name in ("K", "Q", "dO")}
        load = cta.producer()
        for ring in rings.values():
            load.tma(ring[0])
        for wg in cta.consumers():
            for ring in rings.values():
                wg.wait(ring[0])
            for _ in range((REPEATS, REPEATS, REPEATS // 2, 0)[wg.rank]):
                if wg.rank < 2:
                    wg.wait(wg.gemm(destination, rings[a][0] if a in rings else a, rings[b][0], loaded=True))
                elif other == "stores":
                    (phase,) = wg.pen.put(view, "dV")
                    stored.append(phase.chunks * 2048)
                    wg.compute("stores", phase)
                elif other == "reds":
                    wg.add("dV", "dV", step=0)
            for ring in rings.values():
                wg.free(ring[0])

    tile = Tile(rows, 256, 1, 4)  # the fourth does nothing
    program = trace(Kernel(body, "columns", code=Gradients(wgmma=True, added_bytes=16)), WORKLOAD, tile, [(1, 0)])
    run = replay([program], H200, Memory(40.0, 18.0, {}, {}, adds=H200.l2_add_bytes_per_cycle / 132), max_spans=100_000)
    lanes, spans = {lane.name: n for n, lane in enumerate(run.lanes)}, run.spans
    gemms, own = spans[spans["lane"] == lanes["tensor cores"]], spans[(spans["lane"] == lanes["WG2"]) & (spans["wait"] == 0)]
    begin, until = gemms["start"].min(), min(own["end"].max(), gemms["end"].max()) if other else gemms["end"].max()
    done = int(((gemms["start"] >= begin) & (gemms["end"] <= until)).sum())
    return done / (until - begin), sum(stored) / (own["end"].max() - own["start"].min())


@pytest.mark.parametrize("kind", GEMMS)
def test_gemms_beside_stores_and_adds_lose_what_was_recorded_and_stores_get_it(kind):
    recorded = {what: RECORDED["beside"][f"{kind}_{what}"] for what in ("alone", "stores", "reds")}
    alone, _ = modelled(kind, None)
    for other in ("stores", "reds"):
        beside, stored = modelled(kind, other)
        kept = recorded[other]["gemms_per_1000_clk"]["median"] / recorded["alone"]["gemms_per_1000_clk"]["median"]
        assert beside / alone == pytest.approx(kept, abs=0.1)
        if other == "stores":
            assert stored == pytest.approx(recorded[other]["stores_bytes_per_clk"]["median"], rel=0.1)


def test_two_warpgroups_gemms_that_need_all_of_shared_memory_lose_nothing():
    """Of 64 columns with A in shared memory, which need 128 bytes a cycle, all there is; so `shared_operands` has it, at any number
    of k steps and of warpgroups. In `reduce_add` a load of shared memory stood between two GEMMs of a warpgroup."""
    for groups in ("warpgroups_2", "warpgroups_3"):
        for name in ("ss64x4", "ss64x8", "ss64x16", "ss64x32", "ss64x16_rs256x4", "ss80x8", "ss128x8"):
            if found := SHARED[groups].get(name):
                assert found["tensor_utilisation"]["median"] == pytest.approx(1, abs=0.01)
    assert modelled("ss64", None)[0] == pytest.approx(2 * modelled("ss128", None)[0], rel=0.07)


def test_all_sms_add_what_was_recorded():
    """Of one SM's share, a bulk copy that adds takes as long as recorded, alone and with all SMs adding."""
    for sms, name in ((1, "apart_1"), (132, "apart_132")):
        memory = Memory(1e4, 1e4, {}, {}, adds=H200.l2_add_bytes_per_cycle / sms)

        def body(cta, view):
            out = cta.outbox("dQ", 3 * 16384)
            drain = cta.drain()
            for i in range(20):
                for wg in cta.consumers():
                    wg.put("dV", out[wg, i])
                    drain.wait(out[wg, i])
                    drain.add("dQ", "dQaccum", slot=out[wg, i], step=i)
                    drain.free(out[wg, i])

        program = trace(Kernel(body, "columns", code=Gradients(wgmma=True)), WORKLOAD, Tile(81, 192, 1, 3), [(1, 0)])
        run = replay([program], H200, memory, max_spans=10_000)
        waits = run.spans[(run.spans["lane"] == 0) & (run.spans["wait"] == 1)]
        copying = [label.startswith("add") for label in run.labels]
        lasted = [int(each["end"] - each["start"]) for each in waits if copying[each["label"]]]
        one = RECORDED["bulk"][name]["bytes_per_clk_chip"] / sms
        assert sum(lasted) / len(lasted) == pytest.approx(16384 / one + 54 - 47, rel=0.05), "less its issue"
