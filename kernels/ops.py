"""The kernels as PyTorch operators: `flash_attn_func`, differentiable, traceable by torch.compile, on any stream.

`fasim::attention` (O and LSE) is registered here, `fasim::attention_backward` (dQ, dK, dV) in `backward.py`, those of FP8 in
`fp8/operator.py`, those of few queries in `decode/operator.py` and, against a cache in pages, `decode/cache.py`, those of packed
sequences in `varlen/operator.py`. Kernels are imported on first use. Where nobody traces, a CUDA kernel is launched past the
dispatcher, whose price is several times its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..simulator.errors import UsageError
from .arguments import check_inputs, check_storage, flag_of, is_dense, scale_of
from .backward import asked, attention_backward, differentiate, keep
from .compile import build
from .cuda import config as cuda
from .cuda import fastest
from .cuda.pairs import config as pairs
from .decode import operator as few_queries
from .decode.cache import flash_attn_with_kvcache
from .device import check_runnable, on_device
from .fp8.arguments import Descales
from .fp8.operator import attend, flash_attn_fp8, is_e4m3
from .gluon import config as gluon
from .varlen.operator import flash_attn_varlen_func

if TYPE_CHECKING:
    from .cuda.launch import Plan as CudaPlan
    from .gluon.launch import Plan as GluonPlan
    from .launch.fa2 import Plan as TritonPlan

    Plan = CudaPlan | GluonPlan | TritonPlan

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # not in this PyTorch: every call is checked in full
    TensorGuards = None

__all__ = [
    "SCHEDULES",
    "attention",
    "attention_backward",
    "flash_attn_fp8",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "runnable",
]

TRITON = {"standard": ".triton.standard", "fa1": ".triton.fa1", "fa2": ".triton.fa2"}
"""Schedule -> module whose `forward(q, k, v, softmax_scale, causal) -> (O, LSE)` runs it."""

SCHEDULES = (*TRITON, *cuda.available())
"""Every schedule that has a kernel."""

BACKENDS = {"triton": tuple(TRITON), "cuda": cuda.available(), "gluon": gluon.SCHEDULES}
"""What a kernel is written in -> the schedules that are."""


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    schedule: str = "auto",
    return_lse: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    num_splits: int | None = None,
    deterministic: bool = False,
    backward: str = "auto",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * Q K^T) V by a kernel of ours, O shaped as q; with return_lse, (O, LSE).

    q is (B, S_q, H, D), k and v are (B, S_k, H_kv, D): fp16 or bf16, D of 64, 128 or 256, H a multiple of H_kv, any
    lengths and strides. LSE is (B, H, S_q), fp32, natural logarithm. A causal mask is bottom-right aligned; a row that sees
    no key gives O = 0, LSE = -inf. `schedule` is one of SCHEDULES or "auto". Both outputs are differentiable, once.
    At D of 64 it may be one of pairs.NAMES too, kernels for short rows whose CTAs share an SM, of which "auto" knows by shape.
    `backend` is "auto" or one of BACKENDS, and then `schedule` one of that backend's. Those in Gluon have been held to fp64 at D of
    128 only, "persistent" nowhere; at 64 and 256 nobody has yet.

    `softmax_scale` is a number within -65,536 and 65,536; None is 1/sqrt(D). A negative one prefers the lowest scores. At 0,
    -0.0 and magnitudes below 2^-126, which are 0 in the GPU's fp32, all keys that a row sees weigh the same and dQ = dK = 0.
    Larger magnitudes, infinities and NaN are refused. P has a relative error of |scale * S| 2^-24 and
    dQ and dK one of |scale| times the rounding of O, as of every kernel that keeps S in fp32 and O in 16 bits.

    In FP8, forward only, q, k and v are torch.float8_e4m3fn alike and O is bf16. A descale is fp32 of (B, H_kv): what an element
    stands for is its value times the descale of its batch entry and K/V head, q's shared by a group's query heads; None is 1.
    softmax_scale is above 0. It runs on an H100 or H200, and is emulated, slowly, on the CPU. `fp8.operator.flash_attn_fp8` takes
    16-bit tensors and quantises them.

    Few queries against many keys (decoding: at most 64 query rows for each K/V head) are given by "auto" to a kernel that reads
    each K/V head once and walks its keys in parts, which a second kernel combines. `num_splits`, from 1 to 256, asks for that
    kernel with so many parts, at any shape; None has the kernel and the parts chosen. Deterministic. Launching it costs the host
    more than a short cache takes the GPU: below some 100 MB of K and V it pays in a CUDA graph, else schedule="fa3" is sooner.

    Gradients are taken by one of backward.SCHEDULES, by "auto" with a CUDA kernel where there is one that was validated on such
    a GPU (backward.READY), else with Triton's. With `deterministic`, or under torch.use_deterministic_algorithms, they have the
    same bits every time; O, LSE, dK and dV always have.

    Raises UsageError, one sentence, for whatever is not supported, and when a second derivative is asked for.
    """
    causal, schedule = flag_of(causal), _known(schedule) if backend == "auto" else _written_in(backend, schedule)
    how = (False, "auto")
    if deterministic is not False or backward != "auto":
        how = asked(deterministic, backward, _head_dim(q))
    if num_splits is not None:
        o, lse = _in_parts(q, k, v, (q_descale, k_descale, v_descale), softmax_scale, causal, schedule, num_splits, how)
        return (o, lse) if return_lse else o
    found = None
    if q_descale is k_descale is v_descale is None:
        found = _accepted_before(q, k, v, causal, schedule)
    if found is None:
        descales = (q_descale, k_descale, v_descale)
        if is_e4m3(q, k, v) or any(x is not None for x in descales):
            o, lse = _in_fp8(q, k, v, descales, softmax_scale, causal, schedule)
            return (o, lse) if return_lse else o
        found = _accept(q, k, v, causal, schedule)
    plan, head_dim = found
    softmax_scale = scale_of(softmax_scale, head_dim)
    if plan is None:
        o, lse = attention(q, k, v, softmax_scale, causal, schedule, *how)
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        o, lse = _Recorded.apply(q, k, v, softmax_scale, causal, plan, *how)
    else:
        o, lse = plan.run(q, k, v, softmax_scale)
    return (o, lse) if return_lse else o


def _in_fp8(
    q: Tensor, k: Tensor, v: Tensor, descales: Descales, softmax_scale: float | None, causal: bool, schedule: str
) -> tuple[Tensor, Tensor]:
    """O and LSE of e4m3 tensors, past the dispatcher where it has nothing to do."""
    if schedule not in ("auto", FASTEST_ON_HOPPER):
        raise UsageError(f"schedule={schedule!r} has no FP8 kernel (auto, {FASTEST_ON_HOPPER})")
    if not torch.compiler.is_compiling():
        _check_tangents(q, k, v, *descales)
    tensors = (q, k, v, *(x for x in descales if x is not None))
    observed = any(_observed(x, x, x) for x in tensors) if all(isinstance(x, Tensor) for x in tensors) else True
    return attend(q, k, v, descales, softmax_scale, causal, observed)


def _in_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    descales: Descales,
    softmax_scale: float | None,
    causal: bool,
    schedule: str,
    num_splits: int,
    how: tuple[bool, str],
) -> tuple[Tensor, Tensor]:
    """O and LSE by the decode kernel's operator."""
    num_splits = few_queries.checked_splits(num_splits)
    if schedule != "auto":
        raise UsageError(f"schedule={schedule!r} does not walk its keys in parts: leave schedule or num_splits out")
    if is_e4m3(q, k, v) or any(x is not None for x in descales):
        raise UsageError("num_splits is for float16 and bfloat16: leave it out for FP8")
    if not torch.compiler.is_compiling():
        _check_tangents(q, k, v)
        check_inputs(q, k, v, "decode")
    return few_queries.decode(q, k, v, scale_of(softmax_scale, q.shape[-1]), causal, num_splits, *how)


def runnable(device: str | torch.device) -> tuple[str, ...]:
    """The schedules that run on a device: those in CUDA C++ need compute capability 9.0."""
    hopper = torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return SCHEDULES if hopper else tuple(TRITON)


def _accepted_before(q: Tensor, k: Tensor, v: Tensor, causal: bool, schedule: str) -> tuple[Plan | few_queries.Plan, int] | None:
    """What _accept said of tensors that are in no respect unlike these, where it chose a launch and nobody watches."""
    if _watched() or not (type(q) is type(k) is type(v) is Tensor):
        return None
    found = _accepted.get((q.numel(), k.numel(), causal, schedule))
    return found[1] if found is not None and found[0](q, k, v) else None


def _accept(q: Tensor, k: Tensor, v: Tensor, causal: bool, schedule: str) -> tuple[Plan | few_queries.Plan | None, int]:
    """The plan to launch past the dispatcher or None where the operator is to be called, and head_dim; all is checked."""
    if _observed(q, k, v):
        if not torch.compiler.is_compiling():
            _check_tangents(q, k, v)
            check_inputs(q, k, v, "fa2" if schedule == "auto" else schedule)
        return None, q.shape[-1]
    answer = _plan(q, k, v, causal, schedule), q.shape[-1]
    if answer[0] is not None and TensorGuards and q is not k and k is not v and v is not q:  # the guard takes no tensor for two
        if len(_accepted) >= _PLANS_KEPT:
            _accepted.clear()
        with suppress(TypeError, ValueError, RuntimeError):  # made otherwise in this PyTorch: every call is checked in full
            alike = TensorGuards(q, k, v, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
            _accepted[q.numel(), k.numel(), causal, schedule] = alike, answer
    return answer


# torch.compile's own guard: one call compares type, key set as the dispatcher sees it, dtype, device, requires_grad, shape
# and strides of all three tensors. Asking for them one by one takes twelve objects and three times as long.
_accepted: dict[tuple, tuple[Callable[[Tensor, Tensor, Tensor], bool], tuple[Plan | few_queries.Plan, int]]] = {}


def _observed(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the dispatcher has work to do before or instead of a launch: someone watches, or these are not the plain tensors
    of a CUDA device (but subclasses, negated views, zero tensors, wrappers, other devices).
    """
    return (
        _watched()
        or not (type(q) is type(k) is type(v) is Tensor)
        or not ((keys := _keys_of(q)) == _keys_of(k) == _keys_of(v) and keys in (_PLAIN, _PLAIN_INFERENCE))
    )


def _watched() -> bool:
    """Whether a tracer, a mode, a transform or forward AD is at work in this thread."""
    return bool(
        torch.compiler.is_compiling()
        or _function_modes()
        or _dispatch_modes()
        or _transform() is not None
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def _check_tangents(*tensors: Tensor) -> None:
    """Raise UsageError where an input carries a forward-mode derivative: PyTorch drops it in silence at such an operator."""
    if forward_ad._current_level < 0:
        return
    try:
        carried = any(forward_ad.unpack_dual(x).tangent is not None for x in tensors if isinstance(x, Tensor))
    except RuntimeError:  # vmap inside jvp cannot tell
        carried = True
    if carried:
        raise UsageError("attention has no forward-mode derivative here (jvp, jacfwd): use backward, or vjp")


def _plain_keys(*names: str) -> torch._C.DispatchKeySet:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys.add(getattr(torch._C.DispatchKey, name))
    return keys


# What a tensor asks of the dispatcher is written in its key set (c10/core/DispatchKeySet.h). One set is allowed, not some
# others forbidden: whatever PyTorch adds next goes through the dispatcher too.
_PLAIN = _plain_keys("CUDA", "ADInplaceOrView", "AutogradCUDA", "AutocastCUDA")
_PLAIN_INFERENCE = _plain_keys("CUDA", "AutocastCUDA")

# Looked up once: a call asks all of them.
_keys_of = torch._C._dispatch_keys
_function_modes = torch._C._len_torch_function_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state


PLANNED_FA2 = False
"""Whether `fa2` is launched past Triton's launcher (launch/fa2.py): off until that has run on a GPU. Then forget_plans."""


def forget_plans() -> None:
    """Choose and check anew at the next call."""
    _plans.clear()


_plans: dict[tuple, Plan | few_queries.Plan | None] = {}
_PLANS_KEPT = 1024


def _plan(q: Tensor, k: Tensor, v: Tensor, causal: bool, schedule: str) -> Plan | few_queries.Plan | None:
    """How a CUDA kernel or the decode kernel is launched on tensors like these, or None where another Triton kernel is to run.

    Tensors that were accepted once are not checked again.
    """
    # fmt: off
    key = (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(),
        q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, causal, schedule,
    )
    # fmt: on
    try:
        return _plans[key]
    except KeyError:
        pass
    check_inputs(q, k, v, "fa2" if schedule == "auto" else schedule)
    name = _resolve(schedule, q, causal, k.shape[1])
    plan = few_queries.plan_for(q, k, causal) if schedule == "auto" else None
    if plan is None and name == FASTEST_ANYWHERE and PLANNED_FA2 and q.is_cuda:
        from .launch.fa2 import plan_for

        plan = plan_for(q, k, v, causal)
    elif plan is None and name not in TRITON:
        if name.startswith(gluon.PREFIX):
            from .gluon.launch import plan_for

            name = name.removeprefix(gluon.PREFIX)
        elif name in pairs.NAMES:
            from .cuda.pairs.launch import plan_for
        else:
            from .cuda.launch import plan_for
        plan = plan_for(q.shape, k.shape, q.stride(), k.stride(), v.stride(), q.dtype, causal, name, q.get_device())
    if len(_plans) >= _PLANS_KEPT:
        _plans.clear()
    _plans[key] = plan
    return plan


@torch.library.custom_op("fasim::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool = False,
    schedule: str = "auto",
    deterministic: bool = False,
    backward: str = "auto",
) -> tuple[Tensor, Tensor]:
    """O and LSE by the schedule's kernel; arguments as of flash_attn_func, the last two for the gradients alone."""
    if not (is_dense(q) and is_dense(k) and is_dense(v)):  # the rest is _plan's to check
        check_inputs(q, k, v, "fa2" if schedule == "auto" else schedule)
    plan, softmax_scale = _plan(q, k, v, causal, _known(schedule)), scale_of(softmax_scale, q.shape[3])
    if plan:
        return plan.run(q, k, v, softmax_scale)
    check_runnable(q)
    for x in (q, k, v):
        check_storage(x)
    kernel = import_module(TRITON[_resolve(schedule, q, causal)], __package__)
    if softmax_scale < 0:  # the kernels take their maxima before they scale
        q, softmax_scale = -q, -softmax_scale
    with on_device(q):
        return kernel.forward(q, k, v, softmax_scale, causal)


@attention.register_fake
def _(q, k, v, softmax_scale, causal=False, schedule="auto", deterministic=False, backward="auto"):
    check_inputs(q, k, v, "fa2" if schedule == "auto" else schedule)
    batch, seqlen_q, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)


attention.register_autograd(differentiate, setup_context=keep)
few_queries.decode.register_autograd(differentiate, setup_context=keep)


class _Recorded(torch.autograd.Function):
    """The operator's gradient without the operator: recording through the dispatcher takes 30 us more."""

    @staticmethod
    def forward(ctx, q, k, v, softmax_scale, causal, plan, deterministic, backward_schedule):
        o, lse = plan.run(q, k, v, softmax_scale)
        keep(ctx, (q, k, v, softmax_scale, causal, None, deterministic, backward_schedule), (o, lse))
        return o, lse

    backward = staticmethod(differentiate)


def _resolve(schedule: str, q: Tensor, causal: bool, seqlen_k: int = 0) -> str:
    """The schedule that "auto" stands for, for tensors like q and so many keys."""
    if schedule != "auto":
        return schedule
    if not q.is_cuda:
        return FASTEST_ANYWHERE
    kind = (q.get_device(), q.dtype, q.shape[3], causal)
    name, by_shape = _fastest(*kind), fastest.by_shape(q.shape[3], causal, seqlen_k)
    if name == FASTEST_ON_HOPPER != by_shape and _fastest(*kind, by_shape) == by_shape:
        return by_shape
    return name


FASTEST_ANYWHERE = "fa2"
FASTEST_ON_HOPPER = fastest.MOSTLY


@lru_cache(maxsize=256)
def _fastest(device: int, dtype: torch.dtype, head_dim: int, causal: bool, name: str = FASTEST_ON_HOPPER) -> str:
    """`name` where its kernel is for this GPU and can be had: compiled here or found compiled; else FASTEST_ANYWHERE."""
    if name not in (*cuda.available(), *pairs.NAMES) or torch.cuda.get_device_capability(device) != (9, 0):
        return FASTEST_ANYWHERE
    config_for = pairs.config_for if name in pairs.NAMES else cuda.config_for
    kernel = config_for(name, {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype], head_dim, causal)
    can_be_had = build.compiler_version() is not None or build.lookup(kernel.source) is not None
    return name if can_be_had else FASTEST_ANYWHERE


def _head_dim(q: Tensor) -> int:
    """Of tensors that are not checked yet: one that every backward takes where q has none."""
    return q.shape[-1] if isinstance(q, Tensor) and q.dim() else 128


def _known(schedule: str) -> str:
    """`schedule`; UsageError unless it is "auto", one of SCHEDULES, or one in Gluon or of pairs by its name among kernels."""
    if isinstance(schedule, str) and (schedule == "auto" or schedule in (*SCHEDULES, *pairs.NAMES, *gluon.NAMES)):
        return schedule
    raise UsageError(f"schedule={schedule!r} has no kernel here (auto, {', '.join(SCHEDULES)})")


def _written_in(backend: str, schedule: str) -> str:
    """The name of a backend's kernel, its fastest for "auto"; UsageError where there is none."""
    if not (isinstance(backend, str) and backend in BACKENDS):
        raise UsageError(f"backend={backend!r} is not known (auto, {', '.join(BACKENDS)})")
    if schedule == "auto":
        schedule = FASTEST_ANYWHERE if backend == "triton" else FASTEST_ON_HOPPER
    if schedule not in BACKENDS[backend]:
        raise UsageError(f"schedule={schedule!r} has no kernel in backend={backend!r} (auto, {', '.join(BACKENDS[backend])})")
    return gluon.PREFIX + schedule if backend == "gluon" else schedule
