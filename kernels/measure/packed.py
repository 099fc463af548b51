"""Packed sequences on the bench: their tensors, the call, and O beside fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate

from ...simulator.errors import UsageError
from ...simulator.problem.workload import Workload

SCHEDULE = "fa3"
"""The schedule whose kernel takes packed sequences."""
SUFFIXES = (".py", ".cu", ".cuh")
"""Of the files in cuda/varlen that make up such a kernel."""


def require(kernel: str) -> None:
    """Raise UsageError, one sentence, where a kernel is asked for packed sequences that does not take them here."""
    if kernel != SCHEDULE:
        raise UsageError(f"{kernel!r} is not measured on packed sequences ({SCHEDULE})")


def inputs(workload: Workload, device: str = "cuda", generator=None) -> tuple:
    """(q, k, v, cu_seqlens_q, cu_seqlens_k): (rows of all sequences, heads, D), normal, and where sequences begin, int32."""
    import torch

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[workload.dtype]
    totals = [sum(each) for each in zip(*workload.lengths, strict=True)]

    def normal(rows: int, heads: int):
        return torch.randn((rows, heads, workload.head_dim), dtype=dtype, device=device, generator=generator)

    q, k, v = normal(totals[0], workload.heads), *(normal(totals[1], workload.kv_heads) for _ in range(2))
    ends = [torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=device) for each in zip(*workload.lengths, strict=True)]
    return q, k, v, *ends


def caller(workload: Workload) -> Callable:
    """f(q, k, v, cu_seqlens_q, cu_seqlens_k) -> (O, LSE)."""
    from ..ops import flash_attn_varlen_func

    longest = workload.seqlen_q, workload.seqlen_k
    return lambda *tensors: flash_attn_varlen_func(*tensors, *longest, causal=workload.causal, return_lse=True)


def compared(got: object, tensors: tuple, workload: Workload) -> Iterator[tuple]:
    """(kernel's rows, the reference's): first and last head of the sequences of the most and of the fewest queries."""
    from ..reference import attention_forward

    q, k, v, starts_q, starts_k = tensors
    out = got[0] if isinstance(got, tuple) else got
    order = sorted((queries, i) for i, (queries, keys) in enumerate(workload.lengths) if queries and keys)
    for _, i in dict.fromkeys((order[-1], order[0])):
        rows, keys = (slice(int(starts[i]), int(starts[i + 1])) for starts in (starts_q, starts_k))
        for head in dict.fromkeys((0, workload.heads - 1)):
            shared = slice(head // workload.heads_per_kv, head // workload.heads_per_kv + 1)
            mine = q[None, rows, head : head + 1], k[None, keys, shared], v[None, keys, shared]
            yield out[None, rows, head : head + 1], attention_forward(*mine, causal=workload.causal).o
