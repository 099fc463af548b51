"""Which kernel takes the gradients, and what it is told: a CUDA backward where it is ready, Triton's everywhere else.

On the CPU a stand-in takes the place of the CUDA backward's launch.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

_spec = importlib.util.spec_from_file_location("triton_env", Path(__file__).with_name("triton_env.py"))
env = sys.modules.setdefault("triton_env", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(env)

import torch  # noqa: E402

if env.DEVICE != "cpu":
    pytest.skip("the stand-in for a launch is the CPU's", allow_module_level=True)

from fasim.kernels import backward, ops, reference  # noqa: E402
from fasim.kernels.cuda import driver, launch  # noqa: E402
from fasim.kernels.cuda.backward import config  # noqa: E402
from fasim.kernels.ops import flash_attn_func  # noqa: E402
from fasim.kernels.validation import subjects  # noqa: E402
from fasim.simulator.errors import UsageError  # noqa: E402

LAUNCH = "fasim.kernels.cuda.backward.launch"


@pytest.fixture
def launched(monkeypatch):
    """What the CUDA backward's launch was called with; gradients are the oracle's."""
    seen = []

    def stand_in(q, k, v, o, lse, do, dlse=None, *, causal, scale, schedule="fa3", deterministic=False):
        seen.append({"schedule": schedule, "deterministic": deterministic, "causal": causal, "scale": scale, "dlse": dlse})
        found = reference.attention_backward(q, k, v, do, scale, causal, dlse)
        return tuple(x.to(q.dtype) for x in found)

    monkeypatch.setitem(sys.modules, LAUNCH, SimpleNamespace(backward=stand_in))
    return seen


@pytest.fixture
def ready(monkeypatch, launched):
    """As on an H200 with a backward that was validated for head dim 64."""
    monkeypatch.setattr(backward, "chosen", lambda q, causal, *_: "lagged" if q.shape[3] == 64 else backward.TRITON)
    return launched


def gradients(head_dim=64, of_lse=False, attend=flash_attn_func, **how):
    """(found, expected) of a small causal problem."""
    q, k, v, do = env.inputs(1, 2, 1, 17, 20, head_dim)
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    o, lse = attend(*inputs, None, True, return_lse=True, **how)
    dlse = torch.randn(lse.shape, generator=torch.Generator().manual_seed(1)) if of_lse else None
    found = torch.autograd.grad((o, lse), inputs, (do, dlse)) if of_lse else torch.autograd.grad(o, inputs, do)
    return found, reference.attention_backward(q, k, v, do, None, True, dlse)


def right(found, expected):
    return all(env.relative_error(ours, theirs) < 3e-3 for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("of_lse", [False, True])
def test_a_ready_backward_takes_the_gradients_that_auto_asks_for(ready, of_lse):
    assert right(*gradients(of_lse=of_lse))
    (call,) = ready
    assert (call["schedule"], call["deterministic"], call["causal"], call["scale"]) == ("lagged", False, True, 0.125)
    assert (call["dlse"] is not None) == of_lse


def test_a_head_dim_that_is_not_ready_stays_with_triton(ready):
    assert right(*gradients(head_dim=128)) and ready == []


def test_the_same_bits_are_asked_for_by_the_argument_or_by_pytorchs_switch(ready):
    gradients(deterministic=True)
    gradients(num_splits=2, deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        gradients()
    finally:
        torch.use_deterministic_algorithms(False)
    gradients()
    assert [call["deterministic"] for call in ready] == [True, True, True, False]


def test_tritons_backward_has_the_same_bits_every_time():
    first, again = gradients()[0], gradients(deterministic=True)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_backward_can_be_asked_for_by_name(launched):
    assert right(*gradients(backward="fa3")) and [call["schedule"] for call in launched] == ["fa3"]
    assert right(*gradients(backward="fa2")) and len(launched) == 1


def test_a_launch_past_the_dispatcher_keeps_what_was_asked_of_its_gradients(launched, monkeypatch):
    class Plan:
        def run(self, q, k, v, softmax_scale):
            o, lse = reference.attention_forward(q, k, v, softmax_scale, True)
            return o.half(), lse.float()

    monkeypatch.setattr(ops, "_accept", lambda q, k, v, causal, schedule: (Plan(), q.shape[3]))
    assert right(*gradients(backward="fa3", deterministic=True))
    assert [(call["schedule"], call["deterministic"]) for call in launched] == [("fa3", True)]


def test_a_compiled_model_asks_for_the_same(ready):
    def compiled(q, k, v, scale, causal, return_lse, deterministic):
        return torch.compile(flash_attn_func, fullgraph=True, backend="aot_eager")(
            q, k, v, scale, causal, return_lse=return_lse, deterministic=deterministic
        )

    assert right(*gradients(attend=compiled, deterministic=True))
    assert [(call["schedule"], call["deterministic"]) for call in ready] == [("lagged", True)]


def test_opcheck_of_the_operator_that_asks_for_the_same_bits(ready):
    q, k, v, do = env.inputs(1, 2, 1, 17, 20, 64)
    o, lse = ops.attention(q, k, v, 0.125)
    torch.library.opcheck(ops.attention_backward, (do, q, k, v, o, lse, None, 0.125, False, True, "lagged"))
    torch.library.opcheck(ops.attention, (q.requires_grad_(), k, v, 0.125, True, "auto", True, "lagged"))


def test_auto_is_cuda_on_hopper_alone_and_where_it_can_be_compiled_or_is_found_compiled(monkeypatch):
    q = SimpleNamespace(is_cuda=True, shape=(1, 16, 1, 64), dtype=torch.bfloat16, get_device=lambda: 0)
    capability, compiler, compiled = [(9, 0)], ["13.0"], []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.setattr(backward.build, "compiler_version", lambda: compiler[0])
    monkeypatch.setattr(backward.build, "lookup", lambda source: compiled or None)
    monkeypatch.setattr(backward, "READY", {("bf16", 64, True): "fa3"})

    def chosen():
        backward._fits.cache_clear()
        return backward.chosen(q, causal=True)

    try:
        assert chosen() == "fa3"
        capability[0] = (8, 0)
        assert chosen() == "fa2"
        capability[0], compiler[0] = (9, 0), None
        assert chosen() == "fa2"
        compiled.append("a cubin")
        assert chosen() == "fa3"
        q.dtype = torch.float16
        assert chosen() == "fa2"
    finally:
        backward._fits.cache_clear()


def test_auto_takes_another_where_queries_and_keys_are_many_and_in_the_deterministic_mode(monkeypatch):
    monkeypatch.setattr(backward, "READY", {("bf16", 128, False): "lagged"})
    monkeypatch.setattr(backward, "LONG", {("bf16", 128, False): (4096, "across")})
    monkeypatch.setattr(backward, "SAME_BITS", {("bf16", 128, False): (2048, "apart")})
    monkeypatch.setattr(backward, "_fits", lambda *_: True)

    def chosen(queries, keys, same_bits=False):
        q = SimpleNamespace(is_cuda=True, shape=(1, queries, 1, 128), dtype=torch.bfloat16, get_device=lambda: 0)
        return backward.chosen(q, False, keys, same_bits)

    assert [chosen(4096, 4096), chosen(8192, None)] == ["across"] * 2
    assert [chosen(4096, 4095), chosen(4095, 9000)] == ["lagged"] * 2
    assert [chosen(2048, 2048, True), chosen(2048, 2047, True)] == ["apart", "lagged"]


def test_what_is_ready_has_a_kernel():
    more = [(kind, schedule) for table in (backward.LONG, backward.SAME_BITS) for kind, (_, schedule) in table.items()]
    for (dtype, head_dim, causal), schedule in (*backward.READY.items(), *more):
        config.config_for(schedule, dtype, head_dim, causal, deterministic=True, has_dlse=True)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"backward": "fa9"}, "backward='fa9' has no kernel here (auto, fa2, "),
        ({"backward": None}, "backward=None has no kernel here"),
        ({"backward": "fa3"}, "head_dim=256 is not supported by backward='fa3'"),
        ({"deterministic": "yes"}, "deterministic is 'yes' and must be True or False"),
    ],
)
def test_what_is_not_possible_is_said_before_the_forward_runs(how, said):
    q, k, v, _ = env.inputs(1, 1, 1, 5, 5, 256)
    with pytest.raises(UsageError) as caught:
        flash_attn_func(q, k, v, **how)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", subjects.GRADIENTS)
def test_each_cuda_backward_is_a_subject_of_validation_in_both_modes(name, launched):
    found = subjects.resolve(name)
    assert found.differentiable and found.needs_cuda and found.dq_is_deterministic == name.endswith("-deterministic")
    q, k, v, do = env.inputs(1, 2, 1, 17, 20, int(found.head_dims[0]))
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    o, lse = found.forward(*inputs, causal=True)
    assert right(torch.autograd.grad(o, inputs, do), reference.attention_backward(q, k, v, do, None, True))
    assert [(c["schedule"], c["deterministic"]) for c in launched] == [(name.split("-backward")[0], found.dq_is_deterministic)]
    assert lse.shape == (1, 2, 17) and all(path.is_file() for path in found.sources)


def test_the_launch_of_the_backward_calls_what_is_there():
    """It runs on a GPU alone: nothing else here would notice that a name is gone."""
    tree = ast.parse((config.HERE / "launch.py").read_text(encoding="utf-8"))
    rooms = {"launch": launch, "driver": driver, "build": backward.build, "torch": torch}
    used = {
        (each.value.id, each.attr)
        for each in ast.walk(tree)
        if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id in rooms
    }
    assert any(room == "launch" for room, _ in used)
    assert [f"{room}.{name}" for room, name in sorted(used) if not hasattr(rooms[room], name)] == []
