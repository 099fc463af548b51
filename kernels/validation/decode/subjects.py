"""Who takes few queries with the number of parts: our decode kernel, and the user's own callable."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ....simulator.errors import UsageError, did_you_mean
from ..check import MissingTool
from ..subjects import HALF, Subject, load, package_of, parse_argument, source_of

OURS = ("decode",)
CALLABLE = "f(q, k, v, causal=..., softmax_scale=..., num_splits=...) -> O or (O, LSE)"
PAGED = ("cache_seqlens", "page_table")
"""What a callable that takes keys in pages is given besides, k and v then being (pages, page size, H_kv, D)."""


@dataclass(frozen=True, kw_only=True)
class PartsSubject(Subject):
    """A kernel of few queries; `pages(q, k_cache, v_cache, cache_seqlens=, page_table=, ...)` where it takes a cache in pages."""

    pages: Callable | None = None


def resolve(name: str, device: str = "cuda", arguments: Sequence[str] = ()) -> PartsSubject:
    """The subject called `name`, or the user's `package.module:function`; raises as `subjects.resolve` does."""
    look_up(name)
    if arguments and ":" not in name:
        raise UsageError(f"--with is for your own package.module:function; {name} takes no other arguments")
    if name in OURS:
        return _ours(device)
    keywords = dict(map(parse_argument, arguments))
    found = load(name, keywords | {"num_splits": 2}, CALLABLE)
    called = functools.partial(found, **keywords) if keywords else found
    return PartsSubject(
        name=name,
        forward=called,
        pages=called if _takes(found, PAGED) else None,
        strict=False,
        arguments=tuple(arguments),
        package=package_of(name),
        sources=source_of(name),
    )


def look_up(name: str) -> None:
    """Raise UsageError where `name` takes no parts and is no `package.module:function` either; needs no torch."""
    if name not in OURS and ":" not in name:
        raise UsageError(
            f"no kernel of few queries is called {name!r}: give {OURS[0]}, or your own as package.module:function"
            f"{did_you_mean(name, OURS)}"
        )


def _takes(found: Callable, names: Sequence[str]) -> bool:
    """Whether a callable has parameters of these names."""
    try:
        return set(names) <= inspect.signature(found).parameters.keys()
    except Exception:  # built-ins may have no signature, and a class of the user's may compute its own
        return False


def _ours(device: str) -> PartsSubject:
    """`fasim::decode` in as many parts as are asked for; where none are, as many as it chooses."""
    if importlib.util.find_spec("triton") is None:
        raise MissingTool("the decode kernel needs triton, which is not installed: pip install 'fasim[kernels]' on Linux")
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    from ... import ops

    def forward(q, k, v, *, causal=False, softmax_scale=None, num_splits=None):
        scale = q.shape[3] ** -0.5 if softmax_scale is None else float(softmax_scale)
        return ops.few_queries.decode(q, k, v, scale, causal, num_splits)

    rooms = Path(__file__).parents[2]
    return PartsSubject(
        name=OURS[0],
        forward=forward,
        pages=functools.partial(ops.flash_attn_with_kvcache, return_lse=True),
        head_dims=(64, 128, 256),
        tile=128 if device == "cuda" else 16,
        dtypes=HALF,
        needs_cuda=device == "cuda",
        returns_lse=True,
        differentiable=True,
        dq_is_deterministic=device != "cuda",  # as of every kernel of ours that is not asked for it
        sources=(rooms / "arguments.py", *sorted((rooms / "decode").glob("*.py"))),
    )
