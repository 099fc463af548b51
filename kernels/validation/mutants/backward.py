"""Planted faults in the gradients."""

from __future__ import annotations

import torch

from .tiled import TiledAttention


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
