"""Puts Triton in its interpreter where there is no GPU. Import it before anything that imports Triton."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, dtype=torch.float16, seed=0):
    """Random normal q, k, v and dO on the device the kernels run on."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(seqlen_q, heads), (seqlen_k, kv_heads), (seqlen_k, kv_heads), (seqlen_q, heads)]
    drawn = (torch.randn(batch, n, h, head_dim, generator=generator) for n, h in shapes)
    return tuple(x.to(device=DEVICE, dtype=dtype) for x in drawn)


def relative_error(got, want):
    """||got - want|| / ||want||; 0 for two empty or zero tensors, NaN where got has one."""
    difference = (got.double() - want).norm()
    return float(difference / want.norm()) if float(want.norm()) else float(difference)
