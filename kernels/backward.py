"""The gradients as a PyTorch operator, `fasim::attention_backward`, and which kernel takes them.

On Hopper a CUDA backward takes them where it stands in READY; Triton's takes all others, and those on any other GPU. Triton's is
deterministic in itself: it forms dQ by a walk of its own. Of the CUDA ones dK and dV are; dQ is added up in the order in
which tiles of keys finish, unless a deterministic backward is asked for, here or by torch.use_deterministic_algorithms.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module

import torch
from torch import Tensor

from ..simulator.errors import UsageError
from .arguments import check_gradients, check_inputs, check_storage, flag_of, scale_of
from .compile import build
from .cuda.backward import config as cuda
from .device import check_runnable, on_device

TRITON = "fa2"
"""The schedule of kernels/triton/fa2_backward.py."""
SCHEDULES = (TRITON, *cuda.SCHEDULES)
"""Every schedule whose backward has a kernel."""

READY: dict[tuple[str, int, bool], str] = {
    **{(dtype, 64, causal): "apart" for dtype in cuda.DTYPES for causal in (False, True)},
    **{(dtype, 128, causal): "apart" for dtype in cuda.DTYPES for causal in (False, True)},
    **{(dtype, 256, causal): "relay" for dtype in cuda.DTYPES for causal in (False, True)},
}
"""Dtype, head dim and mask -> the CUDA schedule that "auto" takes on Hopper, the faster where two are right (backward_h200.json). A
schedule stands here once the whole suite, the sanitizer and the endurance runs have passed on an H200, in that dtype
(traces/recorded/backward/validation)."""
LONG: dict[tuple[str, int, bool], tuple[int, str]] = {
    (dtype, 128, causal): (least, "late") for dtype in cuda.DTYPES for causal, least in ((False, 2048), (True, 8192))
}
"""Where another is faster once queries and keys are so many: least length and schedule, under the same conditions
(backward_late_h200.json)."""
SAME_BITS: dict[tuple[str, int, bool], tuple[int, str]] = {
    (dtype, 128, causal): (least, "late") for dtype in cuda.DTYPES for causal, least in ((False, 2048), (True, 4096))
}
"""The same in the deterministic mode."""
_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def checked(schedule: object, head_dim: int) -> str:
    """`schedule`; UsageError unless it is "auto" or a backward of ours that takes this head dim."""
    if isinstance(schedule, str) and schedule in ("auto", TRITON):
        return schedule
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        raise UsageError(f"backward={schedule!r} has no kernel here (auto, {', '.join(SCHEDULES)})")
    if head_dim not in head_dims(schedule):
        possible = ", ".join(map(str, head_dims(schedule)))
        raise UsageError(f"head_dim={head_dim} is not supported by backward={schedule!r} ({possible}); leave it at auto")
    return schedule


def head_dims(schedule: str) -> tuple[int, ...]:
    """The head dims of a CUDA backward."""
    return tuple(sorted({head_dim for name, head_dim, _ in cuda.TILES if name == schedule}))


def chosen(q: Tensor, causal: bool, keys: int | None = None, same_bits: bool = False) -> str:
    """The schedule that "auto" stands for, for tensors like q and so many keys (as many as queries, unless said)."""
    kind = _DTYPES.get(q.dtype, ""), q.shape[3], bool(causal)
    found = READY.get(kind)
    least, longer = (SAME_BITS if same_bits else LONG).get(kind, (0, found))
    if min(q.shape[1], q.shape[1] if keys is None else keys) >= least:
        found = longer
    if q.is_cuda and found and _fits(q.get_device(), found, _DTYPES[q.dtype], q.shape[3], bool(causal)):
        return found
    return TRITON


@lru_cache(maxsize=256)
def _fits(device: int, schedule: str, dtype: str, head_dim: int, causal: bool) -> bool:
    """Whether the CUDA backward is for this GPU and can be had: compiled here or found compiled."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return False
    if build.compiler_version() is not None:
        return True
    kernel = cuda.config_for(schedule, dtype, head_dim, causal)
    return all(build.lookup(kernel.source(part)) is not None for part in cuda.ENTRIES)


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
    deterministic: bool = False,
    schedule: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV, contiguous, by recomputation from LSE; `dlse` is the gradient of LSE, if any."""
    check_inputs(q, k, v)
    check_gradients(do, q, o, lse, dlse)
    schedule = checked(schedule, q.shape[3])
    same_bits = deterministic or torch.are_deterministic_algorithms_enabled()
    schedule = chosen(q, causal, k.shape[1], same_bits) if schedule == "auto" else schedule
    if schedule == TRITON:
        check_runnable(q)
    for x in (do, q, k, v, o, lse) if dlse is None else (do, q, k, v, o, lse, dlse):
        check_storage(x)
    softmax_scale = scale_of(softmax_scale, q.shape[3])
    if schedule == TRITON:
        kernel = import_module(".triton.fa2_backward", __package__)
        with on_device(q):
            return kernel.backward(do, q, k, v, o, lse, softmax_scale, causal, dlse=dlse)
    kernel = import_module(".cuda.backward.launch", __package__)
    return kernel.backward(
        q, k, v, o, lse, do, dlse, causal=causal, scale=softmax_scale, schedule=schedule, deterministic=same_bits
    )  # fmt: skip


@attention_backward.register_fake
def _(do, q, k, v, o, lse, dlse, softmax_scale, causal=False, deterministic=False, schedule="auto"):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _refuse(ctx, *_):
    raise UsageError(
        "attention has no second derivative here: leave create_graph=True out, or use torch's scaled_dot_product_attention"
        " with the math backend"
    )


# Without this node a second derivative would end in silence wherever None is allowed.
attention_backward.register_autograd(_refuse, setup_context=lambda ctx, inputs, output: None)


def keep(ctx, inputs, output):
    """What gradients follow from: of q, k, v, softmax_scale, causal, one that they do not depend on, deterministic and backward."""
    q, k, v, ctx.softmax_scale, ctx.causal, _, ctx.deterministic, ctx.backward_schedule = inputs
    o, lse = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, o, lse)


def differentiate(ctx, do, dlse):
    """The gradients of what `keep` kept, None for all inputs but q, k and v."""
    q, k, v, o, lse = ctx.saved_tensors
    if do is None and dlse is None:
        return (None,) * 8
    if do is None:
        do = torch.zeros_like(o)
    how = (ctx.softmax_scale, ctx.causal, ctx.deterministic, ctx.backward_schedule)
    return *attention_backward(do, q, k, v, o, lse, dlse, *how), None, None, None, None, None


def asked(deterministic: object, backward: object, head_dim: int) -> tuple[bool, str]:
    """`deterministic` and `backward` as flash_attn_func was given them. Raises UsageError for what is not possible."""
    return flag_of(deterministic, "deterministic"), checked(backward, head_dim)
