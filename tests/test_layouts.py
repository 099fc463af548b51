"""Layouts of the validation suite: the same numbers in other memory, and what a kernel reads that takes them for others."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from fasim.kernels.validation import diagnose, layouts, shapes, yardstick  # noqa: E402
from fasim.kernels.validation.check import Case  # noqa: E402


def made(batch: int = 2, rows: int = 5, heads: int = 4) -> tuple:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, rows, heads, 8)
    return tuple(torch.randn(shape, generator=generator) for _ in range(3))


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_a_layout_keeps_the_values_and_changes_the_memory(layout):
    ones = {"batch": 1, "heads": 1} if "size 1" in layout else {}
    before = made(**ones)
    after = layouts.lay_out(layout, *before)
    repeated = "stride 0" in layout
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True)) != repeated
    assert all(x.shape == y.shape and y.isfinite().all() for x, y in zip(before, after, strict=True))
    changed = any(
        (x.stride(), x.storage_offset(), x.is_neg()) != (y.stride(), y.storage_offset(), y.is_neg())
        for x, y in zip(before, after, strict=True)
    )
    assert changed == (layout != "contiguous")


@pytest.mark.parametrize("layout", layouts.DOUT_LAYOUTS)
def test_a_layout_of_dout_keeps_its_values_unless_its_stride_is_0(layout):
    do = made()[0]
    laid = layouts.DOUT_LAYOUTS[layout](do)
    assert laid.shape == do.shape and (torch.equal(laid, do) or 0 in laid.stride())
    assert laid.stride() != do.stride() or laid.storage_offset() or laid.is_neg()


def test_stride_0_means_the_first_for_all():
    q, k, v = layouts.lay_out("K and V heads of stride 0", *made())
    assert k.stride(2) == v.stride(2) == 0 and torch.equal(k[:, :, 3], made()[1][:, :, 0]) and q.stride(2) == 8
    k = layouts.lay_out("K and V batch of stride 0", *made())[1]
    assert k.stride(0) == 0 and torch.equal(k[1], made()[1][0])


def test_packed_tensors_are_slices_of_one_buffer_side_by_side():
    q, k, v = layouts.lay_out("packed QKV", *made())
    assert q.data_ptr() + q.shape[2] * q.shape[3] * 4 == k.data_ptr()
    assert len({x.untyped_storage().data_ptr() for x in (q, k, v)}) == 1 and q.stride() == k.stride() == v.stride()


@pytest.mark.parametrize(
    ("layout", "misread", "words"),
    [
        ("K heads before rows, V contiguous", lambda q, k, v: (q, k, v.as_strided(v.shape, k.stride())), "K's strides"),
        ("V heads before rows, K contiguous", lambda q, k, v: (q, k.as_strided(k.shape, v.stride()), v), "V's strides"),
        ("heads before rows in memory", lambda *qkv: tuple(x.as_strided(x.shape, made()[0].stride()) for x in qkv), "contiguous"),
        ("lazily negated", lambda *qkv: tuple(x.neg() for x in qkv), "negation is lazy"),
    ],
)
def test_what_was_misread_is_named(layout, misread, words):
    case = Case(name="x", seqlen_q=5, seqlen_k=5, head_dim=8, batch=2, heads=4, layout=layout)
    qkv = layouts.lay_out(layout, *made())
    *_, bound = yardstick.bound(*qkv, False, None)
    got = yardstick.expected(*misread(*qkv), False, None)[0]
    assert words in diagnose.output(case, *qkv, got, bound)


def test_every_layout_is_asked_for_and_size_1_twice():
    asked = [case for case, _ in shapes.laid_out(16, 32)]
    assert {case.layout for case in asked} == set(layouts.LAYOUTS) - {"contiguous"}
    odd = [case for case in asked if "size 1" in case.layout]
    assert len(odd) == 2 and all(1 in case.k_shape[:3] for case in odd)
