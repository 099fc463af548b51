"""Whatever callable is held to the suite: a report, never a traceback; refusals told from faults; each said once."""

from __future__ import annotations

import functools
import json
import random
import sys
import warnings

import pytest

torch = pytest.importorskip("torch")

from fasim.kernels.validation import calls, report, state, subjects, suite  # noqa: E402
from fasim.kernels.validation.check import Case, HeadDim  # noqa: E402
from fasim.kernels.validation.mutants import TiledAttention  # noqa: E402
from fasim.simulator.errors import UsageError  # noqa: E402

right = TiledAttention()


def held(forward, only=("memory",), **promises):
    """The report on `forward` as the user's own kernel, at head dims 16 and 32."""
    options = {"head_dims": (HeadDim(16), HeadDim(32)), "tile": 16, "slow": True, "strict": False} | promises
    return suite.validate(
        subjects.Subject(name="mine:f", forward=forward, **options), device="cpu", quick=True, only=only
    )


def wrapped(change):
    """A right kernel whose answer (O, LSE) goes through `change`."""

    def forward(q, k, v, causal=False, softmax_scale=None):
        return change(*right(q, k, v, causal=causal, softmax_scale=softmax_scale))

    return forward


def raising(error, when=lambda q, k: True):
    def forward(q, k, v, causal=False, softmax_scale=None):
        if when(q, k):
            raise error
        return right(q, k, v, causal=causal, softmax_scale=softmax_scale)

    return forward


class Backward(torch.autograd.Function):
    """A right forward whose backward does what it is told."""

    @staticmethod
    def forward(ctx, q, k, v, options, act):
        ctx.act, ctx.shapes = act, [x.shape for x in (q, k, v)]
        return right(q, k, v, **options)[0]

    @staticmethod
    def backward(ctx, do):
        return *ctx.act(ctx, do), None, None


def with_backward(act):
    return lambda q, k, v, **options: Backward.apply(q, k, v, options, act)


def throw(error):
    raise error


class Odd(torch.Tensor):
    """A subclass that can do nothing."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError("Odd does nothing")


class Speechless(Exception):
    def __str__(self):
        raise ValueError("no words")


def deep(q, k, v, causal=False, softmax_scale=None):
    return deep(q, k, v)


def leaves_grad_mode_off(q, k, v, **options):
    answer = right(q, k, v, **options)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    return answer


def resizes_its_input(q, k, v, **options):
    answer = right(q, k, v, **options)
    q.detach().set_(torch.zeros(1, dtype=q.dtype))
    return answer


def inference(q, k, v, **options):
    with torch.inference_mode():
        return right(q, k, v, **options)


def yields(q, k, v, causal=False, softmax_scale=None):
    yield q


def warns(q, k, v, **options):
    warnings.warn("slow path", stacklevel=1)
    return right(q, k, v, **options)


FAULTS = {
    "None": (lambda q, k, v, **_: None, "O is a NoneType"),
    "an empty tuple": (lambda q, k, v, **_: (), "O is a tuple"),
    "a dict": (lambda q, k, v, **_: {"o": q}, "O is a dict"),
    "a number": (lambda q, k, v, **_: 1.0, "O is a float"),
    "a generator": (yields, "O is a generator"),
    "NaN": (wrapped(lambda o, lse: o * float("nan")), "NaN or Inf"),
    "another device": (wrapped(lambda o, lse: o.to("meta")), "device meta"),
    "another dtype": (wrapped(lambda o, lse: o.double()), "dtype torch.float64"),
    "another shape": (wrapped(lambda o, lse: o.flatten()), "O has shape"),
    "sparse": (wrapped(lambda o, lse: o.to_sparse()), "O has layout torch.sparse_coo"),
    "a word for LSE": (wrapped(lambda o, lse: (o, "lse")), "LSE is a str"),
    "an LSE that is off": (wrapped(lambda o, lse: (o, lse + 1.0)), "LSE"),
    "SystemExit": (raising(SystemExit(3)), "raised SystemExit: 3"),
    "GeneratorExit": (raising(GeneratorExit()), "raised GeneratorExit"),
    "BaseException": (raising(BaseException("odd")), "raised BaseException: odd"),
    "StopIteration": (raising(StopIteration()), "raised StopIteration"),
    "MemoryError": (raising(MemoryError()), "raised MemoryError"),
    "an exception without words": (raising(Speechless()), "raised Speechless: (no message)"),
    "RuntimeError": (raising(RuntimeError("no kernel image")), "raised RuntimeError: no kernel image"),
    "CUDA error": (raising(RuntimeError("CUDA error: operation not supported")), "raised RuntimeError: CUDA error"),
    "recursion": (deep, "raised RecursionError"),
    "KeyError": (raising(KeyError("d")), "raised KeyError"),
    "a resized input": (resizes_its_input, "q"),
    "grad mode": (leaves_grad_mode_off, "changes the default dtype"),
    "exit in backward": (with_backward(lambda ctx, do: throw(SystemExit(1))), "backward raised SystemExit: 1"),
    "None from backward": (with_backward(lambda ctx, do: (None, None, None)), "dQ is missing"),
    "gradients of another dtype": (with_backward(lambda ctx, do: [torch.zeros(x) for x in ctx.shapes]), "dQ"),
    "a shape of its own in backward": (with_backward(lambda ctx, do: (do[:, :1],) * 3), "backward raised RuntimeError"),
    "too few gradients": (with_backward(lambda ctx, do: (do,)), "backward raised RuntimeError"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_whatever_a_subject_returns_or_raises_is_a_failed_check(name):
    forward, words = FAULTS[name]
    before = state.read()
    found = held(forward, only=("memory", "process") if name == "grad mode" else ("memory",))
    assert not found.passed and found.failures, found.conclusion
    assert any(words in check.message for check in found.failures), [check.message for check in found.failures]
    json.dumps(found.to_dict(), allow_nan=False)
    report.junit([found])
    assert [name for name in state.put_back(before) if "random" not in name] == []


@pytest.mark.parametrize(
    "forward",
    [
        inference,
        warns,
        wrapped(lambda o, lse: [o, lse]),
        wrapped(lambda o, lse: (o, None)),
        wrapped(lambda o, lse: (o, lse, "more", 4)),
        wrapped(lambda o, lse: o.detach()),
        wrapped(lambda o, lse: o.as_subclass(Odd)),
        wrapped(lambda o, lse: -torch._neg_view(o)),
        functools.partial(right, softmax_scale=None),
        right.__call__,
        lambda q, k, v, causal, softmax_scale: right(q, k, v, causal=causal, softmax_scale=softmax_scale),
    ],
    ids="inference warns list None tuple detached subclass negated partial method lambda".split(),
)
def test_a_right_kernel_passes_in_whatever_wrapping(forward):
    found = held(forward)
    assert found.passed, [check.message for check in found.failures]


def test_an_nn_module_is_a_kernel():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v, causal=False, softmax_scale=None):
            return right(q, k, v, causal=causal, softmax_scale=softmax_scale)

    assert held(Attention(), only=("determinism",)).passed


def test_a_kernel_that_raises_at_random_does_not_pass():
    luck = random.Random(0)
    found = held(raising(ValueError("unlucky"), when=lambda q, k: luck.random() < 0.3))
    assert not found.passed and any("unlucky" in check.message for check in found.failures)


# -- refusals ---------------------------------------------------------------------------------------------------------


def refuse(condition, error):
    """A right kernel that states a limit."""

    def forward(q, k, v, causal=False, softmax_scale=None):
        if condition(q, k):
            raise error
        return right(q, k, v, causal=causal, softmax_scale=softmax_scale)

    return forward


REFUSALS = (
    NotImplementedError("d"),
    ValueError("d 32 only"),
    TypeError("d 32 only"),
    AssertionError("d 32 only"),
    RuntimeError("FlashAttention only supports head dimension 32"),
)


@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
def test_a_head_dim_that_is_refused_is_said_once_and_the_others_are_checked(error):
    found = held(refuse(lambda q, k: q.shape[-1] == 16, error), only=("determinism",))
    assert found.passed
    (skipped,) = (check for check in found.checks if check.verdict == "skip")
    assert (skipped.group, skipped.case) == ("survey", "head dim 16") and str(error) in skipped.message


def test_a_length_that_is_refused_is_not_applicable_and_one_that_breaks_is_a_fault():
    ragged = lambda q, k: q.shape[1] % 16 or k.shape[1] % 16  # noqa: E731
    stated = held(refuse(ragged, ValueError("lengths must be multiples of 16")))
    assert stated.passed and any("multiples of 16" in check.message for check in stated.checks if check.verdict == "skip")

    def breaks(q, k, v, causal=False, softmax_scale=None):
        q.unflatten(1, (-1, 16)), k.unflatten(1, (-1, 16))  # PyTorch's complaint, not the kernel's
        return right(q, k, v, causal=causal, softmax_scale=softmax_scale)

    broken = held(breaks)
    assert not broken.passed and any("raised RuntimeError" in check.message for check in broken.failures)


def test_a_complaint_about_the_values_is_a_fault():
    found = held(refuse(lambda q, k: not torch.isfinite(q).all(), ValueError("q is not finite")), only=("inputs",))
    assert not found.passed
    assert any("but not on the same shapes with other values" in check.message for check in found.failures)


def test_a_kernel_that_promises_what_it_is_asked_may_only_raise_not_implemented():
    assert held(refuse(lambda q, k: True, ValueError("no")), strict=True).failures
    assert not held(refuse(lambda q, k: True, NotImplementedError("no")), strict=True).failures


def test_a_kernel_that_refuses_everything_is_not_validated():
    found = held(refuse(lambda q, k: True, ValueError("only on Tuesdays")))
    assert not found.passed and not found.failures and "not validated" in found.conclusion
    assert [check.case for check in found.checks] == ["forward at head dims 16, 32"]


@pytest.mark.parametrize("error", [RuntimeError("This build does not support backward."), NotImplementedError()])
def test_a_kernel_without_a_backward_says_so_once(error):
    found = held(with_backward(lambda ctx, do: throw(error)), only=("determinism",))
    assert found.passed, [check.message for check in found.failures]
    said = [check for check in found.checks if check.group == "survey"]
    assert len(said) == 1 and "backward" in said[0].message
    assert {check.message for check in found.of("determinism") if check.verdict == "skip"} == {"forward only"}


def test_a_backward_that_fails_at_once_fails_once():
    found = held(with_backward(lambda ctx, do: throw(ZeroDivisionError("x"))), only=("determinism",))
    assert [check.group for check in found.failures] == ["survey"] and "ZeroDivisionError" in found.failures[0].message


def test_forward_only_asks_for_no_gradients():
    wrong = with_backward(lambda ctx, do: [torch.ones(x, dtype=do.dtype) for x in ctx.shapes])
    kernel = subjects.Subject(name="mine:f", forward=wrong, tile=16, slow=True)
    found = suite.validate(kernel, device="cpu", quick=True, only=("determinism",), forward_only=True, head_dims=[16])
    assert found.passed and "--forward-only" in found.options and "--head-dim 16" in found.options


# -- head dims, arguments, names --------------------------------------------------------------------------------------


def test_vs_head_dim_may_differ():
    kernel = subjects.Subject(name="mine:f", forward=right, tile=16, slow=True)
    found = suite.validate(kernel, device="cpu", quick=True, only=["process", "determinism"], head_dims=["24x16"])
    assert found.passed, [check.message for check in found.failures]
    assert "--head-dim 24x16" in found.options


def test_a_head_dim_reads_as_it_is_given():
    wide = subjects.head_dim("192x128")
    assert (int(wide), wide.v, str(wide), f"d{wide}") == (192, 128, "192x128", "d192x128")
    assert wide != subjects.head_dim(192) and subjects.head_dim("128") == 128 == HeadDim(128)
    case = Case(name="x", seqlen_q=2, seqlen_k=3, head_dim=wide)
    assert (case.q_shape, case.k_shape, case.v_shape, case.o_shape) == (
        (1, 2, 2, 192), (1, 3, 2, 192), (1, 3, 2, 128), (1, 2, 2, 128)
    )  # fmt: skip
    for text in ("0", "-64", "64x", "x", "64x64x64", "1e2", "６４", "100000", "64 "):
        with pytest.raises(UsageError, match="--head-dim"):
            subjects.head_dim(text)


MODULE = """
import sys
from fasim.kernels.validation.subjects import resolve
right = resolve("torch-math").forward
def attention(q, k, v, causal=False, softmax_scale=None, *, loud=None):
    print("printed by the kernel")
    assert loud == 2
    return right(q, k, v, causal=causal, softmax_scale=softmax_scale)
class Kernel:
    def method(self, q, k, v, causal=False, softmax_scale=None):
        return right(q, k, v, causal=causal, softmax_scale=softmax_scale)
kernel = Kernel()
def __getattr__(name):
    raise SystemExit(name) if name == "leaves" else ZeroDivisionError(name)
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A working directory with the user's modules."""
    (tmp_path / "odd_attention.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "leaves_at_import.py").write_text("raise SystemExit(3)", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("odd_attention", None)


OPTIONS = ("--device", "cpu", "--quick", "--only", "determinism", "--head-dim", "16")


@pytest.mark.usefixtures("user")
def test_other_arguments_reach_the_kernel_and_what_it_prints_stays_off_stdout(fasim):
    status, out, _ = fasim("validate", "odd_attention:attention", "--with", "loud=2", *OPTIONS, "--json")
    assert status == 0 and json.loads(out)[0]["verdict"] == "pass"  # nothing but JSON
    status, out, _ = fasim("validate", "odd_attention:attention", "--with", "loud=3", *OPTIONS)
    assert status == 1 and "not validated" in out


@pytest.mark.usefixtures("user")
def test_a_bound_method_and_a_built_in_are_callables(fasim):
    assert fasim("validate", "odd_attention:kernel.method", *OPTIONS)[0] == 0
    assert fasim("validate", "math:hypot", *OPTIONS)[0] in (1, 2)


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (("odd_attention:nothing",), "ZeroDivisionError"),
        (("odd_attention:leaves",), "SystemExit"),
        (("leaves_at_import:f",), "cannot import 'leaves_at_import': SystemExit"),
        ((":f",), "cannot import"),
        (("odd_attention:",), "odd_attention"),
        (("odd_attention:kernel.method", "--with", "loud=3"), "does not take the arguments"),
        (("odd_attention:attention", "--with", "loud=__import__('os')"), "--with"),
        (("torch-math", "--with", "a=1"), "--with"),
        (("odd_attention:attention", "--head-dim", "wide"), "--head-dim"),
    ],
)
def test_a_name_an_argument_or_a_head_dim_that_is_none_is_one_sentence(fasim, tokens, words):
    status, out, err = fasim("validate", *tokens, "--device", "cpu")
    assert (status, out, err.count("\n")) == (2, "", 1) and words in err


def test_a_wrong_name_is_said_before_torch_is_missed(fasim, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "fasim.kernels.validation.suite", raising=False)
    status, _, err = fasim("validate", "nosuch")
    assert status == 2 and "no kernel is called 'nosuch'" in err


# -- the process ------------------------------------------------------------------------------------------------------


def test_what_a_call_changes_is_named_and_put_back():
    with calls.contained() as changed:
        torch.set_default_dtype(torch.bfloat16)
        torch.rand(1)
        sys.setrecursionlimit(sys.getrecursionlimit() + 1)
    assert changed == ["the default dtype", "PyTorch's random numbers", "the recursion limit"]
    assert state.decisive(changed) == changed[:2]
    assert torch.get_default_dtype() == torch.float32


def test_what_decides_nothing_is_a_note():
    def shuffles(q, k, v, **options):
        random.random()
        return right(q, k, v, **options)

    found = held(shuffles, only=("process",))
    assert found.passed and found.notes and "Python's random numbers" in found.notes[0].message
