"""A cache in pages beside one without: `python -m fasim.kernels.measure.beside_pages --out DIR [--deadline 90]`.

One query, 32 heads on 8, head_dim 128, bf16: microseconds of a call in a replayed CUDA graph, the median of rounds in which the
kernels take turns. The same keys are read by all: in order without pages (`flash_attn_func`, and `flash_attn_with_kvcache` by
cache_seqlens alone), and as shuffled pages of several sizes; FlashAttention-3's flash_attn_with_kvcache likewise, where its wheel
is there. As many sets in turn as make 256 MiB. O of every kernel is first held to the fp64 oracle. Rows come in the order of what
they decide, and none begins behind the deadline. `--try` calls each kernel once on a small cache, on the CPU in Triton's
interpreter. Writes pages.json; the table goes to stdout.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch

from . import record
from .record import output_of

SCHEMA = "fasim.page-times/1"
ROWS = ((8, 32 << 10), (1, 32 << 10), (1, 4 << 10), (64, 4 << 10), (8, 128 << 10), (64, 32 << 10))
"""Batch and keys of an entry."""
PAGES = (16, 64, 128, 256)
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
ROTATED_BYTES = 256 << 20
TOLERANCE = 1e-2


def calls_of(
    batch: int, keys: int, device: str, dtype: torch.dtype, pages: tuple[int, ...]
) -> tuple[dict[str, Callable], int, tuple]:
    """f(set) -> O by name, how many sets there are, and q, k and v of the first."""
    from .. import ops
    from ..decode import kernel

    each = 2 * batch * keys * KV_HEADS * HEAD_DIM * 2
    sets = 2 if device == "cpu" else max(1, -(-ROTATED_BYTES // each))
    generator = torch.Generator(device).manual_seed(0)
    shape = (sets, batch, keys, KV_HEADS, HEAD_DIM)
    k, v = (torch.randn(shape, device=device, dtype=dtype, generator=generator) for _ in range(2))
    q = torch.randn(batch, 1, HEADS, HEAD_DIM, device=device, dtype=dtype, generator=generator)
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=device)
    scale = HEAD_DIM**-0.5
    calls: dict[str, Callable] = {
        "decode": lambda i: kernel.forward(q, k[i], v[i], scale)[0],
        "lengths": lambda i: ops.flash_attn_with_kvcache(q, k[i], v[i], lengths),
    }
    fa3 = _fa3()
    if fa3 is not None:
        calls["fa3 lengths"] = lambda i: output_of(fa3(q, k[i], v[i], cache_seqlens=lengths))
    for size in pages:
        of_entry = keys // size
        order = torch.randperm(sets * batch * of_entry, generator=torch.Generator().manual_seed(size))
        tables = order.to(torch.int32).to(device).view(sets, batch, of_entry)
        pools = []
        for x in (k, v):  # a page of the pool holds what the table says it holds
            pool = torch.empty(sets * batch * of_entry, size, KV_HEADS, HEAD_DIM, device=device, dtype=dtype)
            pool[order.to(device)] = x.view(-1, size, KV_HEADS, HEAD_DIM)
            pools.append(pool)
        calls[f"pages of {size}"] = lambda i, pools=pools, tables=tables: ops.flash_attn_with_kvcache(q, *pools, lengths, tables[i])
        if fa3 is not None:
            calls[f"fa3 pages of {size}"] = lambda i, pools=pools, tables=tables: output_of(
                fa3(q, *pools, cache_seqlens=lengths, page_table=tables[i])
            )
    return calls, sets, (q, k[0], v[0])


def _fa3() -> Callable | None:
    try:
        from fa3_fwd_interface import flash_attn_with_kvcache
    except ImportError:
        return None
    return flash_attn_with_kvcache


def row_of(
    batch: int, keys: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, pages: tuple[int, ...] = PAGES
) -> dict:
    """Errors of every kernel on one row and, on a GPU, microseconds and TB/s of K and V."""
    from .. import reference
    from .beside_decode import graph_of, in_turns

    calls, sets, (q, k, v) = calls_of(batch, keys, device, dtype, pages)
    group = HEADS // KV_HEADS
    expected = reference.attention_forward(q[:1, :, :group], k[:1, :, :1], v[:1, :, :1]).o
    found, graphs = {}, {}
    for name, call in calls.items():
        try:
            o = call(0)[:1, :, :group].double()
            found[name] = {"relative_error": float((o - expected).norm() / expected.norm())}
            if not found[name]["relative_error"] <= TOLERANCE:
                found[name]["refused"] = "its error is above the tolerance"
            elif device == "cuda":
                graphs[name] = graph_of(call, sets)
        except Exception as error:  # a peer that refuses a page size is a finding
            found[name] = found.get(name, {}) | {"refused": f"{type(error).__name__}: {error}"[:300]}
    cache_bytes = 2 * batch * keys * KV_HEADS * HEAD_DIM * 2
    for name, us in in_turns(graphs).items() if graphs else ():
        found[name] |= {"us": us, "tb_per_s": round(cache_bytes / us / 1e6, 3)}
    return {"batch": batch, "keys": keys, "sets": sets, "kernels": found}


def line_of(row: dict) -> str:
    """One row as a line: microseconds of each kernel, or why it has none."""
    cells = []
    for name, each in row["kernels"].items():
        timed = f"{name} {each['us']:.1f} ({each['tb_per_s']:.2f})" if "us" in each else ""
        cells.append(timed or f"{name}: {each.get('refused', 'right')}")
    return f"{row['batch']} x {row['keys']}: {'; '.join(cells)}"


def main() -> None:
    """Measure, write DIR/pages.json as it grows, show the table."""
    parser = record.parser(__doc__.splitlines()[0], "pages", 90.0)
    parser.add_argument("--try", action="store_true", dest="tried")
    given = parser.parse_args()
    if given.tried:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
        sys.stdout.write(line_of(row_of(1, 64, "cpu", torch.float16, (16,))) + "\n")
        return
    if given.out is None:
        parser.error("--out is where pages.json goes")
    result = record.begun(SCHEMA, __file__, (record.ROOT / "kernels" / "decode").glob("*.py"))
    record.keep(result, given.out / "pages.json", ROWS, row_of, line_of, given.deadline)


if __name__ == "__main__":
    main()
