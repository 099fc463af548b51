"""The groups of checks over kernels of few queries: what walking the keys in parts and packing the heads of a group can break."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from .. import accuracy, determinism, inputs, kinds, layouts, memory, shapes
from ..bench import Bench
from ..check import Case, Fault, Trial, explained
from . import pages


@dataclass(frozen=True, kw_only=True)
class InParts(Case):
    """A Case whose keys are walked in `num_splits` parts."""

    num_splits: int = 1

    @property
    def keywords(self) -> dict:
        """What the subject is given besides."""
        return {"num_splits": self.num_splits}

    def __str__(self) -> str:
        return f"{super().__str__()}, num_splits {self.num_splits}"


def parts(bench: Bench) -> Iterator[Trial]:
    """Any number of parts, empty ones too, one and few queries, heads of a group; inputs that only a right combine survives."""
    for case, promise in _cases(bench):
        yield Trial(case.name, partial(bench.hold, case, promise))
    tile, first = bench.tile, bench.head_dims[0]
    about = {"head_dim": first, "heads": 4, "kv_heads": 1, "seqlen_q": 1, "seqlen_k": 5 * tile + 3, "num_splits": 3}
    nan = InParts(name="NaN in one part", **about)
    yield Trial(nan.name, partial(_nan, bench, nan))
    same = InParts(name="the same bits every time", **(about | {"heads": 16, "seqlen_k": 20 * tile, "num_splits": 13}))
    yield Trial(same.name, partial(determinism.repeated, bench, same))
    for layout in list(layouts.LAYOUTS)[1:]:
        case = InParts(name=f"{layout}, 3 parts", layout=layout, **about)
        yield Trial(case.name, partial(bench.hold, case, "strides are respected"))


def _cases(bench: Bench) -> Iterator[tuple[InParts, str]]:
    """(case, what it proves)."""
    tile, first = bench.tile, bench.head_dims[0]
    one = {"seqlen_q": 1, "heads": 8, "kv_heads": 2, "batch": 2}
    for head_dim in bench.head_dims:
        for count in (1, 2, 3, 7):
            name = f"1 query, {count} part{'s' * (count > 1)}, d{head_dim}"
            yield InParts(name=name, seqlen_k=8 * tile + 3, head_dim=head_dim, num_splits=count, **one), "parts add up to the whole"
    few = {"head_dim": first, "causal": True}
    for rows, heads, kv_heads in ((3, 8, 2), (4, 3, 1), (5, 4, 4), (1, 16, 1), (9, 16, 2)):
        name = f"{rows} queries, {heads} heads on {kv_heads}, 3 parts"
        case = InParts(name=name, seqlen_q=rows, seqlen_k=4 * tile + 5, heads=heads, kv_heads=kv_heads, num_splits=3, **few)
        yield case, "the rows of a tile are a group's heads and their queries"
    nothing = "a part of no keys counts for nothing"
    for keys, count in ((5, 9), (1, 4), (tile, 6), (tile + 1, 40)):
        name = f"{keys} keys in {count} parts"
        yield InParts(name=name, seqlen_k=keys, num_splits=count, head_dim=first, **one), nothing
    yield InParts(name="no keys in 3 parts", seqlen_k=0, num_splits=3, head_dim=first, **one), "no keys give O = 0 and LSE = -inf"
    name, rows = "rows without keys in 2 parts", tile + 4
    yield InParts(name=name, seqlen_q=rows, seqlen_k=tile, num_splits=2, heads=2, **few), "a row that sees no key gives O = 0"
    many = InParts(name="70 parts", seqlen_k=(80 if bench.at_scale else 40) * tile, num_splits=70, head_dim=first, **one)
    yield many, "every part is combined"
    for kind in kinds.KINDS:
        case = InParts(name=f"{kind}, 3 parts", seqlen_k=6 * tile + 1, num_splits=3, head_dim=first, inputs=kind, **one)
        yield case, "parts are weighted by their LSE"
    for scale in (0.3, 1.0):
        case = InParts(
            name=f"softmax_scale {scale:g}, 3 parts", seqlen_k=6 * tile, num_splits=3, softmax_scale=scale, head_dim=first, **one
        )
        yield case, "softmax_scale is the one given"


def _nan(bench: Bench, case: InParts) -> dict:
    """A NaN of K in the last part is a NaN of O; without it all is as it was."""
    q, k, v = bench.tensors(case)
    k[:, -1, 0, 0] = float("nan")
    out, _ = bench.call(q, k, v, case)
    if not out.isnan().all():
        raise Fault(f"a NaN in the last part does not reach O; inputs: {case}")
    fewer = replace(case, seqlen_k=case.seqlen_k - 1, name=f"{case.name}, left out")
    qkv = (q, k[:, :-1], v[:, :-1])
    with explained(fewer, "what is past the keys is not read"):
        return bench.compare(fewer, qkv, bench.call(*qkv, fewer), bench.yardstick(fewer, *qkv))


GROUPS: dict[str, tuple[str, Callable]] = {
    "parts": ("few queries, their keys in any number of parts", parts),
    "pages": ("keys in pages of any size and order, by a page table", pages.trials),
    "accuracy": ("O and LSE against fp64, at most twice the error of PyTorch in the same precision", accuracy.trials),
    "inputs": ("inputs that break a softmax", inputs.trials),
    "memory": ("what is written, kept and on which stream", memory.trials),
    "determinism": ("the same bits every time", determinism.trials),
    "shapes": ("lengths, masks, heads, batches, layouts", shapes.trials),
}
"""As suite.GROUPS; those after the first two leave the number of parts to the kernel."""
OWN = ("parts", "pages")
"""The groups that the faults of decode/mutants.py are held to."""
