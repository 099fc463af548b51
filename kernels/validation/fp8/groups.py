"""The groups of checks over e4m3 kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ...fp8.plain import LARGEST, Quantised
from .. import kinds as inputs_of
from .. import shapes
from ..check import Case, Fault, Trial
from ..determinism import repeated
from .bench import Fp8Bench

FACTORS = (0.25, 1.0, 4.0)
"""Of the sizes of heads, or of blocks, in turn: no neighbours are alike."""
LONG = (1024, 16384, 131072)
"""Keys of the rows at whose ends sums of 14 bits drift."""
MOST_KEYS = 1 << 15


def accuracy(bench: Fp8Bench) -> Iterator[Trial]:
    """Random inputs at growing lengths, every head dim; outliers; long rows of V around 1."""
    for head_dim in bench.head_dims:
        for rows, keys, causal in _lengths(bench):
            name = f"{rows} x {keys}, {_mask(causal)}, d{head_dim}"
            yield _held(bench, Case(name=name, seqlen_q=rows, seqlen_k=keys, head_dim=head_dim, causal=causal))
    head_dim, length = bench.head_dims[-1], 1024 if bench.at_scale else 4 * bench.tile
    name = f"outliers, {length} x {length}, d{head_dim}"
    yield _held(bench, Case(name=name, seqlen_q=length, seqlen_k=length, head_dim=head_dim, inputs="outliers"))
    for keys in LONG[: 2 if bench.quick else 3] if bench.at_scale else (64 * bench.tile,):
        rows, kind = min(64, 4 * bench.tile), "V around 1"
        name = f"{kind}, {rows} x {keys}"
        case = Case(name=name, seqlen_q=rows, seqlen_k=keys, head_dim=head_dim, heads=1, inputs=kind)
        yield _held(bench, case, "what the tensor cores cut off may add up no further than in Hopper's own 14 bits")


def _lengths(bench: Fp8Bench) -> list[tuple[int, int, bool]]:
    if not bench.at_scale:
        near, far = 4 * bench.tile, 16 * bench.tile
        return [(near, near, False), (near, near, True), (near, far, False)]
    return [(length, length, causal) for length in ((512, 2048) if bench.quick else (512, 1024, 4096)) for causal in (False, True)]


def kinds(bench: Fp8Bench) -> Iterator[Trial]:
    """Every kind of inputs, full and causal; rows without keys; NaN."""
    head_dim = bench.head_dims[0]
    length = _blocks(bench, head_dim)
    for kind in inputs_of.KINDS:
        for causal in (False, True):
            name = f"{kind}, {_mask(causal)}"
            case = Case(name=name, seqlen_q=length, seqlen_k=length, head_dim=head_dim, causal=causal, inputs=kind)
            yield _held(bench, case)
    rows = bench.tile + bench.tile // 2
    name = f"{rows} of {length} rows fully masked"
    case = Case(name=name, seqlen_q=length, seqlen_k=length - rows, head_dim=head_dim, causal=True)
    yield _held(bench, case, "a row that sees no key must give O = 0 and LSE = -inf")
    at = (0, length // 2 + 1, 0, 3)
    for tensor in range(3):
        name = f"NaN in {'qkv'[tensor]}"
        case = Case(name=name, seqlen_q=length, seqlen_k=length, head_dim=head_dim)
        yield _held(bench, case, f"NaN at {'qkv'[tensor]}{list(at)}", partial(_with_nan, tensor, at))


def _blocks(bench: Fp8Bench, head_dim: int) -> int:
    """A length of several blocks, the last in part."""
    length = 6 * bench.tile
    return length if bench.subject.block_rows is None else max(length, 3 * max(bench.subject.block_rows(head_dim, length)) + 5)


def _with_nan(tensor: int, at: tuple[int, ...], *qkv: Quantised) -> tuple[Quantised, ...]:
    values = qkv[tensor].values.float()
    values[at] = float("nan")
    return _changed(qkv, tensor, values=values.to(qkv[tensor].values.dtype))


def scales(bench: Fp8Bench) -> Iterator[Trial]:
    """Descales that differ from one head, or block, to the next; of 0, inf, NaN; blocks of zeros; values at the type's end."""
    head_dim = bench.head_dims[0]
    length = _blocks(bench, head_dim)
    of = "heads" if bench.subject.block_rows is None else "blocks"
    own = {"head_dim": head_dim, "heads": 4, "kv_heads": 2, "batch": 2}
    for tensor in "qkv":
        name = f"{of} of {tensor} of many sizes"
        case = Case(name=name, seqlen_q=length, seqlen_k=length - 3, causal=tensor == "k", **own)
        yield Trial(name, partial(_uneven, bench, case, tensor))
    sizes = {"seqlen_q": bench.tile + 3, "seqlen_k": length, **own}
    one = {"seqlen_q": bench.tile + 3, "seqlen_k": length, "head_dim": head_dim, "heads": 2}
    for tensor, value in (
        (0, 0.0),
        (1, 0.0),
        (2, 0.0),
        (0, 1e-30),
        (2, 1e-30),
        (2, 1e20),
        (0, "nan"),
        (1, "nan"),
        (2, "nan"),
        (2, "inf"),
    ):
        name = f"a {'qkv'[tensor]}_descale of {value}"
        yield _held(bench, Case(name=name, **one), name, partial(_with_descale, tensor, float(value)))
    yield _held(bench, Case(name="descales of 2^-60 and 2^60", **sizes), "descales are multiplied", _opposite)
    for tensor in range(3):
        name = f"a part of {'qkv'[tensor]} is zeros"
        yield Trial(name, partial(_zeros, bench, Case(name=name, **sizes), tensor))
    full = Case(name="every value 448 or -448", softmax_scale=2e-6, **sizes)
    yield _held(bench, full, "the type's largest values are numbers as others", _at_the_end)
    if bench.subject.block_rows is None:
        yield Trial("no descales", partial(_without, bench, Case(name="no descales", **sizes)))


def _uneven(bench: Fp8Bench, case: Case, tensor: str) -> dict:
    made = dict(zip("qkv", inputs_of.make(case, bench.generator(case.name), torch.float32), strict=True))
    x = made[tensor]
    rows = bench.rows(case)["qkv".index(tensor)]
    heads = torch.arange(x.shape[2]) // (1 if rows or tensor != "q" else case.heads // case.heads_kv)
    which = torch.arange(x.shape[1])[:, None] // (rows or x.shape[1]) + heads
    made[tensor] = x * torch.tensor(FACTORS)[which % len(FACTORS)][None, :, :, None]
    given = bench.quantised(case, *(each.half().to(bench.device) for each in made.values()))
    return bench.hold(case, f"each of the {tensor}_descales counts where it belongs", lambda *_: given)


def _with_descale(tensor: int, value: float, *qkv: Quantised) -> tuple[Quantised, ...]:
    """The first head's, all of its blocks."""
    descale = qkv[tensor].descale.clone()
    descale[:, :1] = value
    return _changed(qkv, tensor, descale=descale)


def _opposite(q: Quantised, k: Quantised, v: Quantised) -> tuple[Quantised, ...]:
    return q._replace(descale=q.descale * 2.0**-60), k._replace(descale=k.descale * 2.0**60), v


def _zeros(bench: Fp8Bench, case: Case, tensor: int) -> dict:
    made = [x.half().to(bench.device) for x in inputs_of.make(case, bench.generator(case.name), torch.float32)]
    rows = bench.rows(case)[tensor] or bench.tile
    made[tensor][:, :rows] = 0.0
    given = bench.quantised(case, *made)
    return bench.hold(case, "zeros are quantised to zeros and counted as such", lambda *_: given)


def _at_the_end(*qkv: Quantised) -> tuple[Quantised, ...]:
    return tuple(x._replace(values=(x.values.float().sign() * LARGEST).to(x.values.dtype)) for x in qkv)


def _without(bench: Fp8Bench, case: Case) -> dict:
    """None stands for 1."""
    qkv = bench.tensors(case)
    ones = tuple(x._replace(descale=torch.ones_like(x.descale)) for x in qkv)
    wanted = bench.yardstick(case, *ones)
    got = bench.call(*(x._replace(descale=None) for x in qkv), case)
    return bench.compare(case, ones, got, wanted)


def memory(bench: Fp8Bench) -> Iterator[Trial]:
    """What is read and written, and on which stream."""
    case = Case(name="memory", seqlen_q=4 * bench.tile - 1, seqlen_k=4 * bench.tile + 3, head_dim=bench.head_dims[0], causal=True)
    yield Trial("the inputs are left as they were", partial(_unchanged, bench, case))
    yield Trial("an earlier answer is left as it was", partial(_kept, bench, case))
    if bench.on_gpu:
        yield Trial("the current stream", partial(_on_a_side_stream, bench, case))


def _unchanged(bench: Fp8Bench, case: Case) -> dict:
    qkv = bench.tensors(case)
    before = [(x.values.view(torch.uint8).clone(), x.descale.clone()) for x in qkv]
    bench.call(*qkv, case)
    for name, x, (values, descale) in zip("qkv", qkv, before, strict=True):
        if not torch.equal(x.values.view(torch.uint8), values) or not torch.equal(x.descale, descale):
            raise Fault(f"the call modifies {name} or its descale; inputs: {case}")
    return {}


def _kept(bench: Fp8Bench, case: Case) -> dict:
    qkv = bench.tensors(case)
    first = [x for x in bench.call(*qkv, case) if x is not None]
    before = [x.clone() for x in first]
    bench.call(*qkv[:2], qkv[2]._replace(descale=2 * qkv[2].descale), case)
    if not all(torch.equal(a, b) for a, b in zip(first, before, strict=True)):
        raise Fault(f"the answer of an earlier call is overwritten; inputs: {case}")
    return {}


def _on_a_side_stream(bench: Fp8Bench, case: Case) -> dict:
    """Inputs that a busy stream has not yet made when the kernel is called on it."""
    qkv = bench.tensors(case)
    wanted = bench.yardstick(case, *qkv)
    late = tuple(x._replace(values=torch.zeros_like(x.values.view(torch.uint8)).view(x.values.dtype)) for x in qkv)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        for there, x in zip(late, qkv, strict=True):
            there.values.view(torch.uint8).copy_(x.values.view(torch.uint8))
        got = bench.call(*late, case)
    torch.cuda.synchronize()
    return bench.compare(case, qkv, got, wanted)


def determinism(bench: Fp8Bench) -> Iterator[Trial]:
    """The same bits every time."""
    length = 1024 if bench.at_scale else 6 * bench.tile
    for head_dim in bench.head_dims:
        for causal in (False, True):
            name = f"forward, {_mask(causal)}, d{head_dim}"
            case = Case(name=name, seqlen_q=length, seqlen_k=length, head_dim=head_dim, causal=causal)
            yield Trial(name, partial(repeated, bench, case))


def of_any_shape(bench: Fp8Bench) -> Iterator[Trial]:
    """The lengths, heads, batches and layouts of `shapes` that e4m3 has: its values have no lazy negation."""
    for case, proves in shapes.cases(bench.tile, bench.head_dims, bench.quick):
        if max(case.seqlen_q, case.seqlen_k) <= MOST_KEYS and case.layout != "lazily negated":
            yield _held(bench, case, proves)


def _held(bench: Fp8Bench, case: Case, promise: str = "", change: Callable = lambda *qkv: qkv) -> Trial:
    return Trial(case.name, lambda: bench.hold(case, promise, change))


def _changed(qkv: tuple[Quantised, ...], tensor: int, **change: torch.Tensor) -> tuple[Quantised, ...]:
    return tuple(x._replace(**change) if n == tensor else x for n, x in enumerate(qkv))


def _mask(causal: bool) -> str:
    return "causal" if causal else "full"


GROUPS: dict[str, tuple[str, Callable]] = {
    "accuracy": ("O and LSE against fp64 of what e4m3 says, at most twice the error of FP8 arithmetic", accuracy),
    "inputs": ("inputs that break a softmax", kinds),
    "scales": ("descales of heads and blocks, zeros, the type's end", scales),
    "memory": ("what is written, kept and on which stream", memory),
    "determinism": ("the same bits every time", determinism),
    "shapes": ("lengths, masks, heads, batches, layouts", of_any_shape),
}
"""As suite.GROUPS."""
