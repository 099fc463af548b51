"""Lengths, heads, batches, scales and layouts that break attention kernels, and the group of checks over them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from . import large
from .check import Case, Fault, Skipped, Trial
from .layouts import LAYOUTS

if TYPE_CHECKING:
    from .bench import Bench

_PRIMES = (2, 3, 5, 7, 11, 17, 23, 37, 53, 71, 97, 113, 149, 191, 251, 307, 389, 499)
MANY_HEADS = ((16, 1), (32, 2), (71, 1))
"""Query heads and key heads: groups that no tile of heads is made for, and a prime one."""
SCALES = (0.3, 1.0, 0.0, -0.3, 1e-46, 8.0)
"""softmax_scale is any number: 0, a negative one, one that fp32 rounds to 0, and one that makes a row look at one key."""
_HEAD_DIMS = (40, 96, 80, 192, 256)
"""Head dims beside those promised: what is taken must be right, and what is not must be refused."""


def cases(tile: int, head_dims: tuple[int, ...], quick: bool) -> Iterator[tuple[Case, str]]:
    """(case, what it proves) over all that the group asks, positions past 2^16 last."""
    first = head_dims[0]
    yield from _lengths(tile, head_dims, quick)
    yield from empty(tile, first)
    yield from _heads(tile, first, quick)
    for scale in SCALES:
        sizes = {"seqlen_q": tile, "seqlen_k": tile + 3, "head_dim": first, "causal": True}
        yield Case(name=f"softmax_scale {scale:g}", softmax_scale=scale, **sizes), "softmax_scale is the one given"
    yield from laid_out(tile, first)
    yield from large.positions(first, quick)


def _lengths(tile: int, head_dims: tuple[int, ...], quick: bool) -> Iterator[tuple[Case, str]]:
    first = head_dims[0]
    prime = max(p for p in _PRIMES if p < 3 * tile)
    lengths = [1, tile - 1, tile, tile + 1, 2 * tile + 1, prime]
    if not quick:
        lengths += [2, tile // 2 + 1, 2 * tile - 1, 2 * tile, 5 * tile + 3]
    for head_dim in head_dims:
        for length in dict.fromkeys(lengths if head_dim == first else lengths[1:4]):
            for causal in (False, True):
                name = f"S = {_in_tiles(length, tile)}, {_mask(causal)}, d{head_dim}"
                yield Case(name=name, seqlen_q=length, seqlen_k=length, head_dim=head_dim, causal=causal), "every length works"
    pairs = [(tile + 3, 3 * tile - 1), (3 * tile - 1, tile + 3), (1, 3 * tile + 1), (2 * tile, 1)]
    if not quick:
        pairs += [(prime, tile), (tile, prime), (3, 5 * tile), (4 * tile, 4 * tile + 1), (4 * tile + 1, 4 * tile)]
    for head_dim in head_dims:
        for rows, keys in pairs if head_dim == first else pairs[:2]:
            for causal in (False, True):
                name = f"Sq = {rows}, Sk = {keys}, {_mask(causal)}, d{head_dim}"
                proves = "causal is aligned bottom right" if causal else "Sq and Sk are independent"
                yield Case(name=name, seqlen_q=rows, seqlen_k=keys, head_dim=head_dim, causal=causal), proves


def empty(tile: int, head_dim: int) -> Iterator[tuple[Case, str]]:
    """Problems in which a dimension is 0."""
    for batch, rows, keys, heads in ((1, 0, tile, 2), (1, tile, 0, 2), (0, tile, tile, 2), (2, 0, 0, 2), (1, tile, tile, 0)):
        name = f"empty: batch {batch}, Sq = {rows}, Sk = {keys}" + (", no heads" if not heads else "")
        case = Case(name=name, batch=batch, seqlen_q=rows, seqlen_k=keys, head_dim=head_dim, heads=heads)
        yield case, "an empty problem has an answer"


def _heads(tile: int, head_dim: int, quick: bool) -> Iterator[tuple[Case, str]]:
    common = {"batch": 2, "seqlen_q": tile + 5, "seqlen_k": 2 * tile - 1, "head_dim": head_dim}
    for heads, kv_heads in ((4, 2), (6, 1)) if quick else ((4, 2), (6, 1), (8, 2), (15, 5)):
        for causal in (False, True):
            name = f"{heads} query heads on {kv_heads} key head{'s' * (kv_heads > 1)}, {_mask(causal)}"
            case = Case(name=name, heads=heads, kv_heads=kv_heads, causal=causal, **common)
            yield case, "consecutive query heads share a key head"
    for case in many_heads(tile, head_dim):
        yield case, "any number of query heads share a key head"
    for batch, heads in ((1, 1), (19, 3)):
        sizes = {"batch": batch, "heads": heads, "seqlen_q": tile + 1, "seqlen_k": tile + 1, "head_dim": head_dim}
        yield Case(name=f"batch {batch}, {heads} heads", **sizes), "batches and heads are independent"


def many_heads(tile: int, head_dim: int) -> Iterator[Case]:
    """Large groups of query heads, on few rows."""
    for heads, kv_heads in MANY_HEADS:
        sizes = {"heads": heads, "kv_heads": kv_heads, "batch": 2, "seqlen_q": 5, "seqlen_k": tile + 3, "head_dim": head_dim}
        yield Case(name=f"{heads} query heads on {kv_heads} key head{'s' * (kv_heads > 1)}, causal", causal=True, **sizes)


def laid_out(tile: int, head_dim: int) -> Iterator[tuple[Case, str]]:
    """Every layout but the contiguous one, on two batch entries and GQA."""
    common = {"batch": 2, "seqlen_q": tile + 8, "seqlen_k": 2 * tile + 8, "head_dim": head_dim, "heads": 4, "kv_heads": 2}
    for layout in list(LAYOUTS)[1:]:
        if "size 1" not in layout:
            yield Case(name=layout, layout=layout, **common), "strides are respected"
            continue
        one = {"batch": 1, "kv_heads": 1}
        for which, sizes in (("one batch entry, one key head", one), ("decoding", one | {"seqlen_q": 1})):
            yield Case(name=f"{layout}, {which}", layout=layout, **(common | sizes)), "strides are respected"


def trials(bench: Bench) -> Iterator[Trial]:
    """Those of `large` in a full run, then every case of `cases`."""
    yield from () if bench.quick else large.trials(bench)
    for case, proves in cases(bench.tile, bench.head_dims, bench.quick):
        yield Trial(case.name, lambda case=case, proves=proves: bench.hold(case, proves))
    for head_dim in other_head_dims(bench):
        case = Case(name=f"head dim {head_dim}", seqlen_q=bench.tile + 1, seqlen_k=bench.tile + 3, head_dim=head_dim, causal=True)
        yield Trial(case.name, lambda case=case: _offered(bench, case))


def other_head_dims(bench: Bench) -> list[int]:
    """Head dims that the subject does not promise."""
    return [d for d in (_HEAD_DIMS[:2] if bench.quick else _HEAD_DIMS) if d not in bench.subject.head_dims]


def _offered(bench: Bench, case: Case) -> dict:
    """A problem outside the promise: refused by whatever exception, or right."""
    try:
        bench.call(*bench.tensors(case), case)
    except Fault as fault:
        if "raised " not in str(fault):
            raise
        raise Skipped(f"head dim {case.head_dim} is not promised: {fault}") from None
    return bench.hold(case, "a head dim that is taken is computed right, its default softmax_scale included")


def _mask(causal: bool) -> str:
    return "causal" if causal else "full"


def _in_tiles(length: int, tile: int) -> str:
    for count in (1, 2):
        for offset, sign in ((-1, " - 1"), (0, ""), (1, " + 1")):
            if length == count * tile + offset:
                return f"{length} ({'' if count == 1 else count}tile{sign})".replace("2tile", "2 tiles")
    return str(length)
