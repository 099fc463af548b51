"""Packed sequences on a Hopper GPU: the CUDA kernel in all its variants, at lengths that cross tiles, and as PyTorch uses it."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a GPU of compute capability 9.0", allow_module_level=True)

from fasim.kernels.cuda.varlen import launch  # noqa: E402
from fasim.kernels.ops import flash_attn_func, flash_attn_varlen_func  # noqa: E402
from fasim.kernels.varlen import reference  # noqa: E402

LENGTHS = ((300, 1, 0, 128, 129, 777, 16), (300, 1, 40, 513, 64, 777, 0))


def packed(lengths=LENGTHS, heads=4, kv_heads=2, head_dim=128, dtype=torch.bfloat16, before=5, after=9):
    """q, k, v and both cu_seqlens, with rows of no sequence before and after."""
    generator = torch.Generator("cuda").manual_seed(0)
    cu = [torch.tensor([*accumulate(x, initial=before)], dtype=torch.int32, device="cuda") for x in lengths]
    rows = [before + sum(x) + after for x in lengths]

    def normal(count, of):
        return torch.randn(count, of, head_dim, device="cuda", dtype=dtype, generator=generator)

    return normal(rows[0], heads), normal(rows[1], kv_heads), normal(rows[1], kv_heads), *cu


def run(q, k, v, cu_q, cu_k, **given):
    longest = [int(x.diff().max()) if len(x) > 1 else 0 for x in (cu_q, cu_k)]
    return flash_attn_varlen_func(q, k, v, cu_q, cu_k, *longest, **given)


def check(tensors, **given):
    """Hold O and LSE to the oracle, sequence by sequence, so that a failure says which rows."""
    q, cu_q, cu_k = tensors[0], *tensors[3:]
    o, lse = run(*tensors, return_lse=True, **given)
    given.pop("schedule", None)
    expected = reference.attention_forward(*tensors, **given)
    allowed = 1e-3 if q.dtype == torch.float16 else 8e-3
    wrong = []
    for i, (rows, _) in enumerate([*reference.sequences(cu_q, cu_k), (slice(0, len(q)), None)]):
        ours, theirs = o[rows].double(), expected.o[rows]
        error = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)) if theirs.any() else float(ours.abs().sum())
        if not error <= allowed:
            row, head, _ = (int(x) for x in torch.nonzero(~((ours - theirs).abs() <= 0.1))[0]) if theirs.numel() else (0, 0, 0)
            wrong.append((i, rows, error, f"first at row {row}, head {head}: {ours[row, head, :4]} for {theirs[row, head, :4]}"))
    assert not wrong
    dead = expected.lse == -math.inf
    assert torch.equal(lse == -math.inf, dead)
    torch.testing.assert_close(lse[~dead].double(), expected.lse[~dead], rtol=1e-5, atol=1e-5)
    return o, lse


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_every_variant_gives_the_oracle(dtype, head_dim, causal):
    check(packed(head_dim=head_dim, dtype=dtype), causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_a_thousand_sequences_in_any_order(causal):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 200, (2, 1100), generator=generator).tolist()
    check(packed(lengths, heads=2, kv_heads=1), causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences_in_several_sections_of_heads(causal):
    check(packed(((9000, 40, 5000), (9000, 40, 5000)), heads=6, kv_heads=6, dtype=torch.float16), causal=causal)


def test_what_is_not_finite_stays_in_its_sequence():
    q, k, v, cu_q, cu_k = packed()
    expected = run(q, k, v, cu_q, cu_k, causal=True)
    for x, cu in ((q, cu_q), (k, cu_k), (v, cu_k)):
        x[: cu[0]] = x[cu[5] : cu[6]] = x[cu[-1] :] = math.nan
    got = run(q, k, v, cu_q, cu_k, causal=True)
    for i in (0, 1, 2, 3, 4, 6):
        rows = slice(cu_q[i], cu_q[i + 1])
        assert torch.equal(got[rows], expected[rows]), i


def test_the_memory_behind_the_last_row_is_not_written():
    q, k, v, cu_q, cu_k = packed(after=0)
    for _ in range(3):
        o, lse = run(q, k, v, cu_q, cu_k, return_lse=True)
        assert o.isfinite().all() and (o[: cu_q[0]] == 0).all() and (lse[:, : cu_q[0]] == -math.inf).all()


def test_one_length_gives_the_bits_of_the_fixed_length_kernel():
    q, k, v, cu_q, cu_k = packed(((384,) * 5, (640,) * 5), before=0, after=0)
    o, lse = run(q, k, v, cu_q, cu_k, causal=True, return_lse=True)
    alone = [x.view(5, -1, *x.shape[1:]) for x in (q, k, v)]
    expected, lse_expected = flash_attn_func(*alone, causal=True, schedule="fa3", return_lse=True)
    assert torch.equal(o, expected.flatten(0, 1)) and torch.equal(lse, lse_expected.transpose(0, 1).flatten(1))


def test_other_lengths_at_the_same_addresses_are_read_anew():
    """The tensor maps of one call may lie where those of the call before did."""
    q, k, v, cu_q, cu_k = packed()
    other = [x.clone() for x in (cu_q, cu_k)]
    other[0][1:-1] -= 60
    other[0].clamp_(min=int(cu_q[0]))
    for cu in ((cu_q, cu_k), other) * 3:
        check((q, k, v, *cu), causal=True)


def test_graphs_and_strides():
    q, k, v, cu_q, cu_k = packed()
    expected = run(q, k, v, cu_q, cu_k, causal=True)
    strided = [torch.stack((x, x), 1)[:, 1] for x in (q, k, v)]
    off = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in (q, k, v)]
    for tensors in (strided, off):
        assert torch.equal(run(*tensors, cu_q, cu_k, causal=True), expected)
    graph = torch.cuda.CUDAGraph()
    longest = int(cu_q.diff().max()), int(cu_k.diff().max())
    with torch.cuda.graph(graph):
        o = flash_attn_varlen_func(q, k, v, cu_q, cu_k, *longest, causal=True)
    for _ in range(2):
        o.zero_()
        graph.replay()
        assert torch.equal(o, expected)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_the_oracles(head_dim, causal):
    tensors = packed(head_dim=head_dim, dtype=torch.float16)
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    o, lse = run(*leaves, *tensors[3:], causal=causal, return_lse=True)
    do, dlse = torch.randn_like(o), torch.where(lse.isfinite(), torch.randn_like(lse), 0.0).detach()
    got = torch.autograd.grad((o, lse), leaves, (do, dlse))
    wanted = reference.attention_backward(*tensors[:3], do, *tensors[3:], causal=causal, dlse=dlse)
    for name, ours, theirs in zip("qkv", got, wanted, strict=True):
        error = float((ours.double() - theirs).norm() / theirs.norm())
        assert error < 3e-3, f"d{name} is off by {error}"


def test_a_batch_without_anything_to_do():
    q, k, v, cu_q, cu_k = packed(((), ()), before=7, after=0)
    o, lse = run(q, k, v, cu_q, cu_k, return_lse=True)
    assert (o == 0).all() and (lse == -math.inf).all()
    assert launch.plan_for.cache_info().currsize > 0
