"""Who takes packed sequences: our kernels, and the user's own callable; a batch of one length is packed for them."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ....simulator.errors import UsageError, did_you_mean
from ..check import MissingTool
from ..subjects import HALF, Subject, load, package_of, parse_argument, source_of

OURS = ("fa2", "fa3")
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
CALLABLE = (
    "f(q, k, v, cu_seqlens_q=..., cu_seqlens_k=..., max_seqlen_q=..., max_seqlen_k=..., causal=..., softmax_scale=...)"
    " -> O or (O, LSE)"
)


@dataclass(frozen=True, kw_only=True)
class PackedSubject(Subject):
    """A kernel of packed sequences.

    `packed(q, k, v, cu_seqlens_q=, cu_seqlens_k=, max_seqlen_q=, max_seqlen_k=, causal=, softmax_scale=)` takes (total, H, D)
    tensors and returns O or (O, LSE, ...), LSE (H, total_q); `forward` calls it with sequences of one length.
    """

    packed: Callable


def resolve(name: str, device: str = "cuda", arguments: Sequence[str] = ()) -> PackedSubject:
    """The subject called `name`, or the user's `package.module:function`; raises as `subjects.resolve` does."""
    look_up(name)
    if arguments and ":" not in name:
        raise UsageError(f"--with is for your own package.module:function; {name} takes no other arguments")
    if name in OURS:
        return _ours(name, device)
    keywords = dict(map(parse_argument, arguments))
    found = load(name, keywords | dict.fromkeys(LENGTHS), CALLABLE)
    return packed_subject(
        name,
        functools.partial(found, **keywords) if keywords else found,
        strict=False,
        arguments=tuple(arguments),
        package=package_of(name),
        sources=source_of(name),
    )


def look_up(name: str) -> None:
    """Raise UsageError where `name` takes no packed sequences and is no `package.module:function` either; needs no torch."""
    if name not in OURS and ":" not in name:
        raise UsageError(
            f"no kernel of packed sequences is called {name!r}: give one of {', '.join(OURS)}, or your own as"
            f" package.module:function{did_you_mean(name, OURS)}"
        )


def packed_subject(name: str, packed: Callable, **promises) -> PackedSubject:
    """A kernel of packed sequences as the suite sees it; `promises` are a Subject's fields."""
    return PackedSubject(name=name, forward=functools.partial(_of_one_length, packed), packed=packed, **promises)


def _of_one_length(packed: Callable, q, k, v, *, causal=False, softmax_scale=None):
    """A batch of one length, packed."""
    import torch

    def bounds(length: int):
        return torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device) * length

    lengths = (bounds(q.shape[1]), bounds(k.shape[1]), q.shape[1], k.shape[1])
    given = dict(zip(LENGTHS, lengths, strict=True)) | {"causal": causal, "softmax_scale": softmax_scale}
    answer = packed(*(x.flatten(0, 1) for x in (q, k, v)), **given)
    out, lse = (*answer, None)[:2] if isinstance(answer, (tuple, list)) and answer else (answer, None)
    rows, (batch, length, heads) = q.shape[0] * q.shape[1], q.shape[:3]
    if isinstance(out, torch.Tensor) and out.dim() == 3 and out.shape[0] == rows:
        out = out.unflatten(0, (batch, length))
    if isinstance(lse, torch.Tensor) and tuple(lse.shape) == (heads, rows):
        lse = lse.unflatten(1, (batch, length)).transpose(0, 1)
    return out, lse


def _ours(schedule: str, device: str) -> PackedSubject:
    """`flash_attn_varlen_func` of one schedule."""
    if importlib.util.find_spec("triton") is None:
        raise MissingTool(f"the kernel {schedule!r} needs triton, which is not installed: pip install 'fasim[kernels]' on Linux")
    on_hopper = schedule == "fa3"
    if device == "cpu" and not on_hopper:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    from ...ops import flash_attn_varlen_func

    rooms = Path(__file__).parents[2]
    own = sorted((rooms / "varlen").glob("*.py"))
    if on_hopper:
        room = rooms / "cuda"
        files = [*(room / "varlen").glob("*.py"), *(room / "varlen").glob("*.cu*"), *room.glob("*.cuh"), room / "fa3.cu"]
        own += sorted(path for path in files if path.name != "__init__.py")
    return packed_subject(
        schedule,
        functools.partial(flash_attn_varlen_func, schedule=schedule, return_lse=True),
        head_dims=(64, 128, 256),
        tile=128 if device == "cuda" or on_hopper else 16,
        dtypes=HALF,
        needs_cuda=device == "cuda" or on_hopper,
        returns_lse=True,
        differentiable=True,
        sources=(rooms / "arguments.py", *own),
    )
