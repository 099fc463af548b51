"""The FP8 kernels on a Hopper GPU against fp64 attention of what their inputs stand for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a GPU of compute capability 9.0", allow_module_level=True)

from fasim.kernels import reference  # noqa: E402
from fasim.kernels.cuda.fp8 import keyed_launch  # noqa: E402
from fasim.kernels.cuda.fp8.config import APPROXIMATE, QUERY_ROWS  # noqa: E402
from fasim.kernels.cuda.fp8.launch import forward  # noqa: E402
from fasim.kernels.fp8 import emulate  # noqa: E402
from fasim.kernels.fp8.keyed import as_rows_of_keys  # noqa: E402
from fasim.kernels.fp8.operator import flash_attn_fp8, kv_rows  # noqa: E402
from fasim.kernels.fp8.quantise import Part, quantise, quantise_blocks  # noqa: E402

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


def in_blocks(seqlen_q=300, seqlen_k=777, heads=4, kv_heads=2, head_dim=128, two_level=0, spread=3.0):
    """q, k, v as quantised by the kernel's own blocks, whose sizes differ by up to e^(2 spread)."""
    generator = torch.Generator("cuda").manual_seed(5)

    def draw(seqlen, heads, rows):
        x = torch.randn(2, seqlen, heads, head_dim, device="cuda", generator=generator)
        blocks = torch.rand(2, -(-seqlen // rows), heads, device="cuda", generator=generator) * 2 - 1
        return quantise((x * (spread * blocks).exp().repeat_interleave(rows, 1)[:, :seqlen, :, None]).half(), rows)

    own = kv_rows(head_dim, seqlen_k, two_level)
    return draw(seqlen_q, heads, QUERY_ROWS), draw(seqlen_k, kv_heads, own), draw(seqlen_k, kv_heads, own)


def with_descales(q, k, v, **more):
    return forward(q.values, k.values, v.values, q.descale, k.descale, v.descale, block_scales=True, **more)


def check_blocks(q, k, v, causal=False, two_level=0, error=WEIGHT_ERROR):
    scale = 0.05 / math.sqrt(q.values.shape[3])  # the largest blocks' scores would leave one key a row
    o, lse = with_descales(q, k, v, softmax_scale=scale, causal=causal, dtype=torch.float16, two_level=two_level)
    again = with_descales(q, k, v, softmax_scale=scale, causal=causal, dtype=torch.float16, two_level=two_level)
    assert torch.equal(again[0], o) and torch.equal(again[1], lse)
    expected = emulate.exact(q, k, v, scale, causal)
    seen = ~torch.isinf(expected.lse)
    assert not o.transpose(1, 2)[~seen].any()
    assert (o.double() - expected.o).norm() <= error * expected.o.norm()
    if seen.any():
        top = max(1.0, float(expected.lse[seen].abs().max()))
        assert float((lse.double() - expected.lse)[seen].abs().max()) <= SCORE_BITS * top


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(300, 777), (1000, 130), (1, 5), (129, 4097), (700, 9000)])
def test_a_descale_of_a_block_is_that_blocks(head_dim, causal, lengths):
    check_blocks(*in_blocks(*lengths, head_dim=head_dim), causal=causal)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("two_level", [1, 2, 5, 1000])
def test_two_levels_with_descales_of_blocks_or_of_heads(head_dim, causal, two_level):
    for lengths in ((300, 777), (130, 100), (200, 3001)):
        check_blocks(*in_blocks(*lengths, head_dim=head_dim, two_level=two_level), causal=causal, two_level=two_level)
    q, k, v = inputs(seqlen_q=333, seqlen_k=1500, head_dim=head_dim)
    o, lse = forward(q, k, v, causal=causal, two_level=two_level)
    expected = reference.attention_forward(q, k, v, causal=causal)
    assert (o.double() - expected.o).norm() <= WEIGHT_ERROR * expected.o.norm()
    assert float((lse.double() - expected.lse).abs().max()) <= SCORE_BITS * float(expected.lse.abs().max())


def test_two_levels_take_the_drift_out_of_long_rows():
    """V around 1: what 14 bits cut off adds up, the more the longer the row."""
    q, k = random(1, 128, 2, 128, seed=1), random(1, 1 << 16, 2, 128, seed=2)
    v = (1 + 0.1 * random(1, 1 << 16, 2, 128, seed=3).float()).to(E4M3)
    exact = reference.attention_forward(q, k, v).o
    drift = [float((forward(q, k, v, dtype=torch.float16, two_level=n)[0].double() - exact).mean()) for n in (0, 4)]
    assert drift[0] < -3 * abs(drift[1]), drift


@pytest.mark.parametrize(("head_dim", "approximate"), [(64, False), (128, False), (256, False), (64, True), (128, True)])
@pytest.mark.parametrize("block_scales", [False, True])
def test_the_kernel_does_what_the_emulation_says(head_dim, approximate, block_scales):
    """Where both round alike they agree far better than either with fp64; the exponentials differ in their last bits."""
    if block_scales:
        q, k, v = in_blocks(130, 1500, 2, 2, head_dim, spread=0.3)
    else:
        q, k, v = (quantise(x.half(), None) for x in inputs(1, 130, 1500, 2, 2, head_dim))
    given = (q.values, k.values, v.values, q.descale, k.descale, v.descale)
    o, lse = forward(*given, dtype=torch.float16, block_scales=block_scales, approximate=approximate)
    how = replace(emulate.OURS, block=kv_rows(head_dim, 1500), line_keys=APPROXIMATE[head_dim] if approximate else 0)
    expected, exact = emulate.attention(q, k, v, arithmetic=how), emulate.exact(q, k, v)
    assert (o.double() - expected.o).norm() <= 0.2 * (o.double() - exact.o).norm()
    assert float((lse - expected.lse).abs().max()) <= 2e-5 * float(exact.lse.abs().max())


def test_blocks_of_zeros_and_descales_of_zero():
    q, k, v = in_blocks(200, 1000, spread=0.0)
    rows = slice(kv_rows(128, 1000), 2 * kv_rows(128, 1000))
    wide = [x.says().half() for x in (k, v)]
    for x in wide:
        x[:, rows] = 0
    k, v = (quantise(x, k.block, powers=x is wide[1]) for x in wide)  # or all of a block's weights are rounded alike
    check_blocks(q, k, v)
    nothing = v._replace(descale=torch.zeros_like(v.descale))
    assert float(with_descales(q, k, nothing)[0].abs().max()) < 1e-20
    o, lse = with_descales(q._replace(descale=torch.zeros_like(q.descale)), k, v)
    mean = v.says().mean(1, keepdim=True).repeat_interleave(2, 2).expand_as(o)
    assert (o.double() - mean).norm() <= 0.02 * mean.norm()
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(1000)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("choice", [{}, {"block_scales": False}, {"hadamard": False}, {"two_level": 4}, {"causal": True}], ids=str)
def test_16_bit_tensors_are_quantised_on_the_way(choice):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 128, device="cuda", generator=generator).half() for n, h in ((300, 4), (500, 2), (500, 2)))
    o, lse = flash_attn_fp8(q, k, v, **choice, return_lse=True)
    exact = reference.attention_forward(q, k, v, causal=choice.get("causal", False))
    assert o.dtype == torch.float16 and (o.double() - exact.o).norm() <= 0.07 * exact.o.norm()
    assert float((lse - exact.lse).abs().max()) < 0.3


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(300, 777), (129, 513), (1000, 1000), (64, 16), (2048, 4100)])
def test_v_as_rows_of_keys_changes_no_bit_but_at_128_where_a_second_block_gives_the_maximum(head_dim, causal, lengths):
    """From the values that the transposing kernel takes, and from those that one launch writes across."""
    q, k, v = in_blocks(*lengths, head_dim=head_dim, spread=0.3)
    given = q.descale, k.descale, v.descale
    for approximate in (False, True) if head_dim in APPROXIMATE else (False,):
        wanted = with_descales(q, k, v, causal=causal, approximate=approximate)
        way = {"causal": causal, "approximate": approximate}
        got = keyed_launch.forward(q.values, k.values, as_rows_of_keys(v.values), *given, block_scales=True, **way)
        if head_dim != 128:
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        else:
            exact = emulate.exact(q, k, v, None, causal)
            errors = [float((o.double() - exact.o).norm() / exact.o.norm()) for o, _ in (got, wanted)]
            assert errors[0] <= 1.05 * errors[1] + 1e-3, errors
            assert float((got[1] - wanted[1]).nan_to_num(0.0).abs().max()) < 0.05
        heads = forward(q.values, k.values, v.values, **way)
        rows = keyed_launch.forward(q.values, k.values, as_rows_of_keys(v.values), **way)
        assert all(
            float((a - b).float().nan_to_num(0.0).norm()) <= 0.03 * float(b.float().nan_to_num(0.0, 0.0, 0.0).norm())
            for a, b in zip(rows, heads, strict=True)
        )
    wide = v.says().half()
    plain, across = (quantise_blocks([Part(wide, v.block, powers=True, keyed=keyed)])[0] for keyed in (False, True))
    assert torch.equal(across.values.view(torch.uint8), as_rows_of_keys(plain.values).view(torch.uint8))
    assert torch.equal(across.descale, plain.descale)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_rung_below_fa3_gives_the_oracle(head_dim):
    q, k, v = inputs(head_dim=head_dim, seqlen_q=700, seqlen_k=1500)
    for causal in (False, True):
        o, lse = forward(q, k, v, causal=causal, schedule="overlap-2stage")
        expected = reference.attention_forward(q, k, v, causal=causal)
        assert (o.double() - expected.o).norm() <= WEIGHT_ERROR * expected.o.norm()
        assert float((lse.double() - expected.lse).abs().max()) <= SCORE_BITS * float(expected.lse.abs().max())


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
