"""A cache in pages as the suite asks for it, and how the answer is held: each entry alone, to its own keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from .. import calls, criteria, kinds
from ..bench import Bench
from ..check import Case, Fault, Skipped, Trial, explained

OLD = 3.0
"""What a page that was used before holds past its entry's keys: finite, so that weights of it show in O."""


@dataclass(frozen=True, kw_only=True)
class Pages:
    """Entries of `lengths[i]` keys in pages of `page_size`, which lie in any order, beside others that are nobody's."""

    name: str
    lengths: tuple[int, ...]
    page_size: int
    head_dim: int
    seqlen_q: int = 1
    heads: int = 4
    kv_heads: int = 2
    causal: bool = False
    softmax_scale: float | None = None
    inputs: str = "random"
    num_splits: int | None = None
    old: float = float("nan")  # what lies in no entry's keys

    def alone(self, i: int) -> Case:
        """Entry i as a problem of its own."""
        about = {"head_dim": self.head_dim, "heads": self.heads, "kv_heads": self.kv_heads, "causal": self.causal}
        about |= {"softmax_scale": self.softmax_scale, "inputs": self.inputs if self.lengths[i] else "random"}
        return Case(name=f"{self.name}, entry {i}", seqlen_q=self.seqlen_q, seqlen_k=self.lengths[i], **about)

    def __str__(self) -> str:
        shown = "+".join(map(str, self.lengths))
        parts = f", num_splits {self.num_splits}" if self.num_splits else ""
        mask = "causal" if self.causal else "full"
        return f"{self.inputs}, {self.seqlen_q} queries, {shown} keys, pages of {self.page_size}, d{self.head_dim}, {mask}{parts}"


def trials(bench: Bench) -> Iterator[Trial]:
    """Pages of every size about a block's, out of order, the last one partly filled, none at all; what is in nobody's rows."""
    for case, promise in _cases(bench):
        yield Trial(case.name, partial(hold, bench, case, promise))
    yield Trial("pages that entries share", partial(_shared, bench))
    yield Trial("another table in the next call", partial(_another_table, bench))


def _cases(bench: Bench) -> Iterator[tuple[Pages, str]]:
    tile, first = bench.tile, bench.head_dims[0]
    order, end = "an entry's keys are those of its pages, in the table's order", "keys past an entry's end are not read"
    uneven = (3 * tile + 5, tile, 2 * tile + 1)
    few = {"head_dim": first, "causal": True, "seqlen_q": 3}
    yield Pages(name="whole pages, 3 queries", lengths=(3 * tile, tile, 2 * tile), page_size=tile, old=OLD, **few), order
    for head_dim in bench.head_dims:
        yield Pages(name=f"pages of {tile} keys, d{head_dim}", lengths=uneven, page_size=tile, head_dim=head_dim), end
    for size in (1, tile // 2 - 1, 2 * tile):
        yield Pages(name=f"pages of {size} keys, 3 queries", lengths=uneven, page_size=size, **few), order
    old = {"page_size": tile, "head_dim": first, "old": OLD}
    yield Pages(name="old keys past the end", lengths=(tile + 3, 2, 2 * tile - 1), **old), end
    yield Pages(name="old keys past the end, 2 parts", lengths=(tile + 3, 2, 2 * tile - 1), num_splits=2, **old), end
    none = {"lengths": (0, tile + 1, 1), "page_size": tile, "head_dim": first}
    yield Pages(name="an entry without keys", **none), "no keys give O = 0 and LSE = -inf"
    aligned = "a causal mask is aligned with each entry's own length"
    yield Pages(name="more queries than keys", lengths=(2, tile + 2), page_size=tile, **(few | {"seqlen_q": 5})), aligned
    for inputs in ("rising logits", "one-hot"):
        yield Pages(name=f"{inputs} in pages", lengths=uneven, page_size=tile, inputs=inputs, **few), order


def tensors(bench: Bench, case: Pages) -> tuple[list[tuple], tuple, dict]:
    """q, k and v of each entry; q and the caches; lengths and table by name. Unused places of the table are -1."""
    made = [kinds.make(case.alone(i), bench.generator(case.alone(i).name), bench.dtype) for i in range(len(case.lengths))]
    made = [tuple(x.to(bench.device) for x in each) for each in made]
    counts = [-(-length // case.page_size) for length in case.lengths]
    places = torch.randperm(sum(counts) + 2, generator=bench.generator(f"{case.name}, pages")).tolist()
    table = torch.full((len(counts), max(1, *counts)), -1, dtype=torch.int32)
    shape = (len(places), case.page_size, case.kv_heads, case.head_dim)
    caches = [torch.full(shape, case.old, dtype=bench.dtype, device=bench.device) for _ in range(2)]
    for i, (_, *kv) in enumerate(made):
        for j in range(counts[i]):
            table[i, j] = place = places.pop()
            rows = slice(j * case.page_size, min(case.lengths[i], (j + 1) * case.page_size))
            for cache, x in zip(caches, kv, strict=True):
                cache[place, : rows.stop - rows.start] = x[0, rows]
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=bench.device)
    return made, (torch.cat([q for q, *_ in made]), *caches), {"cache_seqlens": lengths, "page_table": table.to(bench.device)}


def call(bench: Bench, case: Pages, given: tuple, table: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
    """O and LSE (None where the subject returns none), with their form checked; raises as Bench.call does."""
    if getattr(bench.subject, "pages", None) is None:
        raise Skipped("takes no page table")
    keywords = {"causal": case.causal, "softmax_scale": case.softmax_scale} | table
    keywords |= {"num_splits": case.num_splits} if case.num_splits else {}

    def ask() -> tuple:
        answer = bench.subject.pages(*given, **keywords)
        if bench.on_gpu:
            torch.cuda.current_stream().synchronize()
        out, lse = (*answer, None)[:2] if isinstance(answer, (tuple, list)) and answer else (answer, None)
        return calls.plain(out), calls.plain(lse)

    def again() -> None:
        calls.refill(given[0])
        ask()

    out, lse = bench.run(ask, again)
    criteria.hold_form("O", out, tuple(given[0].shape), bench.dtype, bench.device)
    if lse is not None:
        wide = torch.float64 if bench.dtype == torch.float64 else torch.float32
        criteria.hold_form("LSE", lse, (len(case.lengths), case.heads, case.seqlen_q), wide, bench.device)
    elif bench.subject.returns_lse:
        raise Fault("LSE is missing: only O came back")
    return out, lse


def hold(bench: Bench, case: Pages, promise: str = "") -> dict:
    """Call the subject on the cache and hold each entry to the yardstick."""
    made, given, table = tensors(bench, case)
    return _held(bench, case, made, call(bench, case, given, table), promise)


def _held(bench: Bench, case: Pages, made: list[tuple], got: tuple, promise: str) -> dict:
    figures = {}
    for i, qkv in enumerate(made):
        alone, one = case.alone(i), slice(i, i + 1)
        answer = got[0][one], None if got[1] is None else got[1][one]
        with explained(case, f"{promise + ': ' if promise else ''}entry {i}"):
            figures = bench.compare(alone, qkv, answer, bench.yardstick(alone, *qkv)) or figures
    return figures


def _shared(bench: Bench) -> dict:
    """Two entries whose tables are the same pages, as those of one prompt are, the second cut short."""
    tile = bench.tile
    case = Pages(name="shared pages", lengths=(2 * tile + 3, 0), page_size=tile, head_dim=bench.head_dims[0])
    made, (q, *caches), table = tensors(bench, case)
    short = tile + 2
    q = q[:1].repeat(2, 1, 1, 1)
    table = {
        "cache_seqlens": torch.tensor([case.lengths[0], short], dtype=torch.int32, device=bench.device),
        "page_table": table["page_table"][:1].repeat(2, 1),
    }
    both = Pages(**(vars(case) | {"lengths": (case.lengths[0], short)}))
    first = made[0]
    return _held(
        bench, both, [first, (first[0], first[1][:, :short], first[2][:, :short])], call(bench, both, (q, *caches), table),
        "entries may share pages",
    )  # fmt: skip


def _another_table(bench: Bench) -> dict:
    """The same memory, entries the other way round."""
    tile = bench.tile
    case = Pages(name="tables", lengths=(tile + 3, 2 * tile), page_size=tile, head_dim=bench.head_dims[0])
    made, (q, *caches), table = tensors(bench, case)
    call(bench, case, (q, *caches), table)
    turned = {name: x.flip(0) for name, x in table.items()}
    other = Pages(**(vars(case) | {"lengths": case.lengths[::-1]}))
    mixed = [(made[1 - i][0], *made[i][1:]) for i in (1, 0)]
    q = torch.cat([each[0] for each in mixed])
    return _held(bench, other, mixed, call(bench, other, (q, *caches), turned), "lengths and table are those of this call")
