"""Packed sequences beside FlashAttention-3 and our fixed lengths: `python -m fasim.kernels.measure.beside_varlen --out DIR`.

Microseconds of a call in a replayed CUDA graph, the median of rounds in which the kernels take turns, random normal bf16. A rate
counts 4 D FLOP for each query and key that the mask lets meet, as the papers do with a fixed length. `fixed` is what our kernel of
one length reaches on each sequence's own length, from lengths measured in the same turns, weighted by FLOP: the time that the
batch would take if every sequence ran in a full batch of its like. O is first held to the fp64 oracle. Writes varlen.json; the
table goes to stdout, progress to stderr.
"""

from __future__ import annotations

import bisect
import math
import random
from dataclasses import asdict, dataclass
from itertools import accumulate

import torch

from .. import ops
from ..varlen import reference
from . import record
from .beside_decode import graph_of, in_turns
from .record import output_of

SCHEMA = "fasim.varlen-times/1"
FIXED_TOKENS = 128 << 10
FIXED_LENGTHS = (128, 512, 1024, 2048, 4096, 8192)
CHECKED = 6
"""Sequences of a batch whose O is held to the oracle: the longest, the shortest and some between, two heads of each."""


@dataclass(frozen=True)
class Packed:
    """Lengths of queries and keys of each sequence, in bf16."""

    name: str
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    causal: bool
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128

    @property
    def flop(self) -> int:
        """4 D for each pair that meets; a causal mask halves a square, as the papers count it."""
        return sum(flop_of(q, k, self.causal) for q, k in zip(self.queries, self.keys, strict=True)) * self.heads * self.head_dim


def flop_of(queries: int, keys: int, causal: bool) -> int:
    """FLOP of one head, over head_dim."""
    met = queries * keys
    if causal:  # bottom right: the square of the lesser is halved
        met -= min(queries, keys) ** 2 // 2 if keys >= queries else queries * keys - keys * keys // 2
    return 4 * met


def spread(count: int, least: int, most: int, power: float) -> tuple[int, ...]:
    """`count` lengths from least to most, shuffled: the higher the power, the more of them are short."""
    lengths = [round(least + (most - least) * (i / (count - 1)) ** power) for i in range(count)]
    random.Random(0).shuffle(lengths)
    return tuple(lengths)


LONG = spread(64, 16, 8000, 3.15)
"""126,249 tokens."""
SHORT = spread(512, 16, 512, 1.0)
EQUAL = (2048,) * 64


def batches() -> list[Packed]:
    """What is measured, the batch that matters most first."""
    found = []
    for causal in (True, False):
        mask = "causal" if causal else "full"
        found += [
            Packed(f"64 of 16 to 8000, {mask}", LONG, LONG, causal),
            Packed(f"64 of 16 to 8000, 32 heads on 8, {mask}", LONG, LONG, causal, 32, 8),
            Packed(f"64 of 2048, {mask}", EQUAL, EQUAL, causal),
            Packed(f"512 of 16 to 512, {mask}", SHORT, SHORT, causal),
            Packed(f"64 of 16 to 8000, d64, {mask}", LONG, LONG, causal, 32, 32, 64),
            Packed(f"64 of 16 to 8000, d256, {mask}", LONG, LONG, causal, 8, 8, 256),
        ]
    chunks = tuple(min(256, keys) for keys in LONG)
    return [*found, Packed("the last 256 of 16 to 8000, causal", chunks, LONG, True)]


def tensors_of(batch: Packed) -> tuple:
    """(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)."""
    generator = torch.Generator("cuda").manual_seed(0)
    cu = [torch.tensor([0, *accumulate(x)], dtype=torch.int32, device="cuda") for x in (batch.queries, batch.keys)]

    def normal(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, batch.head_dim, device="cuda", generator=generator, dtype=torch.bfloat16)

    total_q, total_k = sum(batch.queries), sum(batch.keys)
    keys, values = normal(total_k, batch.kv_heads), normal(total_k, batch.kv_heads)
    return normal(total_q, batch.heads), keys, values, *cu, max(batch.queries), max(batch.keys)


def error_of(o: torch.Tensor, batch: Packed, tensors: tuple) -> float:
    """Largest relative error against fp64 over some sequences, the first and the last head of each."""
    q, k, v, cu_q, cu_k, *_ = tensors
    order = sorted(range(len(batch.keys)), key=lambda i: batch.keys[i])
    chosen = {order[round(i * (len(order) - 1) / (CHECKED - 1))] for i in range(CHECKED)}
    worst = 0.0
    starts = cu_q.tolist(), cu_k.tolist()
    group = batch.heads // batch.kv_heads
    for i in chosen:
        rows, keys = (slice(start[i], start[i + 1]) for start in starts)
        one = [torch.tensor([0, part.stop - part.start], dtype=torch.int32) for part in (rows, keys)]
        for head in (0, batch.heads - 1):
            kv = slice(head // group, head // group + 1)
            expected = reference.attention_forward(q[rows, head : head + 1], k[keys, kv], v[keys, kv], *one, causal=batch.causal).o
            error = float((o[rows, head : head + 1].double() - expected).norm() / expected.norm().clamp(min=1e-30))
            worst = max(worst, error) if error == error else math.inf
    return worst


def fixed_graphs(batch: Packed) -> tuple[dict[int, tuple], list]:
    """Graphs of our fixed-length kernel, by length, and the tensors that they read."""
    found, held = {}, []
    for length in FIXED_LENGTHS:
        entries = max(1, FIXED_TOKENS // length)
        q = torch.randn(entries, length, batch.heads, batch.head_dim, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(entries, length, batch.kv_heads, batch.head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        held.append((q, k, v))
        found[length] = graph_of(lambda _, t=held[-1]: ops.flash_attn_func(*t, causal=batch.causal, schedule="fa3"), 1)
    return found, held


def fixed_seconds(batch: Packed, us: dict[int, float]) -> float:
    """Seconds that the batch would take at the fixed-length kernel's rate of each length, between lengths by their logarithms."""
    rates = {n: FIXED_TOKENS // n * flop_of(n, n, batch.causal) * batch.heads * batch.head_dim / us[n] * 1e6 for n in FIXED_LENGTHS}

    def rate(length: int) -> float:
        at = bisect.bisect_left(FIXED_LENGTHS, length)
        if at == 0:
            return rates[FIXED_LENGTHS[0]] * length / FIXED_LENGTHS[0]
        if at == len(FIXED_LENGTHS):
            return rates[FIXED_LENGTHS[-1]]
        low, high = FIXED_LENGTHS[at - 1], FIXED_LENGTHS[at]
        share = math.log(length / low) / math.log(high / low)
        return rates[low] ** (1 - share) * rates[high] ** share

    return sum(flop_of(n, n, batch.causal) * batch.heads * batch.head_dim / rate(n) for n in batch.keys)


def row_of(batch: Packed) -> dict:
    """Every kernel of a batch: error, microseconds and TFLOP/s, or why not."""
    tensors = tensors_of(batch)
    calls = {"fasim": lambda _: ops.flash_attn_varlen_func(*tensors, causal=batch.causal)}
    try:
        import fa3_fwd_interface as fa3

        calls["fa3"] = lambda _: output_of(fa3.flash_attn_varlen_func(*tensors, causal=batch.causal))
    except ImportError:
        pass
    found, graphs = {}, {}
    for name, call in calls.items():
        try:
            found[name] = {"relative_error": error_of(call(0), batch, tensors)}
            graphs[name] = graph_of(call, 1)
        except Exception as error:  # a peer that refuses a batch is a finding
            found[name] = {"refused": f"{type(error).__name__}: {error}"[:300]}
    square = batch.queries == batch.keys
    if square:
        of_lengths, _held = fixed_graphs(batch)
        graphs |= of_lengths
    us = in_turns(graphs)
    for name in found.keys() & us.keys():
        found[name] |= {"us": us[name], "tflops": round(batch.flop / us[name] / 1e6, 1)}
    row = {**asdict(batch), "tokens": sum(batch.keys), "kernels": found}
    if square:
        seconds = fixed_seconds(batch, us)
        lengths = {str(n): us[n] for n in FIXED_LENGTHS}
        row["fixed"] = {"us": round(seconds * 1e6, 2), "tflops": round(batch.flop / seconds / 1e12, 1), "us_of_length": lengths}
    return row


def line_of(row: dict) -> str:
    """One row as a line: TFLOP/s of each kernel."""
    cells = [
        f"{name} {each['tflops']:.0f} ({each['us']:.0f} us, error {each['relative_error']:.1e})"
        if "us" in each
        else f"{name} {each['refused'][:80]}"
        for name, each in row["kernels"].items()
    ]
    cells += [f"fixed {row['fixed']['tflops']:.0f}"] if "fixed" in row else []
    return f"{row['name']:44} " + "  ".join(cells)


def main() -> None:
    """Measure, write DIR/varlen.json as it grows, show the table."""
    parser = record.parser(__doc__.splitlines()[0], "varlen", 120.0)
    given = parser.parse_args()
    if given.out is None:
        parser.error("--out is where varlen.json goes")
    torch.manual_seed(0)
    room = record.ROOT / "kernels" / "cuda"
    sources = [path for path in (*(room / "varlen").glob("*.*"), *room.glob("*.cu*")) if path.suffix in (".py", ".cu", ".cuh")]
    cases = [(batch,) for batch in batches()]
    record.keep(record.begun(SCHEMA, __file__, sources), given.out / "varlen.json", cases, row_of, line_of, given.deadline)


if __name__ == "__main__":
    main()
