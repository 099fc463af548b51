"""The roofline: closed forms that hold to the digit."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasim.simulator.devices.device import load_device
from fasim.simulator.errors import UsageError
from fasim.simulator.problem.workload import Workload
from fasim.simulator.results.roofline import roofline

H200 = load_device("h200")
TABLE2 = Workload(batch=4, heads=16, seqlen=8448, head_dim=128)


def test_the_tensor_bound_is_the_flops_over_the_peak():
    bound = roofline(TABLE2, H200, 1.83e9)
    assert bound.flops == 4 * 4 * 16 * 8448**2 * 128
    assert bound.tensor_cycles == 4 * 64 * 8448**2 * 128 / (132 * 4096) == 4325376
    assert bound.binding == "tensor"
    assert bound.bound_flops_per_s == pytest.approx(132 * 4096 * 1.83e9)


def test_exp2_takes_a_sixteenth_of_a_cycle_per_pair_and_sm():
    assert roofline(TABLE2, H200, 1.83e9).mufu_cycles == 64 * 8448**2 / (132 * 16)


def test_at_head_dim_64_exp2_and_the_gemms_take_equally_long():
    bound = roofline(replace(TABLE2, head_dim=64), H200, 1.83e9)
    assert bound.mufu_cycles == bound.tensor_cycles
    fp8 = roofline(replace(TABLE2, head_dim=64, dtype="e4m3"), H200, 1.83e9)
    assert fp8.binding == "mufu"
    assert 2 * fp8.tensor_cycles == bound.tensor_cycles


def test_a_causal_mask_leaves_the_exact_triangle():
    full, causal = (roofline(replace(TABLE2, causal=c), H200, 1.83e9) for c in (False, True))
    assert causal.mufu_cycles / full.mufu_cycles == pytest.approx(8449 / (2 * 8448))


def test_decoding_is_bound_by_hbm():
    work = Workload(batch=8, heads=32, kv_heads=8, seqlen_q=1, seqlen_k=8192)
    bound = roofline(work, H200, 1.98e9)
    assert bound.binding == "hbm"
    assert bound.bound_cycles / 1.98e9 == pytest.approx(sum(work.tensor_bytes.values()) / 4.8e12)
    assert bound.arithmetic_intensity < bound.ridge_flops_per_byte


def test_standard_attention_moves_s_and_p_through_l2_and_what_l2_cannot_hold_through_hbm():
    scores = 64 * 8448**2 * 2
    fused, standard = (roofline(TABLE2, H200, 1.83e9, standard=s) for s in (False, True))
    assert standard.compulsory_bytes - fused.compulsory_bytes == 4 * (scores - H200.l2_bytes)
    assert (standard.l2_cycles - fused.l2_cycles) * H200.l2_bytes_per_cycle == pytest.approx(4 * scores)
    assert (standard.binding, fused.binding) == ("hbm", "tensor")
    small = Workload(batch=1, heads=1, seqlen=1024)
    assert roofline(small, H200, 1e9, standard=True).hbm_cycles == roofline(small, H200, 1e9).hbm_cycles


@given(
    heads=st.integers(1, 4),
    seqlen_q=st.integers(1, 5000),
    seqlen_k=st.integers(1, 5000),
    head_dim=st.sampled_from([64, 128, 256]),
    dtype=st.sampled_from(["fp16", "e4m3"]),
    causal=st.booleans(),
    standard=st.booleans(),
)
def test_the_binding_bound_is_the_longest_and_every_ceiling_agrees(standard, **shape):
    work = Workload(batch=1, **shape)
    bound = roofline(work, H200, 1.7e9, standard)
    named = {name: getattr(bound, f"{name}_cycles") for name in ("tensor", "mufu", "hbm", "l2")}
    assert bound.bound_cycles == named[bound.binding] == max(named.values()) > 0
    ceilings = {c.name: c for c in bound.ceilings}
    assert ceilings.keys() == named.keys()
    for name in ("tensor", "mufu", "hbm"):
        assert ceilings[name].at(bound.arithmetic_intensity) * named[name] / 1.7e9 == pytest.approx(bound.flops)
    if bound.flops:
        assert all(c.at(bound.arithmetic_intensity) >= bound.bound_flops_per_s * (1 - 1e-9) for c in bound.ceilings)


def test_the_roofline_is_plain_json():
    assert json.loads(json.dumps(roofline(TABLE2, H200, 1.83e9).to_dict()))["binding"] == "tensor"


def test_fp8_on_ampere_is_refused():
    with pytest.raises(UsageError, match="has no fp8"):
        roofline(replace(TABLE2, dtype="e4m3"), load_device("a100-sxm"), 1.4e9)


def test_a_bandwidth_says_whose_bytes_it_rises_with():
    assert {c.name: c.over for c in roofline(TABLE2, H200, 1.83e9).ceilings} == {
        "tensor": None, "mufu": None, "l2": "L2", "hbm": "HBM",
    }  # fmt: skip
