"""Faults in what a call leaves behind in the process, or takes from it."""

from __future__ import annotations

import torch

from .tiled import TiledAttention


class SwitchesDeterminismOn(TiledAttention):
    """Deterministic algorithms are switched on for whatever runs after the call."""

    def __call__(self, q, k, v, **options):
        torch.set_deterministic_debug_mode("warn")
        return super().__call__(q, k, v, **options)


class DrawsRandomNumbers(TiledAttention):
    """Each call draws from PyTorch's random numbers, as for a dropout of 0: what is drawn after it is other."""

    def __call__(self, q, k, v, **options):
        torch.rand(1)
        return super().__call__(q, k, v, **options)


class ResetsPrecision(TiledAttention):
    """Backward sets the precision of fp32 matrix products to PyTorch's default, whatever the caller chose."""

    def backward(self, *saved):
        torch.set_float32_matmul_precision("highest")
        return super().backward(*saved)


class LseInDefaultDtype(TiledAttention):
    """LSE is allocated without a dtype: fp32 until the caller sets another default."""

    def forward(self, q, k, v, scale, causal):
        out, lse = super().forward(q, k, v, scale, causal)
        return out, lse if lse.dtype == torch.float64 else lse.to(torch.get_default_dtype())
