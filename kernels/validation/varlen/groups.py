"""The groups of checks over kernels of packed sequences: those of one length, and what only unequal lengths can break."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from .. import accuracy, determinism, gradients, inputs, shapes
from ..bench import Bench
from ..check import Fault, Trial
from . import packed
from .packed import Packed


def packing(bench: Bench) -> Iterator[Trial]:
    """Lengths about a tile, empty sequences, one token, unequal queries and keys; what is beside a sequence; memory; gradients."""
    for case, promise in _batches(bench):
        yield Trial(case.name, partial(packed.hold, bench, case, promise))
    tile, first = bench.tile, bench.head_dims[0]
    lengths = (tile + 3, tile // 2, 5, tile - 1)
    beside = Packed(name="a sequence of NaN beside others", queries=lengths, keys=lengths, head_dim=first, causal=True)
    yield Trial(beside.name, partial(packed.hold, bench, beside, "no sequence reads another's rows", _with_nan))
    full = Packed(name="a sequence of NaN beside others, full", queries=lengths, keys=(5, tile + 1, 3, 9), head_dim=first)
    yield Trial(full.name, partial(packed.hold, bench, full, "no sequence reads another's rows", _with_nan))
    strided = Packed(name="rows of q, k and v in one tensor", queries=lengths, keys=lengths, head_dim=first, causal=True)
    yield Trial(strided.name, partial(packed.hold, bench, strided, "strides are respected", _in_one_tensor))
    yield Trial("other lengths in the next call", partial(_other_lengths, bench))
    yield Trial("what is given is left as it was", partial(_unchanged, bench))
    yield Trial("the same bits every time", partial(_repeated, bench))
    for causal in (True, False):
        about = {
            "head_dim": first,
            "heads": 4,
            "causal": causal,
            "queries": (tile + 3, 0, 5, 7),
            "keys": (tile // 2 + 1, 4, 0, tile + 9),
        }
        case = Packed(name=f"gradients, {_mask(causal)}", **about)
        yield Trial(case.name, partial(packed.hold_gradients, bench, case, "each sequence has its own gradients"))
    case = Packed(name="gradients of O and LSE", queries=(9, tile), keys=(9, tile), head_dim=first, causal=True)
    yield Trial(case.name, partial(packed.hold_gradients, bench, case, "LSE is differentiable", True))


def _batches(bench: Bench) -> Iterator[tuple[Packed, str]]:
    """(batch, what it proves) where all there is to do is to call."""
    tile, first = bench.tile, bench.head_dims[0]
    near = (tile - 1, tile, tile + 1, 1, 2 * tile, 3 * tile + 5)
    for head_dim in bench.head_dims:
        for causal in (True, False):
            name = f"lengths about a tile, {_mask(causal)}, d{head_dim}"
            yield (
                Packed(name=name, queries=near, keys=near, head_dim=head_dim, causal=causal),
                "each sequence is a problem of its own",
            )
    for causal in (True, False):
        mask = {"causal": causal, "head_dim": first}
        aligned = "a causal mask is aligned bottom right in each sequence" if causal else "each sequence has its own keys"
        queries, keys = (tile + 3, 5, 2 * tile, 9), (2 * tile, 3 * tile + 1, 7, 11)
        yield Packed(name=f"unequal queries and keys, {_mask(causal)}", queries=queries, keys=keys, **mask), aligned
        empty = (5, 0, tile, 0, 0, 3)
        yield Packed(name=f"empty sequences, {_mask(causal)}", queries=empty, keys=empty, **mask), "an empty sequence takes no rows"
        some = {"queries": (3, 4, 0, tile), "keys": (5, 0, 7, tile + 2)}
        nothing = "a sequence without keys has O = 0 and LSE = -inf"
        yield Packed(name=f"queries without keys, keys without queries, {_mask(causal)}", **some, **mask), nothing
        outside = {"before": 3, "after": tile // 2 + 3, "queries": (7, tile + 1), "keys": (7, tile + 1)}
        yield (
            Packed(name=f"rows of no sequence, {_mask(causal)}", **outside, **mask),
            "cu_seqlens say where sequences begin and end",
        )
    common = {"head_dim": first, "causal": True}
    for name, promise, lengths, more in (
        ("one token each", "a sequence may be one token", (1,) * 9, {}),
        ("one sequence", "a batch may be one sequence", (2 * tile + 1,), {}),
        ("the longest first", "no order of lengths is asked for", (2 * tile + 1, 1, 2), {}),
        ("the longest last", "no order of lengths is asked for", (1, 2, 2 * tile + 1), {}),
        ("many sequences", "any number of sequences", tuple(i * 7 % 11 for i in range(700 if bench.at_scale else 70)), {}),
        ("4 query heads on 2 key heads", "consecutive query heads share one", (tile + 1, 6), {"heads": 4}),
        ("max_seqlen above the longest", "max_seqlen is a bound and no length", (tile + 1, 6), {"longer": 3 * tile}),
        ("softmax_scale 0.3", "softmax_scale is the one given", (tile + 1, 6), {"softmax_scale": 0.3}),
        ("rising logits", "each sequence has a maximum of its own", (2 * tile, tile + 1), {"inputs": "rising logits"}),
    ):
        yield Packed(name=name, queries=lengths, keys=lengths, **common, **more), promise


def _with_nan(case: Packed, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """NaN in the keys and values of the second sequence."""
    for x in (k, v):
        x[case.rows(case.keys)[1]] = float("nan")
    return q, k, v


def _in_one_tensor(case: Packed, *qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of one (total, 3, H, D) tensor."""
    return torch.stack(qkv, 1).unbind(1)


def _other_lengths(bench: Bench) -> dict:
    """As many sequences of as many rows, cut elsewhere."""
    tile, figures = bench.tile, {}
    for lengths in ((tile, 7, 3 * tile), (tile + 5, 2, 3 * tile), (1, tile + 6, 3 * tile)):
        name = f"other lengths in the next call, {lengths[0]}"
        case = Packed(name=name, queries=lengths, keys=lengths, head_dim=bench.head_dims[0], causal=True)
        figures = packed.hold(bench, case, "cu_seqlens are those of this call")
    return figures


def _unchanged(bench: Bench) -> dict:
    """Inputs, cu_seqlens and an earlier answer."""
    tile = bench.tile
    about = {"head_dim": bench.head_dims[0], "causal": True, "before": 2, "after": 3}
    case = Packed(name="memory", queries=(tile, 5), keys=(tile, 9), **about)
    qkv, given = packed.tensors(bench, case), packed.bounds(bench, case)
    named = dict(zip("qkv", qkv, strict=True)) | {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
    before = {name: x.clone() for name, x in named.items()}
    first = packed.call(bench, case, qkv, given)
    for name, x in named.items():
        if not torch.equal(x.nan_to_num(), before[name].nan_to_num()):
            raise Fault(f"the call modifies {name}; inputs: {case}")
    kept = [x if x is None else x.clone() for x in first]
    packed.call(bench, case, (qkv[0], qkv[1], 2 * qkv[2]), given)
    for name, x, y in zip(("O", "LSE"), first, kept, strict=True):
        if x is not None and not torch.equal(x.nan_to_num(), y.nan_to_num()):
            raise Fault(f"{name} of an earlier call is overwritten; inputs: {case}")
    return {}


def _repeated(bench: Bench) -> dict:
    tile = bench.tile
    lengths = (tile + 1, 3, 4 * tile, 9)
    case = Packed(name="the same bits every time", queries=lengths, keys=lengths, head_dim=bench.head_dims[0], causal=True)
    qkv = packed.tensors(bench, case)
    first = [x if x is None else x.clone() for x in packed.call(bench, case, qkv)]
    repeats = 20 if bench.at_scale else 3
    for _ in range(repeats):
        for name, x, y in zip(("O", "LSE"), first, packed.call(bench, case, qkv), strict=True):
            if x is not None and not torch.equal(x, y):
                raise Fault(f"{name} is not deterministic: {int((x != y).sum())} elements differ; inputs: {case}")
    return {"repeats": repeats}


def _mask(causal: bool) -> str:
    return "causal" if causal else "full"


GROUPS: dict[str, tuple[str, Callable]] = {
    "packing": ("sequences of any lengths, beside each other and alone", packing),
    "accuracy": ("O and LSE against fp64, at most twice the error of PyTorch in the same precision", accuracy.trials),
    "inputs": ("inputs that break a softmax", inputs.trials),
    "determinism": ("the same bits every time", determinism.trials),
    "gradients": ("dQ, dK, dV against fp64", gradients.trials),
    "shapes": ("lengths, masks, heads, batches, layouts", shapes.trials),
}
"""As suite.GROUPS; those after the first pack a batch of one length."""
OWN = ("packing",)
"""The groups that the faults of varlen/mutants.py are held to."""
