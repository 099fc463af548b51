"""Launches the FlashAttention-2 forward past Triton's launcher and PyTorch's dispatcher, whose price is several times the kernel's
on short sequences. Triton compiles it, and chooses by shapes and strides, on the first call.
"""

from __future__ import annotations

import threading

import torch
import triton
from torch import Tensor

from ..arguments import check_storage
from ..cuda import driver
from ..cuda.launch import BOX_COLUMNS, DTYPES, LOG2_E, Operand
from ..device import check_runnable
from ..triton import fa2
from ..triton.loads import can_describe, describe, heads_together
from ..triton.tiles import TritonTile, forward_tile
from .arguments import TYPES, ArgumentBlock

WARP = 32


class Plan:
    """Everything about a launch but the addresses, for tensors that TMA can describe; taken from Triton's own first launch."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
        self.causal, self.device = causal, q.get_device()
        self.lse_shape = (q.shape[0], q.shape[2], q.shape[1])
        self.contiguous = q.is_contiguous()
        self.compiled = None
        self.local = threading.local()

    def run(self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        """Launch on the device's current stream, with a scale that scale_of gave; (O, LSE)."""
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                return self.run(q, k, v, softmax_scale)
        if softmax_scale < 0:  # the kernel takes its maxima before it scales
            return self.run(-q, k, v, -softmax_scale)
        if self.compiled is None or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
            return self._by_triton(q, k, v, softmax_scale)
        o = torch.empty_like(q) if self.contiguous else q.new_empty(q.shape)
        lse = q.new_empty(self.lse_shape, dtype=torch.float32)
        block = self.block()
        maps = self.q.map(q), self.k.map(k), self.v.map(v)  # held until the driver has read them
        for name, each in zip("qkv", maps, strict=True):
            block.pointers[block.maps[name]] = each.address
        block.values["o"].value, block.values["lse"].value = o.data_ptr(), lse.data_ptr()
        block.values["scale_log2"].value = softmax_scale * LOG2_E
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        block.launch(self.compiled.function, self.grid, self.threads, self.smem_bytes, stream, self.context)
        return o, lse

    def block(self) -> ArgumentBlock:
        """This thread's argument block, with all in it that calls share."""
        try:
            return self.local.block
        except AttributeError:
            driver.ensure_context(self.device)
            block = self.local.block = ArgumentBlock(self.signature)
            for name, value in self.shared.items():
                block.values[name].value = value
            return block

    def _by_triton(self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        """By Triton's launcher, whose kernel is kept where it can be launched without it."""
        for x in (q, k, v):
            check_storage(x)
        tile = tile_for(q, k, v, self.causal)
        batch, seqlen_q, heads, head_dim = q.shape
        seqlen_k, kv_heads = k.shape[1:3]
        if not (tile.tensor_descriptors and can_describe(q, k, v)):
            return fa2.forward(q, k, v, softmax_scale, self.causal, tile=tile)
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(self.lse_shape, dtype=torch.float32, device=q.device)
        sharing = heads // kv_heads
        sizes = batch * heads, heads, sharing, seqlen_q, seqlen_k
        strides = *q.stride(), *k.stride(), *v.stride(), *o.stride(), *lse.stride()
        maps = describe(q, tile.block_m), describe(k, tile.block_n), describe(v, tile.block_n)
        given = *maps, o, lse, softmax_scale * LOG2_E, *sizes, *strides
        self.grid = triton.cdiv(seqlen_q, tile.block_m) * batch * heads
        kernel = fa2._forward[(self.grid,)](  # as fa2.forward does
            *given,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, HEAD_DIM=head_dim, CAUSAL=self.causal,
            WHOLE=not self.causal and seqlen_k % tile.block_n == 0, TMA=True, OVERLAPPED=tile.overlapped,
            TOGETHER=heads_together(seqlen_k, head_dim, q.element_size(), batch * heads, sharing, self.causal),
            **tile.options(),
        )  # fmt: skip
        self._keep(kernel, dict(zip(fa2._forward.arg_names, given, strict=False)), (q, k, v), tile)
        return o, lse

    def _keep(self, kernel: object, arguments: dict, inputs: tuple[Tensor, ...], tile: TritonTile) -> None:
        """What Triton compiled, where all that its launch needs is known here."""
        metadata = kernel.metadata
        self.signature = [(name, kind) for name, kind in kernel.src.signature.items() if kind != "constexpr"]
        known = all(kind in TYPES or kind.startswith(("tensordesc", "*")) for _, kind in self.signature)
        plain = metadata.num_ctas == 1 and not metadata.global_scratch_size and not metadata.profile_scratch_size
        if not (known and plain):
            return
        self.shared = {name: arguments[name] for name, kind in self.signature if kind in ("i32", "i64")}
        self.threads, self.smem_bytes = metadata.num_warps * WARP, metadata.shared
        self.context = driver.primary_context(self.device)
        rows = tile.block_m, tile.block_n, tile.block_n
        self.q, self.k, self.v = (
            Operand(DTYPES[x.dtype], tuple(x.shape), x.stride(), (BOX_COLUMNS, each)) for x, each in zip(inputs, rows, strict=True)
        )
        self.compiled = kernel


SHORT = TritonTile(128, 64, 4, 2)
SHORT_KEYS = 1024
"""At head_dim 128, up to so many keys, two programs of 128x64 an SM are faster than the table's (kernels/triton/NOTES.md)."""


def tile_for(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> TritonTile:
    """The tile of a launch: by head dim, mask, and length."""
    described = can_describe(q, k, v)
    if described and q.shape[3] == 128 and k.shape[1] <= SHORT_KEYS:
        return SHORT
    return forward_tile(q.shape[3], causal, bool(fa2.INTERPRETED), described)


def forward(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    """As fa2.forward, on the tile of a launch."""
    return fa2.forward(q, k, v, softmax_scale, causal, tile=tile_for(q, k, v, causal))


def plan_for(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Plan | None:
    """The plan of a launch on tensors like these, or None where TMA cannot describe them and Triton launches by itself."""
    if bool(fa2.INTERPRETED) or not (q.numel() and k.numel() and can_describe(q, k, v)):
        return None
    check_runnable(q)
    return Plan(q, k, v, causal)
