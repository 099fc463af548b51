"""A few small calls of a subject, none of them checked: what compute-sanitizer is put around."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

from .bench import Bench
from .check import Case, Skipped
from .precision import DENSE, subjects_of


def exercise(name: str, dtype: str, seed: int = 0, kind: str = DENSE, device: str = "cuda") -> int:
    """Forward and, where there is one, backward: full and causal, ragged lengths and GQA, every head dim; how many calls were made.

    Raises as `suite.validate` does where the subject is none, or the device is missing.
    """
    from .suite import bench_of

    bench = bench_of(subjects_of(dtype, kind).resolve(name, device), device, dtype, seed, quick=True)
    bench.group = "sanitize"
    done = 0
    for head_dim in bench.subject.head_dims:
        for call in _CALLS[kind](bench, head_dim):
            try:
                call()
                done += 1
            except Skipped:
                continue
    if bench.on_gpu:
        import torch

        torch.cuda.synchronize()
    return done


def _dense(bench: Bench, head_dim: int) -> Iterator[Callable]:
    for rows, keys, causal, kv_heads in ((129, 129, True, 2), (64, 420, False, 1)):
        case = Case(name=f"{rows} x {keys}", seqlen_q=rows, seqlen_k=keys, head_dim=head_dim, causal=causal, kv_heads=kv_heads)
        yield partial(_there_and_back, bench, case)


def _there_and_back(bench: Bench, case: Case) -> None:
    from .differentiate import backward

    q, k, v = bench.tensors(case)
    bench.call(q, k, v, case)
    backward(bench, case, q, k, v, bench.dout(case))


def _packed(bench: Bench, head_dim: int) -> Iterator[Callable]:
    from .varlen import packed

    tile = bench.tile
    queries, keys = (tile + 1, 0, 5, 2 * tile), (tile + 1, 7, 0, tile + 3)
    outside = {"before": 3, "after": 2}
    for causal, kv_heads in ((True, 2), (False, 1)):
        about = {"head_dim": head_dim, "causal": causal, "kv_heads": kv_heads}
        case = packed.Packed(name=f"packed, {kv_heads} heads", queries=queries, keys=keys, **about, **outside)
        yield partial(_called, bench, case)
        yield partial(packed.differentiated, bench, case)


def _called(bench: Bench, case) -> None:
    from .varlen import packed

    packed.call(bench, case, packed.tensors(bench, case))


def _few(bench: Bench, head_dim: int) -> Iterator[Callable]:
    from .decode import groups, pages

    tile = bench.tile
    for count, (rows, causal) in product((1, 3), ((1, False), (5, True))):
        about = {"seqlen_q": rows, "seqlen_k": 3 * tile + 5, "head_dim": head_dim, "heads": 8, "kv_heads": 2}
        case = groups.InParts(name=f"{rows} queries in {count} parts", causal=causal, num_splits=count, **about)
        yield lambda case=case: bench.call(*bench.tensors(case), case)
        for size in (tile, 5):
            about = {"lengths": (2 * tile + 3, 0, 1), "page_size": size, "head_dim": head_dim, "seqlen_q": rows, "causal": causal}
            paged = pages.Pages(name=f"{rows} queries, pages of {size}, {count} parts", num_splits=count, **about)
            yield lambda paged=paged: pages.call(bench, paged, *pages.tensors(bench, paged)[1:])


_CALLS: dict[str, Callable[[Bench, int], Iterator[Callable]]] = {DENSE: _dense, "varlen": _packed, "decode": _few}
