"""softmax_scale: every number is computed with as its definition says, forward and backward, or refused in one sentence."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest

_spec = importlib.util.spec_from_file_location("triton_env", Path(__file__).with_name("triton_env.py"))
env = sys.modules.setdefault("triton_env", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(env)

import torch  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fasim.kernels import arguments, ops, reference  # noqa: E402
from fasim.kernels.ops import flash_attn_func  # noqa: E402
from fasim.simulator.errors import UsageError  # noqa: E402

EVERY_PATH = ops.runnable(env.DEVICE)
NOTHING = [-0.0, 1e-46, -1e-40]
"""0 to the GPU."""


@given(st.floats() | st.integers())
def test_every_number_is_taken_as_it_is_or_as_zero_or_refused(value):
    try:
        scale = arguments.scale_of(value, 64)
    except UsageError as error:
        assert not abs(value) <= arguments.LARGEST_SCALE and "\n" not in str(error)
    else:
        assert type(scale) is float and scale == (0.0 if abs(value) < 2.0**-126 else value)
        assert scale == 0 or (np.float32(scale * math.log2(math.e)) != 0 and np.isfinite(np.float32(scale)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30, 1e39, 65537, 10**400])
def test_what_fp32_cannot_tell_apart_is_refused_everywhere(value):
    q, k, v, do = env.inputs(1, 1, 1, 3, 4, 64)
    for call in (flash_attn_func, reference.attention_forward, lambda *x: torch.ops.fasim.attention(*x[:3], float(x[3]))):
        with pytest.raises((UsageError, OverflowError), match=r"softmax_scale=.* is not possible|too large"):
            call(q, k, v, value)
    with pytest.raises(UsageError, match="is not possible"):
        reference.attention_backward(q, k, v, do, value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "is a bool and must be a number"),
        ("0.1", "is a str and must be a number"),
        ([0.1], "is a list"),
        (0.1j, "is a complex"),
        (torch.tensor(0.1), "is a Tensor .* multiply q by it and give softmax_scale=1.0"),
    ],
    ids=repr,
)
def test_what_is_no_number_is_refused(value, message):
    q, k, v, _ = env.inputs(1, 1, 1, 3, 4, 64)
    with pytest.raises(UsageError, match=message):
        flash_attn_func(q, k, v, value)


@pytest.mark.parametrize("value", [np.float32(0.25), np.float16(0.25), np.int64(1), 1, np.float64(-0.25)], ids=repr)
def test_numpys_numbers_and_integers_are_numbers(value):
    q, k, v, _ = env.inputs(1, 1, 1, 3, 4, 64)
    assert torch.equal(flash_attn_func(q, k, v, value), flash_attn_func(q, k, v, float(value)))


@pytest.mark.parametrize("schedule", EVERY_PATH)
@pytest.mark.parametrize("scale", NOTHING)
def test_a_scale_that_is_zero_in_fp32_weighs_all_keys_alike(schedule, scale):
    q, k, v, do = env.inputs(1, 1, 1, 3, 5, 64)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o, lse = flash_attn_func(*leaves, scale, True, schedule, return_lse=True)
    seen = torch.arange(3, 6, device=q.device)
    assert env.relative_error(o.detach(), v.double().cumsum(1)[:, 2:] / seen[None, :, None, None]) < 1e-3
    torch.testing.assert_close(lse.double(), seen.double().log().expand(1, 1, -1), rtol=1e-6, atol=1e-6)
    dq, dk, dv = torch.autograd.grad(o, leaves, do)
    assert not dq.any() and not dk.any()
    assert env.relative_error(dv, reference.attention_backward(q, k, v, do, 0.0, True).dv) < 3e-3


@pytest.mark.parametrize("schedule", EVERY_PATH)
@pytest.mark.parametrize("scale", [-2.0, 1e-37, arguments.LARGEST_SCALE])
def test_any_other_scale_gives_the_oracle_forward_and_backward(schedule, scale):
    q, k, v, do = env.inputs(1, 1, 1, 3, 5, 64)
    q, k = (torch.nn.functional.normalize(x.float(), dim=-1).to(x.dtype) for x in (q, k))  # the largest scale is for unit vectors
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o = flash_attn_func(*leaves, scale, True, schedule)
    assert env.relative_error(o.detach(), reference.attention_forward(q, k, v, scale, True).o) < 1e-3
    # dS is a difference of numbers of the size of dO V, whose rounding the scale multiplies.
    rounding = 2.0**-10 * float(do.double().norm() * v.double().norm(dim=-1).max())
    allowed = (rounding * abs(scale) + 1e-8, rounding * abs(scale) + 1e-8, rounding)
    wanted = reference.attention_backward(q, k, v, do, scale, True)
    for ours, theirs, bound in zip(torch.autograd.grad(o, leaves, do), wanted, allowed, strict=True):
        assert float((ours.double() - theirs).norm()) < bound


def test_the_operator_takes_a_negative_scale_too():
    q, k, v, _ = env.inputs(1, 1, 1, 5, 6, 64)
    o, _ = torch.ops.fasim.attention(q, k, v, -0.5)
    assert env.relative_error(o, reference.attention_forward(q, k, v, -0.5).o) < 1e-3
