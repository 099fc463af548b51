"""The clock: never above the device's, falling with activity, at the power limit wherever it is below the top."""

import json
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasim.kernels.calibrate import power_fit
from fasim.simulator import clock as clock_module
from fasim.simulator.clock import LOOKED_UP, MIN_CLOCK_HZ, Rates, power_w, sustained
from fasim.simulator.devices.device import DEVICE_NAMES, load_device
from fasim.simulator.errors import UsageError

H200 = load_device("h200")
LIMIT_W = H200.power_limit_w * H200.power_limit_overshoot
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
        l2_lookup_bytes_per_cycle=draw(UNIT) * device.l2_bytes_per_cycle,
    )


@given(rates())
def test_the_clock_is_the_highest_within_the_limit(work):
    clock = sustained(H200, work)
    top = sustained(H200, work, regime="burst").clock_hz
    assert MIN_CLOCK_HZ <= clock.clock_hz <= top <= H200.max_clock_hz
    assert clock.power_w == power_w(H200, work, clock.clock_hz) <= LIMIT_W * (1 + 1e-9)
    assert not clock.over_limit
    if clock.clock_hz < top:
        assert clock.power_w == pytest.approx(LIMIT_W, rel=1e-6)
        assert power_w(H200, work, clock.clock_hz * 1.001) > LIMIT_W


@given(
    rates(), st.sampled_from(["tensor", "mufu", "issue", "hbm_bytes_per_cycle", "l2_bytes_per_cycle", "l2_lookup_bytes_per_cycle"])
)
def test_more_activity_never_raises_the_clock(work, unit):
    more = Rates(**{**vars(work), unit: getattr(work, unit) + 0.1})
    assert sustained(H200, more).clock_hz <= sustained(H200, work).clock_hz
    assert power_w(H200, more, 1.5e9) >= power_w(H200, work, 1.5e9)


@pytest.mark.parametrize("name", DEVICE_NAMES)
def test_an_idle_chip_runs_at_its_top_clock_at_idle_power(name):
    device = load_device(name)
    assert sustained(device, Rates()) == (device.max_clock_hz, device.idle_w, False)


def test_power_is_the_sum_of_the_units_at_full_rate():
    full = Rates(1, 1, 1, H200.smem_bytes_per_cycle, 5000, H200.hbm_bytes_per_s / H200.max_clock_hz, 3000)
    l2_w = (5000 * H200.l2_joules_per_byte + 3000 * H200.l2_lookup_joules_per_byte) * H200.max_clock_hz
    expected = (
        H200.idle_w + H200.tensor_w + H200.mufu_w + H200.issue_w + H200.smem_w + l2_w
        + H200.hbm_joules_per_byte * H200.hbm_bytes_per_s
    )  # fmt: skip
    assert power_w(H200, full, H200.max_clock_hz) == pytest.approx(expected)


def test_bytes_whose_lookups_are_not_known_are_looked_up_as_attentions_were_counted():
    unknown, known = Rates(l2_bytes_per_cycle=5000), Rates(l2_bytes_per_cycle=5000, l2_lookup_bytes_per_cycle=5000 * LOOKED_UP)
    assert power_w(H200, unknown, 1.9e9) == power_w(H200, known, 1.9e9)
    counted = recorded()["attention_1.0"]["activity"]
    assert counted["l2_lookup_bytes"] / counted["l2_bytes"] == pytest.approx(LOOKED_UP, abs=0.01)


def test_tensor_cores_draw_less_on_bf16():
    fp16, bf16 = (Rates(tensor=0.9, dtype=dtype) for dtype in ("fp16", "bf16"))
    assert sustained(H200, bf16).clock_hz > 1.02 * sustained(H200, fp16).clock_hz


def test_hbm_power_stops_at_the_memorys_bandwidth():
    memory = H200.hbm_bytes_per_s / 1e9
    at, above = Rates(hbm_bytes_per_cycle=memory), Rates(hbm_bytes_per_cycle=3 * memory)
    assert power_w(H200, above, 1e9) == power_w(H200, at, 1e9)


def recorded():
    """The power microbenchmark's workloads."""
    path = Path(clock_module.__file__).parents[1] / "traces" / "recorded" / "calibration" / "power.json"
    return json.loads(path.read_text())["results"]["workloads"]


FITTED = power_fit.fitted_names(recorded())
STREAMS = [name for name in FITTED if "tensor_utilisation" in recorded()[name]]


@pytest.mark.parametrize("name", FITTED)
def test_the_power_is_the_recorded_microbenchmarks_at_their_clock(name):
    work, seen = power_fit.rates(recorded(), name), recorded()[name]
    assert power_w(H200, work, 1e6 * seen["sm_mhz_settled"]) == pytest.approx(seen["watts_instant_settled"], rel=0.06)


def clock_errors(regime: str, window: str) -> dict[str, float]:
    """Relative errors of the clock of the GEMM streams."""
    seen = recorded()
    return {
        name: sustained(H200, power_fit.rates(seen, name), regime=regime).clock_hz / 1e6 / seen[name][f"sm_mhz_{window}"] - 1
        for name in STREAMS
    }


@pytest.mark.parametrize(("regime", "window"), [("sustained", "settled"), ("burst", "burst")])
def test_the_clock_is_the_recorded_microbenchmarks(regime, window):
    """GEMMs on fresh tiles at several duties, in bursts and after half a second: 1.5 % on average, 5.5 % at worst."""
    errors = [abs(error) for error in clock_errors(regime, window).values()]
    assert len(errors) >= 20 and mean(errors) < 0.02 and max(errors) < 0.055


@pytest.mark.parametrize("name", ["beside_softmax_1.0", "beside_softmax_0.5"])
def test_gemms_beside_a_softmax_draw_the_sum_though_no_fit_has_seen_them(name):
    work, seen = power_fit.rates(recorded(), name), recorded()[name]
    assert power_w(H200, work, 1e6 * seen["sm_mhz_settled"]) == pytest.approx(seen["watts_instant_settled"], rel=0.04)
    assert sustained(H200, work).clock_hz == pytest.approx(1e6 * seen["sm_mhz_settled"], rel=0.035)


def test_a_fit_finds_the_energies_that_made_its_data():
    """Of workloads whose watts are the model's own, to a watt, and whose voltage has another floor."""
    workloads = json.loads(json.dumps(recorded()))
    found = power_fit.fit(workloads)
    made = dict.fromkeys(power_fit.TERMS, 500.0) | {"l2": 6e-12, "l2_lookup": 18e-12, "hbm": 60e-12}
    table, _ = power_fit.watts(workloads, power_fit.fitted_names(workloads), 0.45)
    for name, above in zip(power_fit.fitted_names(workloads), table @ list(made.values()), strict=True):
        workloads[name]["watts_instant_settled"] = workloads["sleep"]["watts_instant_settled"] + above
    again = power_fit.fit(workloads)
    assert again.floor == pytest.approx(0.45) and again.terms == pytest.approx(made, rel=1e-6)
    assert found.rms < 0.03 and again.rms < 1e-9


def test_a_term_that_would_be_negative_is_left_out():
    table, wanted = [[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]], [3.0, 2.0, 1.0]
    assert power_fit.nonnegative(np.array(table), np.array(wanted)) == pytest.approx([2.0, 0.0])


def test_a_gemm_bursts_faster_than_it_can_last():
    """Measured on an H200: 8192^3 fp16 at 781 TFLOP/s in bursts, 649 after two seconds at 692 W and 1.27 to 1.4 GHz, which
    makes 0.86 to 0.95 of the tensor cores' cycles."""
    gemm = Rates(tensor=0.9, issue=0.03, smem_bytes_per_cycle=75, l2_bytes_per_cycle=6000, hbm_bytes_per_cycle=400)
    flops_per_cycle = 0.9 * H200.sms * H200.tensor_flops_per_cycle
    assert sustained(H200, gemm, regime="burst").clock_hz * flops_per_cycle / 1e12 == pytest.approx(781, rel=0.05)
    lasting = sustained(H200, gemm)
    assert lasting.clock_hz * flops_per_cycle / 1e12 == pytest.approx(649, rel=0.05)
    assert lasting.power_w == pytest.approx(692, rel=0.03)


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
