"""Lengths, heads, batches and layouts that break attention kernels, and the group of checks over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from . import criteria, yardstick
from .check import Case, Skipped, Trial

if TYPE_CHECKING:
    from .bench import Bench

_PRIMES = (2, 3, 5, 7, 11, 17, 23, 37, 53, 71, 97, 113, 149, 191, 251, 307, 389, 499)
_PAST_INT32 = 2**31


# -- layouts ----------------------------------------------------------------------------------------------------------


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _length_first(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _packed(x: torch.Tensor) -> torch.Tensor:
    """The middle third of a fused projection, as of one GEMM for Q, K and V."""
    room = x.new_full((*x.shape[:2], 3 * x.shape[2], x.shape[3]), float("nan"))
    room[:, :, x.shape[2] : 2 * x.shape[2]] = x
    return room[:, :, x.shape[2] : 2 * x.shape[2]]


def _every_second_row(x: torch.Tensor) -> torch.Tensor:
    room = x.new_full((x.shape[0], 2 * x.shape[1], *x.shape[2:]), float("nan"))
    room[:, ::2] = x
    return room[:, ::2]


def _head_dim_strided(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def _off_alignment(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, but its first element lies two elements past a 16-byte boundary."""
    room = x.new_full((x.numel() + 2,), float("nan"))
    room[2:] = x.flatten()
    return room[2:].view(x.shape)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "heads before rows in memory": _heads_first,
    "rows before batch in memory": _length_first,
    "packed QKV": _packed,
    "every second row": _every_second_row,
    "head dim strided": _head_dim_strided,
    "base off 16 bytes": _off_alignment,
}
"""How a tensor (B, S, H, D) may lie in memory; what lies between its elements is NaN."""


def lay_out(name: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same values in the layout `name`."""
    return tuple(LAYOUTS[name](x) for x in tensors)


# -- the group --------------------------------------------------------------------------------------------------------


def cases(tile: int, head_dims: tuple[int, ...], quick: bool) -> Iterator[tuple[Case, str]]:
    """(case, what it proves) over lengths, pairs of lengths, heads, batches, scales and layouts."""
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
    for batch, rows, keys in ((1, 0, tile), (1, tile, 0), (0, tile, tile), (2, 0, 0)):
        name = f"empty: batch {batch}, Sq = {rows}, Sk = {keys}"
        yield Case(name=name, batch=batch, seqlen_q=rows, seqlen_k=keys, head_dim=first), "an empty problem has an answer"
    for heads, kv_heads in ((4, 2), (6, 1)) if quick else ((4, 2), (6, 1), (8, 2), (15, 5)):
        for causal in (False, True):
            name = f"{heads} query heads on {kv_heads} key heads, {_mask(causal)}"
            case = Case(
                name=name,
                batch=2,
                seqlen_q=tile + 5,
                seqlen_k=2 * tile - 1,
                head_dim=first,
                heads=heads,
                kv_heads=kv_heads,
                causal=causal,
            )
            yield case, "consecutive query heads share a key head"
    for batch, heads in ((1, 1), (19, 3)):
        yield (
            Case(
                name=f"batch {batch}, {heads} heads",
                batch=batch,
                heads=heads,
                seqlen_q=tile + 1,
                seqlen_k=tile + 1,
                head_dim=first,
            ),
            "batches and heads are independent",
        )
    for scale in (0.3, 1.0):
        case = Case(name=f"softmax_scale {scale}", seqlen_q=tile, seqlen_k=tile, head_dim=first, softmax_scale=scale)
        yield case, "softmax_scale is the one given"
    for layout in list(LAYOUTS)[1:]:
        case = Case(
            name=layout,
            batch=2,
            seqlen_q=tile + 8,
            seqlen_k=2 * tile + 8,
            head_dim=first,
            heads=4,
            kv_heads=2,
            layout=layout,
        )
        yield case, "strides are respected"


def trials(bench: Bench) -> Iterator[Trial]:
    """`large` in a full run, then every case of `cases`."""
    yield from () if bench.quick else large(bench)
    for case, proves in cases(bench.tile, bench.head_dims, bench.quick):
        yield Trial(case.name, lambda case=case, proves=proves: bench.hold(case, proves))


def large(bench: Bench) -> Iterator[Trial]:
    """More CTAs than a grid's y axis, and more than 2^31 elements."""
    head_dim = bench.head_dims[-1]
    many = Case(name="batch x heads > 65535", batch=1100, heads=60, seqlen_q=17, seqlen_k=17, head_dim=bench.head_dims[0])
    yield Trial(many.name, lambda: _large(bench, many))
    for name, sizes in (
        ("more than 2^31 elements: batch", {"batch": _PAST_INT32 // (512 * 16 * head_dim) + 1, "seqlen_q": 512, "seqlen_k": 512}),
        ("more than 2^31 elements: long q", {"seqlen_q": _PAST_INT32 // (16 * head_dim) + 64, "seqlen_k": 128}),
        ("more than 2^31 elements: long k", {"seqlen_q": 64, "seqlen_k": _PAST_INT32 // (16 * head_dim) + 64}),
    ):
        case = Case(name=name, heads=16, head_dim=head_dim, **sizes)
        yield Trial(name, lambda case=case: _large(bench, case))


def _large(bench: Bench, case: Case) -> dict:
    """Run a problem too large for the yardstick; hold its last corner, where an index that overflowed would show."""
    if not bench.on_gpu:
        raise Skipped("needs a GPU")
    from math import prod

    item = torch.empty((), dtype=bench.dtype).element_size()
    need = item * (2 * prod(case.q_shape) + 2 * prod(case.k_shape)) * 1.4
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if need > free:
        raise Skipped(f"needs {need / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} GiB are free")
    from .bench import explained

    generator = torch.Generator(bench.device).manual_seed(bench.seed)
    try:
        with explained(case, "indices do not overflow"):
            q, k, v = (
                torch.randn(shape, dtype=bench.dtype, device=bench.device, generator=generator)
                for shape in (case.q_shape, case.k_shape, case.k_shape)
            )
            out, _ = bench.call(q, k, v, case)
            figures = {}
            for batches, rows in ((slice(0, 1), slice(0, 64)), (slice(-1, None), slice(-64, None))):
                heads = slice(-1, None)
                part = q[batches, rows, heads], k[batches, :, heads], v[batches, :, heads]
                exact, _, bound = yardstick.bound(*part, case.causal, case.softmax_scale)
                figures = criteria.hold(f"O[{_corner(batches)}]", "bmhd", out[batches, rows, heads], exact, bound)
            return figures
    finally:
        q = k = v = out = part = None
        torch.cuda.empty_cache()


def _corner(batches: slice) -> str:
    return "last 64 rows of the last batch" if batches.start else "first 64 rows of the first batch"


def _mask(causal: bool) -> str:
    return "causal" if causal else "full"


def _in_tiles(length: int, tile: int) -> str:
    for count in (1, 2):
        for offset, sign in ((-1, " - 1"), (0, ""), (1, " + 1")):
            if length == count * tile + offset:
                return f"{length} ({'' if count == 1 else count}tile{sign})".replace("2tile", "2 tiles")
    return str(length)
