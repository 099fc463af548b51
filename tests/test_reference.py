"""The fp64 oracle agrees with PyTorch's math attention and autograd, in fp64, for every mask and head layout."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from fasim.kernels import reference  # noqa: E402

SHAPES = [
    # batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim
    (1, 1, 1, 1, 1, 8),
    (2, 4, 4, 17, 17, 16),
    (2, 4, 2, 13, 29, 16),
    (1, 6, 1, 31, 7, 8),
    (1, 2, 2, 5, 64, 64),
]


def inputs(batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, n, h, head_dim) for n, h in ((seqlen_q, heads), (seqlen_k, kv_heads), (seqlen_k, kv_heads))]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def by_autograd(q, k, v, scale, causal):
    """Whole-matrix attention in plain torch, where fully masked rows are zeroed by hand."""
    sharing = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(sharing, 2).transpose(1, 2) for x in (k, v))
    scores = q.transpose(1, 2) @ k.transpose(-1, -2) * scale
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool)
    if causal:
        seen = seen.tril(scores.shape[-1] - scores.shape[-2])
    scores = scores.masked_fill(~seen, -math.inf)
    alive = seen.any(-1)[:, None]
    weights = torch.softmax(torch.where(alive, scores, 0.0), -1) * alive
    lse = torch.where(alive[:, 0], torch.logsumexp(torch.where(alive, scores, 0.0), -1), -math.inf)
    return (weights @ v).transpose(1, 2), lse


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [1, 100, 1 << 26])
def test_forward_and_backward_equal_autograd(shape, causal, chunk, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", chunk)
    q, k, v = (x.requires_grad_() for x in inputs(*shape))
    o, lse = by_autograd(q, k, v, 0.3, causal)
    do = torch.randn_like(o)
    dlse = torch.randn_like(lse)
    alive = lse.isfinite()
    expected = torch.autograd.grad((o * do).sum() + (lse[alive] * dlse[alive]).sum(), (q, k, v))
    with torch.no_grad():
        ours = reference.attention_forward(q, k, v, 0.3, causal)
        grads = reference.attention_backward(q, k, v, do, 0.3, causal, dlse)
    torch.testing.assert_close(ours.o, o, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.lse, lse, rtol=1e-12, atol=1e-12)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_forward_equals_pytorch_math_attention(causal):
    q, k, v = inputs(2, 4, 2, 40, 40, 32)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True
        ).transpose(1, 2)
    o, _ = reference.attention_forward(q, k, v, causal=causal)
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)


def test_rows_that_see_no_key_give_zero_and_minus_infinity():
    q, k, v = inputs(1, 2, 2, 9, 4, 8)
    o, lse = reference.attention_forward(q, k, v, causal=True)
    assert (o[:, :5] == 0).all() and (lse[..., :5] == -math.inf).all()
    assert lse[..., 5:].isfinite().all() and (o[:, 5:] != 0).all()
    o, lse = reference.attention_forward(q, k[:, :0], v[:, :0])
    assert (o == 0).all() and (lse == -math.inf).all()
    dq, dk, dv = reference.attention_backward(q, k[:, :0], v[:, :0], torch.ones_like(q))
    assert (dq == 0).all() and dk.shape == (1, 0, 2, 8) and dv.shape == dk.shape


def test_half_inputs_are_read_exactly():
    q, k, v = (x.to(torch.bfloat16) for x in inputs(1, 2, 1, 12, 12, 16))
    ours = reference.attention_forward(q, k, v)
    exact = reference.attention_forward(q.double(), k.double(), v.double())
    assert ours.o.dtype == torch.float64
    assert torch.equal(ours.o, exact.o) and torch.equal(ours.lse, exact.lse)


def test_a_nan_reaches_every_row_that_reads_it():
    q, k, v = inputs(1, 1, 1, 6, 6, 8)
    k[0, 3, 0, 0] = math.nan
    o, lse = reference.attention_forward(q, k, v, causal=True)
    assert o[0, :3].isfinite().all() and o[0, 3:].isnan().all()
    assert lse[0, 0, :3].isfinite().all() and lse[0, 0, 3:].isnan().all()
