"""The bit-level model of Hopper's FP8 tensor cores, the microbenchmark that asks for it, and attention in that arithmetic."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import fasim.traces  # noqa: E402
from fasim.kernels.calibrate import fp8_accumulation  # noqa: E402
from fasim.kernels.compile import build  # noqa: E402
from fasim.kernels.fp8 import emulate, plain  # noqa: E402
from fasim.kernels.fp8.emulate import FLASH_ATTENTION_3, OURS  # noqa: E402
from fasim.kernels.fp8.quantise import quantise  # noqa: E402
from fasim.kernels.fp8.tensor_cores import HOPPER, exponent, multiply, power_of_two, truncate  # noqa: E402

E4M3 = plain.E4M3


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Several threads would spend their time on waiting for each other: what is emulated are many small operations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def by_hand(a, b, c, bits, depth):
    """c + sum a b with Python's fractions, one product at a time: the model's definition written a second time."""

    def parts(x, smallest):
        if x == 0:
            return Fraction(0), -252
        power = max(math.frexp(x)[1] - 1, smallest)
        return Fraction(x) / Fraction(2) ** power, power

    total = Fraction(c)
    for start in range(0, len(a), depth):
        terms = [parts(float(total), -126)]
        for x, y in zip(a[start : start + depth], b[start : start + depth], strict=True):
            (s, e), (t, f) = parts(x, -6), parts(y, -6)
            terms.append((s * t, e + f))
        unit = Fraction(2) ** (max(e for _, e in terms) - bits)
        total = sum(math.trunc(s * Fraction(2) ** e / unit) for s, e in terms) * unit
        if total:
            last = Fraction(2) ** (math.frexp(float(total))[1] - 1 - bits)
            total = math.trunc(total / last) * last
    return float(total)


@pytest.mark.parametrize("bits", [13, 10])
@pytest.mark.parametrize("depth", [32, 16])
def test_a_chain_of_instructions_adds_as_written_by_hand(bits, depth):
    how = replace(HOPPER, fraction_bits=bits, depth=depth)
    a, b, c = (x[:4] for x in fp8_accumulation.random_problems(4, 64, seed=bits))
    for problem in range(4):
        got = multiply(a[problem], b[problem], c[problem], how)
        for row, column in ((0, 0), (5, 31), (40, 7), (63, 12)):
            pair = a[problem, row].float().tolist(), b[problem, column].float().tolist()
            assert got[row, column] == by_hand(*pair, float(c[problem, row, column]), bits, depth)


def test_products_of_any_size_stay_within_the_bits_that_are_kept():
    """Against fp64: each of 33 terms loses less than 2^-13 of the largest, and the result less than 2^-13 of itself."""
    a, b, c = fp8_accumulation.random_problems(8, 32)
    for each in zip(a, b, c, strict=True):
        x, y, z = (t.double() for t in each)
        largest = torch.maximum((x[:, None] * y[None]).abs().amax(-1), z.abs())
        assert torch.all((multiply(*each) - (z + x @ y.T)).abs() <= 66 * 2.0**-13 * largest)


def test_nan_makes_nan_and_zeros_make_zero():
    a, b = torch.zeros(2, 32), torch.ones(3, 32)
    a[1, 5] = math.nan
    found = multiply(a.to(E4M3), b.to(E4M3))
    assert not found[0].any() and found[1].isnan().all()


def test_columns_past_the_last_count_as_zeros_and_fp32_adds_as_torch():
    a, b = (torch.randn(5, 40, generator=torch.Generator().manual_seed(s)).to(E4M3) for s in (1, 2))
    padded = (torch.nn.functional.pad(x.float(), (0, 24)) for x in (a, b))
    assert torch.equal(multiply(a, b), multiply(*padded))
    torch.testing.assert_close(multiply(a, b, how=None), a.float() @ b.float().T)


def test_its_pieces_are_exact():
    x = torch.tensor([1.0, -1.5, 3.999, 2.0**-9, 0.0, 448.0, -(2.0**-140)])
    assert exponent(x, -6).tolist() == [0, 0, 1, -6, -252, 8, -6]
    assert power_of_two(torch.tensor([-126, 0, 127])).tolist() == [2.0**-126, 1.0, 2.0**127]
    assert truncate(torch.tensor([1 + 2.0**-13 + 2.0**-14, -(1 + 2.0**-14)]), 13).tolist() == [1 + 2.0**-13, -1.0]


def tensor_cores(how):
    return lambda a, b, c: torch.stack([multiply(*each, how) for each in zip(a, b, c, strict=True)])


@pytest.mark.parametrize(("bits", "depth"), [(13, 32), (10, 32), (13, 16)])
def test_the_microbenchmark_finds_out_what_it_is_asked_of(bits, depth):
    found = fp8_accumulation.conclude(tensor_cores(replace(HOPPER, fraction_bits=bits, depth=depth)))
    assert found["fraction_bits_of_products"] == found["fraction_bits_of_the_accumulator"] == bits
    assert found["fraction_bits_beside_the_accumulator"] == bits
    assert found["truncates"] and found["cuts_each_product"] and found["product_exponent_is_the_sum_of_its_factors"]
    assert found["adds_all_at_once"] == (depth == 32)


def test_the_microbenchmark_tells_fp32_from_tensor_cores():
    """Added in fp64 and rounded once: nothing is cut off."""
    found = fp8_accumulation.conclude(lambda a, b, c: (c.double() + a.double() @ b.double().transpose(1, 2)).float())
    assert not found["truncates"] and not found["cuts_each_product"] and found["fraction_bits_of_products"] == 23


def test_the_microbenchmark_counts_the_answers_that_are_not_the_models():
    assert fp8_accumulation.compare(tensor_cores(HOPPER))["other_bits"] == 0
    assert fp8_accumulation.compare(tensor_cores(replace(HOPPER, fraction_bits=14)))["other_bits"] > 1000


def test_an_h200_answers_as_the_model_bit_by_bit():
    """The recorded run: 131,072 sums of random bytes, and the questions whose answers tell hypotheses apart."""
    path = Path(fasim.traces.__file__).parent / "recorded" / "calibration" / "fp8_accumulation.json"
    recorded = json.loads(path.read_text())["results"]
    assert recorded["model"]["answers"] >= 1 << 17 and recorded["model"]["other_bits"] == 0
    mine = fp8_accumulation.conclude(tensor_cores(HOPPER))
    assert {name: recorded[name] for name in mine} == mine


@pytest.mark.skipif(build.compiler_version() is None, reason="NVRTC is not installed")
def test_the_microbenchmark_compiles_without_spills_or_remarks():
    report = build.build(build.Source("microbenchmark.cu", fp8_accumulation.source(), fast_math=True)).report
    assert (report.spill_bytes, report.stack_bytes, report.remarks) == (0, 0, ())


# -- attention in that arithmetic -----------------------------------------------------------------------------------------


def normal(batch, seqlen, heads, head_dim=64, seed=0):
    return torch.randn(batch, seqlen, heads, head_dim, generator=torch.Generator().manual_seed(seed)).half()


def inputs(seqlen_q=150, seqlen_k=170, heads=4, kv_heads=2, block=None):
    q, k, v = (normal(1, n, h, seed=s) for s, (n, h) in enumerate(((seqlen_q, heads), (seqlen_k, kv_heads), (seqlen_k, kv_heads))))
    return quantise(q, block, group=1 if block else heads // kv_heads), quantise(k, block), quantise(v, block)


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("arithmetic", [OURS, FLASH_ATTENTION_3, replace(OURS, two_level=1), replace(OURS, block=32, two_level=2)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [None, 32])
def test_fp8_attention_is_as_near_to_fp64_as_three_bits_of_p_allow(arithmetic, causal, block):
    q, k, v = inputs(block=block)
    found, exact = (
        f(q, k, v, causal=causal) for f in (lambda *a, **k: emulate.attention(*a, **k, arithmetic=arithmetic), emulate.exact)
    )
    assert 0.005 < relative(found.o, exact.o) < 0.03
    assert float((found.lse - exact.lse).abs().max()) < 1e-3


def test_lines_between_powers_of_two_are_within_4_percent_and_even_out():
    x = torch.arange(-118.0, 9.0, 1 / 512)
    error = emulate.on_lines(x).double() / x.double().exp2() - 1
    assert -0.0392 < float(error.min()) < -0.038 and 0.02 < float(error.max()) < 0.0212 and abs(float(error.mean())) < 1e-3
    assert bool((emulate.on_lines(torch.tensor([-119.5, -1e30, -math.inf])) < 2e-36).all())
    assert bool(emulate.on_lines(torch.tensor([9.001, 1e30, math.inf, math.nan])).isnan().all())


@pytest.mark.parametrize("block", [None, 32])
def test_half_of_the_exponentials_on_lines_cost_a_tenth_of_ps_error(block):
    q, k, v = inputs(block=block)
    exact = emulate.exact(q, k, v)
    plain, lines = (emulate.attention(q, k, v, arithmetic=replace(OURS, block=32, line_keys=each)) for each in (0, 8))
    assert relative(plain.o, exact.o) < relative(lines.o, exact.o) < 1.2 * relative(plain.o, exact.o)
    assert 1e-3 < float((lines.lse - exact.lse).abs().max()) < 0.02


def test_with_exact_sums_only_p_is_rounded():
    q, k, v = inputs()
    fine = replace(FLASH_ATTENTION_3, accumulation=None)
    exact = emulate.exact(q, k, v)
    assert float((emulate.attention(q, k, v, arithmetic=fine).lse - exact.lse).abs().max()) < 5e-6
    coarse = replace(HOPPER, fraction_bits=7)
    worse = relative(emulate.attention(q, k, v, arithmetic=replace(fine, accumulation=coarse)).o, exact.o)
    assert worse > 1.5 * relative(emulate.attention(q, k, v, arithmetic=fine).o, exact.o)


def test_two_levels_take_the_drift_out_of_long_rows():
    """V around 1: O's sum grows and what 14 bits cut off adds up, the more the longer the row."""
    q, k = quantise(normal(1, 16, 1, seed=1), None), quantise(normal(1, 4096, 1, seed=2), None)
    v = quantise(1 + 0.1 * normal(1, 4096, 1, seed=3), None)
    exact = emulate.exact(q, k, v).o
    one, two = (emulate.attention(q, k, v, arithmetic=replace(OURS, two_level=n)).o.double() - exact for n in (None, 4))
    assert float(one.mean()) < -2 * abs(float(two.mean()))


def test_rows_without_keys_and_empty_problems_are_zero():
    q, k, v = inputs(seqlen_q=40, seqlen_k=10)
    found = emulate.attention(q, k, v, causal=True)
    assert (
        not found.o[:, :30].any()
        and bool((found.lse[:, :, :30] == -math.inf).all())
        and bool(found.lse[:, :, 30:].isfinite().all())
    )
    assert not emulate.attention(*inputs(seqlen_k=0)).o.any()


def test_nan_in_a_row_stays_in_that_row():
    q, k, v = inputs()
    q.values[0, 7, 1, 3] = math.nan
    found = emulate.attention(q, k, v)
    assert found.o[0, 7, 1].isnan().all() and int(found.o.isnan().sum()) == 64


@pytest.mark.parametrize("scale", [0.0, 2.0**-130])
def test_descales_of_zero_weigh_all_keys_alike(scale):
    q, k, v = inputs()
    q = q._replace(descale=torch.full_like(q.descale, scale))
    found = emulate.attention(q, k, v)
    mean = v.says().mean(1, keepdim=True).repeat_interleave(2, 2).expand_as(found.o)
    assert relative(found.o, mean) < 0.01
    torch.testing.assert_close(found.lse, torch.full_like(found.lse, math.log(170)), rtol=0, atol=1e-4)
