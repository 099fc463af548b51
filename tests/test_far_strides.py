"""Elements past 2^31 in every dimension of every tensor: an index is a product, and it overflows though its factors fit.

On the CPU only the pages that are touched exist; on a GPU the memory is real.
"""

from __future__ import annotations

import importlib.util
import mmap
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("triton_env", Path(__file__).with_name("triton_env.py"))
env = sys.modules.setdefault("triton_env", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(env)

import torch  # noqa: E402

from fasim.kernels import ops, reference  # noqa: E402
from fasim.kernels.triton import fa2_backward  # noqa: E402

BEYOND = 2**31 + 2**20
"""Where the last element lies, at least; no factor of its index reaches that."""
FORWARD = [{"schedule": name} for name in ops.runnable(env.DEVICE)] + [{"num_splits": 2}]


def far(x, dim):
    """The same values, with the elements along `dim` so far apart that the last lies at BEYOND or after."""
    step = -(-BEYOND // (x.shape[dim] - 1))
    strides, inner = [0] * x.dim(), 1
    for other in reversed(range(x.dim())):
        strides[other] = step if other == dim else inner
        inner *= 1 if other == dim else x.shape[other]
    size = step * (x.shape[dim] - 1) + inner
    if x.device.type == "cpu":
        memory = torch.frombuffer(mmap.mmap(-1, size * x.element_size(), flags=mmap.MAP_PRIVATE), dtype=x.dtype)
    else:
        memory = torch.empty(size, dtype=x.dtype, device=x.device)
    return memory.as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("kernel", FORWARD, ids=lambda kernel: str(*kernel.values()))
@pytest.mark.parametrize("dim", range(4))
def test_inputs_are_read_past_two_to_the_31_in_every_dimension(kernel, dim):
    q, k, v, _ = env.inputs(2, 2, 2, 2, 2, 64)
    expected = reference.attention_forward(q, k, v)
    o, lse = ops.flash_attn_func(far(q, dim), far(k, dim), far(v, dim), **kernel, return_lse=True)
    assert env.relative_error(o, expected.o) < 1e-3
    torch.testing.assert_close(lse.double(), expected.lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", range(4))
def test_gradients_are_read_and_written_past_two_to_the_31_in_every_dimension(dim):
    q, k, v, do = env.inputs(2, 2, 2, 2, 2, 64)
    dlse = torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(1)).to(q.device)
    o, lse = (x.to(kind) for x, kind in zip(reference.attention_forward(q, k, v), (q.dtype, torch.float32), strict=True))
    expected = reference.attention_backward(q, k, v, do, dlse=dlse)
    rows = {0: 0, 1: 2, 2: 1}.get(dim)  # of (B, H, S)
    far_lse, far_dlse = (x if rows is None else far(x, rows) for x in (lse, dlse))
    outputs = {name: far(torch.zeros_like(x), dim) for name, x in (("dq", q), ("dk", k), ("dv", v))}
    inputs = [far(x, dim) for x in (do, q, k, v, o)]
    got = fa2_backward.backward(*inputs, far_lse, 1 / 8, dlse=far_dlse, **outputs)
    for ours, theirs in zip(got, expected, strict=True):
        assert env.relative_error(ours, theirs) < 3e-3
