"""Planted faults: FlashAttention tile by tile in plain torch, and wrappers that break one step of it each.

`TiledAttention` is correct and slow, runs on any device, and takes every dtype. A mutant overrides one step; the suite
must reject each, and `expects` holds what its rejection must say.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import log, sqrt

import torch

from .subjects import Subject

TILE = 16


class TiledAttention:
    """The online softmax of FlashAttention-2 (Algorithms 1 and 2), every step a method of its own.

    Tiles are (B, H, rows, D) in fp32, or in fp64 where the inputs are; P is rounded to the inputs' dtype before P V.
    """

    def __call__(self, q, k, v, *, causal=False, softmax_scale=None):
        """O (B, Sq, H, D) and LSE (B, H, Sq); O is differentiable."""
        scale = softmax_scale if softmax_scale is not None else 1.0 / sqrt(q.shape[-1])
        return _Attention.apply(q, k, v, self, scale, causal)

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(self, q, k, v, scale, causal):
        """All rows, tile by tile."""
        out = self.new_output(q)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=_wide(q), device=q.device)
        for start in range(0, q.shape[1], TILE):
            rows = slice(start, min(start + TILE, q.shape[1]))
            self.store(out, lse, rows, *self.rows(q, k, v, rows, scale, causal))
        return out, lse

    def new_output(self, q):
        """Where O goes."""
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)

    def rows(self, q, k, v, rows, scale, causal):
        """O and LSE of one tile of rows."""
        q_tile = self.load(q, rows)
        shape = q_tile.shape[:-1]
        top = q_tile.new_full(shape, float("-inf"))
        total, acc = q_tile.new_zeros(shape), torch.zeros_like(q_tile)
        for cols in self.kv_tiles(q.shape[1], k.shape[1], rows, causal):
            k_tile, v_tile = (self.share_heads(self.load_kv(x, cols, which), q) for which, x in (("k", k), ("v", v)))
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
        return tile.repeat_interleave(q.shape[2] // tile.shape[1], 1)

    def kv_tiles(self, seqlen_q, seqlen_k, rows, causal):
        """The K/V tiles that these rows see."""
        end = min(seqlen_k, rows.stop + seqlen_k - seqlen_q) if causal else seqlen_k
        return [slice(start, min(start + TILE, seqlen_k)) for start in range(0, max(0, end), TILE)]

    def scale(self, s, scale, head_dim):
        """Scores from products."""
        return s * scale

    def mask(self, rows, cols, seqlen_q, seqlen_k, causal, device):
        """Which key of `cols` each row of `rows` sees."""
        m = torch.arange(rows.start, rows.stop, device=device)[:, None]
        n = torch.arange(cols.start, cols.stop, device=device)[None, :]
        return n <= m + seqlen_k - seqlen_q if causal else torch.ones_like(m + n, dtype=torch.bool)

    def step(self, top, total, acc, s, v_tile, dtype):
        """One step of the online softmax."""
        higher = torch.maximum(top, s.amax(-1))
        pivot = torch.where(higher == float("-inf"), 0.0, higher)
        alpha = self.rescale(torch.exp(top - pivot))
        p = self.weights(s, pivot)
        acc = self.accumulate(acc * alpha[..., None], p.to(dtype).to(p.dtype) @ v_tile)
        return higher, total * torch.exp(top - pivot) + p.sum(-1), acc

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

    def backward(self, q, k, v, out, lse, do, scale, causal):
        """dQ, dK, dV by recomputing P from LSE, tile by tile."""
        wide = _wide(q)
        dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=q.device) for x in (q, k, v))
        for start in range(0, q.shape[1], TILE):
            rows = slice(start, min(start + TILE, q.shape[1]))
            q_tile, do_tile = self.load(q, rows), self.load(do, rows)
            lse_tile = lse[:, :, rows].to(wide)
            delta = self.delta(do_tile, self.load(out, rows))
            for cols in TiledAttention.kv_tiles(self, q.shape[1], k.shape[1], rows, causal):
                k_tile, v_tile = (TiledAttention.share_heads(self, self.load(x, cols), q) for x in (k, v))
                seen = TiledAttention.mask(self, rows, cols, q.shape[1], k.shape[1], causal, q.device)
                s = torch.where(seen, q_tile @ k_tile.transpose(-1, -2) * scale, float("-inf"))
                p = torch.exp(s - torch.where(lse_tile == float("-inf"), 0.0, lse_tile)[..., None])
                ds = p * (do_tile @ v_tile.transpose(-1, -2) - delta[..., None])
                dq[:, rows] += (self.dq(ds, scale) @ k_tile).transpose(1, 2)
                dk[:, cols] += self.sum_heads(ds.transpose(-1, -2) @ q_tile * scale, k).transpose(1, 2)
                dv[:, cols] += self.sum_heads(p.transpose(-1, -2) @ do_tile, v).transpose(1, 2)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def delta(self, do_tile, out_tile):
        """rowsum(dO * O)."""
        return (do_tile * out_tile).sum(-1)

    def dq(self, ds, scale):
        """dS as it enters dQ."""
        return ds * scale

    def sum_heads(self, tile, x):
        """Gradients of the query heads of a group, added for their key head."""
        return tile.unflatten(1, (x.shape[2], -1)).sum(2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, kernel, scale, causal):
        out, lse = kernel.forward(q, k, v, scale, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernel, ctx.scale, ctx.causal = kernel, scale, causal
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, do, _):
        return *ctx.kernel.backward(*ctx.saved_tensors, do, ctx.scale, ctx.causal), None, None, None


def _wide(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# -- the faults -------------------------------------------------------------------------------------------------------


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


class StaleBuffer(TiledAttention):
    """Results are cached by address and shape: new numbers in an old buffer get the old answer."""

    def __init__(self):
        self.kept = {}

    def forward(self, q, k, v, scale, causal):
        key = (*(x.data_ptr() for x in (q, k, v)), q.shape, k.shape, scale, causal)
        if key not in self.kept:
            self.kept[key] = (q, k, v, *super().forward(q, k, v, scale, causal))
        return tuple(x.clone() for x in self.kept[key][3:])


class SharedOutput(TiledAttention):
    """O goes to one buffer per shape: the next call overwrites what the last one returned."""

    def __init__(self):
        self.buffers = {}

    def new_output(self, q):
        key = (tuple(q.shape), q.dtype, q.device)
        if key not in self.buffers:
            self.buffers[key] = super().new_output(q)
        return self.buffers[key].detach()


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


class WritesPastEnd(TiledAttention):
    """The last tile of O is written whole: rows past the end land in whatever follows."""

    def store(self, out, lse, rows, o_tile, lse_tile):
        super().store(out, lse, rows, o_tile, lse_tile)
        end = out.storage_offset() + out.numel()
        if rows.stop == out.shape[1] and end < out.untyped_storage().nbytes() // out.element_size():
            out.as_strided((1,), (1,), end).fill_(1.0)  # plain torch refuses where the storage ends; a GPU does not


class UnwrittenRows(TiledAttention):
    """A tile of rows that sees no key is skipped: O and LSE keep what was in memory."""

    def forward(self, q, k, v, scale, causal):
        self.unseen = q.shape[1] - k.shape[1] if causal else 0
        return super().forward(q, k, v, scale, causal)

    def store(self, out, lse, rows, o_tile, lse_tile):
        if rows.stop > self.unseen:
            super().store(out, lse, rows, o_tile, lse_tile)


class ModifiesInput(TiledAttention):
    """Q is scaled in place; the answer is right."""

    def forward(self, q, k, v, scale, causal):
        answer = super().forward(q, k, v, scale, causal)
        q.detach().mul_(scale)
        return answer

    def backward(self, q, *rest):
        return super().backward(q / rest[-2], *rest)


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
        return super().forward(*map(self._flat, (q, k, v)), scale, causal)

    @staticmethod
    def _flat(x):
        strides = torch.empty(x.shape, device="meta").stride()
        room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        return x.as_strided(x.shape, strides) if room >= x.numel() else x.contiguous()


class WrongDqScale(TiledAttention):
    """dQ lacks softmax_scale."""

    def dq(self, ds, scale):
        return ds


class MissingDelta(TiledAttention):
    """dS = P * dP, without rowsum(dO * O)."""

    def delta(self, do_tile, out_tile):
        return torch.zeros_like(do_tile[..., 0])


class OneHeadOfTheGroup(TiledAttention):
    """dK and dV take the first query head of a group, not the sum."""

    def sum_heads(self, tile, x):
        return tile.unflatten(1, (x.shape[2], -1))[:, :, 0]


@dataclass(frozen=True)
class Mutant:
    """A planted fault, the group that must reject it, and words that the rejection must hold."""

    kernel: type[TiledAttention]
    group: str
    expects: str

    @property
    def name(self) -> str:
        """ "DroppedRescale" -> "dropped rescale"."""
        return "".join(f" {c.lower()}" if c.isupper() else c for c in self.kernel.__name__).strip()

    @property
    def fault(self) -> str:
        """What is wrong with it."""
        return " ".join(self.kernel.__doc__.split())

    def subject(self) -> Subject:
        """A fresh kernel with this fault, to be held to the suite."""
        return subject(self.name, self.kernel())


def subject(name: str, kernel: TiledAttention) -> Subject:
    """A tiled kernel as the suite sees it."""
    return Subject(name=name, forward=kernel, head_dims=(32,), tile=TILE, returns_lse=True, differentiable=True)


MUTANTS = (
    Mutant(DroppedRescale, "inputs", "rising logits"),
    Mutant(MaskOffByOne, "accuracy", "causal mask one key too far"),
    Mutant(MaskTopLeft, "shapes", "causal mask aligned top left"),
    Mutant(MissingLastTile, "shapes", "without the last, partial tile"),
    Mutant(UnmaskedTail, "shapes", "keys of zeros, not masked"),
    Mutant(WrongScale, "accuracy", "softmax_scale 1/d"),
    Mutant(ScaleIgnored, "shapes", "not the one given"),
    Mutant(StaleBuffer, "memory", "no result of an earlier call may come back"),
    Mutant(SharedOutput, "memory", "they share a buffer"),
    Mutant(SwappedKTile, "accuracy", "K tiles of 16 swapped"),
    Mutant(LseWithoutMax, "accuracy", "without the row's maximum"),
    Mutant(LseInBase2, "accuracy", "in base 2, not natural"),
    Mutant(NoRunningMax, "inputs", "large logits"),
    Mutant(ScoresInHalf, "inputs", "scores beyond fp16"),
    Mutant(EmptyRowsDivide, "inputs", "a row that sees no key"),
    Mutant(NanSwallowed, "inputs", "swallows NaN"),
    Mutant(HalfAccumulator, "accuracy", "V around 1"),
    Mutant(CoarseWeights, "accuracy", "O drifts"),
    Mutant(WritesPastEnd, "memory", "writes out of bounds"),
    Mutant(UnwrittenRows, "memory", "every element of O and LSE is written"),
    Mutant(ModifiesInput, "memory", "modifies its input q"),
    Mutant(RandomOrder, "determinism", "not deterministic"),
    Mutant(GqaInterleaved, "shapes", "key head h mod Hkv"),
    Mutant(StridesIgnored, "shapes", "as if it were contiguous"),
    Mutant(WrongDqScale, "gradients", "times what it should be"),
    Mutant(MissingDelta, "gradients", "dQ"),
    Mutant(OneHeadOfTheGroup, "gradients", "sum over the query heads of a group"),
)
