"""Few queries against many keys: packed GQA and split-KV, then a combine by LSE.

A long cache is bound by the bytes of K and V, so each is read once: the query heads that share a K/V head, times their few
query rows, are the rows of one tile. And all SMs read: the keys are walked in parts, one CTA each, that leave a normalised
O and its LSE, both fp32, in memory; a second kernel merges them by LSE in a fixed order (Flash-Decoding, FlashAttention's
repository, 2023; the merge is FlashAttention-2's, arXiv:2307.08691 section 3.1). One part is written straight to O.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import JITFunction

from ..triton.arithmetic import INTERPRETED, LN_2, LOG2_E, gemm, product
from ..triton.loads import can_describe, describe, load_tile
from ..triton.tiles import TritonTile
from .splits import decode_tile, splits_for


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
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads = k.shape[1:3]
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=q.device)
    if o.numel() == 0:
        return o, lse
    device = q.get_device() if q.is_cuda else None
    sharing = heads // kv_heads
    tile = tile or decode_tile(head_dim, seqlen_q * sharing, bool(INTERPRETED))
    tiles = triton.cdiv(seqlen_q * sharing, tile.block_m)
    if num_splits is None:
        blocks = triton.cdiv(seqlen_k, tile.block_n)
        num_splits = splits_for(batch * kv_heads * tiles, blocks, _sms(device))
    partial = num_splits > 1
    early = partial and (_starts_early(device) if early is None else early)
    parts, levels, strides = o, lse, (0, *o.stride(), 0, *lse.stride())
    if partial:
        parts = torch.empty((num_splits, *q.shape), dtype=torch.float32, device=q.device)
        levels = torch.empty(num_splits, batch, seqlen_q, heads, dtype=torch.float32, device=q.device)
        strides = (*parts.stride(), *levels.transpose(2, 3).stride())
    by_tma = tile.tensor_descriptors and can_describe(k, v)
    together = min(32, triton.next_power_of_2(num_splits))
    same = None
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 == 0:
        same = (q.shape, kv_heads, q.stride(), k.stride(), v.stride(), q.dtype, device, tile, causal, together, early, by_tma)
    _launch(
        _walk_part, same, batch * num_splits * tiles * kv_heads,
        (
            q, *((describe(k, tile.block_n), describe(v, tile.block_n)) if by_tma else (k, v)), parts, levels,
            softmax_scale * LOG2_E.value, kv_heads, sharing, seqlen_q, seqlen_k, tiles, num_splits,
            *q.stride(), *k.stride(), *v.stride(), *strides,
            tile.block_m, tile.block_n, head_dim, causal and seqlen_q > 1, by_tma, partial, early,
        ),
        tile.options(),
    )  # fmt: skip
    if partial:
        columns = min(64, head_dim)
        rows = batch * seqlen_q * heads
        _launch(
            _combine, same, rows * (head_dim // columns),
            (
                parts, levels, o, lse, num_splits, rows, heads, seqlen_q, *o.stride(), *lse.stride(),
                head_dim, columns, together, early,
            ),
            {"num_warps": 4} | ({"launch_pdl": True} if early else {}),
        )  # fmt: skip
    return o, lse


_kept: dict[tuple, CompiledKernel] = {}
_KEPT = 1024


def _launch(kernel: JITFunction, same: tuple | None, programs: int, arguments: tuple, options: dict) -> None:
    """Launch a kernel with all its arguments, constants last. `same` is equal wherever Triton would choose the same binary:
    what it found once is launched without being looked for again, which takes the host longer than the launch.
    """
    if (found := _kept.get((kernel.__name__, same))) is not None:
        found[programs, 1, 1](*arguments)
        return
    compiled = kernel[(programs,)](*arguments, **options)  # None from the interpreter
    if compiled is not None and same is not None:
        if len(_kept) >= _KEPT:
            _kept.clear()
        _kept[kernel.__name__, same] = compiled
