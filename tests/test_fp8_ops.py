"""FP8 through PyTorch: flash_attn_func of e4m3 tensors in the peers' convention, flash_attn_fp8 of 16-bit ones, on the CPU."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from torch.autograd import forward_ad  # noqa: E402

from fasim.kernels import reference  # noqa: E402
from fasim.kernels.fp8 import emulate  # noqa: E402
from fasim.kernels.fp8.operator import attention_e4m3, kv_rows, quantise_blocks_e4m3, quantise_e4m3  # noqa: E402
from fasim.kernels.fp8.plain import Quantised  # noqa: E402
from fasim.kernels.ops import flash_attn_fp8, flash_attn_func  # noqa: E402
from fasim.simulator.errors import UsageError  # noqa: E402

E4M3 = torch.float8_e4m3fn


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Several threads would spend their time on waiting for each other: what is emulated are many small operations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def halves(seqlen_q=40, seqlen_k=50, heads=4, kv_heads=2, head_dim=64, dtype=torch.float16):
    generator = torch.Generator().manual_seed(0)
    shapes = ((seqlen_q, heads), (seqlen_k, kv_heads), (seqlen_k, kv_heads))
    return tuple(torch.randn(2, n, h, head_dim, generator=generator).to(dtype) for n, h in shapes)


def bytes_(**sizes):
    return tuple(x.to(E4M3) for x in halves(**sizes))


def descales(seed=0, kv_heads=2):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(2, kv_heads, generator=generator) + 0.5 for _ in range(3))


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("causal", [False, True])
def test_e4m3_tensors_and_descales_give_attention_of_what_they_say(causal):
    q, k, v = bytes_()
    d = descales()
    o, lse = flash_attn_func(q, k, v, 0.2, causal, q_descale=d[0], k_descale=d[1], v_descale=d[2], return_lse=True)
    exact = emulate.exact(*map(Quantised, (q, k, v), d), softmax_scale=0.2, causal=causal)
    assert o.dtype == torch.bfloat16 and o.shape == q.shape and lse.dtype == torch.float32
    assert relative(o, exact.o) < 0.03
    torch.testing.assert_close(lse.double(), exact.lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("which", range(3))
def test_each_descale_counts_and_none_is_one(which):
    q, k, v = bytes_()
    ones = [None] * 3
    plain = flash_attn_func(q, k, v)
    ones[which] = torch.ones(2, 2)
    names = ("q_descale", "k_descale", "v_descale")
    assert torch.equal(flash_attn_func(q, k, v, **dict(zip(names, ones, strict=True))), plain)
    ones[which] = 2 * torch.ones(2, 2)
    assert relative(flash_attn_func(q, k, v, **dict(zip(names, ones, strict=True))), plain.double()) > 0.2


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"hadamard": False},
        {"block_scales": False},
        {"two_level": 1},
        {"approximate": True},
        {"causal": True},
        {"softmax_scale": 0.3},
        {"seed": 5},
    ],
    ids=str,
)
def test_16_bit_tensors_are_quantised_on_the_way(choice):
    dtype = torch.bfloat16 if "seed" in choice else torch.float16
    q, k, v = halves(dtype=dtype)
    o, lse = flash_attn_fp8(q, k, v, **choice, return_lse=True)
    exact = reference.attention_forward(q, k, v, choice.get("softmax_scale"), choice.get("causal", False))
    assert o.dtype == dtype and relative(o, exact.o) < 0.07
    assert float((lse - exact.lse).abs().max()) < 0.3
    assert torch.equal(flash_attn_fp8(q, k, v, **choice), o)


def test_block_scales_and_hadamard_help_where_there_are_outliers():
    poor = better = 0.0
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)

        def outliers(x, generator=generator):
            rare = torch.rand(x.shape, generator=generator) < 1e-3
            return (x + 10 * torch.randn(x.shape, generator=generator) * rare).half()

        q, k, v = map(outliers, halves(seqlen_q=128, seqlen_k=256, heads=1, kv_heads=1, head_dim=128))
        exact = reference.attention_forward(q, k, v).o
        poor += relative(flash_attn_fp8(q, k, v, hadamard=False, block_scales=False), exact)
        better += relative(flash_attn_fp8(q, k, v), exact)
    assert better < 0.9 * poor


def test_the_block_of_a_descale_is_the_kernels_own():
    assert (kv_rows(64, 4096), kv_rows(128, 1024), kv_rows(128, 1025), kv_rows(256, 4096)) == (128, 128, 192, 96)


def test_rows_without_keys_and_empty_problems():
    q, k, v = bytes_(seqlen_q=40, seqlen_k=10)
    o, lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
    assert not o[:, :30].any() and bool((lse[:, :, :30] == -math.inf).all())
    q, k, v = bytes_(seqlen_k=0)
    assert not flash_attn_func(q, k, v).any()
    assert flash_attn_fp8(*halves(seqlen_q=0)).shape == (2, 0, 4, 64)
    assert flash_attn_fp8(*halves(heads=0, kv_heads=0)).shape == (2, 40, 0, 64)
    assert flash_attn_fp8(*(x[:0] for x in halves())).shape == (0, 40, 4, 64)
    assert not flash_attn_fp8(*halves(seqlen_k=0)).any()


def test_v_as_rows_of_keys_is_the_same_attention_and_another_layout_is_refused():
    q, k, v = halves(seqlen_k=70)
    own = kv_rows(64, 70)
    q8, qs, k8, ks, v8, vs = quantise_blocks_e4m3(q, k, v, 64, own)
    across = quantise_blocks_e4m3(q, k, v, 64, own, keyed=True)[4]
    wanted = attention_e4m3(q8, k8, v8, qs, ks, vs, 0.125, True, q_block=64, kv_block=own)
    got = attention_e4m3(q8, k8, across, qs, ks, vs, 0.125, True, q_block=64, kv_block=own, keyed=True)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    with pytest.raises(UsageError, match="as rows of keys it must be contiguous"):
        attention_e4m3(q8, k8, v8, qs, ks, vs, 0.125, q_block=64, kv_block=own, keyed=True)
    with pytest.raises(UsageError, match="no kernel with two_level"):
        attention_e4m3(q8, k8, across, qs, ks, vs, 0.125, q_block=64, kv_block=own, two_level=4, keyed=True)
    plain, got = (
        attention_e4m3(q8, k8, v8, None, None, None, 0.125),
        attention_e4m3(q8, k8, across, None, None, None, 0.125, keyed=True),
    )
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


REFUSED = {
    "k is torch.float16 and FP8 attention takes": lambda q, k, v, d: flash_attn_func(q, k.half(), v),
    "q is torch.float16 and FP8 attention takes": lambda q, k, v, d: flash_attn_func(*halves(), k_descale=d),
    r"q_descale must be fp32 of \(B, H_kv\) = \(2, 2\) on cpu, and is torch.float32 of \(2, 4\)": (
        lambda q, k, v, d: flash_attn_func(q, k, v, q_descale=torch.ones(2, 4))
    ),
    "v_descale must be fp32": lambda q, k, v, d: flash_attn_func(q, k, v, v_descale=d.double()),
    "on cpu, and is torch.float32 of .* on meta": lambda q, k, v, d: flash_attn_func(q, k, v, k_descale=d.to("meta")),
    "k_descale is a float; it must be an fp32 tensor": lambda q, k, v, d: flash_attn_func(q, k, v, k_descale=2.0),
    "schedule='fa2' has no FP8 kernel": lambda q, k, v, d: flash_attn_func(q, k, v, schedule="fa2"),
    "softmax_scale=-1.0 is not above 0": lambda q, k, v, d: flash_attn_func(q, k, v, -1.0),
    "softmax_scale=0.0 is not above 0": lambda q, k, v, d: flash_attn_fp8(*halves(), softmax_scale=0.0),
    "must be equal": lambda q, k, v, d: flash_attn_func(q, k, v[:, :5]),
    "head_dim=80": lambda q, k, v, d: flash_attn_func(*bytes_(head_dim=80)),
    "head_dim=80 is not supported by 'fa3 in FP8'": lambda q, k, v, d: flash_attn_fp8(*halves(head_dim=80)),
    "two_level=0 is not possible": lambda q, k, v, d: flash_attn_fp8(*halves(), two_level=0),
    "two_level=True is not possible": lambda q, k, v, d: flash_attn_fp8(*halves(), two_level=True),
    "q is torch.float8_e4m3fn; the kernels take float16": lambda q, k, v, d: flash_attn_fp8(q, k, v),
    "forward only": lambda q, k, v, d: flash_attn_func(q.clone().requires_grad_(), k, v),
    "forward only: call it under": lambda q, k, v, d: flash_attn_func(q, k, v, v_descale=d.clone().requires_grad_()),
    "is forward only": lambda q, k, v, d: flash_attn_fp8(halves()[0].requires_grad_(), *halves()[1:]),
    "no forward-mode derivative": lambda q, k, v, d: with_tangent(q, k, v, d),
}


def with_tangent(q, k, v, d):
    with forward_ad.dual_level():
        return flash_attn_func(q, k, v, q_descale=forward_ad.make_dual(d, torch.ones_like(d)))


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_supported_is_said_in_one_sentence(message):
    with pytest.raises(UsageError, match=message) as caught:
        REFUSED[message](*bytes_(), descales()[0])
    assert "\n" not in str(caught.value)


def test_without_gradients_leaves_may_be_given():
    q, k, v = halves()
    with torch.no_grad():
        assert not flash_attn_fp8(q.requires_grad_(), k, v).requires_grad


def test_opcheck_of_the_operators():
    torch.library.opcheck(quantise_e4m3, (halves()[0], 32, 1, True, 0), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(quantise_e4m3, (halves()[0], 0, 2), test_utils="test_faketensor")
    for keyed in (False, True):
        given = (*halves(), 16, 32, True, 0, keyed)
        torch.library.opcheck(quantise_blocks_e4m3, given, test_utils=("test_schema", "test_faketensor"))
    q, k, v = bytes_(seqlen_q=5, seqlen_k=6)
    d = descales()[0]
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # PyTorch cannot compare e4m3 inputs
    torch.library.opcheck(attention_e4m3, (q, k, v, d, None, d, 0.125, True), test_utils=utils)


def test_torch_compile_traces_both_as_a_whole_graph():
    torch._dynamo.reset()
    q, k, v = halves(seqlen_q=20, seqlen_k=20)

    def both(q, k, v, d):
        o = flash_attn_fp8(q * 2, k, v, causal=True) + 1
        return o, flash_attn_func(q.to(E4M3), k.to(E4M3), v.to(E4M3), k_descale=d)

    d = descales()[0]
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(q, k, v, d)
    assert all(torch.equal(a, b) for a, b in zip(compiled, both(q, k, v, d), strict=True))


def test_on_meta_tensors_only_shapes_are_asked():
    q, k, v = (x.to("meta") for x in halves())
    o = flash_attn_fp8(q, k, v)
    assert o.device.type == "meta" and o.shape == q.shape and o.dtype == q.dtype
