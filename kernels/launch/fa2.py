"""FlashAttention-2's forward past Triton's launcher and its choice at each call: compiled for a shape, launched in microseconds.

The kernel is kernels/triton/fa2.py's, or the one of bounded.py, on any tile; FORMS says which. ops.PLANNED_FA2 turns it on.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from os import sched_getaffinity

import torch
from torch import Tensor

from ...simulator.errors import UsageError
from ..compile.triton_cache import ensure_writable
from ..cuda import driver
from ..cuda.launch import BOX_COLUMNS, DTYPES, LOG2_E, Operand
from ..triton.loads import can_describe, heads_together
from ..triton.tiles import TritonTile, forward_tile
from .arguments import ArgumentBlock

WARP = 32
SIZES = ("heads_total", "heads", "sharing", "seqlen_q", "seqlen_k")
_T = TritonTile
FORMS = {
    # head_dim, mask: up to so many keys, the tile, and whether bounded.py's has one walk; rates in kernels/triton/NOTES.md
    (128, "full"): ((math.inf, _T(64, 64, 4, 3, overlapped=True), False),),
    (128, "causal"): ((2048, _T(128, 64, 4, 2), True), (math.inf, _T(64, 64, 4, 3, overlapped=True), True)),
    (64, "full"): ((math.inf, _T(64, 64, 4, 3, overlapped=True), False),),
    (64, "causal"): ((2048, _T(64, 64, 4, 3), True), (math.inf, _T(64, 64, 4, 3, overlapped=True), False)),
    (256, "full"): ((math.inf, _T(128, 64, 8, 2), True),),
    (256, "causal"): ((math.inf, _T(128, 64, 8, 2), True),),
}
"""Where bounded.py was seen to be the faster; elsewhere it is fa2.py on the table's tile."""


@dataclass(frozen=True)
class Fa2Config:
    """One compiled kernel."""

    dtype: str
    head_dim: int
    causal: bool
    whole: bool  # no score is masked
    together: int  # heads that are walked side by side
    tile: TritonTile
    bounded: bool = False  # the kernel of bounded.py
    one_walk: bool = False  # of bounded.py: whole blocks and masked ones in one loop

    @property
    def name(self) -> str:
        """As it is spoken of: "128x64, 4 warps, 2 stages, one walk"."""
        tile = self.tile
        said = f"{tile.block_m}x{tile.block_n}, {tile.num_warps} warps, {tile.num_stages} stages"
        return said + ", overlapped" * tile.overlapped + ", bounded" * self.bounded + ", one walk" * self.one_walk


@dataclass(frozen=True)
class Built:
    """A cubin and what a launch of it needs."""

    cubin: bytes
    entry: str
    smem_bytes: int
    threads: int
    compiler: str
    signature: tuple[tuple[str, str], ...]  # (name, Triton's type) of the arguments of a launch


@cache
def build(config: Fa2Config) -> Built:
    """Compile one kernel for sm_90a; no GPU is needed. Raises UsageError where the installed Triton does not take it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ..triton import fa2
    from . import bounded

    ensure_writable()
    kernel = bounded.attention_forward if config.bounded else fa2._forward
    tile = config.tile
    constants = {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "HEAD_DIM": config.head_dim, "CAUSAL": config.causal,
        "WHOLE": config.whole, "TMA": True, "OVERLAPPED": tile.overlapped, "ONE_WALK": config.one_walk,
        "TOGETHER": config.together,
        "o_stride_d": 1, "lse_stride_s": 1,
    }  # fmt: skip
    constants |= {name: 1 for name in kernel.arg_names if name[:8] in ("q_stride", "k_stride", "v_stride")}  # the maps have them
    boxes = {"q": tile.block_m, "k": tile.block_n, "v": tile.block_n} | ({"o": tile.block_m} if config.bounded else {})
    signature, known = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in boxes:
            signature[name] = f"tensordesc<{config.dtype}[1, 1, {boxes[name]}, {config.head_dim}]>"
        else:
            plain = {"o": f"*{config.dtype}", "lse": "*fp32", "scale_log2": "fp32"}
            signature[name] = plain.get(name, "i64" if "stride" in name else "i32")
            if name in ("o", "lse") or name.startswith("o_stride"):
                known[(place,)] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = ASTSource(kernel, signature, constants, known)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=tile.options())
    except Exception as error:
        cause = " ".join(str(error).split())[-200:]
        raise UsageError(f"Triton {triton.__version__} does not compile fa2 on {config.name}: {cause}") from error
    about = compiled.metadata
    maps = about.tensordesc_meta
    if any(tuple(each["block_size"][2:])[1] != BOX_COLUMNS or each["swizzle"] != 3 for each in maps) or about.global_scratch_size:
        raise UsageError(f"Triton {triton.__version__} lays fa2's tiles out as no tensor map here does")
    arguments = tuple((name, kind) for name, kind in signature.items() if kind != "constexpr")
    return Built(compiled.asm["cubin"], about.name, about.shared, WARP * about.num_warps, f"Triton {triton.__version__}", arguments)


def build_all(configs: Iterable[Fa2Config]) -> dict[Fa2Config, str]:
    """Compile kernels, a process a core, into the cache that `build` reads; of each "" or why it is refused."""
    distinct = list(dict.fromkeys(configs))
    with ProcessPoolExecutor(min(len(distinct), len(sched_getaffinity(0))), mp_context=get_context("spawn")) as pool:
        return dict(zip(distinct, pool.map(_failure_of, distinct), strict=True))


def _failure_of(config: Fa2Config) -> str:
    try:
        build(config)
    except UsageError as error:
        return str(error)
    return ""


@cache
def _function(config: Fa2Config, device: int) -> int:
    built = build(config)
    driver.call("cuCtxSetCurrent", driver.primary_context(device))
    return driver.load_kernel(built.cubin, built.entry, built.smem_bytes)


class Plan:
    """Everything about a launch but the addresses, for tensors that TMA can describe."""

    def __init__(self, config: Fa2Config, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.config, self.device, self.built = config, q.get_device(), build(config)
        self.function, self.context = _function(config, self.device), driver.primary_context(self.device)
        batch, seqlen_q, heads, head_dim = q.shape
        self.lse_shape, self.contiguous = (batch, heads, seqlen_q), q.is_contiguous()
        tile = config.tile
        self.grid = -(-seqlen_q // tile.block_m) * batch * heads
        dense = (seqlen_q * heads * head_dim, heads * head_dim, head_dim, 1)
        self.shared = dict(zip(SIZES, (batch * heads, heads, heads // k.shape[2], seqlen_q, k.shape[1]), strict=True))
        self.shared |= dict(zip(("o_stride_b", "o_stride_s", "o_stride_h"), dense[:3], strict=True))
        self.shared |= {"lse_stride_b": heads * seqlen_q, "lse_stride_h": seqlen_q}
        shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape), tuple(q.shape)
        strides = q.stride(), k.stride(), v.stride(), dense
        rows = tile.block_m, tile.block_n, tile.block_n, tile.block_m
        self.q, self.k, self.v, self.o = (
            Operand(config.dtype, shape, stride, (BOX_COLUMNS, each))
            for shape, stride, each in zip(shapes, strides, rows, strict=True)
        )
        self.local = threading.local()

    def run(self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        """Launch on the device's current stream, with a scale that scale_of gave; (O, LSE)."""
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                return self.run(q, k, v, softmax_scale)
        if softmax_scale <= 0:  # masked scores are -inf, -inf * 0 is NaN, and maxima are taken before the scale
            return self.run(-q, k, v, -softmax_scale) if softmax_scale else self.run(q * 0, k, v, 1.0)
        o = torch.empty_like(q) if self.contiguous else q.new_empty(q.shape)
        lse = q.new_empty(self.lse_shape, dtype=torch.float32)
        q, k, v = self.q.readable(q), self.k.readable(k), self.v.readable(v)
        block, (q_at, k_at, v_at, o_at) = self.block(), self.places
        q_map, k_map, v_map = self.q.map(q), self.k.map(k), self.v.map(v)  # held until the driver has read them
        pointers, values = block.pointers, block.values
        pointers[q_at], pointers[k_at], pointers[v_at] = q_map.address, k_map.address, v_map.address
        if o_at is None:
            values["o"].value = o.data_ptr()
        else:
            o_map = self.o.map(o)
            pointers[o_at] = o_map.address
        values["lse"].value = lse.data_ptr()
        values["scale_log2"].value = softmax_scale * LOG2_E
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        block.launch(self.function, self.grid, self.built.threads, self.built.smem_bytes, stream, self.context)
        return o, lse

    def block(self) -> ArgumentBlock:
        """This thread's argument block, with all in it that calls share."""
        try:
            return self.local.block
        except AttributeError:
            driver.ensure_context(self.device)
            block = self.local.block = ArgumentBlock(self.built.signature)
            self.places = tuple(map(block.maps.get, "qkvo"))
            for name, value in self.shared.items():
                if name in block.values:
                    block.values[name].value = value
            return block


def config_for(shape_q: tuple, shape_k: tuple, dtype: str, causal: bool) -> Fa2Config:
    """The kernel for (B, S_q, H, D) on (B, S_k, H_kv, D)."""
    head_dim, seqlen_k = shape_q[3], shape_k[1]
    for keys, tile, one_walk in FORMS.get((head_dim, "causal" if causal else "full"), ()):
        if seqlen_k <= keys:
            return config_of(shape_q, shape_k, dtype, causal, tile, True, one_walk)
    return config_of(shape_q, shape_k, dtype, causal, forward_tile(head_dim, causal, interpreted=False))


def config_of(
    shape_q: tuple,
    shape_k: tuple,
    dtype: str,
    causal: bool,
    tile: TritonTile,
    bounded: bool = False,
    one_walk: bool = False,
    together: int | None = None,
) -> Fa2Config:
    """The same on a tile and in a form that are given, with as many heads side by side as L2 keeps, or `together`."""
    batch, _, heads, head_dim = shape_q
    seqlen_k, kv_heads = shape_k[1:3]
    together = together or heads_together(seqlen_k, head_dim, 2, batch * heads, heads // kv_heads, causal)
    whole = not causal and seqlen_k % tile.block_n == 0
    return Fa2Config(dtype, head_dim, causal, whole, together, tile, bounded, one_walk)


def plan_for(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Plan | None:
    """The plan of a launch on tensors like these, or None where TMA cannot describe them and Triton launches by itself."""
    if not (math.prod(q.shape) and math.prod(k.shape) and can_describe(q, k, v)):
        return None
    if torch.cuda.get_device_capability(q.device) != (9, 0):  # what is compiled is for sm_90a
        return None
    return Plan(config_for(tuple(q.shape), tuple(k.shape), DTYPES[q.dtype], causal), q, k, v)
