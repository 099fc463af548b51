"""Few queries against many keys: packed GQA and split-KV, then a combine by LSE.

A long cache is bound by the bytes of K and V, so each is read once: the query heads that share a K/V head, times their few
query rows, are the rows of one tile. And all SMs read: the keys are walked in parts, one CTA each, that leave a normalised
O and its LSE, both fp32, in memory; a second kernel merges them by LSE in a fixed order (Flash-Decoding, FlashAttention's
repository, 2023; the merge is FlashAttention-2's, arXiv:2307.08691 section 3.1). One part is written straight to O.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import JITFunction

from ..triton.arithmetic import INTERPRETED, LN_2, LOG2_E, gemm, product
from ..triton.loads import can_describe, describe, load_tile
from ..triton.tiles import TritonTile
from .splits import choose, decode_tile, splits_for


@triton.jit
def _row_addresses(base, batch, query, head, stride_b, stride_s, stride_h):
    """Where (batch, query, head) lies, for vectors of query and head; 64-bit, as in loads.tile_pointers."""
    corner = base + tl.cast(batch, tl.int64) * stride_b
    return corner + query.to(tl.int64) * stride_s + head.to(tl.int64) * stride_h


@triton.jit(do_not_specialize=["splits", "tiles", "seqlen_q", "seqlen_k"])
def _walk_part(
    q, k, v, o, lse, scale_log2, kv_heads, sharing, seqlen_q, seqlen_k, tiles, splits,
    q_stride_b, q_stride_s, q_stride_h, q_stride_d, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
    v_stride_b, v_stride_s, v_stride_h, v_stride_d,
    o_stride_part, o_stride_b, o_stride_s, o_stride_h, o_stride_d, lse_stride_part, lse_stride_b, lse_stride_h, lse_stride_s,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
    TMA: tl.constexpr, PARTIAL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: one part of the keys for one tile of packed rows. Row r is query r // sharing of the group's head r % sharing.

    K/V heads are neighbours in the order of programs, as a key's heads are in memory. PARTIAL leaves LSE in base 2.
    """
    if EARLY:
        gdc_launch_dependents()
    program = tl.program_id(0)
    kv_head = program % kv_heads
    tile = program // kv_heads % tiles
    part = program // kv_heads // tiles % splits
    batch = program // kv_heads // tiles // splits

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = row // sharing
    head = kv_head * sharing + row % sharing
    inside = query < seqlen_q
    column = tl.arange(0, HEAD_DIM)
    addresses = _row_addresses(q, batch, query, head, q_stride_b, q_stride_s, q_stride_h)
    queries = tl.load(addresses[:, None] + (column.to(tl.int64) * q_stride_d)[None, :], mask=inside[:, None], other=0.0)

    end = seqlen_k
    if CAUSAL:
        last = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // sharing, seqlen_q - 1)
        end = tl.maximum(0, tl.minimum(seqlen_k, last + 1 + seqlen_k - seqlen_q))
    blocks = tl.cdiv(end, BLOCK_N)
    each, more = blocks // splits, blocks % splits  # the first parts have a block more
    first = part * each + tl.minimum(part, more)
    past = first + each + tl.where(part < more, 1, 0)

    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for key in tl.range(first * BLOCK_N, past * BLOCK_N, BLOCK_N):
        keys = load_tile(
            k, batch, kv_head, key, seqlen_k, k_stride_b, k_stride_s, k_stride_h, k_stride_d, BLOCK_N, HEAD_DIM, TMA, True
        )
        values = load_tile(
            v, batch, kv_head, key, seqlen_k, v_stride_b, v_stride_s, v_stride_h, v_stride_d, BLOCK_N, HEAD_DIM, TMA, True
        )
        scores = product(queries, keys.T)
        position = key + tl.arange(0, BLOCK_N)
        seen = (position < seqlen_k)[None, :]
        if CAUSAL:
            seen = seen & (position[None, :] <= query[:, None] + (seqlen_k - seqlen_q))
        scores = tl.where(seen, scores * scale_log2, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        pivot = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen no key yet: exp2(-inf - 0) = 0
        weights = tl.exp2(scores - pivot[:, None])
        rescale = tl.exp2(top - pivot)
        total = total * rescale + tl.sum(weights, 1)
        acc = gemm(weights.to(values.dtype), values, acc * rescale[:, None])
        top = higher

    divisor = tl.where(total == 0.0, 1.0, total)
    addresses = _row_addresses(o + tl.cast(part, tl.int64) * o_stride_part, batch, query, head, o_stride_b, o_stride_s, o_stride_h)
    addresses = addresses[:, None] + (column.to(tl.int64) * o_stride_d)[None, :]
    tl.store(addresses, (acc / divisor[:, None]).to(o.dtype.element_ty), mask=inside[:, None])
    level = top + tl.log2(divisor)
    rows = _row_addresses(
        lse + tl.cast(part, tl.int64) * lse_stride_part, batch, query, head, lse_stride_b, lse_stride_s, lse_stride_h
    )
    tl.store(rows, level if PARTIAL else level * LN_2, mask=inside)


@triton.jit(do_not_specialize=["splits", "part_rows", "seqlen_q"])
def _combine(
    parts, levels, o, lse, splits, part_rows, heads, seqlen_q,
    o_stride_b, o_stride_s, o_stride_h, o_stride_d, lse_stride_b, lse_stride_h, lse_stride_s,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: some columns of one row of O, from its parts, TOGETHER of them at a time in their order; and its LSE.

    `parts` is (splits, B, S_q, H, D) and `levels`, LSE in base 2, (splits, B, S_q, H), both contiguous.
    """
    if EARLY:
        gdc_wait()
    pieces: tl.constexpr = HEAD_DIM // COLUMNS
    row = tl.program_id(0) // pieces
    column = tl.program_id(0) % pieces * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros([COLUMNS], tl.float32)
    total = 0.0
    top = float("-inf")
    for first in tl.range(0, splits, TOGETHER):
        part = first + tl.arange(0, TOGETHER)
        at = part.to(tl.int64) * part_rows + row
        level = tl.load(levels + at, mask=part < splits, other=float("-inf"))
        share = tl.load(parts + at[:, None] * HEAD_DIM + column[None, :], mask=(part < splits)[:, None], other=0.0)
        higher = tl.maximum(top, tl.max(level, 0))
        pivot = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(level - pivot)
        rescale = tl.exp2(top - pivot)
        acc = acc * rescale + tl.sum(share * weight[:, None], 0)
        total = total * rescale + tl.sum(weight, 0)
        top = higher
    divisor = tl.where(total == 0.0, 1.0, total)
    head = row % heads
    query = row // heads % seqlen_q
    batch = row // heads // seqlen_q
    target = _row_addresses(o, batch, query, head, o_stride_b, o_stride_s, o_stride_h)
    tl.store(target + column.to(tl.int64) * o_stride_d, (acc / divisor).to(o.dtype.element_ty))
    if tl.program_id(0) % pieces == 0:
        tl.store(_row_addresses(lse, batch, query, head, lse_stride_b, lse_stride_s, lse_stride_h), (top + tl.log2(divisor)) * LN_2)


@cache
def _sms(device: int | None) -> int:
    """Streaming multiprocessors of a CUDA device; under the interpreter, an H200's."""
    return 132 if device is None else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _starts_early(device: int | None) -> bool:
    """Whether the combine may be launched while the parts are walked (programmatic dependent launch, compute capability 9)."""
    return device is not None and torch.cuda.get_device_capability(device) >= (9, 0)


class _Launches(NamedTuple):
    """What tensors of one kind have in common: everything about the two launches but addresses and scale."""

    tile: TritonTile
    num_splits: int
    early: bool
    walk: tuple  # the arguments after the scale
    programs: int
    combine: tuple  # those after O and LSE
    combining: int  # its programs


@lru_cache(maxsize=1024)
def _launches(
    q_shape: torch.Size, k_shape: torch.Size, q_strides: tuple, k_strides: tuple, v_strides: tuple, device: int | None,
    causal: bool, num_splits: int | None, tile: TritonTile | None, early: bool | None, describable: bool,
) -> _Launches:  # fmt: skip
    batch, seqlen_q, heads, head_dim = q_shape
    seqlen_k, kv_heads = k_shape[1:3]
    sharing = heads // kv_heads
    packed = seqlen_q * sharing
    if num_splits is None and tile is None:
        tile, _, num_splits = choose(head_dim, packed, batch * kv_heads, seqlen_k, _sms(device), bool(INTERPRETED))
    tile = tile or decode_tile(head_dim, packed, bool(INTERPRETED))
    tiles = triton.cdiv(packed, tile.block_m)
    if num_splits is None:
        num_splits = splits_for(batch * kv_heads * tiles, triton.cdiv(seqlen_k, tile.block_n), _sms(device))
    partial = num_splits > 1
    early = partial and (_starts_early(device) if early is None else early)
    o_strides, lse_strides = (seqlen_q * heads * head_dim, heads * head_dim, head_dim, 1), (heads * seqlen_q, seqlen_q, 1)
    part_strides = (0, *o_strides, 0, *lse_strides)
    rows = batch * seqlen_q * heads
    if partial:
        part_strides = (rows * head_dim, *o_strides, rows, seqlen_q * heads, 1, heads)
    columns, together = min(64, head_dim), min(32, triton.next_power_of_2(num_splits))
    walk = (
        kv_heads, sharing, seqlen_q, seqlen_k, tiles, num_splits, *q_strides, *k_strides, *v_strides, *part_strides,
        tile.block_m, tile.block_n, head_dim, causal and seqlen_q > 1, tile.tensor_descriptors and describable, partial, early,
    )  # fmt: skip
    combine = (num_splits, rows, heads, seqlen_q, *o_strides, *lse_strides, head_dim, columns, together, early)
    return _Launches(tile, num_splits, early, walk, batch * num_splits * tiles * kv_heads, combine, rows * (head_dim // columns))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool = False,
    *,
    num_splits: int | None = None,
    tile: TritonTile | None = None,
    early: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """O (as q) and LSE (B, H, S_q, fp32, natural logarithm) of q (B, S_q, H, D), k, v (B, S_k, H_kv, D).

    fp16 or bf16, D of 64, 128 or 256, softmax_scale >= 0; any lengths and strides, S_q times the heads of a group below
    2^30. `num_splits` parts of the keys, some of them empty where there are fewer blocks; None takes splits_for's.
    `tile` and `early` (the combine's launch) replace the choices made here. Deterministic. Callers check their input.
    """
    shape = q.shape
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((shape[0], shape[2], shape[1]), dtype=torch.float32)
    if o.numel() == 0:
        return o, lse
    device = q.get_device() if q.is_cuda else None
    strides = q.stride(), k.stride(), v.stride()
    by_tma = tile is not None and tile.tensor_descriptors and can_describe(k, v)
    found = _launches(shape, k.shape, *strides, device, causal, num_splits, tile, early, by_tma)
    parts, levels, partial = o, lse, found.num_splits > 1
    if partial:
        parts = q.new_empty((found.num_splits, *shape), dtype=torch.float32)
        levels = q.new_empty((found.num_splits, *shape[:3]), dtype=torch.float32)
    same = None
    if device is not None and not by_tma and (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 == 0:
        same = (q.dtype, device, found)
    sources = (k, v) if not by_tma else (describe(k, found.tile.block_n), describe(v, found.tile.block_n))
    arguments = (q, *sources, parts, levels)
    _launch(_walk_part, same, found.programs, arguments, (softmax_scale * LOG2_E.value, *found.walk), found.tile.options())
    if partial:
        options = {"num_warps": 4} | ({"launch_pdl": True} if found.early else {})
        _launch(_combine, same, found.combining, (parts, levels, o, lse), found.combine, options)
    return o, lse


_kept: dict[tuple, tuple[Callable, _Launches]] = {}
_KEPT = 1024


def _launch(kernel: JITFunction, same: tuple | None, programs: int, tensors: tuple, numbers: tuple, options: dict) -> None:
    """Launch a kernel with tensors, then numbers, constants last. `same` is (dtype, device, _Launches), equal wherever Triton
    would choose the same binary: what it found once is launched without being looked for again, by addresses, which are not
    asked of the driver, and on a stream that is not asked for: looking takes the host longer than the launch.
    """
    key = None if same is None else (kernel, same[0], same[1], id(same[2]))  # kept with the binary, so no other has its id
    if key is not None and (found := _kept.get(key)) is not None:
        addresses = [x.data_ptr() for x in tensors]
        found[0](*addresses, *numbers, stream=torch._C._cuda_getCurrentRawStream(same[1]))
        return
    compiled = kernel[(programs,)](*tensors, *numbers, **options)  # None from the interpreter
    if compiled is not None and key is not None:
        if len(_kept) >= _KEPT:
            _kept.clear()
        _kept[key] = compiled[programs, 1, 1], same[2]
