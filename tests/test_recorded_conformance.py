"""Timelines recorded on hardware: every kernel of ours did what its schedule says, and tracing cost little."""

from __future__ import annotations

import pytest

from fasim.traces import store
from fasim.traces.conformance import conforms
from fasim.traces.overlay import pair

RECORDED = sorted(path for path in store.TIMELINES.glob("*.run.json*")) if store.TIMELINES.is_dir() else []
KERNELS = {"warp-specialized", "pingpong", "overlap-2stage", "overlap-3stage", "fa3"}


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name.split(".")[0])
def test_a_recorded_kernel_conforms_to_its_schedule(path):
    """And hands back every stage before it is loaded anew."""
    found = conforms(store.load(path))
    assert found.holds, found.differences
    assert found.frees > 500


def test_every_cuda_schedule_is_recorded():
    assert {store.load(path).schedule for path in RECORDED} == KERNELS


def test_tracing_costs_little_on_every_recorded_shape():
    """At most 5 % but for those that the folder's README names; what it costs is taken off the phases that are shown."""
    costs = {path.name: store.load(path).measurement.trace_overhead for path in RECORDED}
    named = (RECORDED[0].parent / "README.md").read_text(encoding="utf-8").split("Above 5 %")[1]
    above = [cost for cost in costs.values() if abs(cost) > 0.05]
    assert all(f"{100 * cost:.1f}" in named for cost in above) and len(above) <= 4 and max(above, default=0) < 0.07


# -- the backward ---

BACKWARD = sorted((store.RECORDED.parent / "backward" / "timelines").glob("*.run.json.gz"))


@pytest.mark.parametrize("path", BACKWARD, ids=lambda path: path.name.split(".")[0])
def test_a_recorded_backward_conforms_and_the_model_knows_what_its_arithmetic_takes(path):
    """Where the model is fast, it is in what waits for GEMMs and in dQ's way out (schedules/backward/NOTES.md)."""
    both = pair(path.name, store.load(path))
    assert both.conformance.holds, both.conformance.differences
    assert both.conformance.events >= 6000 and both.measured.measurement.trace_overhead < 0.03
    found = {phase.name: phase for phase in both.phases}
    assert {"S^T=KQ^T", "dP^T=VdO^T", "dV+=P^TdO", "dQ=dSK", "dK+=dS^TQ", "dS^T", "put dQ"} <= found.keys()
    if "multiplier" not in {lane.name for lane in both.measured.lanes}:  # beside it exponentials take 1.7 times the predicted
        arithmetic = [found[name] for name in ("P^T", "dS^T")]
        assert sum(each.predicted for each in arithmetic) == pytest.approx(sum(each.measured for each in arithmetic), rel=0.15)
    assert found["whole block"].predicted == pytest.approx(found["whole block"].measured, rel=0.16)
