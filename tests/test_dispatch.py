"""What PyTorch's dispatcher must see, it sees: no tensor is launched on whose memory is not its value, no derivative is lost.

A launch past the dispatcher reads a tensor's memory and nothing else. Here one that does the same on the CPU stands in.
"""

from __future__ import annotations

import importlib.util
import sys
import weakref
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("triton_env", Path(__file__).with_name("triton_env.py"))
env = sys.modules.setdefault("triton_env", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(env)

import torch  # noqa: E402
from torch._C import DispatchKey  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402

if env.DEVICE != "cpu":
    pytest.skip("the stand-in for a launch reads the CPU's memory; test_cuda_gpu.py has the real one", allow_module_level=True)

from fasim.kernels import ops, reference  # noqa: E402
from fasim.kernels.ops import flash_attn_func  # noqa: E402
from fasim.simulator.errors import UsageError  # noqa: E402


class RawPlan:
    """A launch: reads memory by address, shape and strides, whatever else the tensor says of itself."""

    launches = 0

    def run(self, q, k, v, softmax_scale):
        self.launches += 1
        q, k, v = (
            torch.empty(0, dtype=x.dtype).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride()) for x in (q, k, v)
        )
        o, lse = reference.attention_forward(q, k, v, softmax_scale)
        return o.half(), lse.float()


def memory_of(x):
    """What lies where the tensor says that it lies."""
    return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


@pytest.fixture
def launch(monkeypatch):
    """Plain tensors are the CPU's, and a launch is a RawPlan's."""
    plan = RawPlan()
    keys = {name: ops._plain_keys("CPU", *more, "AutocastCPU") for name, more in KEYS.items()}
    for name, found in keys.items():
        monkeypatch.setattr(ops, name, found)
    monkeypatch.setattr(ops, "_plan", lambda q, k, v, causal, schedule: plan)
    monkeypatch.setattr(ops, "_accepted", {})
    return plan


KEYS = {"_PLAIN": ("ADInplaceOrView", "AutogradCPU"), "_PLAIN_INFERENCE": ()}


def plain():
    return env.inputs(1, 2, 1, 5, 6, 64)[:3]


def test_the_plain_key_sets_are_those_of_fresh_tensors(launch):
    assert torch._C._dispatch_keys(torch.zeros(2)) == ops._PLAIN
    with torch.inference_mode():
        assert torch._C._dispatch_keys(torch.zeros(2)) == ops._PLAIN_INFERENCE


def test_plain_tensors_are_launched_on_past_the_dispatcher(launch):
    q, k, v = plain()
    expected = reference.attention_forward(q, k, v).o
    assert env.relative_error(flash_attn_func(q, k, v), expected) < 1e-3
    flash_attn_func(q.clone().requires_grad_(), k, v)
    with torch.inference_mode():
        flash_attn_func(q.clone(), k.clone(), v.clone())
    assert launch.launches == 3


LAZY = {
    "negated view": lambda x: (torch._neg_view(x), -x),
    "imaginary part of a conjugate": lambda x: (torch.complex(x.float(), x.float()).to(torch.complex32).conj().imag, -x),
    "zero tensor": lambda x: (torch._efficientzerotensor(x.shape, dtype=x.dtype), x * 0),
    "functional wrapper": lambda x: (torch._to_functional_tensor(x), x),
    "subclass": lambda x: (x.as_subclass(Subclass), x),
}


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("kind", LAZY)
def test_a_tensor_whose_memory_is_not_its_value_counts_by_its_value(launch, kind, which):
    tensors = dict(zip("qkv", plain(), strict=True))
    odd, value = LAZY[kind](tensors[which])
    if torch._C._dispatch_keys(odd).has(DispatchKey.Functionalize):  # a wrapper has no memory to launch on
        assert ops._observed(odd, tensors["k"], tensors["v"])
        return
    got = flash_attn_func(**tensors | {which: odd})
    assert env.relative_error(got, reference.attention_forward(**tensors | {which: value}).o) < 1e-3


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("kind", LAZY)
def test_a_tensor_unlike_the_accepted_ones_of_its_shape_is_looked_at_anew(launch, kind, which):
    tensors = dict(zip("qkv", plain(), strict=True))
    flash_attn_func(**tensors)
    assert ops._accepted_before(**tensors, causal=False, schedule="auto") == (launch, 64)
    odd, value = LAZY[kind](tensors[which])
    assert ops._accepted_before(**tensors | {which: odd}, causal=False, schedule="auto") is None
    if torch._C._dispatch_keys(odd).has(DispatchKey.Functionalize):
        return
    got = flash_attn_func(**tensors | {which: odd})
    assert env.relative_error(got, reference.attention_forward(**tensors | {which: value}).o) < 1e-3


UNLIKE = {
    "shape": lambda x: x.reshape(1, x.shape[2], x.shape[1], 64),
    "strides": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "dtype": lambda x: x.bfloat16(),
    "device": lambda x: x.to("meta"),
    "requires_grad": lambda x: x.clone().requires_grad_(),
    "layout": lambda x: x.to_sparse(),
    "no tensor": lambda x: x.numpy(),
}


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("property_of", UNLIKE)
def test_what_was_accepted_is_known_again_by_all_that_a_launch_depends_on(launch, property_of, which):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(1, 4, 2, 64, generator=generator).half() for name in "qkv"}
    flash_attn_func(**tensors)
    assert ops._accepted_before(**tensors, causal=False, schedule="auto") == (launch, 64)
    other = UNLIKE[property_of](tensors[which])
    assert ops._accepted_before(**tensors | {which: other}, causal=False, schedule="auto") is None
    assert ops._accepted_before(**tensors, causal=True, schedule="auto") is None
    assert ops._accepted_before(**tensors, causal=False, schedule="fa2") is None


def test_inference_tensors_and_ordinary_ones_are_told_apart(launch):
    q, k, v = plain()
    with torch.inference_mode():
        inputs = q.clone(), k.clone(), v.clone()
        flash_attn_func(*inputs)
        assert ops._accepted_before(*inputs, False, "auto") == (launch, 64)
        assert ops._accepted_before(q, k, v, False, "auto") is None
    assert ops._accepted_before(q, k, v, False, "auto") is None


def test_one_tensor_in_two_places_is_launched_on_and_not_remembered(launch):
    q, k, _ = plain()
    expected = reference.attention_forward(q, k, k).o
    assert env.relative_error(flash_attn_func(q, k, k), expected) < 1e-3
    assert launch.launches == 1 and not ops._accepted


def test_what_is_remembered_keeps_no_tensor_alive_and_is_bounded(launch, monkeypatch):
    monkeypatch.setattr(ops, "_PLANS_KEPT", 2)
    for rows in range(1, 6):
        q, k, v = (torch.zeros(1, rows, 1, 64).half() for _ in range(3))
        flash_attn_func(q, k, v)
        assert ops._accepted_before(q, k, v, False, "auto") == (launch, 64) and 1 <= len(ops._accepted) <= 2
    gone = weakref.ref(q)
    del q
    assert gone() is None


def test_whoever_watches_sees_the_operator(launch):
    q, k, v = (torch.zeros(1, 4, 1, 64).half() for _ in range(3))
    flash_attn_func(q, k, v)

    def launched():
        return ops._accepted_before(q, k, v, False, "auto") is not None

    assert not ops._observed(q, q, q) and launched()
    assert ops._observed(q, q.as_subclass(Subclass), q)
    assert ops._observed(q, q.to("meta"), q)
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        assert ops._observed(q, q, q) and not launched()
    with TorchDispatchMode():
        assert ops._observed(q, q, q) and not launched()
    with torch.overrides.BaseTorchFunctionMode():
        assert ops._observed(q, q, q) and not launched()
    with forward_ad.dual_level():
        assert ops._observed(q, q, q) and not launched()
    assert torch.vmap(lambda x: x + int(ops._observed(q, q, q)))(torch.zeros(2)).tolist() == [1, 1]
    assert torch.vmap(lambda x: x + int(launched()))(torch.zeros(2)).tolist() == [0, 0]
    assert launched()


def twice(attend, needed=(0, 1, 2)):
    """The gradient of a penalty on gradients, with everything allowed that hides a missing one."""
    inputs = list(plain())
    for index in needed:
        inputs[index] = inputs[index].requires_grad_()
    wanted = [inputs[index] for index in needed]
    first = torch.autograd.grad(attend(*inputs).float().sum(), wanted, create_graph=True)
    penalty = sum(x.float().square().sum() for x in first) + 0 * wanted[0].float().sum()
    return torch.autograd.grad(penalty, wanted, allow_unused=True)


@pytest.mark.parametrize("needed", [(0, 1, 2), (2,)])
@pytest.mark.parametrize("path", ["launch", "operator", "through flash_attn_func"])
def test_a_second_derivative_is_refused_in_one_sentence(path, needed, request):
    if path == "launch":
        request.getfixturevalue("launch")
    attend = (lambda q, k, v: ops.attention(q, k, v, 0.1)[0]) if path == "operator" else flash_attn_func
    with pytest.raises(UsageError, match="attention has no second derivative here"):
        twice(attend, needed)


def test_a_second_derivative_of_a_compiled_call_is_refused():
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        twice(torch.compile(flash_attn_func, backend="aot_eager"))


def test_a_forward_mode_derivative_is_refused_and_not_dropped(launch):
    q, k, v = plain()
    with pytest.raises(UsageError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: flash_attn_func(x, k, v), (q,), (q,))
    with pytest.raises(UsageError, match="no forward-mode derivative"):
        torch.func.jvp(torch.vmap(lambda x: flash_attn_func(x, k, v)), (q[None],), (q[None],))
    with forward_ad.dual_level(), pytest.raises(UsageError, match="no forward-mode derivative"):
        flash_attn_func(q, forward_ad.make_dual(k, k), v)
    _, tangent = torch.func.jvp(lambda x: flash_attn_func(q, k, v) * x, (q,), (q,))  # a constant beside it is none
    assert tangent.any()


REFUSED = {
    "q is a sparse_coo tensor": lambda q: (q.to_sparse(), q, q),
    "k is a nested tensor": lambda q: (q, torch.nested.nested_tensor([q[0], q[0]]), q),
    "v is torch.qint8": lambda q: (q, q, torch.quantize_per_tensor(q.float(), 0.1, 0, torch.qint8)),
    "q is a ndarray; it must be a torch.Tensor": lambda q: (q.numpy(), q, q),
    "k is a NoneType": lambda q: (q, None, q),
    "q has shape ()": lambda q: (q[0, 0, 0, 0], q, q),
    "1,073,741,825 is not supported": lambda q: (q, *(q[:, :1].expand(-1, (1 << 30) + 1, -1, -1),) * 2),
    "needs 1,280 bytes and its storage holds 0": lambda q: (resized(q, 0), q, q),
    "needs 1,280 bytes and its storage holds 64": lambda q: (q, q, resized(q, 64)),
}


def resized(x, size):
    x = x.clone()
    x.untyped_storage().resize_(size)
    return x


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_dense_tensor_of_16_bits_is_said_in_one_sentence(message):
    q, _, _ = plain()
    with pytest.raises(UsageError) as caught:
        flash_attn_func(*REFUSED[message](q))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_operator_refuses_a_sparse_tensor_in_one_sentence():
    tensors = dict(zip("qkv", plain(), strict=True))
    for which, x in tensors.items():
        torch.ops.fasim.attention(*(tensors | {which: x.new_zeros(()).expand(x.shape)}).values(), 0.1)
        with pytest.raises(UsageError, match=f"{which} is a sparse_coo tensor; the kernels take dense ones"):
            torch.ops.fasim.attention(*(tensors | {which: x.to_sparse()}).values(), 0.1)  # its strides are as those: 0


@pytest.mark.parametrize("causal", [None, "no", 2, 0.0, 0.125, torch.tensor(True), []], ids=repr)
def test_causal_is_a_truth_value_and_nothing_else(launch, causal):
    q, k, v = plain()
    with pytest.raises(UsageError, match="causal is .* and must be True or False"):
        flash_attn_func(q, k, v, causal=causal)


@pytest.mark.parametrize("schedule", [None, [], {}, 3, b"fa2"], ids=repr)
def test_a_schedule_is_a_name_and_nothing_else(launch, schedule):
    q, k, v = plain()
    with pytest.raises(UsageError, match="has no kernel here"):
        flash_attn_func(q, k, v, schedule=schedule)


def test_gradients_that_do_not_fit_are_refused_before_memory_is_read():
    q, k, v = plain()
    o, lse = flash_attn_func(q, k, v, return_lse=True)
    with pytest.raises(UsageError, match=r"do is \(1, 4, 2, 64\).* must be \(1, 5, 2, 64\)"):
        ops.attention_backward(o[:, :4], q, k, v, o, lse, None, 0.1)
    with pytest.raises(UsageError, match="lse is .*float16"):
        ops.attention_backward(o, q, k, v, o, lse.half(), None, 0.1)
    with pytest.raises(UsageError, match="its storage holds 0"):
        ops.attention_backward(resized(o, 0), q, k, v, o, lse, None, 0.1)
