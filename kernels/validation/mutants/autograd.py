"""Planted faults that one forward and one backward pass do not show."""

from __future__ import annotations

from math import log

import torch

from .tiled import TiledAttention


class LseEaten(TiledAttention):
    """The backward pass turns the LSE that it was handed to base 2 in place: the next one is wrong."""

    def backward(self, q, k, v, out, lse, *rest):
        found = super().backward(q, k, v, out, lse.clone(), *rest)
        lse.data.div_(log(2.0))
        return found


class OutputEaten(TiledAttention):
    """The backward pass uses O as room for dO * O."""

    def backward(self, q, k, v, out, lse, do, *rest):
        found = super().backward(q, k, v, out.clone(), lse, do, *rest)
        out.data.mul_(do)
        return found


class DoutScaled(TiledAttention):
    """dO is scaled in place; the gradients are right."""

    def backward(self, q, k, v, out, lse, do, dlse, scale, causal):
        found = super().backward(q, k, v, out, lse, do.clone(), dlse, scale, causal)
        do.data.mul_(scale)
        return found


class LastCallKept(TiledAttention):
    """The kernel keeps the tensors of its last forward pass, and every backward pass uses those."""

    def forward(self, q, k, v, *rest):
        self.kept = (q, k, v, *super().forward(q, k, v, *rest))
        return self.kept[3:]

    def backward(self, q, k, v, out, lse, *rest):
        same = all(x.shape == y.shape for x, y in zip((q, k, v), self.kept, strict=False))
        return super().backward(*(self.kept if same else (q, k, v, out, lse)), *rest)


class SharedGradients(TiledAttention):
    """Gradients go to one buffer per shape: the next backward pass overwrites what the last one returned."""

    def __init__(self):
        self.buffers = {}

    def backward(self, *saved):
        found = super().backward(*saved)
        key = (tuple(x.shape for x in found), found[0].dtype, found[0].device)
        if key not in self.buffers:
            self.buffers[key] = tuple(torch.empty_like(x) for x in found)
        return tuple(buffer.copy_(x).detach() for buffer, x in zip(self.buffers[key], found, strict=True))


class DqOrNothing(TiledAttention):
    """Where Q needs no gradient none is computed."""

    def returned(self, needs, found):
        return found if needs[0] else tuple(torch.zeros_like(x) for x in found)


class ValueGradientIsDout(TiledAttention):
    """Where one row sees one key, dV is dO, and no tensor of its own."""

    def backward(self, q, k, v, out, lse, do, *rest):
        dq, dk, dv = super().backward(q, k, v, out, lse, do, *rest)
        return dq, dk, do.detach() if q.shape == v.shape and q.shape[1] == 1 else dv
