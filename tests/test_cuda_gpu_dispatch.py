"""On a Hopper GPU: what PyTorch resolves before a launch, fresh threads, second derivatives, every softmax_scale.

`test_dispatch.py`, `test_scale.py` and `test_far_strides.py` hold the same without a GPU, or with it, where they can.
"""

from __future__ import annotations

import threading

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a GPU of compute capability 9.0", allow_module_level=True)

from fasim.kernels import ops, reference  # noqa: E402
from fasim.kernels.cuda import launch  # noqa: E402
from fasim.kernels.cuda.config import available  # noqa: E402
from fasim.kernels.ops import flash_attn_func  # noqa: E402
from fasim.simulator.errors import UsageError  # noqa: E402

each = pytest.mark.parametrize("schedule", ("fa2", *available()))


def inputs(seqlen=200, head_dim=64, dtype=torch.float16):
    generator = torch.Generator("cuda").manual_seed(0)
    return tuple(torch.randn(1, seqlen, 2, head_dim, device="cuda", dtype=dtype, generator=generator) for _ in range(4))


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


def test_a_fresh_tensor_is_launched_on_past_the_dispatcher():
    q, k, v, _ = inputs()
    assert torch._C._dispatch_keys(q) == ops._PLAIN
    assert not ops._observed(q, k, v.requires_grad_())
    with torch.inference_mode():
        assert torch._C._dispatch_keys(q.clone()) == ops._PLAIN_INFERENCE
        assert not ops._observed(q.clone(), k.clone(), v.clone())


LAZY = {
    "negated view": lambda x: (torch._neg_view(x), -x),
    "imaginary part of a conjugate": lambda x: (torch.complex(x.float(), x.float()).to(torch.complex32).conj().imag, -x),
    "zero tensor": lambda x: (torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device), x * 0),
}


@each
@pytest.mark.parametrize("kind", LAZY)
def test_a_tensor_whose_memory_is_not_its_value_counts_by_its_value(schedule, kind):
    tensors = dict(zip("qkv", inputs()[:3], strict=True))
    for which in "qkv":
        odd, value = LAZY[kind](tensors[which])
        got = flash_attn_func(**tensors | {which: odd}, schedule=schedule)
        wanted = reference.attention_forward(**tensors | {which: value}).o
        assert float((got.double() - wanted).norm()) <= 1e-3 * float(wanted.norm())


@each
def test_a_lazy_gradient_counts_by_its_value(schedule):
    q, k, v, do = inputs()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    got = torch.autograd.grad(flash_attn_func(*leaves, schedule=schedule), leaves, torch._neg_view(do))
    for ours, theirs in zip(got, reference.attention_backward(q, k, v, -do), strict=True):
        assert error(ours, theirs) < 3e-3


@each
def test_a_second_derivative_is_refused_in_one_sentence(schedule):
    leaves = [x.requires_grad_() for x in inputs()[:3]]
    first = torch.autograd.grad(flash_attn_func(*leaves, schedule=schedule).float().sum(), leaves, create_graph=True)
    penalty = sum(x.float().square().sum() for x in first) + 0 * leaves[0].float().sum()
    with pytest.raises(UsageError, match="attention has no second derivative here"):
        torch.autograd.grad(penalty, leaves, allow_unused=True)


@each
def test_freed_memory_is_refused_and_not_read(schedule):
    q, k, v, _ = inputs()
    freed, off_16_bytes = q.clone(), torch.cat((q.flatten()[:1], q.flatten()))[1:].view(q.shape)
    for x in (freed, off_16_bytes):
        x.untyped_storage().resize_(0)
        with pytest.raises(UsageError, match="its storage holds 0"):
            flash_attn_func(x, k, v, schedule=schedule)
    assert error(flash_attn_func(q, k, v, schedule=schedule), reference.attention_forward(q, k, v).o) < 1e-3


@each
@pytest.mark.parametrize("streams", ["own streams", "one stream"])
def test_fresh_threads_attend_and_differentiate(schedule, streams):
    """A Python thread that has called nothing of CUDA has no context, though PyTorch has a device."""
    q, k, v, do = inputs(head_dim=128)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = flash_attn_func(*leaves, causal=True, schedule=schedule)
    expected = (out.detach(), *torch.autograd.grad(out, leaves, do))
    owned = [torch.cuda.Stream() if streams == "own streams" else torch.cuda.current_stream() for _ in range(6)]
    torch.cuda.synchronize()
    ops._plans.clear()
    ops._accepted.clear()
    launch.plan_for.cache_clear()  # tensor maps are made anew, by whichever thread is first
    got, failed = [], []

    def attend(stream):
        try:
            with torch.cuda.stream(stream):
                mine = [x.detach().requires_grad_() for x in (q, k, v)]
                o = flash_attn_func(*mine, causal=True, schedule=schedule)
                got.append((o.detach(), *torch.autograd.grad(o, mine, do)))
        except Exception as problem:
            failed.append(problem)

    threads = [threading.Thread(target=attend, args=(stream,)) for stream in owned]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert not failed and len(got) == 6
    for answer in got:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(answer, expected, strict=True))


@each
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-46, -1e-40, 1e-37, 0.3, -0.3, -20.0])
def test_every_scale_gives_the_oracle_with_ragged_blocks(schedule, causal, scale):
    q, k, v, do = inputs(seqlen=333)
    q, k = (torch.nn.functional.normalize(x.float(), dim=-1).to(x.dtype) for x in (q, k))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o, lse = flash_attn_func(*leaves, scale, causal, schedule, return_lse=True)
    expected = reference.attention_forward(q, k, v, scale, causal)
    assert error(o.detach(), expected.o) < 1e-3
    torch.testing.assert_close(lse.detach().double(), expected.lse, rtol=1e-5, atol=1e-5)
    wanted = reference.attention_backward(q, k, v, do, scale, causal)
    for ours, theirs in zip(torch.autograd.grad(o, leaves, do), wanted, strict=True):
        assert torch.isfinite(ours).all()
        assert float((ours.double() - theirs).norm()) <= 3e-3 * float(theirs.norm()) + 1e-6


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each
def test_a_fresh_thread_uses_the_tensors_device_and_not_the_current_one(schedule):
    q, k, v, _ = inputs()
    expected = flash_attn_func(q, k, v, schedule=schedule)
    there = [x.to("cuda:1") for x in (q, k, v)]
    got = []
    thread = threading.Thread(target=lambda: got.append(flash_attn_func(*there, schedule=schedule)))
    thread.start()
    thread.join()
    assert torch.equal(got[0].to("cuda:0"), expected) and torch.cuda.current_device() == 0
