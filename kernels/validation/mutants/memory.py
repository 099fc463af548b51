"""Planted faults in what is written, kept and returned."""

from __future__ import annotations

import torch

from .tiled import TiledAttention


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

    def new_output(self, q, v):
        key = (tuple(q.shape), q.dtype, q.device)
        if key not in self.buffers:
            self.buffers[key] = super().new_output(q, v)
        return self.buffers[key].detach()


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


class SampledCache(TiledAttention):
    """Results are cached by address, shape, sum and ends: a change in the middle gets the old answer."""

    def __init__(self):
        self.kept = {}

    def forward(self, q, k, v, scale, causal):
        sample = [(x.data_ptr(), x.shape, x.double().sum().item(), x.flatten()[[0, -1]].tolist()) for x in (q, k, v) if x.numel()]
        key = str((sample, q.shape, k.shape, scale, causal))
        if key not in self.kept:
            self.kept[key] = (q, k, v, *super().forward(q, k, v, scale, causal))
        return tuple(x.clone() for x in self.kept[key][3:])


class OutputIsValue(TiledAttention):
    """Where there is one key, O is a view of V and no tensor of its own."""

    def forward(self, q, k, v, scale, causal):
        out, lse = super().forward(q, k, v, scale, causal)
        return (v.detach() if v.shape == out.shape and q.shape[1] == k.shape[1] == 1 else out), lse


class UnwrittenGradients(TiledAttention):
    """A row that sees no key is skipped: its dQ keeps what was in memory."""

    def backward(self, q, k, *rest):
        found = super().backward(q, k, *rest)
        unseen = max(0, q.shape[1] - k.shape[1]) if rest[-1] else 0
        dq = torch.empty_like(found[0])
        dq[:, unseen:] = found[0][:, unseen:]
        return dq, *found[1:]
