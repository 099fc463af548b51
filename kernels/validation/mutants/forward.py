"""Planted faults in the arithmetic of the forward pass."""

from __future__ import annotations

import random
from math import log, sqrt

import torch

from .tiled import TILE, TiledAttention, contiguous, strided


class DroppedRescale(TiledAttention):
    """The accumulator keeps its old scale when the running maximum rises."""

    def rescale(self, alpha):
        return torch.ones_like(alpha)


class MaskOffByOne(TiledAttention):
    """The causal mask lets each row see one key too many."""

    def mask(self, rows, cols, seqlen_q, seqlen_k, causal, device):
        return super().mask(rows, cols, seqlen_q, seqlen_k + 1, causal, device)

    def kv_tiles(self, seqlen_q, seqlen_k, rows, causal):
        return super().kv_tiles(seqlen_q, seqlen_k, slice(rows.start, rows.stop + 1), causal)


class MaskTopLeft(TiledAttention):
    """The causal mask is aligned top left: wrong only where Sq and Sk differ."""

    def forward(self, q, k, v, scale, causal):
        if causal and k.shape[1] > q.shape[1]:
            k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]
        return super().forward(q, k, v, scale, causal)


class MissingLastTile(TiledAttention):
    """The number of K/V tiles is rounded down: a partial last tile is never read."""

    def kv_tiles(self, seqlen_q, seqlen_k, rows, causal):
        return [t for t in super().kv_tiles(seqlen_q, seqlen_k, rows, causal) if t.stop - t.start == TILE]


class UnmaskedTail(TiledAttention):
    """A partial last K/V tile is filled with zeros that are not masked, so they weigh in as keys."""

    def load_kv(self, x, cols, which):
        tile = super().load_kv(x, cols, which)
        return torch.nn.functional.pad(tile, (0, 0, 0, TILE - tile.shape[2]))

    def mask(self, rows, cols, seqlen_q, seqlen_k, causal, device):
        return super().mask(rows, slice(cols.start, cols.start + TILE), seqlen_q, seqlen_k, causal, device)


class WrongScale(TiledAttention):
    """softmax_scale is 1/d."""

    def scale(self, s, scale, head_dim):
        return s / head_dim


class ScaleIgnored(TiledAttention):
    """softmax_scale is always 1/sqrt(d), whatever was asked."""

    def scale(self, s, scale, head_dim):
        return s / sqrt(head_dim)


class SwappedKTile(TiledAttention):
    """K tiles are read in pairs the wrong way round, V tiles are not."""

    def load_kv(self, x, cols, which):
        other = cols.start ^ TILE
        if which == "k" and other + TILE <= x.shape[1] and cols.stop - cols.start == TILE:
            cols = slice(other, other + TILE)
        return super().load_kv(x, cols, which)


class LseWithoutMax(TiledAttention):
    """LSE is the logarithm of the row sum; the row's maximum is missing."""

    def finish(self, top, total, acc):
        out, _ = super().finish(top, total, acc)
        return out, torch.log(total)


class LseInBase2(TiledAttention):
    """LSE stays in base 2, as exp2 left it."""

    def finish(self, top, total, acc):
        out, lse = super().finish(top, total, acc)
        return out, lse / log(2.0)


class NoRunningMax(TiledAttention):
    """exp without subtracting the maximum: right until a logit passes 88."""

    def step(self, top, total, acc, s, v_tile, dtype):
        top = torch.where(torch.isinf(s).all(-1) & torch.isinf(top), float("-inf"), 0.0)
        p = torch.exp(s)
        return top, total + p.sum(-1), acc + p @ v_tile


class ScoresInHalf(TiledAttention):
    """S is kept in fp16: it overflows past 65504."""

    def scale(self, s, scale, head_dim):
        return s.to(torch.float16).to(s.dtype) * scale if s.dtype == torch.float32 else s * scale


class EmptyRowsDivide(TiledAttention):
    """A row that sees no key is divided by its sum, 0."""

    def finish(self, top, total, acc):
        _, lse = super().finish(top, total, acc)
        return acc / total[..., None], lse


class NanSwallowed(TiledAttention):
    """NaN among the scores counts as -inf and NaN in V as 0, as a min/max that ignores NaN would have it."""

    def step(self, top, total, acc, s, v_tile, dtype):
        return super().step(top, total, acc, torch.where(s.isnan(), float("-inf"), s), v_tile.nan_to_num(nan=0.0), dtype)


class HalfAccumulator(TiledAttention):
    """O is accumulated in the inputs' precision: it drifts with the number of tiles."""

    def step(self, top, total, acc, s, v_tile, dtype):
        top, total, acc = super().step(top, total, acc, s, v_tile, dtype)
        return top, total, acc.to(dtype).to(acc.dtype)


class CoarseWeights(TiledAttention):
    """P is rounded to the 8 bits of bf16 where the inputs have more."""

    def step(self, top, total, acc, s, v_tile, dtype):
        return super().step(top, total, acc, s, v_tile, torch.bfloat16)


class RandomOrder(TiledAttention):
    """K/V tiles are added in whatever order they finish, as atomics would."""

    def kv_tiles(self, seqlen_q, seqlen_k, rows, causal):
        tiles = super().kv_tiles(seqlen_q, seqlen_k, rows, causal)
        random.shuffle(tiles)
        return tiles


class GqaInterleaved(TiledAttention):
    """Query head h reads key head h mod Hkv."""

    def share_heads(self, tile, q):
        return tile.repeat(1, q.shape[2] // tile.shape[1], 1, 1)


class StridesIgnored(TiledAttention):
    """Q, K and V are read as if contiguous."""

    def forward(self, q, k, v, scale, causal):
        return super().forward(*(strided(x, contiguous(x)) for x in (q, k, v)), scale, causal)


class ScaleSignLost(TiledAttention):
    """A negative softmax_scale is taken without its sign."""

    def scale(self, s, scale, head_dim):
        return s * abs(scale)


class ZeroScaleIsDefault(TiledAttention):
    """softmax_scale 0 counts as not given."""

    def __call__(self, q, k, v, *, causal=False, softmax_scale=None):
        return super().__call__(q, k, v, causal=causal, softmax_scale=softmax_scale or None)


class MaskTimesScale(TiledAttention):
    """Scores are scaled after the mask: -inf times a scale that is 0 in fp32 is NaN."""

    def step(self, top, total, acc, s, v_tile, dtype):
        return super().step(top, total, acc, s * self.given, v_tile, dtype)

    def scale(self, s, scale, head_dim):
        self.given = scale
        return s


class SmallGroupsOnly(TiledAttention):
    """Groups of more than 8 query heads all read key head 0."""

    def share_heads(self, tile, q):
        shared = super().share_heads(tile, q)
        return shared if q.shape[2] // tile.shape[1] <= 8 else tile[:, :1].expand_as(shared)


class InferenceGroups(SmallGroupsOnly):
    """Where no gradient is asked for another path is taken, in which groups of more than 8 query heads all read key head 0."""

    def __call__(self, q, k, v, **options):
        training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        return (TiledAttention() if training else super()).__call__(q, k, v, **options)


class PositionsIn16Bits(TiledAttention):
    """Positions are kept in 16 bits: the causal mask wraps."""

    def mask(self, rows, cols, seqlen_q, seqlen_k, causal, device):
        if not causal:
            return super().mask(rows, cols, seqlen_q, seqlen_k, causal, device)
        last = torch.arange(rows.start, rows.stop, device=device) + seqlen_k - seqlen_q
        key = torch.arange(cols.start, cols.stop, device=device)
        return key.to(torch.int16)[None] <= last.to(torch.int16)[:, None]


class KeyStridesForValues(TiledAttention):
    """V is read with K's strides."""

    def forward(self, q, k, v, scale, causal):
        return super().forward(q, k, v if k.stride() == v.stride() else strided(v, k.stride()), scale, causal)


class LazyBitIgnored(TiledAttention):
    """Tensors that PyTorch negates lazily are read as they lie in memory."""

    def forward(self, q, k, v, scale, causal):
        return super().forward(*(x.neg() if x.is_neg() else x for x in (q, k, v)), scale, causal)


class PaddedHeadDimScale(TiledAttention):
    """The default softmax_scale is 1/sqrt of the head dim padded to a power of 2."""

    def default_scale(self, head_dim):
        return super().default_scale(1 << (head_dim - 1).bit_length())
