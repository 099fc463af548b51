"""The microbenchmarks of paced warpgroups, instruction fetch, dependent chains and L2's sets: what they compute and recorded."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import fasim.traces
from fasim.kernels.calibrate import chains, fetch, l2_hints, l2_sets, pace, switching

RECORDED = Path(fasim.traces.__file__).parent / "recorded" / "calibration"


def results(name):
    return json.loads((RECORDED / f"{name}.json").read_text())["results"]


def stamps_of(offsets, period=2000, blocks=200, start=(1 << 32) - 30_000):
    """Stamps of one SM: a block every `period` cycles, each warpgroup `offsets` behind the first, over a clock that wraps."""
    times = np.arange(blocks)[None, None, :] * period + np.array(offsets)[None, :, None]
    return (times + start) & 0xFFFFFFFF


def test_stamps_over_a_wrapping_clock_give_the_pace_and_the_phases():
    times = pace.unwrapped(stamps_of((0, 500, 1900)))
    assert pace.pace_of(times) == pytest.approx([2000])
    behind = pace.phases(times, pace.pace_of(times))
    assert behind[0, :, 100] == pytest.approx([0.25, 0.95])


def test_a_warpgroup_ahead_of_the_first_is_behind_it_by_the_rest_of_the_period():
    times = pace.unwrapped(stamps_of((0, -400)))
    assert pace.phases(times, pace.pace_of(times))[0, 0, 100] == pytest.approx(0.8)


def test_settling_is_the_first_block_after_which_the_phase_stays():
    behind = np.full((1, 1, 100), 0.02)
    assert pace.settled(behind).tolist() == [0]
    behind[0, 0, :40] = 0.5
    assert pace.settled(behind).tolist() == [40]
    behind[0, 0, 50:] = 0.98  # over the edge of the period, not far away
    assert pace.settled(behind).tolist() == [40]


@pytest.mark.parametrize("module", [chains, fetch, l2_hints, l2_sets], ids=lambda module: module.__name__.rsplit(".", 1)[1])
def test_the_source_compiles_for_hopper(module, tmp_path, monkeypatch):
    pytest.importorskip("cuda.core")
    pytest.importorskip("cuda.bindings.nvrtc")
    from fasim.kernels.calibrate import harness

    monkeypatch.setenv("FASIM_CACHE_DIR", str(tmp_path))
    try:
        cubin = harness.compile_cubin(module.source())
    except (RuntimeError, OSError) as error:
        pytest.skip(f"no NVRTC here: {error}")
    assert cubin[:4] == b"\x7fELF"


def test_every_case_has_a_kernel_of_its_name():
    for module in (pace, switching):
        text, names = module.source(), [module.name_of(*case) for case in module.CASES]
        assert len(set(names)) == len(names)
        assert all(f"({name}, " in text for name in names)


def test_a_fence_behind_a_gemm_waits_until_seven_k_steps_are_outstanding():
    """Whose they are and how wide does not matter: A of 8 x n128 or 16 x n64, behind 8 or 16 k steps of another warpgroup."""
    cases = results("switching")["cases"]
    for gemms, cycles in (("d128_s_pv", 64), ("d128_pv_s", 64), ("d256_s_pv", 32)):
        for ahead in (8, 16):
            case = cases[f"{gemms}_other_stamped_behind{ahead}"]
            assert (case["a_done"]["median"] - case["b_issued"][0]) / cycles == pytest.approx(7, abs=0.4)
            free = cases[f"{gemms}_other_unfenced_stamped_behind{ahead}"]
            assert free["b_issued"][0] - free["a_committed"]["median"] < 40
    same, other = (cases[f"d128_s_s_{which}_stamped"]["b_issued"][0] for which in ("same", "other"))
    assert same == pytest.approx(other, abs=15)  # the accumulators do not matter


def test_ping_pong_has_one_pace_and_free_running_warpgroups_several():
    found = results("pace")["alignment"]
    for d in (64, 128, 256):
        turns = [run["cycles_per_block"]["median"] for run in found[f"pingpong_d{d}"].values()]
        assert max(turns) - min(turns) < 5
        free = [run["cycles_per_block_deciles"] for run in found[f"plain_d{d}"].values()]
        assert max(map(max, free)) > 1.01 * min(map(min, free))
    assert results("pace")["local_bytes"] == {pace.name_of(*case): 0 for case in pace.CASES}


def test_code_out_of_the_caches_costs_more_the_further_it_is():
    cases = results("fetch")["cases"]["one_warpgroup"]
    slope = {at: (cases[at]["cycles"][0][6] - cases[at]["cycles"][0][4]) / (512 - 128) for at in ("0KiB", "32KiB", "192KiB")}
    assert slope["0KiB"] < slope["32KiB"] < slope["192KiB"]
    assert slope["32KiB"] == pytest.approx(2.36, abs=0.05)


def test_slices_fill_the_sets_of_l2_by_chance():
    """Lines of 30 MiB in sets of 21 ways, at random: the recorded misses of 256-byte slices within two points."""
    for size, seen in results("l2_sets")["slice_256"].items():
        mean = 21 * int(size.removesuffix("MiB")) / 29.75
        kept = sum(math.exp(-mean) * mean**k / math.factorial(k) for k in range(21))
        assert seen["warm_over_size"] == pytest.approx(1 - kept, abs=0.02)
