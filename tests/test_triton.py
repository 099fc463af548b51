"""The Triton kernels equal the fp64 oracle: every mask, head dim, head layout, length and stride, forward and backward."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
from pathlib import Path

import pytest

# The environment has to be set before Triton is imported, and tests/ is no package.
_spec = importlib.util.spec_from_file_location("triton_env", Path(__file__).with_name("triton_env.py"))
env = sys.modules.setdefault("triton_env", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(env)

import torch  # noqa: E402

from fasim.kernels import reference  # noqa: E402
from fasim.kernels.triton import fa1, fa2, fa2_backward, loads, standard, tiles  # noqa: E402


def overlapped(q, k, v, scale, causal=False, **given):
    """fa2 with P V of one block under the softmax of the next, whatever the table says."""
    tile = tiles.forward_tile(q.shape[-1], causal, env.DEVICE == "cpu", described=loads.can_describe(q, k, v))
    return fa2.forward(q, k, v, scale, causal, tile=dataclasses.replace(tile, overlapped=True), **given)


FORWARD = {"standard": standard.forward, "fa1": fa1.forward, "fa2": fa2.forward, "fa2-overlapped": overlapped}
ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative error of a result whose operands and output are rounded to the dtype once each."""

# batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, causal, dtype
HALF, BRAIN = torch.float16, torch.bfloat16
CASES = [
    (1, 1, 1, 16, 16, 64, False, HALF),
    (1, 2, 2, 31, 33, 64, False, BRAIN),
    (2, 4, 2, 17, 37, 64, True, HALF),
    (1, 3, 1, 40, 19, 64, True, BRAIN),
    (1, 1, 1, 32, 32, 128, True, BRAIN),
    (1, 2, 1, 15, 49, 128, False, HALF),
    (1, 2, 1, 20, 23, 256, True, HALF),
    (1, 1, 1, 18, 16, 256, False, BRAIN),
    (1, 2, 2, 1, 29, 64, True, HALF),
    (1, 1, 1, 29, 1, 64, True, HALF),
    (1, 1, 1, 1, 1, 128, False, BRAIN),
]
EMPTY = [(1, 2, 1, 0, 5), (1, 2, 1, 5, 0), (0, 2, 1, 5, 5), (1, 2, 1, 0, 0)]


def name_of(case):
    batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, causal, dtype = case
    mask = "causal" if causal else "full"
    return f"{batch}x{heads}/{kv_heads}x{seqlen_q}/{seqlen_k}-d{head_dim}-{mask}-{str(dtype)[6:]}"


def check_forward(o, lse, expected, dtype):
    assert o.dtype == dtype and lse.dtype == torch.float32
    assert env.relative_error(o, expected.o) < ROUNDING[dtype]
    dead = expected.lse == -math.inf
    assert torch.equal(lse == -math.inf, dead)
    assert (o.transpose(1, 2)[dead] == 0).all()
    torch.testing.assert_close(lse[~dead].double(), expected.lse[~dead], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", FORWARD)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_forward_equals_the_oracle(schedule, case):
    *shape, causal, dtype = case
    q, k, v, _ = env.inputs(*shape, dtype)
    o, lse = (torch.full_like(x, math.nan) for x in (q, torch.empty(shape[0], shape[1], shape[3], device=q.device)))
    returned = FORWARD[schedule](q, k, v, 0.11, causal, o=o, lse=lse)
    assert returned[0] is o and returned[1] is lse
    check_forward(o, lse, reference.attention_forward(q, k, v, 0.11, causal), dtype)


@pytest.mark.parametrize("add_dq", [False, True], ids=["dq-walked", "dq-added"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_backward_equals_the_oracle(case, add_dq):
    *shape, causal, dtype = case
    q, k, v, do = env.inputs(*shape, dtype)
    exact = reference.attention_forward(q, k, v, 0.11, causal)
    o, lse = exact.o.to(dtype), exact.lse.float()
    poisoned = {name: torch.full_like(x, math.nan) for name, x in (("dq", q), ("dk", k), ("dv", v))}
    tile = fa2_backward.backward_tile(shape[-1], causal, env.DEVICE == "cpu")
    got = fa2_backward.backward(do, q, k, v, o, lse, 0.11, causal, tile=dataclasses.replace(tile, add_dq=add_dq), **poisoned)
    expected = reference.attention_backward(q, k, v, do, 0.11, causal)
    for name, ours, theirs in zip(("dq", "dk", "dv"), got, expected, strict=True):
        assert ours is poisoned[name]
        # With one key in sight dS is a difference of equals: held to the size of what is subtracted.
        scale = max(float(theirs.norm()), 0.05 * float(do.double().norm()))
        assert float((ours.double() - theirs).norm()) / scale < 2 * ROUNDING[dtype], name


@pytest.mark.parametrize("schedule", FORWARD)
@pytest.mark.parametrize("shape", EMPTY)
def test_length_zero(schedule, shape):
    q, k, v, do = env.inputs(*shape, 64)
    o, lse = FORWARD[schedule](q, k, v, 0.125)
    assert o.shape == q.shape and (o == 0).all()
    assert lse.shape == (shape[0], shape[1], shape[3]) and (lse == -math.inf).all()
    grads = fa2_backward.backward(do, q, k, v, o, lse, 0.125)
    assert all(got.shape == x.shape and (got == 0).all() for got, x in zip(grads, (q, k, v), strict=True))


@pytest.mark.parametrize("schedule", FORWARD)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_any_strides(schedule, head_dim):
    q, k, v, do = env.inputs(2, 2, 2, 19, 21, head_dim)
    dense = FORWARD[schedule](q, k, v, 0.125, True)
    wanted = fa2_backward.backward(do, q, k, v, *dense, 0.125, True) if schedule == "fa2" else ()
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, do)]
    by_column = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v, do)]
    for queries, keys, values, gradient in (by_head, by_column):
        o, lse = FORWARD[schedule](queries, keys, values, 0.125, True)
        # On a GPU other strides mean another tile, and so another order of addition.
        torch.testing.assert_close(o, dense[0], rtol=0, atol=0 if env.DEVICE == "cpu" else 1e-3)
        torch.testing.assert_close(lse, dense[1], rtol=0, atol=0 if env.DEVICE == "cpu" else 1e-5)
        if schedule == "fa2":
            for got, want in zip(
                fa2_backward.backward(gradient, queries, keys, values, o, lse, 0.125, True), wanted, strict=True
            ):
                torch.testing.assert_close(got, want, rtol=0, atol=0 if env.DEVICE == "cpu" else 1e-3)


def test_one_value_shared_by_all_keys():
    """Stride 0: an expanded tensor is read in place."""
    q, k, v, _ = env.inputs(1, 1, 1, 18, 20, 64)
    v = v[:, :1].expand(-1, 20, -1, -1)
    o, _ = fa2.forward(q, k, v, 0.125)
    torch.testing.assert_close(o, v[:, :1].expand_as(o), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("schedule", FORWARD)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_large_logits_do_not_overflow(schedule, dtype):
    q, k, v, _ = env.inputs(1, 1, 1, 20, 40, 64, dtype)
    q, k = q * 60, k * 60
    o, lse = FORWARD[schedule](q, k, v, 1.0, True)
    check_forward(o, lse, reference.attention_forward(q, k, v, 1.0, True), dtype)


@pytest.mark.parametrize("schedule", FORWARD)
def test_a_nan_reaches_the_rows_that_see_it_and_no_others(schedule):
    q, k, v, _ = env.inputs(1, 1, 1, 40, 40, 64)
    k[0, 20, 0, 3] = math.nan
    o, lse = FORWARD[schedule](q, k, v, 0.125, True)
    assert o[0, :20].isfinite().all() and lse[0, 0, :20].isfinite().all()
    assert o[0, 20:].isnan().all() and lse[0, 0, 20:].isnan().all()


def test_the_gradient_of_lse_is_taken():
    q, k, v, do = env.inputs(1, 2, 1, 21, 30, 64)
    o, lse = fa2.forward(q, k, v, 0.125, True)
    dlse = torch.randn(lse.shape, generator=torch.Generator().manual_seed(1)).to(lse)
    got = fa2_backward.backward(do, q, k, v, o, lse, 0.125, True, dlse=dlse)
    expected = reference.attention_backward(q, k, v, do, 0.125, True, dlse)
    for ours, theirs in zip(got, expected, strict=True):
        assert env.relative_error(ours, theirs) < 2e-3


def test_every_tile_is_placed_once_and_heavy_tiles_come_first():
    """`place` in plain Python, as the kernels compute it."""
    for number, heads, together in ((5, 7, 4), (1, 3, 1), (4, 8, 8), (3, 2, 2)):
        order = []
        for program in range(number * heads):
            first = program // (number * together) * together
            width = min(together, heads - first)
            inside = program - first * number
            order.append((number - 1 - inside // width, first + inside % width))
        assert sorted(order) == sorted((tile, head) for tile in range(number) for head in range(heads))
        for head in range(heads):
            assert [tile for tile, at in order if at == head] == list(range(number))[::-1]


def test_heads_walked_together_keep_keys_and_values_in_half_of_l2():
    for seqlen in (512, 4096, 16384, 1 << 17):
        together = loads.heads_together(seqlen, 128, 2, heads=64, sharing=1, causal=True)
        assert 1 <= together <= 64
        assert together == 1 or together * 2 * seqlen * 128 * 2 <= 32 << 20
    assert loads.heads_together(16384, 128, 2, heads=64, sharing=8, causal=True) >= 8


def test_the_tile_tables_cover_every_head_dim():
    for head_dim in (64, 128, 256):
        for causal in (False, True):
            tile = tiles.forward_tile(head_dim, causal, interpreted=False)
            assert tile.block_m % 16 == 0 and tile.block_n % 16 == 0
            backward = tiles.backward_tile(head_dim, causal, interpreted=False)
            for walk in (backward.keys_and_values, backward.queries):
                assert fa2_backward.PADDING % walk.block_m == 0


def test_a_grid_has_one_axis():
    """The second and third end at 65535, which batch times heads may pass; the first at 2^31 - 1."""
    for module in (standard, fa1, fa2, fa2_backward):
        source = Path(module.__file__).read_text(encoding="utf-8")
        assert "program_id(0)" in source and "program_id(1)" not in source and "program_id(2)" not in source


@pytest.mark.parametrize("blocked", [True, False])
def test_a_cache_that_triton_cannot_write_is_one_of_this_process(tmp_path, monkeypatch, blocked):
    import triton

    from fasim.kernels.compile import triton_cache

    (tmp_path / "file").write_text("in the way")
    chosen = str(tmp_path / "file" / "cache") if blocked else str(tmp_path / "cache")
    before = triton.knobs.cache.dir
    triton.knobs.cache.dir = chosen
    triton_cache.ensure_writable.cache_clear()
    try:
        if blocked:
            with pytest.warns(UserWarning, match="cannot be written; set TRITON_CACHE_DIR"):
                triton_cache.ensure_writable()
            triton_cache.ensure_writable()  # said once
        else:
            triton_cache.ensure_writable()
        assert (triton.knobs.cache.dir != chosen) == blocked
        (Path(triton.knobs.cache.dir) / "entry").write_text("kept")
    finally:
        triton.knobs.cache.dir = before
        triton_cache.ensure_writable.cache_clear()
