"""The FP8 quantiser: plain torch equals exact arithmetic, the fused kernel equals plain torch bit for bit."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("triton_env", Path(__file__).with_name("triton_env.py"))
env = sys.modules.setdefault("triton_env", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(env)

import torch  # noqa: E402

from fasim.kernels.fp8 import fused, plain  # noqa: E402
from fasim.kernels.fp8.quantise import quantise  # noqa: E402
from fasim.kernels.fp8.rotation import rotate, signs  # noqa: E402
from fasim.simulator.errors import UsageError  # noqa: E402

GRID = sorted(float(x) for x in torch.arange(127, dtype=torch.uint8).view(plain.E4M3).double())
"""Every e4m3 number from 0 to 448."""


def normal(*shape, dtype=torch.float16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def extreme(dtype=torch.bfloat16):
    """Heads of normal, NaN, infinite, huge, denormal and zero elements, 48 rows."""
    x = normal(2, 48, 6, 64, dtype=dtype)
    x[0, 3, 1, 2], x[1, 40, 1, 0] = float("nan"), float("inf")
    x[0, 40:, 1] = -float("inf")
    x[:, :, 2] *= torch.finfo(dtype).max / 8
    x[:, :, 3] *= torch.finfo(dtype).smallest_normal / 16
    x[0, :, 4] = 0.0
    x[1, 32:, 4] = -0.0
    x[:, :, 5, ::7] *= 100
    return x


def test_e4m3_ends_at_448_and_starts_at_2_to_the_minus_9():
    assert GRID[-1] == plain.LARGEST and GRID[1] == 2.0**-9 and len(GRID) == 127


@pytest.mark.parametrize("block", [16, 48, None])
def test_a_value_is_the_nearest_e4m3_number_and_a_descale_the_largest_over_448(block):
    """In exact arithmetic, from the fp32 descale; what lies within fp32's rounding of the middle between two may be either."""
    x = normal(2, 50, 2, 64) * 3
    found = plain.quantise(x, block)
    rows = block or 50
    middles = torch.tensor(GRID, dtype=torch.float64)
    for b in range(2):
        for h in range(2):
            for at in range(-(-50 // rows)):
                part = x[b, at * rows : (at + 1) * rows, h].double()
                descale = (found.descale[b, h, at] if block else found.descale[b, h]).double()
                assert descale == (part.abs().max() / 448).float().double()
                exact = part / descale
                got = found.values[b, at * rows : (at + 1) * rows, h].double()
                nearest = (exact.abs()[..., None] - middles).abs().amin(-1)
                assert torch.all((got - exact).abs() <= nearest + 1e-6 * exact.abs())


def test_powers_are_the_next_power_of_two():
    found, exact = (plain.quantise(extreme(), 16, powers=powers).descale for powers in (True, False))
    assert torch.equal(found.log2(), exact.double().log2().ceil().float()) and torch.all((found >= exact) & (found < 2 * exact))


def test_ties_go_to_even():
    for below, above in itertools.pairwise(GRID):
        x = torch.tensor([448.0, (below + above) / 2]).expand(1, 1, 1, 2)
        low, high = (torch.tensor(v).to(plain.E4M3).view(torch.uint8) for v in (below, above))
        even = below if int(low) % 2 == 0 else above
        assert int(low) + 1 == int(high) and float(plain.quantise(x).values[0, 0, 0, 1]) == even


KINDS = {
    "a block of 32": {"block": 32},
    "a block of 48, no power of two": {"block": 48},
    "one scale a head": {"block": None},
    "one scale a group of three heads": {"block": None, "group": 3},
    "one scale": {"block": None, "per": "tensor"},
    "rotated": {"block": 32, "hadamard": True},
    "powers of two": {"block": 32, "powers": True},
    "powers of two, one scale a head": {"block": None, "powers": True},
    "rotated, one scale a group": {"block": None, "group": 2, "hadamard": True},
}


def same(got, wanted):
    assert torch.equal(got.descale, wanted.descale) and got.values.shape == wanted.values.shape and got.values.is_contiguous()
    assert torch.equal(got.values.view(torch.uint8), wanted.values.view(torch.uint8))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of sums beyond fp32
@pytest.mark.parametrize(("kind", "dtype"), [*((kind, torch.bfloat16) for kind in KINDS), ("rotated", torch.float16)])
def test_the_fused_kernel_gives_the_bits_of_plain_torch_on_extreme_inputs(kind, dtype):
    x = extreme(dtype).to(env.DEVICE)
    same(fused.quantise(x, **({"block": 32} | KINDS[kind])), plain.quantise(x, **({"block": 32} | KINDS[kind])))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("seqlen", [1, 31, 97])
def test_the_fused_kernel_takes_every_head_dim_and_ragged_lengths(head_dim, seqlen):
    x = normal(1, seqlen, 1, head_dim).to(env.DEVICE)
    same(fused.quantise(x, 32, hadamard=True), plain.quantise(x, 32, hadamard=True))


@pytest.mark.parametrize("lay", ["heads first", "packed", "head dim strided", "every second row", "negated", "a head for all"])
def test_strides_change_nothing(lay):
    x = normal(2, 40, 3, 64).to(env.DEVICE)
    laid = {
        "heads first": lambda: x.transpose(1, 2).contiguous().transpose(1, 2),
        "packed": lambda: torch.stack((x + 1, x, x - 1), 2)[:, :, 1],
        "head dim strided": lambda: x.transpose(2, 3).contiguous().transpose(2, 3),
        "every second row": lambda: x.repeat_interleave(2, 1)[:, ::2],
        "negated": lambda: torch._neg_view(-x),
        "a head for all": lambda: x[:, :, :1].expand_as(x),
    }[lay]()
    wanted = plain.quantise(laid.clone(memory_format=torch.contiguous_format), 16)
    same(quantise(laid, 16), wanted)
    same(fused.quantise(laid, 16), wanted)


@pytest.mark.parametrize("shape", [(0, 8, 2, 64), (2, 0, 2, 64), (2, 8, 0, 64)])
@pytest.mark.parametrize("block", [16, None])
def test_nothing_is_quantised_to_nothing(shape, block):
    x = torch.zeros(shape, dtype=torch.float16, device=env.DEVICE)
    same(fused.quantise(x, block, hadamard=True), plain.quantise(x, block, hadamard=True))


def test_zero_rows_have_the_smallest_descale_and_stay_zero():
    found = plain.quantise(extreme(), 32)
    least = plain.SMALLEST_DESCALE
    assert torch.equal(found.descale[0, 4], torch.full((2,), least)) and not found.values[0, :, 4].double().any()
    assert found.descale[1, 4, 1] == least and found.descale[1, 4, 0] > least


def test_nan_and_infinity_become_nan_where_they_stand_and_move_no_descale():
    x = extreme()
    found = plain.quantise(x, 32)
    values = found.values.double()
    assert torch.equal(values.isnan(), ~x.isfinite())
    clean = torch.where(x.isfinite(), x, 0)
    assert torch.equal(found.descale, plain.quantise(clean, 32).descale)


def test_rotation_spreads_nan_over_its_row_of_its_head_and_no_further():
    x = normal(1, 20, 2, 64)
    x[0, 7, 1, 3] = float("inf")
    values = plain.quantise(x, 8, hadamard=True).values.double()
    assert values[0, 7, 1].isnan().all() and int(values.isnan().sum()) == 64


def test_huge_and_denormal_inputs_keep_three_bits():
    for head in (2, 3):
        x = extreme()[:, :, head : head + 1]
        says, exact = plain.quantise(x, 32).says(), x.double()
        assert (says - exact).norm() <= 0.04 * exact.norm()


def sylvester(length):
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < length:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_rotation_is_the_signs_and_sylvesters_matrix_and_orthogonal(head_dim):
    sign = signs(head_dim)
    matrix = rotate(torch.eye(head_dim), sign).double()
    exact = sign.double()[:, None] * sylvester(head_dim) / head_dim**0.5
    torch.testing.assert_close(matrix, exact, rtol=1e-7, atol=0)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_dim, dtype=torch.float64), rtol=0, atol=1e-6)
    assert 0.3 < (sign > 0).double().mean() < 0.7 and not torch.equal(sign, signs(head_dim, seed=1))


def test_rotation_leaves_q_k_transposed_as_it_was():
    q, k = (normal(1, 33, 2, 128, seed=s).float() for s in (1, 2))
    turned = torch.einsum("bmhd,bnhd->bhmn", *(rotate(x, signs(128)).double() for x in (q, k)))
    torch.testing.assert_close(turned, torch.einsum("bmhd,bnhd->bhmn", q.double(), k.double()), rtol=0, atol=2e-5)


def test_rotation_takes_the_outliers_out_of_the_largest_error_of_a_score():
    """What it is for: the paper's inputs, one scale a head; Q K^T in fp64 of what the values say."""
    q, k = (normal(1, 256, 1, 128, seed=s) for s in (3, 4))
    for x in (q, k):
        x += (10 * normal(*x.shape, seed=9) * (torch.rand(x.shape, generator=torch.Generator().manual_seed(5)) < 0.001)).half()
    exact = torch.einsum("bmhd,bnhd->bhmn", q.double(), k.double())

    def error(hadamard):
        says = (quantise(x, None, hadamard=hadamard).says() for x in (q, k))
        return (torch.einsum("bmhd,bnhd->bhmn", *says) - exact).abs().max()

    assert error(True) < 0.5 * error(False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": torch.zeros(1, 4, 1, 64)}, "float16 or bfloat16"),
        ({"x": [1.0]}, "a list"),
        ({"x": normal(1, 4, 1, 80)}, "head_dim=80"),
        ({"block": 0}, "block=0"),
        ({"block": 1000}, "1 to 256 rows"),
        ({"per": "row"}, "per='row'"),
        ({"group": 2}, "does not divide"),
    ],
)
def test_what_cannot_be_quantised_is_refused_in_one_sentence(given, message):
    with pytest.raises(UsageError, match=message) as refusal:
        quantise(**({"x": normal(1, 4, 1, 64)} | given))
    assert "\n" not in str(refusal.value)
