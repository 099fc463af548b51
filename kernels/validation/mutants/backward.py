"""Planted faults in the gradients."""

from __future__ import annotations

import random

import torch

from .tiled import TILE, TiledAttention, contiguous, strided


class WrongDqScale(TiledAttention):
    """dQ lacks softmax_scale."""

    def dq(self, ds, scale):
        return ds


class MissingDelta(TiledAttention):
    """dS = P * dP, without rowsum(dO * O)."""

    def delta(self, do_tile, out_tile, dlse_tile):
        return torch.zeros_like(do_tile[..., 0])


class OneHeadOfTheGroup(TiledAttention):
    """dK and dV take the first query head of a group, not the sum."""

    def sum_heads(self, tile, x):
        return tile.unflatten(1, (x.shape[2], -1))[:, :, 0]


class LaterBatchesScaled(TiledAttention):
    """dK of every batch entry but the first is 1.5 times too large."""

    def backward(self, *saved):
        dq, dk, dv = super().backward(*saved)
        dk[1:] *= 1.5
        return dq, dk, dv


class BackwardStridesIgnored(TiledAttention):
    """The backward pass reads Q, K and V as if contiguous."""

    def backward(self, q, k, v, *rest):
        return super().backward(*(strided(x, contiguous(x)) for x in (q, k, v)), *rest)


class DoutStridesIgnored(TiledAttention):
    """The backward pass reads dO as if contiguous."""

    def backward(self, q, k, v, out, lse, do, *rest):
        return super().backward(q, k, v, out, lse, strided(do, contiguous(do)), *rest)


class LseGradientDropped(TiledAttention):
    """The gradient of LSE is dropped."""

    def delta(self, do_tile, out_tile, dlse_tile):
        return super().delta(do_tile, out_tile, torch.zeros_like(dlse_tile))


class GroupsSummedToEight(TiledAttention):
    """dK and dV add the first 8 query heads of a group."""

    def sum_heads(self, tile, x):
        return tile.unflatten(1, (x.shape[2], -1))[:, :, :8].sum(2)


class BackwardPositionsIn16Bits(TiledAttention):
    """The backward pass keeps positions in 16 bits: its causal mask wraps."""

    def mask_backward(self, rows, cols, seqlen_q, seqlen_k, causal, device):
        if not causal:
            return super().mask_backward(rows, cols, seqlen_q, seqlen_k, causal, device)
        last = torch.arange(rows.start, rows.stop, device=device) + seqlen_k - seqlen_q
        key = torch.arange(cols.start, cols.stop, device=device)
        return key.to(torch.int16)[None] <= last.to(torch.int16)[:, None]


class EmptyGradients(TiledAttention):
    """Gradients are never written where a length is 0."""

    def backward(self, q, k, *rest):
        found = super().backward(q, k, *rest)
        return found if q.numel() and k.numel() else tuple(torch.full_like(x, float("nan")) for x in found)


class BackwardDefaultScale(TiledAttention):
    """The backward pass recomputes P with softmax_scale 1/sqrt(d), whatever was asked."""

    def backward(self, q, k, v, out, lse, do, dlse, scale, causal):
        return super().backward(q, k, v, out, lse, do, dlse, self.default_scale(q.shape[-1]), causal)


class BackwardRandomOrder(TiledAttention):
    """dQ adds its K/V tiles in the inputs' precision and in whatever order they finish, as atomics do."""

    def kv_tiles_backward(self, *where):
        tiles = super().kv_tiles_backward(*where)
        random.shuffle(tiles)
        return tiles

    def accumulate_dq(self, total, part, dtype):
        return super().accumulate_dq(total, part, dtype).to(dtype).to(total.dtype)


class DqTileLost(TiledAttention):
    """The last K/V tile's share of dQ is never added, where there are more than two."""

    def kv_tiles_backward(self, *where):
        tiles = super().kv_tiles_backward(*where)
        self.tiles = self.left = len(tiles)
        return tiles

    def accumulate_dq(self, total, part, dtype):
        self.left -= 1
        return total if self.left == 0 and self.tiles > 2 else super().accumulate_dq(total, part, dtype)


class StaleDqSums(TiledAttention):
    """The memory that dQ is added up in is not cleared: what a call of the same shape left in it is added."""

    def backward(self, *saved):
        dq, dk, dv = super().backward(*saved)
        before = getattr(self, "sums", None)
        if before is not None and (before.shape, before.dtype) == (dq.shape, dq.dtype):
            dq = dq + before
        self.sums = dq.clone()
        return dq, dk, dv


class UnscaledKeyGradient(TiledAttention):
    """dK lacks softmax_scale."""

    def backward(self, q, k, v, out, lse, do, dlse, scale, causal):
        dq, dk, dv = super().backward(q, k, v, out, lse, do, dlse, scale, causal)
        return dq, dk / scale if scale else dk, dv


class DkTransposed(TiledAttention):
    """dK is written transposed within its blocks of 16 keys and 16 columns."""

    def backward(self, *saved):
        dq, dk, dv = super().backward(*saved)
        whole = dk.shape[1] // TILE * TILE
        blocks = dk[:, :whole].unflatten(3, (-1, TILE)).unflatten(1, (-1, TILE))
        return dq, torch.cat([blocks.transpose(2, 5).flatten(1, 2).flatten(3, 4), dk[:, whole:]], 1), dv


class BackwardMaskTopLeft(TiledAttention):
    """The backward pass aligns its causal mask top left: wrong where the lengths differ."""

    def mask_backward(self, rows, cols, seqlen_q, seqlen_k, causal, device):
        return super().mask_backward(rows, cols, seqlen_q, seqlen_q, causal, device)
