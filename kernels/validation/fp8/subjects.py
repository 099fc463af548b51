"""Who takes e4m3: our kernel with descales of heads or of blocks, in one level or two, and the user's own callable."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ....simulator.errors import UsageError, did_you_mean
from ...cuda import config as cuda
from ..check import Case, MissingTool
from ..subjects import Subject, load, package_of, parse_argument, source_of

CALLABLE = "f(q, k, v, causal=..., softmax_scale=..., q_descale=..., k_descale=..., v_descale=...) -> O or (O, LSE)"
OURS = ("fa3", "fa3-blocks", "fa3-keyed", "fa3-keyed-heads", "fa3-two-level", "fa3-approximate", "overlap-2stage")
"""With descales of heads; of blocks; with V as rows of keys, of blocks and of heads; of blocks with P V of TWO_LEVEL blocks added
up apart; of blocks with half of the exponentials approximate: of that one only O is held, since its LSE is off by up to 0.03 and
says so; and the rung below fa3, with descales of heads."""
TWO_LEVEL = 4
ON_THE_CPU = 32
"""The tile of a user's callable there, where what FP8 arithmetic makes is emulated bit by bit and slowly."""


@dataclass(frozen=True, kw_only=True)
class Fp8Subject(Subject):
    """A kernel of e4m3 tensors.

    `forward` is also given `q_descale`, `k_descale` and `v_descale`, fp32, (B, H_kv), and returns O in bf16 or fp16. Where
    `block_rows(head_dim, seqlen_k)` gives rows of Q and of K and V, they are (B, H, blocks) of so many rows instead. Where
    exponentials of every second `line_keys(head_dim)` keys are approximate by contract, so is the arithmetic that bounds errors.
    """

    block_rows: Callable[[int, int], tuple[int, int]] | None = None
    line_keys: Callable[[int], int] = lambda head_dim: 0


def resolve(name: str, device: str = "cuda", arguments: Sequence[str] = ()) -> Fp8Subject:
    """The subject called `name`, or the user's `package.module:function`; raises as `subjects.resolve` does."""
    look_up(name)
    if arguments and ":" not in name:
        raise UsageError(f"--with is for your own package.module:function; {name} takes no other arguments")
    if name in OURS:
        return _ours(name)
    keywords = dict(map(parse_argument, arguments))
    found = load(name, keywords | dict.fromkeys(("q_descale", "k_descale", "v_descale")), CALLABLE)
    return Fp8Subject(
        name=name,
        forward=functools.partial(found, **keywords) if keywords else found,
        tile=128 if device == "cuda" else ON_THE_CPU,
        dtypes=("e4m3",),
        strict=False,
        differentiable=False,
        refuses=_scale_above_zero,
        arguments=tuple(arguments),
        package=package_of(name),
        sources=source_of(name),
    )


def look_up(name: str) -> None:
    """Raise UsageError where `name` takes no e4m3 and is no `package.module:function` either; needs no torch."""
    if name not in OURS and ":" not in name:
        raise UsageError(
            f"no kernel of e4m3 is called {name!r}: give one of {', '.join(OURS)}, or your own as package.module:function"
            f"{did_you_mean(name, OURS)}"
        )


def _scale_above_zero(case: Case) -> str | None:
    """FP8 kernels fold softmax_scale into descales and take it as above 0."""
    return "softmax_scale is not above 0" if case.softmax_scale is not None and not case.softmax_scale > 0 else None


def _ours(name: str) -> Fp8Subject:
    if importlib.util.find_spec("triton") is None:
        raise MissingTool("our FP8 kernels need triton, which is not installed: pip install 'fasim[kernels]' on Linux")
    from ...cuda.fp8.config import APPROXIMATE, QUERY_ROWS
    from ...fp8.keyed import as_rows_of_keys
    from ...fp8.operator import attention_e4m3, kv_rows

    schedule = "overlap-2stage" if name == "overlap-2stage" else "fa3"
    two_level = TWO_LEVEL if name == "fa3-two-level" else 0
    blocks, approximate = name not in ("fa3", "fa3-keyed-heads", schedule), name == "fa3-approximate"
    keyed = name in ("fa3-keyed", "fa3-keyed-heads")

    def forward(q, k, v, *, causal=False, softmax_scale=None, q_descale=None, k_descale=None, v_descale=None):
        import torch

        scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
        rows = (QUERY_ROWS, kv_rows(q.shape[3], k.shape[1], two_level)) if blocks else (0, 0)
        descales = q_descale, k_descale, v_descale
        if schedule != "fa3":
            from ...cuda.fp8.launch import forward as launch

            return launch(q, k, v, *descales, scale, causal, torch.bfloat16, schedule)
        v = as_rows_of_keys(v) if keyed else v
        o, lse = attention_e4m3(q, k, v, *descales, scale, causal, torch.bfloat16, *rows, two_level, approximate, keyed)
        return o if approximate else (o, lse)

    room = Path(__file__).parents[2] / "cuda"
    own = [*sorted((room / "fp8").glob("*.py")), *sorted((room / "fp8").glob("*.cuh")), cuda.path_of(schedule)]
    own += [cuda.path_of("overlap-2stage")] if approximate or keyed else []
    own += [room / "fp8" / "keyed" / "producer.cuh"] if keyed else []
    return Fp8Subject(
        name=name,
        forward=forward,
        head_dims=(64, 128) if two_level or approximate else (64, 128, 256),
        dtypes=("e4m3",),
        needs_cuda=True,
        returns_lse=not approximate,
        differentiable=False,
        refuses=_scale_above_zero,
        sources=(*own, *sorted(room.glob("*.cuh"))),
        block_rows=(lambda head_dim, seqlen_k: (QUERY_ROWS, kv_rows(head_dim, seqlen_k, two_level))) if blocks else None,
        line_keys=lambda head_dim: APPROXIMATE[head_dim] if approximate else 0,
    )
