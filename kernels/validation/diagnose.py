"""Known wrong answers: where an output fails, compute what common mistakes would give and say which one it equals."""

from __future__ import annotations

from collections.abc import Iterator
from math import log, sqrt

import torch

from .check import Case
from .criteria import LSE_TOLERANCE, Bound
from .yardstick import sees

_SMALL = 1 << 24  # scores; beyond it a guess is not worth its memory
_TILES = (16, 32, 64, 80, 96, 112, 128, 160, 176, 192, 256)


def output(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, got: torch.Tensor, bound: Bound) -> str:
    """A sentence on the mistake whose answer `got` equals, or an empty string."""
    if case.batch * case.heads * case.seqlen_q * case.seqlen_k > _SMALL:
        return ""
    got = got.double()
    for sentence, wrong in _mistakes(case, q, k, v):
        if wrong.shape == got.shape and (got - wrong).abs().nan_to_num(float("inf")).max().item() <= 2 * bound.largest:
            return f"it equals attention {sentence}"
    return ""


def lse(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, got: torch.Tensor, exact: torch.Tensor) -> str:
    """A sentence on the mistake whose LSE `got` equals, or an empty string."""
    if case.batch * case.heads * case.seqlen_q * case.seqlen_k > _SMALL:
        return ""
    got, scale = got.double(), _scale(case)
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


def _scale(case: Case) -> float:
    return case.softmax_scale if case.softmax_scale is not None else 1.0 / sqrt(case.head_dim)


def _mistakes(
    case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """(what was done wrong, the O it gives)."""
    rows, keys, scale = case.seqlen_q, case.seqlen_k, _scale(case)
    seen = sees(rows, keys, case.causal, q.device)
    ones = torch.ones_like(seen)
    if case.causal:
        for sentence, mask in (
            ("with the causal mask aligned top left", ones.tril(0)),
            ("with the causal mask one key too far", ones.tril(keys - rows + 1)),
            ("with the causal mask one key short", ones.tril(keys - rows - 1)),
            ("without the causal mask", ones),
        ):
            if not torch.equal(mask, seen):
                yield sentence, attend(q, k, v, scale, mask)[0]
    for sentence, wrong in (
        ("without softmax_scale", 1.0),
        ("with softmax_scale 1/d", 1.0 / case.head_dim),
        ("with softmax_scale 1/sqrt(d), not the one given", 1.0 / sqrt(case.head_dim)),
        ("with softmax_scale applied twice", scale * scale),
    ):
        if wrong != scale:
            yield sentence, attend(q, k, v, wrong, seen)[0]
    for tile in _TILES:
        kept = keys // tile * tile
        if 0 < kept < keys:
            yield f"without the last, partial tile (keys from {kept})", attend(q, k, v, scale, seen & _below(seen, kept))[0]
        if kept < keys and not case.causal:
            pad = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, kept + tile - keys)) for x in (k, v)]
            sentence = f"with the last tile padded to {tile} keys of zeros, not masked"
            yield sentence, attend(q, *pad, scale, torch.nn.functional.pad(seen, (0, kept + tile - keys), value=True))[0]
        if kept >= 2 * tile:
            index = torch.arange(keys, device=k.device)
            pairs = keys // (2 * tile) * 2 * tile
            for sentence, end in (("the first two", 2 * tile), ("neighbouring", pairs)):
                order = torch.where(index < end, _swapped(index, tile), index)
                yield f"with {sentence} K tiles of {tile} swapped", attend(q, k[:, order], v, scale, seen)[0]
    if keys > 1:
        yield "without the last key", attend(q, k, v, scale, seen & _below(seen, keys - 1))[0]
    if case.heads_kv not in (0, case.heads):
        interleaved = [h % case.heads_kv for h in range(case.heads)]
        yield "with key head h mod Hkv, not h // (H / Hkv)", attend(q, k, v, scale, seen, interleaved)[0]
        yield "with key head 0 for every query head", attend(q, k, v, scale, seen, [0] * case.heads)[0]
    if case.layout != "contiguous":
        flat = [_as_if_contiguous(x) for x in (q, k, v)]
        if all(x is not None for x in flat):
            yield "on memory read as if it were contiguous", attend(*flat, scale, seen)[0]


def _swapped(index: torch.Tensor, tile: int) -> torch.Tensor:
    """Position of a key's partner where tiles are taken in pairs the wrong way round."""
    return index + torch.where(index // tile % 2 == 0, tile, -tile)


def _below(seen: torch.Tensor, count: int) -> torch.Tensor:
    return torch.arange(seen.shape[1], device=seen.device) < count


def _as_if_contiguous(x: torch.Tensor) -> torch.Tensor | None:
    """What a kernel sees that ignores strides, or None where it would leave the storage."""
    if x.storage_offset() + x.numel() > x.untyped_storage().nbytes() // x.element_size():
        return None
    return x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride(), x.storage_offset())
