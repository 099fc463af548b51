"""Timelines recorded on hardware: every kernel of ours did what its schedule says, and tracing cost little."""

from __future__ import annotations

import pytest

from fasim.traces import store
from fasim.traces.conformance import conforms

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
