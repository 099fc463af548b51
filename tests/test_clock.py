"""The clock: never above the device's, falling with activity, at the power limit wherever it is below the top."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@given(rates(), st.sampled_from(["burst", "sustained"]))
def test_the_clock_is_the_highest_within_the_limit(work, regime):
    limit_w = H200.burst_power_limit_w if regime == "burst" else H200.power_limit_w
    clock = sustained(H200, work, regime=regime)
    assert MIN_CLOCK_HZ <= clock.clock_hz <= H200.max_clock_hz
    assert clock.power_w == power_w(H200, work, clock.clock_hz) <= limit_w * (1 + 1e-9)
    assert not clock.over_limit
    if clock.clock_hz < H200.max_clock_hz:
        assert clock.power_w == pytest.approx(limit_w, rel=1e-6)
        assert power_w(H200, work, clock.clock_hz * 1.001) > limit_w


@given(rates(), st.sampled_from(["tensor", "mufu", "issue", "hbm_bytes_per_cycle", "l2_bytes_per_cycle"]))
def test_more_activity_never_raises_the_clock(work, unit):
    more = Rates(**{**vars(work), unit: getattr(work, unit) + 0.1})
    assert sustained(H200, more).clock_hz <= sustained(H200, work).clock_hz
    assert power_w(H200, more, 1.5e9) >= power_w(H200, work, 1.5e9)


@given(rates())
def test_what_is_held_for_seconds_is_not_faster_than_a_burst(work):
    assert sustained(H200, work, regime="sustained").clock_hz <= sustained(H200, work).clock_hz


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


def test_the_published_h200_power_points_come_back():
    """RRZE-HPC/gpu-benches, gpu-roofline/h200.txt, at 1980 MHz: (GB/s, GFLOP/s of fp32, W)."""
    for gbytes, gflops, watts in [(3759, 940, 572), (3629, 22683, 675), (1838, 37227, 547), (425, 42558, 398)]:
        cycle = 1e9 / H200.max_clock_hz
        work = Rates(
            issue=gflops * cycle / (132 * 256),
            l2_bytes_per_cycle=gbytes * cycle,
            hbm_bytes_per_cycle=gbytes * cycle,
        )
        assert power_w(H200, work, H200.max_clock_hz) == pytest.approx(watts, rel=0.05)


def test_a_gemm_bursts_faster_than_it_can_last():
    """Measured on an H200: 8192^3 fp16 at 781 TFLOP/s in bursts, 649 after two seconds at 692 W."""
    gemm = Rates(tensor=0.96, issue=0.05, smem_bytes_per_cycle=80, l2_bytes_per_cycle=4500, hbm_bytes_per_cycle=400)
    flops_per_cycle = 0.96 * H200.sms * H200.tensor_flops_per_cycle
    assert sustained(H200, gemm).clock_hz * flops_per_cycle / 1e12 == pytest.approx(781, rel=0.06)
    lasting = sustained(H200, gemm, regime="sustained")
    assert lasting.clock_hz * flops_per_cycle / 1e12 == pytest.approx(649, rel=0.06)
    assert lasting.power_w == pytest.approx(692, rel=0.02)


def test_a_pinned_clock_is_kept_and_an_impossible_power_is_said():
    busy = Rates(tensor=1, mufu=0.5, issue=0.5, smem_bytes_per_cycle=100)
    assert sustained(H200, busy, 1.98e9) == (1.98e9, power_w(H200, busy, 1.98e9), True)
    assert not sustained(H200, busy, 1.0e9).over_limit
    assert not sustained(H200, Rates(), 1.83e9).over_limit


@pytest.mark.parametrize("pinned", [0, -1e9, 2.5e9, float("nan")])
def test_a_clock_the_device_has_not_is_refused(pinned):
    with pytest.raises(UsageError, match="MHz is not possible on H200; give one above 0 and at most 1980 MHz"):
        sustained(H200, Rates(), pinned)


def test_an_unknown_regime_is_refused():
    with pytest.raises(UsageError, match="'boost'.*burst, sustained"):
        sustained(H200, Rates(), regime="boost")
