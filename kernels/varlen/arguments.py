"""What packed sequences must be, and the one sentence that says so where they are not."""

from __future__ import annotations

from itertools import pairwise
from numbers import Integral

import torch
from torch import Tensor

from ...simulator.errors import UsageError
from ..arguments import MAX_SEQLEN, check_inputs, is_dense


def check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    """Raise UsageError, one sentence, unless these are packed sequences that the kernels can take.

    What cu_seqlens hold is not looked at on a GPU, which would wait for it; on the CPU it is, by check_lengths.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise UsageError(f"{name} is a {type(x).__name__}; it must be a torch.Tensor")
        if is_dense(x) and x.dim() != 3:
            raise UsageError(f"{name} has shape {tuple(x.shape)}; packed sequences are (total, heads, head_dim)")
    check_inputs(*(x.unsqueeze(0) if is_dense(x) else x for x in (q, k, v)), "varlen")
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(x, Tensor) or x.dtype != torch.int32 or x.dim() != 1 or not len(x):
            shown = f"{tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise UsageError(f"{name} is {shown}; it must be torch.int32 of (sequences + 1,)")
        if x.device != q.device:
            raise UsageError(f"{name} is on {x.device} and q on {q.device}; move it there")
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise UsageError(f"cu_seqlens_q is of {len(cu_seqlens_q) - 1} sequences and cu_seqlens_k of {len(cu_seqlens_k) - 1}")


def checked_longest(name: str, longest: object) -> int:
    """max_seqlen_q or max_seqlen_k as int. Raises UsageError, one sentence, for anything but a length."""
    if isinstance(longest, Integral) and not isinstance(longest, bool) and 0 <= longest <= MAX_SEQLEN:
        return int(longest)
    shown = repr(longest)[:40] if isinstance(longest, int | float | str | None) else f"a {type(longest).__name__}"
    raise UsageError(
        f"{name}={shown} is not possible: give the length of the longest sequence, a whole number up to {MAX_SEQLEN:,}"
    )


def check_lengths(name: str, cu_seqlens: Tensor, total: int, longest: int) -> None:
    """Raise UsageError unless cu_seqlens, on the CPU, rise from 0 or more to at most `total` in steps of at most `longest`."""
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(ends)]
    if ends[0] < 0 or ends[-1] > total or min(lengths, default=0) < 0:
        raise UsageError(f"cu_seqlens_{name} must rise from 0 to at most the {total:,} rows there are; it is {str(ends)[:60]}")
    if max(lengths, default=0) > longest:
        raise UsageError(f"max_seqlen_{name}={longest} is less than the longest sequence, {max(lengths)}")
