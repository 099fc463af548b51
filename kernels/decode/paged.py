"""Few queries against a cache of K and V in pages: kernel.py's walk in parts and its combine, where every entry has as many keys as
it says and a page table says where they lie (PagedAttention, arXiv:2309.06180).

A page of a multiple of a block's keys is looked up once for a block, any other for each key. Keys at and past an entry's end are
not read, so what an old page holds there is nobody's.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from ..triton.arithmetic import INTERPRETED, LN_2, LOG2_E, gemm, product
from ..triton.tiles import TritonTile
from .kernel import _combine, _launch, _Launches, _row_addresses, _sms, _starts_early
from .splits import choose, decode_tile, splits_for


@triton.jit
def _page_of(
    table, entry, key, seqlen_k, pages, table_stride_b, table_stride_p,
    PAGE: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The page of the block of keys that begins with `key`, or, not WHOLE, of each of its keys: past the end, the last key's, which
    is there. A page that is none is taken for the first or the last."""
    wanted = key if WHOLE else key + tl.arange(0, BLOCK_N)
    wanted = tl.maximum(0, tl.minimum(wanted, seqlen_k - 1))
    number = wanted * 0 if PAGE == 0 else wanted // PAGE
    page = tl.load(table + tl.cast(entry, tl.int64) * table_stride_b + number.to(tl.int64) * table_stride_p)
    return tl.minimum(tl.maximum(page, 0), pages - 1)


@triton.jit
def _keys_at(page, row, kv_head, stride_p, stride_s, stride_h):
    """Where rows of one K/V head lie in their page, or each in its own; 64-bit."""
    return page.to(tl.int64) * stride_p + row.to(tl.int64) * stride_s + tl.cast(kv_head, tl.int64) * stride_h


@triton.jit(do_not_specialize=["splits", "tiles", "seqlen_q", "most", "pages"])
def _walk_pages(
    q, k, v, o, lse, lengths, table, scale_log2, kv_heads, sharing, seqlen_q, most, pages, tiles, splits,
    table_stride_b, table_stride_p,
    q_stride_b, q_stride_s, q_stride_h, q_stride_d, k_stride_p, k_stride_s, k_stride_h, k_stride_d,
    v_stride_p, v_stride_s, v_stride_h, v_stride_d,
    o_stride_part, o_stride_b, o_stride_s, o_stride_h, o_stride_d, lse_stride_part, lse_stride_b, lse_stride_h, lse_stride_s,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
    PAGE: tl.constexpr, PARTIAL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: one part of an entry's keys for one tile of packed rows, numbered as kernel._walk_part's.

    An entry has lengths[entry] keys, of `most` that its pages hold. PAGE is the keys of one, 0 where an entry has but one.
    """
    WHOLE: tl.constexpr = PAGE % BLOCK_N == 0  # all keys of a block lie in one page
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

    seqlen_k = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), most)
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
    across_k, across_v = (column.to(tl.int64) * k_stride_d)[None, :], (column.to(tl.int64) * v_stride_d)[None, :]
    page = _page_of(table, batch, first * BLOCK_N, seqlen_k, pages, table_stride_b, table_stride_p, PAGE, BLOCK_N, WHOLE)
    for key in tl.range(first * BLOCK_N, past * BLOCK_N, BLOCK_N):
        if PAGE != 0:
            following = _page_of(
                table, batch, key + BLOCK_N, seqlen_k, pages, table_stride_b, table_stride_p, PAGE, BLOCK_N, WHOLE
            )
        position = key + tl.arange(0, BLOCK_N)
        held = position < seqlen_k
        at = position if PAGE == 0 else position % PAGE
        keys = tl.load(
            k + _keys_at(page, at, kv_head, k_stride_p, k_stride_s, k_stride_h)[:, None] + across_k, mask=held[:, None], other=0.0
        )
        values = tl.load(
            v + _keys_at(page, at, kv_head, v_stride_p, v_stride_s, v_stride_h)[:, None] + across_v, mask=held[:, None], other=0.0
        )
        scores = product(queries, keys.T)
        seen = held[None, :]
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
        if PAGE != 0:
            page = following

    divisor = tl.where(total == 0.0, 1.0, total)
    addresses = _row_addresses(o + tl.cast(part, tl.int64) * o_stride_part, batch, query, head, o_stride_b, o_stride_s, o_stride_h)
    addresses = addresses[:, None] + (column.to(tl.int64) * o_stride_d)[None, :]
    tl.store(addresses, (acc / divisor[:, None]).to(o.dtype.element_ty), mask=inside[:, None])
    level = top + tl.log2(divisor)
    rows = _row_addresses(
        lse + tl.cast(part, tl.int64) * lse_stride_part, batch, query, head, lse_stride_b, lse_stride_s, lse_stride_h
    )
    tl.store(rows, level if PARTIAL else level * LN_2, mask=inside)


@lru_cache(maxsize=1024)
def _launches(
    q_shape: torch.Size, k_shape: torch.Size, table_shape: torch.Size, strides: tuple, device: int | None,
    causal: bool, num_splits: int | None, tile: TritonTile | None,
) -> _Launches:  # fmt: skip
    """What calls of one kind have in common. The parts are chosen for entries as long as their pages allow."""
    batch, seqlen_q, heads, head_dim = q_shape
    pages, page_size, kv_heads = k_shape[:3]
    most = page_size * table_shape[1]
    sharing = heads // kv_heads
    packed = seqlen_q * sharing
    if num_splits is None and tile is None:
        tile, _, num_splits = choose(head_dim, packed, batch * kv_heads, most, _sms(device), bool(INTERPRETED), paged=True)
    tile = tile or decode_tile(head_dim, packed, bool(INTERPRETED))
    tiles = triton.cdiv(packed, tile.block_m)
    if num_splits is None:
        num_splits = splits_for(batch * kv_heads * tiles, triton.cdiv(most, tile.block_n), _sms(device))
    partial = num_splits > 1
    early = partial and _starts_early(device)
    o_strides, lse_strides = (seqlen_q * heads * head_dim, heads * head_dim, head_dim, 1), (heads * seqlen_q, seqlen_q, 1)
    part_strides = (0, *o_strides, 0, *lse_strides)
    rows = batch * seqlen_q * heads
    if partial:
        part_strides = (rows * head_dim, *o_strides, rows, seqlen_q * heads, 1, heads)
    columns, together = min(64, head_dim), min(32, triton.next_power_of_2(num_splits))
    q_strides, k_strides, v_strides, table_strides = strides
    walk = (
        kv_heads, sharing, seqlen_q, most, pages, tiles, num_splits, *table_strides,
        *q_strides, *k_strides, *v_strides, *part_strides,
        tile.block_m, tile.block_n, head_dim, causal and seqlen_q > 1, page_size if table_shape[1] > 1 else 0, partial, early,
    )  # fmt: skip
    combine = (num_splits, rows, heads, seqlen_q, *o_strides, *lse_strides, head_dim, columns, together, early)
    return _Launches(tile, num_splits, early, walk, batch * num_splits * tiles * kv_heads, combine, rows * (head_dim // columns))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    table: Tensor,
    softmax_scale: float,
    causal: bool = False,
    *,
    num_splits: int | None = None,
    tile: TritonTile | None = None,
) -> tuple[Tensor, Tensor]:
    """O (as q) and LSE (B, H, S_q, fp32, natural logarithm) of q (B, S_q, H, D), k, v (pages, page size, H_kv, D).

    Entry b has lengths[b] keys: key i is row i % page size of page table[b, i // page size]. `lengths` is int32 of (B,),
    contiguous, `table` int32 of (B, pages of an entry at most). A length beyond the table's is cut, a page that is none is taken
    for the first or the last: nothing outside k and v is read. fp16 or bf16, D of 64, 128 or 256, softmax_scale >= 0; any strides
    and page size. `num_splits` parts of each entry's keys; None takes splits_for's. Deterministic. Callers check their input.
    """
    shape = q.shape
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((shape[0], shape[2], shape[1]), dtype=torch.float32)
    if o.numel() == 0:
        return o, lse
    if k.numel() == 0 or table.numel() == 0:
        return o.zero_(), lse.fill_(float("-inf"))
    device = q.get_device() if q.is_cuda else None
    strides = q.stride(), k.stride(), v.stride(), table.stride()
    found = _launches(shape, k.shape, table.shape, strides, device, causal, num_splits, tile)
    parts, levels, partial = o, lse, found.num_splits > 1
    if partial:
        parts = q.new_empty((found.num_splits, *shape), dtype=torch.float32)
        levels = q.new_empty((found.num_splits, *shape[:3]), dtype=torch.float32)
    same = None
    addresses = q.data_ptr() | k.data_ptr() | v.data_ptr() | lengths.data_ptr() | table.data_ptr()
    if device is not None and addresses % 16 == 0:
        same = (q.dtype, device, found)
    arguments = (q, k, v, parts, levels, lengths, table)
    _launch(_walk_pages, same, found.programs, arguments, (softmax_scale * LOG2_E.value, *found.walk), found.tile.options())
    if partial:
        options = {"num_warps": 4} | ({"launch_pdl": True} if found.early else {})
        _launch(_combine, same, found.combining, (parts, levels, o, lse), found.combine, options)
    return o, lse
