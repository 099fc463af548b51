"""The CUDA kernels on a Hopper GPU as PyTorch uses them: streams, threads, graphs, layouts, nothing to compute.

`fasim validate` judges the numbers; here each call must give what a plain call gives.
"""

from __future__ import annotations

import math
import threading

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a GPU of compute capability 9.0", allow_module_level=True)

from fasim.kernels import reference  # noqa: E402
from fasim.kernels.cuda import launch  # noqa: E402
from fasim.kernels.cuda.config import available  # noqa: E402
from fasim.kernels.cuda.pairs import config as pairs  # noqa: E402
from fasim.kernels.cuda.pairs import launch as sharing  # noqa: E402
from fasim.kernels.ops import flash_attn_func  # noqa: E402

each = pytest.mark.parametrize("schedule", available())


def inputs(batch=2, heads=4, kv_heads=2, seqlen_q=300, seqlen_k=333, head_dim=128, dtype=torch.float16):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((seqlen_q, heads), (seqlen_k, kv_heads), (seqlen_k, kv_heads))
    return tuple(torch.randn(batch, n, h, head_dim, device="cuda", dtype=dtype, generator=generator) for n, h in shapes)


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_every_variant_gives_the_oracle(schedule, dtype, head_dim, causal):
    q, k, v = inputs(head_dim=head_dim, dtype=dtype)
    o, lse = flash_attn_func(q, k, v, causal=causal, schedule=schedule, return_lse=True)
    expected = reference.attention_forward(q, k, v, causal=causal)
    error = (o.double() - expected.o).norm() / expected.o.norm()
    assert error < (1e-3 if dtype == torch.float16 else 8e-3)
    torch.testing.assert_close(lse.double(), expected.lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", pairs.variants(), ids=lambda variant: variant.name.replace(" ", "-"))
def test_ctas_that_share_an_sm_are_as_many_as_the_tile_says_and_give_the_oracle(variant):
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[variant.dtype]
    q, k, v = inputs(batch=3, heads=40, kv_heads=8, head_dim=64, dtype=dtype)
    name = pairs.PREFIX + variant.schedule
    o, lse = flash_attn_func(q, k, v, causal=variant.causal, schedule=name, return_lse=True)
    expected = reference.attention_forward(q, k, v, causal=variant.causal)
    assert (o.double() - expected.o).norm() / expected.o.norm() < (1e-3 if dtype == torch.float16 else 8e-3)
    torch.testing.assert_close(lse.double(), expected.lse, rtol=1e-5, atol=1e-5)
    plan = sharing.plan_for(q.shape, k.shape, q.stride(), k.stride(), v.stride(), dtype, variant.causal, name, 0)
    assert sharing.resident(plan) == variant.tile.resident


@each
def test_streams_threads_and_new_addresses_change_nothing(schedule):
    q, k, v = inputs()
    expected = flash_attn_func(q, k, v, causal=True, schedule=schedule)
    got = []

    def attend():
        got.append(flash_attn_func(q.clone(), k, v, causal=True, schedule=schedule))

    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    for _ in range(10):  # side by side: each stream has a queue of its own
        for stream in streams:
            with torch.cuda.stream(stream):
                attend()
    threads = [threading.Thread(target=attend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(3 * launch.MAPS_KEPT):
        attend()
    torch.cuda.synchronize()
    assert len(got) == 40 + 4 + 3 * launch.MAPS_KEPT
    assert all(torch.equal(o, expected) for o in got)
    assert all(not queue.any() for queue in launch._queues.values())


@each
def test_a_graph_replays_on_new_data_beside_eager_calls(schedule):
    q, k, v = inputs()
    static = q.clone()
    flash_attn_func(static, k, v, schedule=schedule)  # compiled and loaded before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = flash_attn_func(static, k, v, schedule=schedule)
        second = flash_attn_func(first, k, v, schedule=schedule)
    for scale in (1.0, 0.5, -2.0):
        static.copy_(q * scale)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            graph.replay()
        beside = [flash_attn_func(static, k, v, schedule=schedule) for _ in range(5)]
        torch.cuda.synchronize()
        assert all(torch.equal(o, first) for o in beside)
        assert torch.equal(second, flash_attn_func(first, k, v, schedule=schedule))


LAYOUTS = {
    "heads before rows": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "packed": lambda x: torch.stack((x, x, x), 2)[:, :, 1],
    "head dim strided": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "rows off 16 bytes": lambda x: torch.cat((x, x[..., :1]), -1)[..., :-1],
    "base off 16 bytes": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape),
}


@each
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_nothing(schedule, layout):
    tensors = inputs()
    expected = flash_attn_func(*tensors, schedule=schedule)
    assert torch.equal(flash_attn_func(*(LAYOUTS[layout](x) for x in tensors), schedule=schedule), expected)


def test_one_key_head_shared_by_stride_zero_is_read_in_place():
    q, k, v = inputs(kv_heads=1, heads=4)
    expected = flash_attn_func(q, k, v, schedule=available()[0])
    spread = [x.expand(-1, -1, 4, -1) for x in (k, v)]
    torch.testing.assert_close(flash_attn_func(q, *spread, schedule=available()[0]), expected, rtol=0, atol=0)


@each
@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (2, 0, 8, 8), (2, 4, 0, 8), (2, 4, 8, 0)])
def test_nothing_to_compute(schedule, shape):
    batch, heads, seqlen_q, seqlen_k = shape
    q = torch.randn(batch, seqlen_q, heads, 64, device="cuda", dtype=torch.float16)
    k = torch.randn(batch, seqlen_k, heads, 64, device="cuda", dtype=torch.float16)
    o, lse = flash_attn_func(q, k, k, schedule=schedule, return_lse=True)
    assert o.shape == q.shape and not o.any()
    assert lse.shape == (batch, heads, seqlen_q) and bool((lse == -math.inf).all())


@each
def test_the_operator_and_the_short_cut_agree_and_gradients_flow(schedule):
    q, k, v = inputs(kv_heads=4, seqlen_k=300)
    o = flash_attn_func(q, k, v, causal=True, schedule=schedule)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    recorded = flash_attn_func(*leaves, causal=True, schedule=schedule)
    assert torch.equal(recorded, o)
    do = torch.randn_like(o)
    got = torch.autograd.grad(recorded, leaves, do, retain_graph=True)
    through_operator = torch.ops.fasim.attention(*leaves, reference.default_scale(128), True, schedule)[0]
    for ours, theirs in zip(got, torch.autograd.grad(through_operator, leaves, do), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(got, reference.attention_backward(q, k, v, do, causal=True), strict=True):
        assert (ours.double() - theirs).norm() / theirs.norm() < 3e-3
    compiled = torch.compile(lambda *x: flash_attn_func(*x, causal=True, schedule=schedule), fullgraph=True)
    assert torch.equal(compiled(q, k, v), o)
    torch.library.opcheck(torch.ops.fasim.attention, (q, k, v, 0.1, True, schedule))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each
def test_a_second_gpu_runs_its_own_copy_without_being_current(schedule):
    tensors = inputs()
    expected = flash_attn_func(*tensors, schedule=schedule)
    assert torch.equal(flash_attn_func(*(x.to("cuda:1") for x in tensors), schedule=schedule).to("cuda:0"), expected)
    assert torch.cuda.current_device() == 0
