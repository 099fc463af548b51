"""Packed sequences as PyTorch operators, `fasim::attention_varlen` and `fasim::attention_varlen_backward`, and
`flash_attn_varlen_func`, which calls them in the convention of FlashAttention's own function of that name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...simulator.errors import UsageError
from ..arguments import check_storage, flag_of, scale_of
from ..compile import build
from ..cuda.varlen import config as cuda
from ..device import check_runnable, on_device
from .arguments import check, check_lengths, checked_longest

SCHEDULES = ("fa2", "fa3")
"""Who has a kernel of packed sequences: Triton's, and in CUDA C++ for compute capability 9.0."""


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    schedule: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each of several sequences that lie one behind another; O as q, with return_lse (O, LSE).

    q is (total_q, H, D), k and v are (total_k, H_kv, D): fp16 or bf16, D of 64, 128 or 256, H a multiple of H_kv, any strides.
    Sequence i is rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] of q and cu_seqlens_k[i] to cu_seqlens_k[i + 1] of k and v; both are
    int32 of (sequences + 1,), rising, on q's device. Any length may be 0. LSE is (H, total_q), fp32, natural logarithm. A causal
    mask is bottom-right aligned in each sequence; a row that sees no key, and a row of no sequence, gives O = 0, LSE = -inf.
    No sequence reads another's rows, whatever they hold. `softmax_scale` as of flash_attn_func. `schedule` is "fa2", "fa3" or
    "auto".

    No sequence may be longer than max_seqlen_q and max_seqlen_k say. On a GPU that is not checked, since it would wait for the GPU;
    the forward of "fa3" does not depend on it, the backward and "fa2" leave out what lies beyond.

    Both outputs are differentiable, once. Raises UsageError, one sentence, for whatever is not supported.
    """
    causal, schedule = flag_of(causal), _known(schedule)
    longest = checked_longest("max_seqlen_q", max_seqlen_q), checked_longest("max_seqlen_k", max_seqlen_k)
    if not torch.compiler.is_compiling():
        check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    o, lse = attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, scale_of(softmax_scale, q.shape[-1]), causal, schedule)
    return (o, lse) if return_lse else o


@torch.library.custom_op("fasim::attention_varlen", mutates_args=())
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool = False,
    schedule: str = "auto",
) -> tuple[Tensor, Tensor]:
    """O and LSE; arguments as of flash_attn_varlen_func."""
    check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    _check_on_cpu(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    softmax_scale = scale_of(softmax_scale, q.shape[2])
    for x in (q, k, v):
        check_storage(x)
    bounds = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    if _resolve(_known(schedule), q, causal) == "fa3":
        from ..cuda.varlen import launch

        return launch.forward(q, k, v, *bounds, softmax_scale, causal)
    check_runnable(q)
    from . import forward

    if softmax_scale < 0:  # the kernels take their maxima before they scale
        q, softmax_scale = -q, -softmax_scale
    with on_device(q):
        return forward.forward(q, k, v, *bounds, max_seqlen_q, softmax_scale, causal)


@attention_varlen.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal=False, schedule="auto"):
    check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    total_q, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((heads, total_q), dtype=torch.float32)


@torch.library.custom_op("fasim::attention_varlen_backward", mutates_args=())
def attention_varlen_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV, contiguous, by recomputation from LSE; `dlse` is the gradient of LSE, if any."""
    check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    _check_on_cpu(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    _check_gradients(do, q, o, lse, dlse)
    check_runnable(q)
    for x in (do, q, k, v, o, lse) if dlse is None else (do, q, k, v, o, lse, dlse):
        check_storage(x)
    from . import backward

    bounds = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    with on_device(q):
        return backward.backward(
            do, q, k, v, o, lse, *bounds, max_seqlen_q, max_seqlen_k, scale_of(softmax_scale, q.shape[2]), causal, dlse=dlse
        )


@attention_varlen_backward.register_fake
def _(do, q, k, v, o, lse, dlse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal=False):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _refuse(ctx, *_):
    raise UsageError("attention has no second derivative here: leave create_graph=True out")


# Without this node a second derivative would end in silence wherever None is allowed.
attention_varlen_backward.register_autograd(_refuse, setup_context=lambda ctx, inputs, output: None)


def _keep(ctx, inputs, output):
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.constants, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)


def _differentiate(ctx, do, dlse):
    q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    gradients = (None, None, None)
    if do is not None or dlse is not None:
        do = torch.zeros_like(o) if do is None else do
        gradients = attention_varlen_backward(do, q, k, v, o, lse, dlse, cu_seqlens_q, cu_seqlens_k, *ctx.constants)
    return *gradients, None, None, None, None, None, None, None


attention_varlen.register_autograd(_differentiate, setup_context=_keep)


def _check_on_cpu(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int) -> None:
    if not q.is_cuda:
        check_lengths("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
        check_lengths("k", cu_seqlens_k, k.shape[0], max_seqlen_k)


def _check_gradients(do: Tensor, q: Tensor, o: Tensor, lse: Tensor, dlse: Tensor | None) -> None:
    rows = (q.shape[1], q.shape[0])
    wanted = (("do", do, q.shape, q.dtype), ("o", o, q.shape, q.dtype))
    wanted += (("lse", lse, rows, torch.float32), ("dlse", dlse, rows, torch.float32))
    for name, x, shape, dtype in wanted:
        if x is not None and (tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device != q.device):
            raise UsageError(
                f"{name} is {tuple(x.shape)}, {x.dtype}, {x.device}; it must be {tuple(shape)}, {dtype}, {q.device} for this q"
            )


def _known(schedule: str) -> str:
    if isinstance(schedule, str) and (schedule == "auto" or schedule in SCHEDULES):
        return schedule
    raise UsageError(f"schedule={schedule!r} has no kernel of packed sequences (auto, {', '.join(SCHEDULES)})")


def _resolve(schedule: str, q: Tensor, causal: bool) -> str:
    """The schedule that "auto" stands for: fa3 where its kernel is for this GPU and can be had, else fa2."""
    if schedule != "auto":
        return schedule
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
        return "fa2"
    kernel = cuda.VarlenConfig("fa3", {torch.float16: "fp16", torch.bfloat16: "bf16"}[q.dtype], q.shape[2], causal)
    can_be_had = build.compiler_version() is not None or build.lookup(kernel.source) is not None
    return "fa3" if can_be_had else "fa2"
