"""flash_attn_func is a good PyTorch citizen: registered, differentiable, traceable, and clear about what it refuses."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("triton_env", Path(__file__).with_name("triton_env.py"))
env = sys.modules.setdefault("triton_env", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(env)

import torch  # noqa: E402

from fasim.kernels import reference  # noqa: E402
from fasim.kernels.ops import attention, attention_backward, flash_attn_func, runnable  # noqa: E402
from fasim.simulator.errors import UsageError  # noqa: E402


def leaves(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize("schedule", ["auto", *runnable(env.DEVICE)])
def test_every_schedule_gives_the_oracle_with_the_default_scale(schedule):
    q, k, v, _ = env.inputs(1, 2, 1, 19, 24, 64)
    o, lse = flash_attn_func(q, k, v, causal=True, schedule=schedule, return_lse=True)
    expected = reference.attention_forward(q, k, v, causal=True)
    assert env.relative_error(o, expected.o) < 1e-3
    torch.testing.assert_close(lse.double(), expected.lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(flash_attn_func(q, k, v, causal=True, schedule=schedule), o)


@pytest.mark.parametrize("schedule", runnable(env.DEVICE))
@pytest.mark.parametrize("scale", [0.2, 0.0, -0.2])
def test_gradients_of_o_and_lse_equal_the_oracle(schedule, scale):
    q, k, v, do = env.inputs(1, 2, 1, 18, 21, 64)
    dlse = torch.randn(1, 2, 18, generator=torch.Generator().manual_seed(1)).to(q.device)
    inputs = leaves(q, k, v)
    o, lse = flash_attn_func(*inputs, scale, True, schedule, return_lse=True)
    got = torch.autograd.grad((o, lse), inputs, (do, dlse))
    for ours, theirs in zip(got, reference.attention_backward(q, k, v, do, scale, True, dlse), strict=True):
        assert env.relative_error(ours, theirs) < 3e-3


def test_either_output_alone_can_be_differentiated():
    q, k, v, do = env.inputs(1, 1, 1, 17, 17, 64)
    inputs = leaves(q, k, v)
    o, lse = flash_attn_func(*inputs, 0.125, return_lse=True)
    from_o = torch.autograd.grad(o, inputs, do, retain_graph=True)
    expected = reference.attention_backward(q, k, v, do, 0.125)
    assert all(env.relative_error(a, b) < 3e-3 for a, b in zip(from_o, expected, strict=True))
    from_lse = torch.autograd.grad(lse.sum(), inputs)
    expected = reference.attention_backward(q, k, v, torch.zeros_like(do), 0.125, dlse=torch.ones_like(lse))
    assert all(env.relative_error(a, b) < 3e-3 for a, b in zip(from_lse, expected, strict=True))


@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False)])
def test_opcheck_of_the_forward(needed):
    q, k, v, _ = env.inputs(1, 2, 1, 17, 20, 64)
    inputs = tuple(x.requires_grad_(wanted) for x, wanted in zip((q, k, v), needed, strict=True))
    torch.library.opcheck(attention, (*inputs, 0.125, True, "auto"))


def test_opcheck_of_strided_inputs_and_of_the_backward():
    q, k, v, do = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in env.inputs(1, 2, 1, 17, 20, 64))
    torch.library.opcheck(attention, (q, k, v, 0.125, False, "fa2"))
    o, lse = attention(q, k, v, 0.125)
    torch.library.opcheck(attention_backward, (do, q, k, v, o, lse, None, 0.125))
    torch.library.opcheck(attention_backward, (do, q, k, v, o, lse, torch.ones_like(lse), 0.125))


def test_torch_compile_traces_the_whole_graph_forward_and_backward():
    q, k, v, do = env.inputs(1, 2, 2, 17, 17, 64)

    def model(q, k, v):
        return flash_attn_func(q * 2, k, v, causal=True) + 1

    backend = "inductor" if env.DEVICE == "cuda" else "aot_eager"
    inputs, again = leaves(q, k, v), leaves(q, k, v)
    compiled = torch.compile(model, fullgraph=True, backend=backend)(*inputs)
    eager = model(*again)
    torch.testing.assert_close(compiled, eager, rtol=2e-3, atol=2e-3)
    for a, b in zip(torch.autograd.grad(compiled, inputs, do), torch.autograd.grad(eager, again, do), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(env.DEVICE == "cpu", reason="needs a CUDA device")
def test_a_kernel_waits_for_its_own_stream():
    q, k, v, _ = env.inputs(2, 4, 4, 512, 512, 128)
    expected = flash_attn_func(q, k, v)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(q)
        torch.cuda._sleep(50_000_000)
        late.copy_(q)
        got = flash_attn_func(late, k, v)
    stream.synchronize()
    assert torch.equal(got, expected)


REFUSED = {
    "head_dim=80 is not supported by 'fa2' (64, 128, 256)": lambda q: (q[..., :80],) * 3,
    "q is torch.float32": lambda q: (q.float(), q, q),
    "different dtypes": lambda q: (q, q.bfloat16(), q),
    "must be (batch, seqlen, heads, head_dim)": lambda q: (q[0], q, q),
    "they must be the same": lambda q: (q, q, q[:, :3]),
    "must agree in batch and head_dim": lambda q: (q, q[:1], q[:1]),
    "do not divide": lambda q: (q, q[:, :, :2], q[:, :, :2]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_supported_is_said_in_one_sentence(message):
    q = torch.zeros(2, 4, 3, 128, dtype=torch.float16, device=env.DEVICE)
    with pytest.raises(UsageError) as caught:
        flash_attn_func(*REFUSED[message](q))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_schedule_is_refused_with_the_known_ones():
    q = torch.zeros(1, 4, 1, 64, dtype=torch.float16, device=env.DEVICE)
    with pytest.raises(UsageError, match=r"'fa9' has no kernel here \(auto, standard, fa1, fa2"):
        flash_attn_func(q, q, q, schedule="fa9")


def test_a_cpu_tensor_without_the_interpreter_is_told_what_to_do():
    code = (
        "import torch; from fasim.kernels.ops import flash_attn_func; q = torch.zeros(1, 4, 1, 64).half()\n"
        "try: flash_attn_func(q, q, q)\n"
        "except ValueError as error: raise SystemExit(str(error))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(_without_interpreter()))
    assert "q is on 'cpu'" in done.stderr and "TRITON_INTERPRET=1" in done.stderr
    assert done.returncode == 1


def _without_interpreter():
    import os

    return ((name, value) for name, value in os.environ.items() if name != "TRITON_INTERPRET")
