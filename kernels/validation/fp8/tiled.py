"""FP8 attention tile by tile in plain torch: correct and slow, every step that FP8 adds a method of its own."""

from __future__ import annotations

import math

import torch

from ...fp8.plain import to_e4m3
from .subjects import Fp8Subject

ROWS, KEYS = 16, 64
SHIFT = 4
ACCUMULATORS = [2 * (i // 4) + (0, 1, 8, 9)[i % 4] for i in range(16)]
"""The keys of a thread's accumulators, 16 at a time: the order in which P is packed."""


class TiledFp8:
    """Descales of ROWS rows of Q and KEYS rows of K and V; P with 2^SHIFT at the maximum so far, in the accumulators' order."""

    def __call__(self, q, k, v, *, causal=False, softmax_scale=None, q_descale=None, k_descale=None, v_descale=None):
        """O in bf16 and LSE."""
        scale = (q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale) / math.log(2)
        batch, seqlen_q, heads = q.shape[:3]
        o = torch.zeros(q.shape, dtype=torch.bfloat16, device=q.device)
        lse = torch.full((batch, heads, seqlen_q), -math.inf, device=q.device)
        if not o.numel():
            return o, lse
        blocks = -(-k.shape[1] // KEYS)
        q, k, v = (self.padded(x, n).float().transpose(1, 2) for x, n in ((q, ROWS), (k, KEYS), (v, KEYS)))
        share = heads // k.shape[1]
        k, v = (x.repeat_interleave(share, 1) for x in (k, v))
        kd, vd = (x.repeat_interleave(share, 1) for x in (k_descale, v_descale))
        last = torch.arange(seqlen_q, device=q.device) + self.seen(seqlen_q, self.keys)
        for m in range(-(-seqlen_q // ROWS)):
            rows = slice(m * ROWS, min((m + 1) * ROWS, seqlen_q))
            queries = q[:, :, rows]
            acc = queries.new_zeros(queries.shape)
            top, total = queries.new_full(queries.shape[:3], -math.inf), queries.new_zeros(queries.shape[:3])
            for j in reversed(range(blocks)):
                cols = slice(j * KEYS, (j + 1) * KEYS)
                by = self.score_scale(q_descale, kd, m, j) * scale
                s = queries @ k[:, :, cols].transpose(2, 3)
                key = torch.arange(cols.start, cols.stop, device=q.device)
                hidden = key >= self.keys
                if causal:
                    hidden = hidden | (key > last[rows, None])
                s = s.masked_fill(hidden, -math.inf) * self.above_zero(by)[..., None, None] + self.lift(vd, j)[..., None, None]
                high = torch.maximum(top, torch.where(s.isnan(), -math.inf, s).amax(-1))
                pivot = self.pivot(top, high, j == blocks - 1)
                p = self.weights(s, torch.where(pivot == -math.inf, 0.0, pivot)[..., None])
                factor = torch.where(pivot == -math.inf, 1.0, torch.exp2(top - pivot))
                acc = acc * factor[..., None] + self.values(self.packed(p), v[:, :, cols])
                total = total * factor + p.sum(-1) / torch.exp2(self.lift(vd, j))[..., None]
                top = pivot
            seen = total != 0
            o[:, rows] = torch.where(seen[..., None], acc / total[..., None], 0.0).to(torch.bfloat16).transpose(1, 2)
            lse[:, :, rows] = torch.where(seen, self.lse(top, total), -math.inf)
        return o, lse

    def padded(self, x, rows):
        """With rows of zeros up to a multiple; and how many keys there were."""
        self.keys = x.shape[1]
        short = -x.shape[1] % rows
        return torch.nn.functional.pad(x.contiguous().view(torch.uint8), (0, 0, 0, 0, 0, short)).view(x.dtype)

    def seen(self, seqlen_q, seqlen_k):
        """How many keys more than its number the first row sees."""
        return seqlen_k - seqlen_q

    def score_scale(self, q_descale, k_descale, m, j):
        """What a score of these blocks is multiplied with, (B, H)."""
        return q_descale[:, :, m] * k_descale[:, :, j]

    def above_zero(self, scale):
        """-inf times 0 is NaN."""
        return torch.where(scale == 0, 2.0**-126, scale)

    def lift(self, v_descale, j):
        """V's descale as a part of the exponent of P, (B, H)."""
        return self.v_scale(v_descale, j).clamp(min=2.0**-100).log2()

    def v_scale(self, v_descale, j):
        """V's descale of a block."""
        return v_descale[:, :, j]

    def pivot(self, top, high, first):
        """The maximum that weights are taken from: the one in use, until a weight would pass what e4m3 holds."""
        return torch.where(first | (high - top + SHIFT > math.log2(416)), high, top)

    def weights(self, s, pivot):
        """P in fp32."""
        return torch.exp2(s - pivot + SHIFT)

    def packed(self, p):
        """P in e4m3, in the order of the accumulators."""
        return to_e4m3(self.reordered(p)).float()

    def reordered(self, x):
        """Keys in the last dimension, 16 at a time, as a thread's accumulators have them."""
        return x.unflatten(-1, (-1, 16))[..., ACCUMULATORS].flatten(-2)

    def values(self, p, v):
        """P V, V's transpose in the same order of keys."""
        return p @ self.transposed(v).transpose(2, 3)

    def transposed(self, v):
        """(B, H, D, keys), as the tensor cores take it."""
        return self.reordered(v.transpose(2, 3))

    def lse(self, top, total):
        """In natural logarithms, P's shift taken back."""
        return (top - SHIFT + total.log2()) * math.log(2)


def subject(name: str, kernel: TiledFp8) -> Fp8Subject:
    """A tiled kernel as the suite sees it."""
    return Fp8Subject(
        name=name,
        forward=kernel,
        head_dims=(64,),
        tile=ROWS,
        dtypes=("e4m3",),
        slow=True,
        returns_lse=True,
        differentiable=False,
        refuses=lambda case: "softmax_scale is not above 0" if case.softmax_scale is not None and case.softmax_scale <= 0 else None,
        block_rows=lambda head_dim, seqlen_k: (ROWS, KEYS),
    )
