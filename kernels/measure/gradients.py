"""The backward of a kernel as a call that can be timed: the forward is done before, and nothing else runs beside it.

Ours is called without autograd, and so are PyTorch's and other people's, each by what its own autograd function calls; whatever
else is differentiable goes through torch.autograd.grad on a graph that is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...simulator.errors import UsageError
from ...simulator.problem.workload import Workload
from ..cuda.backward.config import HERE
from ..cuda.backward.config import SCHEDULES as CUDA
from ..validation.subjects import Subject
from . import peers
from .peers import Gradient

TRITON = "fa2"
"""Whose backward is that of kernels/triton/fa2_backward.py."""
OURS = (TRITON, *CUDA)
"""Schedules whose backward has a kernel."""
SAME_BITS = "-deterministic"
"""Behind the name of a CUDA backward: its deterministic mode."""


def files_of(name: str) -> list[Path]:
    """What a CUDA backward is compiled from: all of its room but the other schedules' kernels."""
    others = {schedule.replace("-", "_") for schedule in CUDA if schedule != name.removesuffix(SAME_BITS)}
    return [*(path for path in sorted(HERE.glob("*.cu*")) if path.stem not in others), HERE / "wgmma.py"]


def gradient_of(subject: Subject, workload: Workload) -> Gradient:
    """f(q, k, v, dO) -> a call that gives (dQ, dK, dV). Raises UsageError where the kernel has no backward here."""
    if peers.is_peer(subject.name):
        return peers.differentiate(subject.name, workload)
    if subject.name in ("torch-fa2", "torch-cudnn"):
        return peers.differentiate(subject.name.replace("torch-", peers.PREFIX), workload)
    if subject.name.removesuffix(SAME_BITS) in CUDA:
        return _of_cuda(subject.name, workload)
    return _of_triton(workload) if subject.name == TRITON else _by_autograd(subject, workload)


def _of_cuda(name: str, workload: Workload) -> Gradient:
    from ..cuda.backward.launch import backward
    from ..ops import flash_attn_func

    how = {"causal": workload.causal, "scale": None}
    how |= {"schedule": name.removesuffix(SAME_BITS), "deterministic": name.endswith(SAME_BITS)}

    def ready(q, k, v, do):
        o, lse = flash_attn_func(q, k, v, causal=workload.causal, return_lse=True)
        return lambda: backward(q, k, v, o, lse, do, **how)

    return ready


def _of_triton(workload: Workload) -> Gradient:
    from ..arguments import default_scale
    from ..ops import flash_attn_func
    from ..triton.fa2_backward import backward

    scale = default_scale(workload.head_dim)

    def ready(q, k, v, do):
        o, lse = flash_attn_func(q, k, v, causal=workload.causal, return_lse=True)
        return lambda: backward(do, q, k, v, o, lse, scale, workload.causal)

    return ready


def _by_autograd(subject: Subject, workload: Workload) -> Gradient:
    import torch

    def ready(q, k, v, do):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        found = subject.forward(*leaves, causal=workload.causal)
        o = found[0] if isinstance(found, tuple) else found
        if not o.requires_grad:
            raise UsageError(f"{subject.name} has no backward: its O carries no gradient")
        return lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)

    return ready


def expected(inputs: tuple, workload: Workload) -> list[tuple[int, tuple]]:
    """The reference's (dQ, dK, dV) of the first and the last K/V head of the first batch entry, each beside the K/V head."""
    from ..reference import attention_backward

    q, k, v, do = inputs
    found = []
    for head in dict.fromkeys((0, workload.kv_heads - 1)):
        keys, queries = slice(head, head + 1), _queries_of(head, workload)
        parts = (q[:1, :, queries], k[:1, :, keys], v[:1, :, keys], do[:1, :, queries])
        found.append((head, attention_backward(*parts, causal=workload.causal)))
    return found


def compared(got: tuple, right: list, workload: Workload) -> Iterator[tuple]:
    """(the kernel's gradient, the reference's) of what `expected` gave."""
    for head, theirs in right:
        keys, queries = slice(head, head + 1), _queries_of(head, workload)
        for ours, reference, heads in zip(got, theirs, (queries, keys, keys), strict=True):
            yield ours[:1, :, heads], reference


def _queries_of(head: int, workload: Workload) -> slice:
    """The query heads that share a K/V head."""
    return slice(head * workload.heads_per_kv, (head + 1) * workload.heads_per_kv)
