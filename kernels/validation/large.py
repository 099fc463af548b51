"""Sizes past what narrow integers hold: positions past 2^16, more CTAs than a grid's y axis, more than 2^31 elements."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

import torch

from . import criteria, yardstick
from .check import Case, Skipped, Trial, explained

if TYPE_CHECKING:
    from .bench import Bench

_PAST_INT32 = 2**31
_PAST_INT16 = 66_001  # past 2^16, and what wraps at 2^15 is wrong there too


def positions(head_dim: int, quick: bool) -> Iterator[tuple[Case, str]]:
    """(case, what it proves): one length past 2^16, the other short, so that a CPU can do it."""
    proves = "positions do not overflow 16 bits"
    sizes = {"heads": 1, "head_dim": head_dim}
    yield Case(name="keys past 2^16, causal", seqlen_q=24, seqlen_k=_PAST_INT16, causal=True, **sizes), proves
    yield Case(name="keys past 2^16, full", seqlen_q=8, seqlen_k=_PAST_INT16, **sizes), proves
    yield Case(name="rows past 2^16, full", seqlen_q=_PAST_INT16, seqlen_k=24, **sizes), proves
    if not quick:
        yield Case(name="rows past 2^16, causal", seqlen_q=_PAST_INT16, seqlen_k=24, causal=True, **sizes), proves


def trials(bench: Bench) -> Iterator[Trial]:
    """What only a GPU holds: more CTAs than a grid's y axis, both lengths past 2^16, and more than 2^31 elements."""
    head_dim = bench.head_dims[-1]
    many = Case(name="batch x heads > 65535", batch=1100, heads=60, seqlen_q=17, seqlen_k=17, head_dim=bench.head_dims[0])
    yield Trial(many.name, lambda: _corners(bench, many))
    both = Case(
        name="rows and keys past 2^16, causal",
        seqlen_q=_PAST_INT16,
        seqlen_k=_PAST_INT16,
        heads=1,
        head_dim=bench.head_dims[0],
        causal=True,
    )
    yield Trial(both.name, lambda: _corners(bench, both))
    for name, sizes in (
        ("more than 2^31 elements: batch", {"batch": _PAST_INT32 // (512 * 16 * head_dim) + 1, "seqlen_q": 512, "seqlen_k": 512}),
        ("more than 2^31 elements: long q", {"seqlen_q": _PAST_INT32 // (16 * head_dim) + 64, "seqlen_k": 128}),
        ("more than 2^31 elements: long k", {"seqlen_q": 64, "seqlen_k": _PAST_INT32 // (16 * head_dim) + 64}),
    ):
        case = Case(name=name, heads=16, head_dim=head_dim, **sizes)
        yield Trial(name, lambda case=case: _corners(bench, case))


def _corners(bench: Bench, case: Case) -> dict:
    """Run a problem too large for the yardstick; hold its last corner, where an index that overflowed would show."""
    if not bench.on_gpu:
        raise Skipped("needs a GPU")
    item = torch.empty((), dtype=bench.dtype).element_size()
    need = item * sum(map(prod, (case.q_shape, case.o_shape, case.k_shape, case.v_shape))) * 1.4
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if need > free:
        raise Skipped(f"needs {need / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} GiB are free")
    generator = torch.Generator(bench.device).manual_seed(bench.seed)
    try:
        with explained(case, "indices do not overflow"):
            q, k, v = (
                torch.randn(shape, dtype=bench.dtype, device=bench.device, generator=generator)
                for shape in (case.q_shape, case.k_shape, case.v_shape)
            )
            out, _ = bench.call(q, k, v, case)
            figures = {}
            for batches, rows in ((slice(0, 1), slice(0, 64)), (slice(-1, None), slice(-64, None))):
                heads = slice(-1, None)
                keys = rows if case.causal and not batches.start else slice(None)  # where Sq = Sk
                part = q[batches, rows, heads], k[batches, keys, heads], v[batches, keys, heads]
                exact, _, bound = yardstick.bound(*part, case.causal, case.softmax_scale)
                figures = criteria.hold(f"O[{_corner(batches)}]", "bmhd", out[batches, rows, heads], exact, bound)
            return figures
    finally:
        q = k = v = out = part = None
        torch.cuda.empty_cache()


def _corner(batches: slice) -> str:
    return "last 64 rows of the last batch" if batches.start else "first 64 rows of the first batch"
