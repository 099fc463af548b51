"""Attention in FP8 arithmetic on any device: what a kernel of the same precision makes of the same quantised inputs.

The walk is the FP8 kernel's (cuda/fp8): S by FP8 tensor cores, an online softmax in base 2 and fp32 whose weights are e4m3, P V
by FP8 tensor cores into an fp32 accumulator. What is right is said by `exact`, in fp64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import scale_of
from ..cuda.fp8.config import SHIFT
from ..reference import Output, attention_forward
from .plain import LARGEST, Quantised, to_e4m3
from .tensor_cores import HOPPER, Accumulation, multiply

LOG2_E = 1.4426950408889634
TINY = 2.0**-126
WARP_ROWS = 16
ROWS = 128
SMALLEST_V_SCALE = 2.0**-100
LINE_ORIGIN = (136 << 23) - 473000
"""Bits of 2^9, less the mean by which a line between powers of two lies above the curve."""


@dataclass(frozen=True)
class Arithmetic:
    """What kernels of one precision may still do differently.

    A weight at the maximum is 2^shift. `lazy` weights are taken from the maximum of the blocks before, and begun again by warps of
    16 rows in which one reaches 448; else every block's own maximum counts. V's descales of blocks are in P, and so in the maximum.
    P V of `two_level` blocks is added up apart, and that sum to O in fp32; None adds in the tensor cores' accumulator throughout.
    `accumulation` None is fp32's. Weights of every second `line_keys` keys of a block lie on lines between powers of two where
    they are taken from the maximum of the blocks before; of none with 0.
    """

    shift: int = SHIFT
    lazy: bool = True
    block: int = 128
    two_level: int | None = None
    accumulation: Accumulation | None = HOPPER
    line_keys: int = 0


OURS = Arithmetic()
"""The kernels of cuda/fp8."""
FLASH_ATTENTION_3 = Arithmetic(shift=8, lazy=False)
"""As FlashAttention-3 keeps P: 2^8 at the true maximum."""


def exact(q: Quantised, k: Quantised, v: Quantised, softmax_scale: float | None = None, causal: bool = False) -> Output:
    """O and LSE in fp64 of what the quantised inputs say (`reference.attention_forward`)."""
    return attention_forward(q.says(), k.says(), v.says(), softmax_scale, causal)


def attention(
    q: Quantised,
    k: Quantised,
    v: Quantised,
    softmax_scale: float | None = None,
    causal: bool = False,
    arithmetic: Arithmetic = OURS,
) -> Output:
    """O (B, S_q, H, D) and LSE (B, H, S_q) in fp32; conventions as of reference.attention_forward, softmax_scale above 0."""
    scale = scale_of(softmax_scale, q.values.shape[3]) * LOG2_E
    batch, seqlen_q, heads, head_dim = q.values.shape
    seqlen_k, kv_heads = k.values.shape[1:3]
    o = torch.zeros(batch, seqlen_q, heads, head_dim, device=q.values.device)
    lse = torch.full((batch, heads, seqlen_q), -math.inf, device=q.values.device)
    if 0 in (o.numel(), seqlen_k):
        return Output(o, lse)
    descales = [x.expanded()[..., 0] for x in (q, k, v)]
    own = torch.ones_like(descales[2]) if v.block is None else descales[2].clamp(min=SMALLEST_V_SCALE)  # NaN stays
    last = descales[2][:, 0] if v.block is None else torch.ones_like(descales[2][:, 0])
    for b in range(batch):
        for head in range(heads):
            at = b, slice(None), head // (heads // kv_heads)
            keys, values = k.values[at].float(), v.values[at].float()
            for start in range(0, seqlen_q, ROWS):
                rows = slice(start, min(start + ROWS, seqlen_q))
                walk = _Walk(
                    q.values[b, rows, head].float(), descales[0][b, rows, head] * scale, seqlen_k - seqlen_q, causal, start
                )
                walk.over(keys, values, descales[1][at], own[at], arithmetic)
                o[b, rows, head], lse[b, head, rows] = walk.result(arithmetic, last[b, at[2]])
    return Output(o, lse)


class _Walk:
    """Some rows of one head and what they have seen: the maximum in use in base 2, scaled, the row sums, O and its part."""

    def __init__(self, queries: Tensor, scale: Tensor, offset: int, causal: bool, first: int) -> None:
        self.queries, self.scale, self.causal = queries, scale, causal
        self.last = torch.arange(first, first + len(queries), device=queries.device) + offset  # key that each row sees
        self.warp = torch.arange(len(queries), device=queries.device) // WARP_ROWS
        self.top = torch.full_like(scale, -math.inf)
        self.total = torch.zeros_like(scale)
        self.part, self.o = torch.zeros_like(queries), torch.zeros_like(queries)

    def over(self, keys: Tensor, values: Tensor, key_scale: Tensor, value_scale: Tensor, how: Arithmetic) -> None:
        """All blocks that any of the rows sees, from the last to the first."""
        end = min(len(keys), int(self.last[-1]) + 1) if self.causal else len(keys)
        for walked, start in enumerate(reversed(range(0, max(end, 0), how.block))):
            block = slice(start, min(start + how.block, len(keys)))
            scale = self.scale[:, None] * key_scale[block]
            scale = torch.where(scale == 0, TINY, scale)  # masked scores are -inf, and -inf * 0 is NaN
            scores = multiply(self.queries, keys[block], how=how.accumulation) * scale
            if self.causal:
                key = torch.arange(block.start, block.stop, device=keys.device)
                scores = scores.masked_fill(key > self.last[:, None], -math.inf)
            weights = self.softmax(scores, value_scale[block], walked == 0, how)
            self.part = multiply(weights, values[block].T, self.part, how.accumulation)
            if how.two_level and (walked + 1) % how.two_level == 0:
                self.o, self.part = self.o + self.part, torch.zeros_like(self.part)
        self.o = self.o + self.part

    def softmax(self, scores: Tensor, value_scale: Tensor, first: bool, how: Arithmetic) -> Tensor:
        """P of a block in e4m3 values; what was added up before is rescaled where the maximum in use changes."""
        scores = scores + value_scale.log2()
        pivot = self.top
        weights = torch.exp2(scores - (pivot - how.shift)[:, None])
        if how.line_keys:
            lines = torch.arange(scores.shape[1], device=scores.device) // how.line_keys % 2 == 1
            weights = torch.where(lines, on_lines(scores - (pivot - how.shift)[:, None]), weights)
        again = torch.ones_like(self.warp, dtype=torch.bool)
        if how.lazy and not first:
            again = self.in_warps(~(shares(weights) <= LARGEST).all(1))  # or NaN
            again &= self.in_warps(~(to_e4m3(weights).float() < LARGEST).all(1))
        high = torch.maximum(self.top, torch.where(scores.isnan(), -math.inf, scores).amax(1))
        high = torch.where(again, high, self.top)
        pivot = torch.where(high == -math.inf, 0.0, high)
        weights = torch.where(again[:, None], torch.exp2(scores - (pivot - how.shift)[:, None]), weights)
        factor = torch.where(again, torch.exp2(self.top - pivot), 1.0)
        self.top, self.total = high, self.total * factor + (weights / value_scale).sum(1)
        self.part, self.o = self.part * factor[:, None], self.o * factor[:, None]
        return to_e4m3(weights).float()

    def in_warps(self, rows: Tensor) -> Tensor:
        """Which rows share a warp with one of these."""
        return torch.zeros_like(rows).index_put_((self.warp[rows],), torch.tensor(True, device=rows.device))[self.warp]

    def result(self, how: Arithmetic, value_scale: Tensor) -> tuple[Tensor, Tensor]:
        """O and LSE; a row that saw no key gives 0 and -inf."""
        seen = self.total != 0
        o = torch.where(seen[:, None], self.o / self.total[:, None] * value_scale, 0.0)
        return o, torch.where(seen, (self.top - how.shift + self.total.log2()) / LOG2_E, -math.inf)


def on_lines(exponents: Tensor) -> Tensor:
    """2^x as ptx_fp8.cuh's line_position and line_weight have it: NaN where x is above 9 or NaN, which begins a block again."""
    position = (0.5 + (9.0 - exponents) / 256.0).clamp(max=1.0)
    bits = LINE_ORIGIN - 128 * (position.view(torch.int32).long() - 0x3F000000)
    return torch.where(position >= 0.5, bits.int().view(torch.float32), torch.nan)


def shares(weights: Tensor) -> Tensor:
    """(rows, keys) as sums of the four threads that hold a row: keys 2 i and 2 i + 1 of every 8 are thread i's."""
    padded = torch.nn.functional.pad(weights, (0, -weights.shape[1] % 8))
    return padded.unflatten(1, (-1, 4, 2)).sum((1, 3))
