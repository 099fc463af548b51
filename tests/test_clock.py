"""The clock: never above the device's, falling with activity, at the power limit wherever it is below the top."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasim.simulator import clock as clock_module
from fasim.simulator.clock import MIN_CLOCK_HZ, Rates, power_w, sustained
from fasim.simulator.device import DEVICE_NAMES, load_device
from fasim.simulator.errors import UsageError

H200 = load_device("h200")
UNIT = st.floats(0, 1)


@st.composite
def rates(draw, device=H200):
    return Rates(
        tensor=draw(UNIT),
        mufu=draw(UNIT),
        issue=draw(UNIT),
        smem_bytes_per_cycle=draw(UNIT) * device.smem_bytes_per_cycle,
        l2_bytes_per_cycle=draw(UNIT) * device.l2_bytes_per_cycle,
        hbm_bytes_per_cycle=draw(UNIT) * 2500,
    )


@given(rates())
def test_the_clock_is_the_highest_within_the_limit(work):
    clock = sustained(H200, work)
    top = sustained(H200, work, regime="burst").clock_hz
    assert MIN_CLOCK_HZ <= clock.clock_hz <= top <= H200.max_clock_hz
    assert clock.power_w == power_w(H200, work, clock.clock_hz) <= H200.power_limit_w * (1 + 1e-9)
    assert not clock.over_limit
    if clock.clock_hz < top:
        assert clock.power_w == pytest.approx(H200.power_limit_w, rel=1e-6)
        assert power_w(H200, work, clock.clock_hz * 1.001) > H200.power_limit_w


@given(rates(), st.sampled_from(["tensor", "mufu", "issue", "hbm_bytes_per_cycle", "l2_bytes_per_cycle"]))
def test_more_activity_never_raises_the_clock(work, unit):
    more = Rates(**{**vars(work), unit: getattr(work, unit) + 0.1})
    assert sustained(H200, more).clock_hz <= sustained(H200, work).clock_hz
    assert power_w(H200, more, 1.5e9) >= power_w(H200, work, 1.5e9)


@pytest.mark.parametrize("name", DEVICE_NAMES)
def test_an_idle_chip_runs_at_its_top_clock_at_idle_power(name):
    device = load_device(name)
    assert sustained(device, Rates()) == (device.max_clock_hz, device.idle_w, False)


def test_power_is_the_sum_of_the_units_at_full_rate():
    full = Rates(1, 1, 1, H200.smem_bytes_per_cycle, H200.l2_bytes_per_cycle, H200.hbm_bytes_per_s / H200.max_clock_hz)
    expected = (
        H200.idle_w + H200.tensor_w + H200.mufu_w + H200.issue_w + H200.smem_w + H200.l2_w
        + H200.hbm_joules_per_byte * H200.hbm_bytes_per_s
    )  # fmt: skip
    assert power_w(H200, full, H200.max_clock_hz) == pytest.approx(expected)


def test_hbm_power_stops_at_the_memorys_bandwidth():
    memory = H200.hbm_bytes_per_s / 1e9
    at, above = Rates(hbm_bytes_per_cycle=memory), Rates(hbm_bytes_per_cycle=3 * memory)
    assert power_w(H200, above, 1e9) == power_w(H200, at, 1e9)


def recorded():
    """The power microbenchmark's workloads with tensor activity."""
    path = Path(clock_module.__file__).parents[1] / "traces" / "recorded" / "calibration" / "power.json"
    workloads = json.loads(path.read_text())["results"]["workloads"]
    return {name: seen for name, seen in workloads.items() if "tensor_utilisation" in seen}


@pytest.mark.parametrize("name", recorded())
def test_the_clock_is_the_recorded_microbenchmarks(name):
    """WGMMA streams at several duties, alone or beside a loop of exp2, in bursts and after two seconds."""
    seen = recorded()[name]
    tensor = seen["tensor_utilisation"]
    beside = {"issue": 0.16, "mufu": 0.55} if "exp" in name else {"issue": 0.02}
    work = Rates(tensor=tensor, smem_bytes_per_cycle=85 * tensor, **beside)
    lasting, burst = sustained(H200, work), sustained(H200, work, regime="burst")
    assert lasting.clock_hz == pytest.approx(1e6 * seen["sm_mhz_sustained"], rel=0.025)
    assert burst.clock_hz == pytest.approx(1e6 * seen["sm_mhz_burst"], rel=0.03)
    assert lasting.power_w == pytest.approx(seen["watts_instant_sustained"], rel=0.12)


def test_a_gemm_bursts_faster_than_it_can_last():
    """Measured on an H200: 8192^3 fp16 at 781 TFLOP/s in bursts, 649 after two seconds at 692 W."""
    gemm = Rates(tensor=0.84, issue=0.03, smem_bytes_per_cycle=75, l2_bytes_per_cycle=6000, hbm_bytes_per_cycle=400)
    flops_per_cycle = 0.84 * H200.sms * H200.tensor_flops_per_cycle
    assert sustained(H200, gemm, regime="burst").clock_hz * flops_per_cycle / 1e12 == pytest.approx(781, rel=0.03)
    lasting = sustained(H200, gemm)
    assert lasting.clock_hz * flops_per_cycle / 1e12 == pytest.approx(649, rel=0.07)
    assert lasting.power_w == pytest.approx(692, rel=0.02)


def test_a_pinned_clock_is_kept_and_an_impossible_power_is_said():
    busy = Rates(tensor=1, mufu=0.5, issue=0.5, smem_bytes_per_cycle=100)
    assert sustained(H200, busy, 1.98e9) == (1.98e9, power_w(H200, busy, 1.98e9), True)
    assert not sustained(H200, busy, 1.0e9).over_limit
    assert not sustained(H200, Rates(), 1.83e9).over_limit


@pytest.mark.parametrize("pinned", [0, -1e9, 2.5e9, float("nan")])
def test_a_clock_the_device_has_not_is_refused(pinned):
    with pytest.raises(UsageError, match="MHz is not possible on h200; give one above 0 and at most 1980 MHz"):
        sustained(H200, Rates(), pinned)


def test_an_unknown_regime_is_refused():
    with pytest.raises(UsageError, match="'boost'.*sustained, burst"):
        sustained(H200, Rates(), regime="boost")
