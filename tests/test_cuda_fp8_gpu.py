"""The FP8 kernels on a Hopper GPU against fp64 attention of what their inputs stand for."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a GPU of compute capability 9.0", allow_module_level=True)

from fasim.kernels import reference  # noqa: E402
from fasim.kernels.cuda.fp8.launch import forward  # noqa: E402

E4M3 = torch.float8_e4m3fn
WEIGHT_ERROR = 0.04
"""Bound on O's relative error: weights are rounded to three bits, at most 2^-4 each, 0.027 in the mean."""
SCORE_BITS = 2**-9
"""Bound on LSE's error, of the largest score: Hopper adds e4m3 products with some 14 bits."""


LENGTHS = [(1, 1), (63, 63), (64, 64), (127, 129), (192, 193), (1, 1000), (1000, 1), (300, 77), (129, 4097)]


def random(*shape, scale=1.0, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, device="cuda", generator=generator) * scale).to(E4M3)


def inputs(batch=2, seqlen_q=300, seqlen_k=333, heads=4, kv_heads=2, head_dim=128, scale=1.0):
    shapes = ((seqlen_q, heads), (seqlen_k, kv_heads), (seqlen_k, kv_heads))
    scales = (scale, scale, 1.0)
    return tuple(random(batch, n, h, head_dim, scale=s, seed=i) for i, ((n, h), s) in enumerate(zip(shapes, scales, strict=True)))


def scaled(x, descale, heads):
    return x.double() * descale.double().repeat_interleave(heads // descale.shape[1], 1)[:, None, :, None]


def check(q, k, v, causal=False, descales=None, dtype=torch.bfloat16):
    """O and LSE within the bounds, dead rows exact, four launches bitwise equal."""
    given = dict(zip(("q_descale", "k_descale", "v_descale"), descales or (None,) * 3, strict=True))
    o, lse = forward(q, k, v, causal=causal, dtype=dtype, **given)
    for _ in range(3):
        again = forward(q, k, v, causal=causal, dtype=dtype, **given)
        assert torch.equal(again[0], o) and torch.equal(again[1], lse)
    if descales:
        q, k, v = (scaled(x, d, x.shape[2]) for x, d in zip((q, k, v), descales, strict=True))
    expected = reference.attention_forward(q, k, v, causal=causal)
    dead = torch.isinf(expected.lse)
    assert bool((lse[dead] == -math.inf).all()) and not o.transpose(1, 2)[dead].any()
    assert (o.double() - expected.o).norm() <= WEIGHT_ERROR * expected.o.norm()
    if not dead.all():
        top = max(1.0, float(expected.lse[~dead].abs().max()))
        assert float((lse.double() - expected.lse)[~dead].abs().max()) <= SCORE_BITS * top


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_variant_gives_the_oracle(head_dim, causal, dtype):
    check(*inputs(head_dim=head_dim), causal=causal, dtype=dtype)
    check(*inputs(head_dim=head_dim, seqlen_q=1500, seqlen_k=3001), causal=causal, dtype=dtype)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_ragged_lengths_and_rows_without_keys(head_dim, causal, lengths):
    seqlen_q, seqlen_k = lengths
    check(*inputs(head_dim=head_dim, seqlen_q=seqlen_q, seqlen_k=seqlen_k), causal=causal)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("heads", [(2, 2), (8, 2), (8, 1)])
def test_descales_are_those_of_the_batch_entry_and_kv_head(head_dim, heads):
    q, k, v = inputs(heads=heads[0], kv_heads=heads[1], head_dim=head_dim)
    generator = torch.Generator("cuda").manual_seed(9)
    descales = [torch.rand(2, heads[1], device="cuda", generator=generator) + 0.5 for _ in range(3)]
    check(q, k, v, causal=True, descales=descales)
    check(q, k, v, descales=[d.T.contiguous().T for d in descales])  # any strides


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_maxima_that_grow_from_block_to_block_rescale_what_was_summed(head_dim, causal):
    q, k, v = inputs(seqlen_q=2000, seqlen_k=2000, head_dim=head_dim)
    growth = torch.arange(2000, 0, -1, device="cuda") / 2000 * 6  # blocks are walked from the last to the first
    check(q, (k.float() * growth[None, :, None, None]).clamp(-448, 448).to(E4M3), v, causal=causal)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_large_scores_and_equal_keys(head_dim):
    check(*inputs(seqlen_q=1000, seqlen_k=1000, head_dim=head_dim, scale=4.0))
    q, k, v = inputs(seqlen_q=700, seqlen_k=700, head_dim=head_dim)
    check(q, k[:, :1].expand_as(k).contiguous(), v)
    check(q, k[:, :1].expand_as(k), v)  # rows of stride 0


def test_a_scale_of_zero_weighs_all_keys_alike():
    q, k, v = inputs()
    zero = torch.zeros(2, 2, device="cuda")
    o, lse = forward(q, k, v, q_descale=zero)
    mean = v.double().mean(1, keepdim=True).repeat_interleave(2, 2).expand_as(o)
    assert (o.double() - mean).norm() <= 0.01 * mean.norm()
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(333)), rtol=0, atol=1e-4)


def with_nan(x, *at):
    wide = x.float()
    wide[at] = math.nan
    return wide.to(E4M3)


def test_nan_stays_where_it_is_seen():
    q, k, v = inputs(seqlen_q=400, seqlen_k=400, kv_heads=4)
    o, lse = forward(with_nan(q, 0, 7, 1, 3), k, v)
    assert o[0, 7, 1].isnan().all() and lse[0, 1, 7].isnan()
    assert int(o.isnan().sum()) == o.shape[-1] and int(lse.isnan().sum()) == 1
    q, k, v = inputs(seqlen_q=400, seqlen_k=400, kv_heads=4)
    o, lse = forward(q, with_nan(k, 1, 200, 2, 5), v, causal=True)
    assert o[1, 200:, 2].isnan().all() and not o[1, :200, 2].isnan().any() and not o[0].isnan().any()


LAYOUTS = {
    "heads before rows": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "packed": lambda x: torch.stack((x, x, x), 2)[:, :, 1],
    "head dim strided": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "base off 16 bytes": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_streams_change_nothing(layout):
    tensors = inputs()
    expected = forward(*tensors, causal=True)
    side = torch.cuda.Stream()
    moved = [LAYOUTS[layout](x.view(torch.uint8)).view(E4M3) for x in tensors]
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        got = forward(*moved, causal=True)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (2, 0, 8, 8), (2, 4, 0, 8), (2, 4, 8, 0)])
def test_nothing_to_compute(shape):
    batch, heads, seqlen_q, seqlen_k = shape
    q, k = (torch.zeros(batch, n, heads, 64, device="cuda").to(E4M3) for n in (seqlen_q, seqlen_k))
    o, lse = forward(q, k, k)
    assert o.shape == q.shape and not o.any()
    assert lse.shape == (batch, heads, seqlen_q) and bool((lse == -math.inf).all())
