"""The kernels as PyTorch operators: `flash_attn_func`, differentiable, traceable by torch.compile, on any stream.

Two operators are registered: `fasim::attention` (O and LSE) and `fasim::attention_backward` (dQ, dK, dV). Kernels are
imported on first use. Where nobody traces, a CUDA kernel is launched past the dispatcher, whose price is several times
the launch's.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..simulator.errors import UsageError
from . import build
from .cuda import config as cuda
from .reference import default_scale

if TYPE_CHECKING:
    from .cuda.launch import Plan

TRITON = {"standard": ".triton.standard", "fa1": ".triton.fa1", "fa2": ".triton.fa2"}
"""Schedule -> module whose `forward(q, k, v, softmax_scale, causal) -> (O, LSE)` runs it."""

SCHEDULES = (*TRITON, *cuda.available())
"""Every schedule that has a kernel."""

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    schedule: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * Q K^T) V by a kernel of ours, O shaped as q; with return_lse, (O, LSE).

    q is (B, S_q, H, D), k and v are (B, S_k, H_kv, D): fp16 or bf16, D of 64, 128 or 256, H a multiple of H_kv, any
    lengths and strides. LSE is (B, H, S_q), fp32, natural logarithm. `softmax_scale` defaults to 1/sqrt(D). A causal
    mask is bottom-right aligned; a row that sees no key gives O = 0, LSE = -inf. `schedule` is one of SCHEDULES or
    "auto". Both outputs are differentiable. Raises UsageError for what is not supported.
    """
    if softmax_scale is None:
        softmax_scale = default_scale(q.shape[-1])
    if softmax_scale < 0:  # the kernels take their maxima before they scale
        q, softmax_scale = -q, -softmax_scale
    plan = None if _observed(q, k, v) else _plan(q, k, v, causal, schedule)
    if plan is None:
        o, lse = attention(q, k, v, softmax_scale, causal, schedule)
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        o, lse = _Recorded.apply(q, k, v, softmax_scale, causal, plan)
    else:
        o, lse = plan.run(q, k, v, softmax_scale)
    return (o, lse) if return_lse else o


def runnable(device: str | torch.device) -> tuple[str, ...]:
    """The schedules that run on a device: those in CUDA C++ need compute capability 9.0."""
    hopper = torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return SCHEDULES if hopper else tuple(TRITON)


def _observed(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether someone must see the operator and not its launch: a tracer, a mode, a subclass, a transform, forward AD."""
    return bool(
        torch.compiler.is_compiling()
        or not (type(q) is type(k) is type(v) is Tensor)
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


_plans: dict[tuple, Plan | None] = {}
_PLANS_KEPT = 1024


def _plan(q: Tensor, k: Tensor, v: Tensor, causal: bool, schedule: str) -> Plan | None:
    """How a CUDA kernel is launched on tensors like these, or None where a Triton kernel is to run.

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
    check_inputs(q, k, v, schedule)
    name, plan = _resolve(schedule, q, causal), None
    if name not in TRITON:
        from .cuda.launch import plan_for

        plan = plan_for(q.shape, k.shape, q.stride(), k.stride(), v.stride(), q.dtype, bool(causal), name, q.get_device())
    if len(_plans) >= _PLANS_KEPT:
        _plans.clear()
    _plans[key] = plan
    return plan


@torch.library.custom_op("fasim::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool = False, schedule: str = "auto"
) -> tuple[Tensor, Tensor]:
    """O and LSE by the schedule's kernel; softmax_scale >= 0."""
    plan = _plan(q, k, v, causal, schedule)
    if plan:
        return plan.run(q, k, v, softmax_scale)
    _check_runnable(q)
    kernel = import_module(TRITON[_resolve(schedule, q, causal)], __package__)
    with _on_device(q):
        return kernel.forward(q, k, v, softmax_scale, causal)


@attention.register_fake
def _(q, k, v, softmax_scale, causal=False, schedule="auto"):
    check_inputs(q, k, v, schedule)
    batch, seqlen_q, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)


@torch.library.custom_op("fasim::attention_backward", mutates_args=())
def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    softmax_scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV, contiguous, by recomputation from LSE; `dlse` is the gradient of LSE, if any."""
    check_inputs(q, k, v)
    _check_runnable(q)
    kernel = import_module(".triton.fa2_backward", __package__)
    with _on_device(q):
        return kernel.backward(do, q, k, v, o, lse, softmax_scale, causal, dlse=dlse)


@attention_backward.register_fake
def _(do, q, k, v, o, lse, dlse, softmax_scale, causal=False):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx, inputs, output):
    q, k, v, ctx.softmax_scale, ctx.causal, _ = inputs
    o, lse = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, o, lse)


def _differentiate(ctx, do, dlse):
    q, k, v, o, lse = ctx.saved_tensors
    if do is None and dlse is None:
        return None, None, None, None, None, None
    if do is None:
        do = torch.zeros_like(o)
    dq, dk, dv = attention_backward(do, q, k, v, o, lse, dlse, ctx.softmax_scale, ctx.causal)
    return dq, dk, dv, None, None, None


attention.register_autograd(_differentiate, setup_context=_keep)


class _Recorded(torch.autograd.Function):
    """The operator's gradient without the operator: recording through the dispatcher takes 30 us more."""

    @staticmethod
    def forward(ctx, q, k, v, softmax_scale, causal, plan):
        o, lse = plan.run(q, k, v, softmax_scale)
        _keep(ctx, (q, k, v, softmax_scale, causal, None), (o, lse))
        return o, lse

    backward = staticmethod(torch.autograd.function.once_differentiable(_differentiate))


def check_inputs(q: Tensor, k: Tensor, v: Tensor, schedule: str = "auto") -> None:
    """Raise UsageError, one sentence, unless the kernels can take these tensors."""
    if schedule != "auto" and schedule not in SCHEDULES:
        raise UsageError(f"schedule={schedule!r} has no kernel here (auto, {', '.join(SCHEDULES)})")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise UsageError(f"{name} has shape {tuple(x.shape)}; it must be (batch, seqlen, heads, head_dim)")
        if x.dtype not in DTYPES:
            raise UsageError(f"{name} is {x.dtype}; the kernels take float16 and bfloat16: convert it with {name}.half()")
    if not q.dtype == k.dtype == v.dtype:
        raise UsageError(f"q, k and v have different dtypes ({q.dtype}, {k.dtype}, {v.dtype}); convert them to one")
    if not q.device == k.device == v.device:
        raise UsageError(f"q, k and v are on different devices ({q.device}, {k.device}, {v.device}); move them to one")
    if k.shape != v.shape:
        raise UsageError(f"k has shape {tuple(k.shape)} but v has {tuple(v.shape)}; they must be the same")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise UsageError(f"q of shape {tuple(q.shape)} and k of {tuple(k.shape)} must agree in batch and head_dim")
    if q.shape[3] not in HEAD_DIMS:
        name = "fa2" if schedule == "auto" else schedule
        raise UsageError(
            f"head_dim={q.shape[3]} is not supported by {name!r} ({', '.join(map(str, HEAD_DIMS))});"
            " pad q, k and v with zeros and give softmax_scale, or use torch's scaled_dot_product_attention"
        )
    if (k.shape[2] == 0 and q.shape[2] != 0) or (k.shape[2] and q.shape[2] % k.shape[2]):
        raise UsageError(f"k's {k.shape[2]} heads do not divide q's {q.shape[2]}; repeat or drop heads of k and v")


def _resolve(schedule: str, q: Tensor, causal: bool) -> str:
    """The schedule that "auto" stands for, for tensors like q."""
    if schedule != "auto":
        return schedule
    if not q.is_cuda:
        return FASTEST_ANYWHERE
    return _fastest(q.get_device(), q.dtype, q.shape[3], bool(causal))


FASTEST_ANYWHERE = "fa2"
FASTEST_ON_HOPPER = "fa3"


@lru_cache(maxsize=256)
def _fastest(device: int, dtype: torch.dtype, head_dim: int, causal: bool) -> str:
    """FASTEST_ON_HOPPER where its kernel is for this GPU and can be had: compiled here or found compiled."""
    if FASTEST_ON_HOPPER not in cuda.available() or torch.cuda.get_device_capability(device) != (9, 0):
        return FASTEST_ANYWHERE
    kernel = cuda.config_for(FASTEST_ON_HOPPER, {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype], head_dim, causal)
    can_be_had = build.compiler_version() is not None or build.lookup(kernel.source) is not None
    return FASTEST_ON_HOPPER if can_be_had else FASTEST_ANYWHERE


def _check_runnable(q: Tensor) -> None:
    """Raise UsageError unless a kernel can run on q's device."""
    try:
        import triton
    except ImportError:
        raise UsageError("these kernels need Triton, which is not installed: pip install 'fasim[kernels]'") from None
    if q.is_cuda:
        if torch.cuda.get_device_capability(q.device) < (8, 0):
            name = torch.cuda.get_device_name(q.device)
            raise UsageError(f"the kernels need an NVIDIA GPU of compute capability 8.0 or more, and {name} has less")
        return
    if not triton.knobs.runtime.interpret:
        raise UsageError(
            f"q is on {q.device.type!r} and the kernels run on CUDA devices: move q, k and v with .cuda(), or set"
            " TRITON_INTERPRET=1 before Python starts to interpret them, slowly, on the CPU"
        )


def _on_device(q: Tensor):
    """Launch on q's device and its current stream."""
    return torch.cuda.device(q.device) if q.is_cuda else nullcontext()
