"""Kinds of inputs that break attention kernels.

Each kind is a function (case, generator) -> q, k, v in fp32 on the CPU, so that a seed gives the same numbers anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, sqrt

import torch

from .check import Case

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """N(0, 1)."""
    return torch.randn(shape, generator=generator)


def with_outliers(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """N(0, 1) + N(0, 100) * Bernoulli(0.001): FlashAttention-3 section 4.3."""
    rare = torch.bernoulli(torch.full(shape, 0.001), generator=generator)
    return normal(shape, generator) + 10.0 * normal(shape, generator) * rare


def _random(case: Case, generator: torch.Generator) -> Tensors:
    return normal(case.q_shape, generator), normal(case.k_shape, generator), normal(case.v_shape, generator)


def _outliers(case: Case, generator: torch.Generator) -> Tensors:
    return tuple(with_outliers(shape, generator) for shape in (case.q_shape, case.k_shape, case.v_shape))


def _large_logits(case: Case, generator: torch.Generator) -> Tensors:
    """Logits of standard deviation 100: exp without the running maximum overflows fp32."""
    q, k, v = _random(case, generator)
    return 10.0 * q, 10.0 * k, v


def _overflowing_scores(case: Case, generator: torch.Generator) -> Tensors:
    """|q.k| beyond 65504 before scaling: S kept in fp16 overflows. All whole numbers, so S is exact in fp32."""
    size = float(ceil(sqrt(68000.0 / case.head_dim)))
    along = normal((case.head_dim,), generator).sign()
    signs = normal(case.q_shape[:3], generator).sign()[..., None]
    wobble = torch.randint(-2, 3, case.k_shape, generator=generator)
    return signs * size * along.expand(case.q_shape), size * along + wobble, normal(case.v_shape, generator)


def _sink(place: int) -> Callable[[Case, torch.Generator], Tensors]:
    """One key that every row looks at, at one end of the sequence: the running maximum jumps there."""

    def make(case: Case, generator: torch.Generator) -> Tensors:
        q, k, v = _random(case, generator)
        direction = torch.ones(case.head_dim) / sqrt(case.head_dim)
        q = q + 4.0 * direction
        k[:, place] = 3.0 * sqrt(case.head_dim) * direction  # logit about 12 over a background of about 4
        return q, k, v

    return make


def _rising(sign: float) -> Callable[[Case, torch.Generator], Tensors]:
    """Logits that rise (or fall) along the keys: every tile (or only the first) moves the running maximum."""

    def make(case: Case, generator: torch.Generator) -> Tensors:
        q, k, v = _random(case, generator)
        direction = torch.ones(case.head_dim) / sqrt(case.head_dim)
        ramp = torch.linspace(-10.0, 10.0, case.seqlen_k) * sign
        q = q + 2.0 * sqrt(case.head_dim) * direction
        k = 0.1 * k + ramp[None, :, None, None] * direction / 2.0
        return q, k, v

    return make


def _constant_v(case: Case, generator: torch.Generator) -> Tensors:
    """Every row of V the same: O is that row, whatever the weights, and weights that do not sum to 1 show at once."""
    q, k, v = _random(case, generator)
    return q, k, v[:, :1].expand_as(v).contiguous()


def _v_around_one(case: Case, generator: torch.Generator) -> Tensors:
    """V of mean 1: the sum P V grows with every tile, so that what an accumulator rounds away adds up."""
    q, k, v = _random(case, generator)
    return q, k, 1.0 + 0.1 * v


def _one_hot(case: Case, generator: torch.Generator) -> Tensors:
    """Each row looks at exactly one key: O is a row of V, and a wrong row is in plain sight."""
    _, k, v = _random(case, generator)
    k = 4.0 * k.sign()
    wanted = torch.randint(case.seqlen_k, (case.batch, case.seqlen_q), generator=generator)
    if case.causal:
        last = torch.arange(case.seqlen_q) + case.seqlen_k - case.seqlen_q
        wanted = torch.minimum(wanted, last.clamp(min=0))
    group = case.heads // case.heads_kv
    chosen = k.repeat_interleave(group, 2)[torch.arange(case.batch)[:, None], wanted]
    return 4.0 * chosen.sign(), k, v


def _equal_keys(case: Case, generator: torch.Generator) -> Tensors:
    """All keys equal, V around 100: O is a mean, and an unnormalised sum kept in fp16 overflows past 655 keys."""
    q, k, v = _random(case, generator)
    return q, k[:, :1].expand_as(k).contiguous(), 100.0 + v


KINDS: dict[str, Callable[[Case, torch.Generator], Tensors]] = {
    "random": _random,
    "outliers": _outliers,
    "large logits": _large_logits,
    "scores beyond fp16": _overflowing_scores,
    "sink at the first key": _sink(0),
    "sink at the last key": _sink(-1),
    "rising logits": _rising(1.0),
    "falling logits": _rising(-1.0),
    "constant V": _constant_v,
    "V around 1": _v_around_one,
    "one-hot": _one_hot,
    "equal keys": _equal_keys,
}


def make(case: Case, generator: torch.Generator, dtype: torch.dtype) -> Tensors:
    """q, k, v of `case` in `dtype`, contiguous, on the CPU."""
    return tuple(x.to(dtype).contiguous() for x in KINDS[case.inputs](case, generator))
