"""Attention against a cache of K and V, in pages or not, as a PyTorch operator, `fasim::attention_with_cache`, and
`flash_attn_with_kvcache`, which calls it in the convention of FlashAttention's own function of that name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...simulator.errors import UsageError
from ..arguments import MAX_SEQLEN, check_inputs, check_storage, flag_of, is_dense, scale_of
from ..device import check_runnable, on_device
from .operator import checked_splits


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: int | Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    num_splits: int | None = None,
    return_lse: bool = False,
    *,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * Q K^T) V of few queries against the keys that each entry has in a cache; O as q, with return_lse (O, LSE).

    q is (B, S_q, H, D): fp16 or bf16, D of 64, 128 or 256, H a multiple of H_kv, any strides. `cache_seqlens`, int32 of (B,) or one
    number for all, says how many keys an entry has, None as many as there is room for. Without a page table the caches are (B, S,
    H_kv, D), or (B', S, H_kv, D) with `cache_batch_idx`, int32 of (B,): whose cache, or row of the table, is an entry's. With
    `page_table` (or `block_table`, FlashAttention-2's name), int32 of (B, pages of an entry at most), they are (pages, page size,
    H_kv, D): key i of entry b is row i % page size of page page_table[b, i // page size]. Pages may lie in any order and be shared;
    of any size, but one of a multiple of a block's keys (32 to 128) is looked up once a block. What a page holds past an entry's
    end is not read.

    A causal mask is bottom-right aligned with each entry's own length; a row that sees no key gives O = 0, LSE = -inf. LSE is (B,
    H, S_q), fp32, natural logarithm. `num_splits` is in how many parts an entry's keys are walked; None and 0 have it chosen, for
    entries that fill their pages. Nothing is appended and nothing rotated: K and V are in the cache before. Forward only.

    What tensors of lengths and pages hold is looked at on the CPU alone, as looking would wait for the GPU. On a GPU a length
    beyond what the pages hold is cut, and a page that is none is taken for the first or last: nothing outside the cache is read.

    Raises UsageError, one sentence, for whatever is not supported.
    """
    if page_table is not None and block_table is not None:
        raise UsageError("page_table and block_table are one thing by two names: give one of them")
    causal, num_splits = flag_of(causal), checked_splits(num_splits or None)
    table = block_table if page_table is None else page_table
    _check_caches(q, k_cache, v_cache)
    batch, room = q.shape[0], k_cache.shape[1]
    if table is None:
        if cache_batch_idx is not None:
            table = _indices("cache_batch_idx", cache_batch_idx, (batch,), q)[:, None]
        elif k_cache.shape[0] != batch:
            raise UsageError(f"q is of {batch} entries and the cache of {k_cache.shape[0]}: give page_table or cache_batch_idx")
        else:
            table = torch.arange(batch, dtype=torch.int32, device=q.device)[:, None]
    elif cache_batch_idx is not None:
        rows, table = _indices("cache_batch_idx", cache_batch_idx, (batch,), q), _indices("page_table", table, (-1, -1), q)
        if not len(table) or (rows.device.type == "cpu" and batch and not 0 <= int(rows.min()) <= int(rows.max()) < len(table)):
            raise UsageError(f"cache_batch_idx {rows.tolist()[:8]} are not all rows of a page_table of {len(table)}")
        table = table.index_select(0, rows.clamp(0, len(table) - 1))
    table = _indices("page_table", table, (batch, -1), q)
    room *= table.shape[1]
    if cache_seqlens is None or (isinstance(cache_seqlens, int) and not isinstance(cache_seqlens, bool)):
        length = room if cache_seqlens is None else cache_seqlens
        if not 0 <= length <= room:
            raise UsageError(f"cache_seqlens={length} is not possible: there is room for {room} keys of an entry")
        cache_seqlens = torch.full((batch,), length, dtype=torch.int32, device=q.device)
    lengths = _indices("cache_seqlens", cache_seqlens, (batch,), q)
    scale = scale_of(softmax_scale, q.shape[3])
    o, lse = attention_with_cache(q, k_cache, v_cache, lengths, table, scale, causal, num_splits)
    return (o, lse) if return_lse else o


@torch.library.custom_op("fasim::attention_with_cache", mutates_args=())
def attention_with_cache(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, table: Tensor, softmax_scale: float, causal: bool, num_splits: int | None =
    None
) -> tuple[Tensor, Tensor]:
    """O and LSE of q against pages of k and v; arguments as of paged.forward."""
    _check_caches(q, k, v)
    lengths, table = _indices("lengths", lengths, (q.shape[0],), q), _indices("page_table", table, (q.shape[0], -1), q)
    _check_values(lengths, table, k)
    softmax_scale = scale_of(softmax_scale, q.shape[3])
    check_runnable(q)
    for x in (q, k, v, lengths, table):
        check_storage(x)
    from . import paged

    if softmax_scale < 0:  # the kernel takes its maxima of scaled scores, as all here do for scales of 0 and above
        q, softmax_scale = -q, -softmax_scale
    with on_device(q):
        return paged.forward(q, k, v, lengths.contiguous(), table, softmax_scale, causal, num_splits=checked_splits(num_splits))


@attention_with_cache.register_fake
def _(q, k, v, lengths, table, softmax_scale, causal, num_splits=None):
    batch, seqlen_q, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)


def _check_caches(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k_cache", k), ("v_cache", v)):
        if not isinstance(x, Tensor) or not is_dense(x) or x.dim() != 4:
            shown = tuple(x.shape) if isinstance(x, Tensor) and is_dense(x) else f"a {type(x).__name__}"
            kind = "(batch, seqlen, heads, head_dim)" if name == "q" else "(batch or pages, rows, K/V heads, head_dim)"
            raise UsageError(f"{name} is {shown}; it must be a dense tensor of {kind}")
    one = q[:1] if q.shape[0] else q.new_empty((1, *q.shape[1:]))
    check_inputs(one.expand(k.shape[0], *q.shape[1:]), k, v, "decode")
    if k.shape[2] and q.shape[1] * (q.shape[2] // k.shape[2]) > MAX_SEQLEN:
        raise UsageError(f"q of shape {tuple(q.shape)} has more than {MAX_SEQLEN:,} rows for each K/V head")


def _indices(name: str, x: object, shape: tuple[int, ...], q: Tensor) -> Tensor:
    """`x`; UsageError unless it is int32 of that shape, -1 for any size, on q's device."""
    alike = isinstance(x, Tensor) and x.dim() == len(shape) and all(n in (-1, m) for n, m in zip(shape, x.shape, strict=True))
    if not alike or x.dtype != torch.int32 or not is_dense(x):
        shown = f"{tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) and is_dense(x) else f"a {type(x).__name__}"
        wanted = ", ".join("any" if n < 0 else str(n) for n in shape)
        raise UsageError(f"{name} is {shown}; it must be torch.int32 of ({wanted}{',' if len(shape) == 1 else ''})")
    if x.device != q.device:
        raise UsageError(f"{name} is on {x.device} and q on {q.device}; move it there")
    return x


def _check_values(lengths: Tensor, table: Tensor, k: Tensor) -> None:
    """Raise UsageError where lengths or pages on the CPU are not within the cache."""
    if lengths.device.type != "cpu" or not len(lengths):
        return
    page_size, room = k.shape[1], k.shape[1] * table.shape[1]
    least, most = int(lengths.min()), int(lengths.max())
    if least < 0 or most > room:
        raise UsageError(f"cache_seqlens go from {least} to {most}; an entry's pages hold 0 to {room} keys")
    for entry, length in enumerate(lengths.tolist()):
        pages = table[entry, : -(-length // page_size) if page_size else 0]
        if len(pages) and not 0 <= int(pages.min()) <= int(pages.max()) < k.shape[0]:
            wrong = next(page for page in pages.tolist() if not 0 <= page < k.shape[0])
            raise UsageError(f"page_table has page {wrong} for entry {entry}; the cache has pages 0 to {k.shape[0] - 1}")
