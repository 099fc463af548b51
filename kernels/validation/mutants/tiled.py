"""FlashAttention tile by tile in plain torch: correct and slow, on any device, in every dtype."""

from __future__ import annotations

from functools import cache, lru_cache
from math import sqrt

import torch

TILE = 16
_LONG = 8192  # keys or rows; past it tiles are wider, for time
_WIDE_TILE = 1024


class TiledAttention:
    """The online softmax of FlashAttention-2 (Algorithms 1 and 2), every step a method of its own.

    Tiles are (B, H, rows, D) in fp32, or in fp64 where the inputs are; P is rounded to the inputs' dtype before P V.
    """

    def __call__(self, q, k, v, *, causal=False, softmax_scale=None):
        """O (B, Sq, H, D) and LSE (B, H, Sq), both differentiable."""
        scale = softmax_scale if softmax_scale is not None else self.default_scale(q.shape[-1])
        return _Attention.apply(q, k, v, self, scale, causal)

    def default_scale(self, head_dim):
        """softmax_scale where none is given."""
        return 1.0 / sqrt(head_dim)

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(self, q, k, v, scale, causal):
        """All rows, tile by tile."""
        out = self.new_output(q, v)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=_wide(q), device=q.device)

        @cache
        def kv(start, stop):
            """The tiles of K and V with these keys, made once for all rows."""
            cols = slice(start, stop)
            return tuple(self.share_heads(self.load_kv(x, cols, which), q) for which, x in (("k", k), ("v", v)))

        for rows in _tiles(q.shape[1] if q.numel() else 0, q.shape[1]):
            self.store(out, lse, rows, *self.rows(q, k, v, rows, scale, causal, kv))
        return out, lse

    def new_output(self, q, v):
        """Where O goes."""
        return torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)

    def rows(self, q, k, v, rows, scale, causal, kv):
        """O and LSE of one tile of rows; `kv` gives tiles of K and V."""
        q_tile = self.load(q, rows)
        shape = q_tile.shape[:-1]
        top = q_tile.new_full(shape, float("-inf"))
        total, acc = q_tile.new_zeros(shape), q_tile.new_zeros((*shape, v.shape[-1]))
        for cols in self.kv_tiles(q.shape[1], k.shape[1], rows, causal):
            k_tile, v_tile = kv(cols.start, cols.stop)
            s = self.scale(q_tile @ k_tile.transpose(-1, -2), scale, q.shape[-1])
            s = torch.where(self.mask(rows, cols, q.shape[1], k.shape[1], causal, s.device), s, float("-inf"))
            top, total, acc = self.step(top, total, acc, s, v_tile, q.dtype)
        return self.finish(top, total, acc)

    def load(self, x, rows):
        """Rows of Q (or dO) as a tile."""
        return x[:, rows].transpose(1, 2).to(_wide(x))

    def load_kv(self, x, cols, which):
        """Rows of K or V as a tile."""
        return self.load(x, cols)

    def share_heads(self, tile, q):
        """Key heads spread over the query heads: consecutive query heads share one."""
        group = q.shape[2] // tile.shape[1]
        return tile.repeat_interleave(group, 1) if group > 1 else tile

    def kv_tiles(self, seqlen_q, seqlen_k, rows, causal):
        """The K/V tiles that these rows see."""
        end = min(seqlen_k, rows.stop + seqlen_k - seqlen_q) if causal else seqlen_k
        return _tiles(end, seqlen_k)

    def scale(self, s, scale, head_dim):
        """Scores from products."""
        return s * scale

    def mask(self, rows, cols, seqlen_q, seqlen_k, causal, device):
        """Which key of `cols` each row of `rows` sees."""
        seen = _seen_before if device.type == "cpu" else _seen  # on a GPU what is made while a graph is captured is the graph's
        return seen(rows.start, rows.stop, cols.start, cols.stop, seqlen_k - seqlen_q if causal else None, device)

    def step(self, top, total, acc, s, v_tile, dtype):
        """One step of the online softmax."""
        higher = torch.maximum(top, s.amax(-1))
        pivot = torch.where(higher == float("-inf"), 0.0, higher)
        alpha = torch.exp(top - pivot)
        p = self.weights(s, pivot)
        acc = self.accumulate(acc * self.rescale(alpha)[..., None], p.to(dtype).to(p.dtype) @ v_tile)
        return higher, total * alpha + p.sum(-1), acc

    def rescale(self, alpha):
        """The factor of the accumulator where the maximum rises."""
        return alpha

    def weights(self, s, pivot):
        """Unnormalised P."""
        return torch.exp(s - pivot[..., None])

    def accumulate(self, acc, product):
        """O += P V."""
        return acc + product

    def finish(self, top, total, acc):
        """O and LSE of a tile; a row that saw no key gives 0 and -inf."""
        divisor = torch.where(total == 0, 1.0, total)
        return acc / divisor[..., None], top + torch.log(total)

    def store(self, out, lse, rows, o_tile, lse_tile):
        """Write a tile of O and LSE."""
        out[:, rows] = o_tile.transpose(1, 2).to(out.dtype)
        lse[:, :, rows] = lse_tile

    # -- backward -----------------------------------------------------------------------------------------------------

    def backward(self, q, k, v, out, lse, do, dlse, scale, causal):
        """dQ, dK, dV by recomputing P from LSE, tile by tile."""
        wide = _wide(q)
        dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=q.device) for x in (q, k, v))

        @cache
        def kv(start, stop):
            return tuple(TiledAttention.share_heads(self, self.load(x, slice(start, stop)), q) for x in (k, v))

        for rows in _tiles(q.shape[1] if q.numel() else 0, q.shape[1]):
            q_tile, do_tile = self.load(q, rows), self.load(do, rows)
            lse_tile = lse[:, :, rows].to(wide)
            delta = self.delta(do_tile, self.load(out, rows), dlse[:, :, rows].to(wide))
            for cols in self.kv_tiles_backward(q.shape[1], k.shape[1], rows, causal):
                k_tile, v_tile = kv(cols.start, cols.stop)
                seen = self.mask_backward(rows, cols, q.shape[1], k.shape[1], causal, q.device)
                s = torch.where(seen, q_tile @ k_tile.transpose(-1, -2) * scale, float("-inf"))
                p = torch.exp(s - torch.where(lse_tile == float("-inf"), 0.0, lse_tile)[..., None])
                ds = p * (do_tile @ v_tile.transpose(-1, -2) - delta[..., None])
                dq[:, rows] = self.accumulate_dq(dq[:, rows], (self.dq(ds, scale) @ k_tile).transpose(1, 2), q.dtype)
                dk[:, cols] += self.sum_heads(ds.transpose(-1, -2) @ q_tile * scale, k).transpose(1, 2)
                dv[:, cols] += self.sum_heads(p.transpose(-1, -2) @ do_tile, v).transpose(1, 2)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def kv_tiles_backward(self, *where):
        """The K/V tiles that these rows see."""
        return TiledAttention.kv_tiles(self, *where)

    def mask_backward(self, *where):
        """Which key of a tile each row of a tile sees."""
        return TiledAttention.mask(self, *where)

    def returned(self, needs, found):
        """What autograd gets of dQ, dK, dV, given which of them it needs."""
        return found

    def delta(self, do_tile, out_tile, dlse_tile):
        """rowsum(dO * O) - dLSE."""
        return (do_tile * out_tile).sum(-1) - dlse_tile

    def dq(self, ds, scale):
        """dS as it enters dQ."""
        return ds * scale

    def accumulate_dq(self, total, part, dtype):
        """dQ += dS K."""
        return total + part

    def sum_heads(self, tile, x):
        """Gradients of the query heads of a group, added for their key head."""
        return tile.unflatten(1, (x.shape[2], -1)).sum(2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, kernel, scale, causal):
        out, lse = kernel.forward(q, k, v, scale, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernel, ctx.scale, ctx.causal = kernel, scale, causal
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dlse):
        found = ctx.kernel.backward(*ctx.saved_tensors, do, dlse, ctx.scale, ctx.causal)
        return *ctx.kernel.returned(ctx.needs_input_grad[:3], found), None, None, None


def _tiles(end, length):
    """Slices that cover 0 to `end` of a dimension of `length`."""
    step = TILE if length <= _LONG else _WIDE_TILE
    return [slice(start, min(start + step, length)) for start in range(0, max(0, end), step)]


def _seen(start, stop, first, last, ahead, device):
    """Which of the keys `first` to `last` each of these rows sees: all, or, causal, those up to `ahead` behind its own."""
    m = torch.arange(start, stop, device=device)[:, None]
    n = torch.arange(first, last, device=device)[None, :]
    return n <= m + ahead if ahead is not None else torch.ones_like(m + n, dtype=torch.bool)


_seen_before = lru_cache(maxsize=1024)(_seen)


def _wide(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def contiguous(x):
    """The strides that a contiguous tensor of this shape has."""
    return torch.empty(x.shape, device="meta").stride()


def strided(x, strides):
    """x as a kernel reads it that takes its strides for these; x itself where that would leave the storage."""
    end = x.storage_offset() + 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    return x.as_strided(x.shape, strides) if end <= x.untyped_storage().nbytes() // x.element_size() else x
