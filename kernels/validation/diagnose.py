"""Known wrong answers: where an output fails, compute what common mistakes would give and say which one it equals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import log, sqrt

import torch

from .check import Case
from .criteria import LSE_TOLERANCE, Bound
from .yardstick import sees

SMALL = 1 << 24  # scores; beyond it a guess is not worth its memory
_TILES = (16, 32, 64, 80, 96, 112, 128, 160, 176, 192, 256)


def output(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, got: torch.Tensor, bound: Bound) -> str:
    """A sentence on the mistake whose answer `got` equals, or an empty string."""
    if case.batch * case.heads * case.seqlen_q * case.seqlen_k > SMALL:
        return ""
    got = got.double()
    for sentence, tensors, attention in _mistakes(case, q, k, v):
        wrong = attention(*tensors)
        if wrong.shape == got.shape and (got - wrong).abs().nan_to_num(float("inf")).max().item() <= 2 * bound.largest:
            return f"it equals attention {sentence}"
    return ""


def lse(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, got: torch.Tensor, exact: torch.Tensor) -> str:
    """A sentence on the mistake whose LSE `got` equals, or an empty string."""
    if case.batch * case.heads * case.seqlen_q * case.seqlen_k > SMALL:
        return ""
    got, scale = got.double(), scale_of(case)
    k_wide = k.double().repeat_interleave(case.heads // max(1, case.heads_kv), 2)
    s = torch.einsum("bmhd,bnhd->bhmn", q.double(), k_wide) * scale
    seen = sees(case.seqlen_q, case.seqlen_k, case.causal, q.device)
    largest = s.masked_fill(~seen, float("-inf")).amax(-1) if case.seqlen_k else exact
    unscaled = attend(q, k, v, 1.0, seen)[1]
    for sentence, wrong in (
        ("the logarithm of the row sum without the row's maximum", exact - largest),
        ("in base 2, not natural", exact / log(2.0)),
        ("the row's maximum without the logarithm of the sum", largest),
        ("that of the scores without softmax_scale", unscaled),
    ):
        allowed = 4 * LSE_TOLERANCE * wrong.abs().clamp(min=1.0)
        if ((got - wrong).abs() <= allowed)[torch.isfinite(exact)].all() and torch.isfinite(exact).any():
            return f"it equals {sentence}"
    return ""


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, seen: torch.Tensor, heads: list[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in fp64 under any mask (Sq, Sk): O (B, Sq, H, D) and LSE (B, H, Sq).

    `heads` maps each query head to its key head; by default consecutive query heads share one.
    """
    group = q.shape[2] // max(1, k.shape[2])
    index = torch.tensor(heads or [h // max(1, group) for h in range(q.shape[2])], device=q.device, dtype=torch.long)
    k, v = (x.double().index_select(2, index) for x in (k, v))
    s = (torch.einsum("bmhd,bnhd->bhmn", q.double(), k) * scale).masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(s, -1) if s.shape[-1] else s.new_full(s.shape[:-1], float("-inf"))
    p = torch.exp(s - torch.where(lse == float("-inf"), 0.0, lse)[..., None])
    return torch.einsum("bhmn,bnhd->bmhd", p, v), lse


def scale_of(case: Case) -> float:
    return case.softmax_scale if case.softmax_scale is not None else 1.0 / sqrt(case.head_dim)


Mistake = tuple[str, tuple, Callable[..., torch.Tensor]]


def _mistakes(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[Mistake]:
    """(what was done wrong, on which q, k, v, the function of them that gives O)."""
    rows, keys, scale = case.seqlen_q, case.seqlen_k, scale_of(case)
    seen = sees(rows, keys, case.causal, q.device)
    qkv = q, k, v

    def masked(mask: torch.Tensor) -> Callable[..., torch.Tensor]:
        return lambda q, k, v: attend(q, k, v, scale, mask)[0]

    for sentence, mask in masks(case, seen):
        if not torch.equal(mask, seen):
            yield sentence, qkv, masked(mask)
    for sentence, wrong in scales(case):
        if wrong != scale:
            yield sentence, qkv, lambda q, k, v, wrong=wrong: attend(q, k, v, wrong, seen)[0]
    for tile in _TILES:
        kept = keys // tile * tile
        if 0 < kept < keys:
            yield f"without the last, partial tile (keys from {kept})", qkv, masked(seen & _below(seen, kept))
        if kept < keys and not case.causal:
            more = kept + tile - keys
            padded = torch.nn.functional.pad(seen, (0, more), value=True)
            sentence = f"with the last tile padded to {tile} keys of zeros, not masked"
            yield sentence, qkv, lambda q, k, v, p=padded, more=more: attend(q, *_padded(more, k, v), scale, p)[0]
        if kept >= 2 * tile:
            index = torch.arange(keys, device=k.device)
            pairs = keys // (2 * tile) * 2 * tile
            for words, end in (("the first two", 2 * tile), ("neighbouring", pairs)):
                order = torch.where(index < end, _swapped(index, tile), index)
                sentence = f"with {words} K tiles of {tile} swapped"
                yield sentence, qkv, lambda q, k, v, order=order: attend(q, k[:, order], v, scale, seen)[0]
    if keys > 1:
        yield "without the last key", qkv, masked(seen & _below(seen, keys - 1))
    if case.heads_kv not in (0, case.heads):
        interleaved = [h % case.heads_kv for h in range(case.heads)]
        for sentence, heads in (("h mod Hkv, not h // (H / Hkv)", interleaved), ("0 for every query head", [0] * case.heads)):
            yield f"with key head {sentence}", qkv, lambda q, k, v, heads=heads: attend(q, k, v, scale, seen, heads)[0]
    if case.layout != "contiguous":
        for sentence, tensors in misread(q, k, v):
            if all(x is not None for x in tensors):
                yield sentence, tensors, masked(seen)


def masks(case: Case, seen: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Causal masks as they go wrong."""
    if not case.causal:
        return
    ones, rows, keys = torch.ones_like(seen), *seen.shape
    yield "with the causal mask aligned top left", ones.tril(0)
    yield "with the causal mask one key too far", ones.tril(keys - rows + 1)
    yield "with the causal mask one key short", ones.tril(keys - rows - 1)
    yield "without the causal mask", ones
    if max(rows, keys) > 1 << 15:
        last = torch.arange(rows, device=seen.device)[:, None] + keys - rows
        key = torch.arange(keys, device=seen.device)[None]
        for words, wrap in (
            ("in 16 bits, wrapped at 32768", lambda x: (x + 32768) % 65536 - 32768),
            ("in 16 bits, wrapped at 65536", lambda x: x % 65536),
        ):
            yield f"with positions {words}", wrap(key) <= wrap(last)


def scales(case: Case) -> Iterator[tuple[str, float]]:
    """What is taken for softmax_scale."""
    head_dim, scale = case.head_dim, scale_of(case)
    yield "without softmax_scale", 1.0
    yield "with softmax_scale 1/d", 1.0 / head_dim
    yield "with softmax_scale 1/sqrt(d), not the one given", 1.0 / sqrt(head_dim)
    yield "with softmax_scale applied twice", scale * scale
    yield "with softmax_scale without its sign", abs(scale)
    if case.softmax_scale is None:
        for other in (64, 128, 1 << (int(head_dim) - 1).bit_length()):
            yield f"with softmax_scale 1/sqrt({other}), as of head dim {other}", 1.0 / sqrt(other)


def misread(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[tuple[str, tuple]]:
    """Tensors as a kernel sees them that takes strides for something else."""
    for sentence, tensors in (
        ("on memory read as if it were contiguous", [strided(x, contiguous(x)) for x in (q, k, v)]),
        ("on K read with V's strides and V with K's", [q, strided(k, v.stride()), strided(v, k.stride())]),
        ("on K and V read with K's strides", [q, k, strided(v, k.stride())]),
        ("on K and V read with V's strides", [q, strided(k, v.stride()), v]),
        ("on -x where the negation is lazy", [x.neg() if x.is_neg() else None for x in (q, k, v)]),
    ):
        yield sentence, tuple(tensors)


def _swapped(index: torch.Tensor, tile: int) -> torch.Tensor:
    """Position of a key's partner where tiles are taken in pairs the wrong way round."""
    return index + torch.where(index // tile % 2 == 0, tile, -tile)


def _below(seen: torch.Tensor, count: int) -> torch.Tensor:
    return torch.arange(seen.shape[1], device=seen.device) < count


def _padded(rows: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, rows)) for x in tensors]


def contiguous(x: torch.Tensor) -> tuple[int, ...]:
    return torch.empty(x.shape, device="meta").stride()


def strided(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor | None:
    """What lies where a kernel looks that takes x's strides for these, or None where it would leave the storage."""
    end = x.storage_offset() + 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    return x.as_strided(x.shape, strides) if x.numel() and end <= x.untyped_storage().nbytes() // x.element_size() else None
