"""Few queries against long caches, beside FlashAttention-3: `python -m fasim.kernels.measure.beside_decode --out DIR`.

Microseconds of a call in a replayed CUDA graph, the median of rounds in which the kernels take turns, on random normal bf16
data in buffers that together exceed L2 several times; TB/s are the bytes of K and V alone. Each kernel's O is first held to
the fp64 oracle on two K/V heads. A sweep over parts, tiles and stages follows, which is what the rule of `decode/splits.py`
was checked by. Writes decode.json; the table goes to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .. import ops, reference
from ..decode import kernel, splits
from ..triton.tiles import TritonTile
from . import record
from .record import output_of

SCHEMA = "fasim.decode-times/1"
HERE = Path(ops.__file__).parent
ROUNDS = 7
GRAPH_S = 0.004
"""A graph holds as many calls as take about so long, 100 at most."""
COLD_BYTES = 256 << 20
"""Of the buffers that calls go through in turn: four times an H200's L2."""
DEADLINE_S = 50
"""After so many seconds no further line of the sweep is begun."""


@dataclass(frozen=True)
class Shape:
    """Query rows against a cache, in bf16."""

    batch: int
    keys: int
    head_dim: int = 128
    heads: int = 32
    kv_heads: int = 8
    queries: int = 1
    causal: bool = False

    @property
    def cache_elements(self) -> int:
        """Of K, and as many of V."""
        return self.batch * self.keys * self.kv_heads * self.head_dim

    @property
    def cache_bytes(self) -> int:
        """Of K and V."""
        return 4 * self.cache_elements


ISSUE = [Shape(batch, keys << 10) for batch in (1, 8, 64) for keys in (4, 32, 128)]
OTHER_DIMS = [Shape(8, 32 << 10, head_dim) for head_dim in (64, 256)]
EDGES = [
    Shape(1, 512), Shape(1, 2048), Shape(64, 128), Shape(64, 512),  # few bytes
    Shape(64, 4096, heads=8), Shape(1, 32 << 10, heads=8),  # no heads to pack
    Shape(8, 4096, queries=4, causal=True), Shape(8, 4096, queries=16, causal=True), Shape(64, 4096, queries=16, causal=True),
]  # fmt: skip
"""Where "auto" changes from one kernel to the other: both are timed."""
# query rows of a K/V head: the shapes swept, and tiles: rows, keys, warps, stages, by tensor descriptor
SWEPT = {
    4: ([Shape(1, 4 << 10), Shape(1, 32 << 10), Shape(8, 4 << 10)],
        [(16, 64, 4, 4, 0), (16, 64, 4, 3, 0), (16, 64, 4, 4, 1), (16, 128, 4, 3, 1)]),
    64: ([EDGES[-1]],
         [(64, 64, 8, 3, 0), (64, 64, 4, 3, 0), (64, 64, 4, 2, 0), (64, 128, 8, 2, 0), (32, 64, 4, 4, 0), (64, 64, 4, 3, 1)]),
}  # fmt: skip

Call = Callable[[int], torch.Tensor]


class Caches:
    """One flat K and one flat V, made once, that every shape is a view of."""

    def __init__(self, elements: int) -> None:
        self.flat = [torch.empty(elements, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        for flat in self.flat:
            for piece in flat.split(1 << 28):
                piece.normal_()

    def sets(self, shape: Shape) -> list[tuple[torch.Tensor, ...]]:
        """(q, k, v) as often as makes COLD_BYTES, where that often fits."""
        count = max(1, min(-(-COLD_BYTES // shape.cache_bytes), self.flat[0].numel() // shape.cache_elements))
        size = (shape.batch, shape.keys, shape.kv_heads, shape.head_dim)
        found = []
        for i in range(count):
            k, v = (flat[i * shape.cache_elements : (i + 1) * shape.cache_elements].view(size) for flat in self.flat)
            q = torch.randn(shape.batch, shape.queries, shape.heads, shape.head_dim, device="cuda").bfloat16()
            found.append((q, k, v))
        return found


def calls_of(shape: Shape, sets: list[tuple[torch.Tensor, ...]]) -> dict[str, Call]:
    """The kernels of a row by name, each a function of the number of the buffer set."""

    def ours(**given) -> Call:
        return lambda i: ops.flash_attn_func(*sets[i], causal=shape.causal, **given)

    calls = {"fasim": ours(), "fasim-decode": lambda i: decoded(shape, sets[i]), "fasim-fa3": ours(schedule="fa3")}
    try:
        import fa3_fwd_interface as fa3
    except ImportError:
        return calls
    lengths = torch.full((shape.batch,), shape.keys, dtype=torch.int32, device="cuda")
    calls["fa3"] = lambda i: output_of(fa3.flash_attn_func(*sets[i], causal=shape.causal))
    calls["fa3-kvcache"] = lambda i: output_of(fa3.flash_attn_with_kvcache(*sets[i], cache_seqlens=lengths, causal=shape.causal))
    return calls


def decoded(shape: Shape, tensors: tuple[torch.Tensor, ...], **given) -> torch.Tensor:
    """O by the decode kernel, with a tile or parts of one's own."""
    return kernel.forward(*tensors, shape.head_dim**-0.5, shape.causal, **given)[0]


def error_of(o: torch.Tensor, shape: Shape, tensors: tuple[torch.Tensor, ...]) -> float:
    """Largest relative error against fp64, over the first K/V head of the first entry and the last of the last."""
    q, k, v = tensors
    group, worst = shape.heads // shape.kv_heads, 0.0
    for entry, head in ((0, 0), (shape.batch - 1, shape.kv_heads - 1)):
        heads = slice(head * group, (head + 1) * group)
        part = q[entry : entry + 1, :, heads], *(x[entry : entry + 1, :, head : head + 1] for x in (k, v))
        expected = reference.attention_forward(*part, causal=shape.causal).o
        error = float((o[entry : entry + 1, :, heads].double() - expected).norm() / expected.norm())
        worst = max(worst, error) if error == error else float("inf")
    return worst


def graph_of(call: Call, sets: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of many calls through the buffers in turn, and how many."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call(0)
    begin.record()
    call(sets - 1)
    end.record()
    end.synchronize()
    count = max(1, min(100, round(GRAPH_S * 1000 / begin.elapsed_time(end))))
    count = -(-max(count, 4) // sets) * sets if sets < 100 else 100
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i % sets)
    graph.replay()
    return graph, count


def in_turns(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], rounds: int = ROUNDS, rest_s: float = 0.0) -> dict[str, float]:
    """Microseconds of a call of each graph, the median over rounds in shuffled turns, the GPU at rest before each."""
    readings = {name: [] for name in graphs}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(graphs), len(graphs)):
            graph, count = graphs[name]
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            time.sleep(rest_s)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            readings[name].append(begin.elapsed_time(end) * 1000 / count)
    return {name: round(statistics.median(each), 2) for name, each in readings.items()}


def row_of(shape: Shape, caches: Caches) -> dict:
    """Every kernel of a shape: error, microseconds and TB/s, or why not."""
    sets = caches.sets(shape)
    found, graphs = {}, {}
    for name, call in calls_of(shape, sets).items():
        try:
            found[name] = {"relative_error": error_of(call(0), shape, sets[0])}
            graphs[name] = graph_of(call, len(sets))
        except Exception as error:  # a peer that refuses a shape is a finding
            found[name] = {"refused": f"{type(error).__name__}: {error}"[:300]}
    for name, us in in_turns(graphs).items():
        found[name] |= {"us": us, "tb_per_s": round(shape.cache_bytes / us / 1e6, 3)}
    return {**asdict(shape), "buffers": len(sets), "parts": chosen(shape), "kernels": found}


def chosen(shape: Shape, tile: TritonTile | None = None) -> int:
    """The rule's number of parts, on this device."""
    rows = shape.queries * shape.heads // shape.kv_heads
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    if tile is None:
        return splits.choose(shape.head_dim, rows, shape.batch * shape.kv_heads, shape.keys, sms).parts
    tiles = shape.batch * shape.kv_heads * -(-rows // tile.block_m)
    return splits.splits_for(tiles, -(-shape.keys // tile.block_n), sms)


def sweep(shape: Shape, tiles: list[tuple], caches: Caches) -> dict:
    """Microseconds of every tile in the rule's number of parts for it, and in fewer and more."""
    sets, lines = caches.sets(shape), []
    for height, keys, warps, stages, described in tiles:
        if time.monotonic() - record.STARTED > DEADLINE_S:
            break
        tile = TritonTile(height, keys, warps, stages, tensor_descriptors=bool(described))
        rule, most = chosen(shape, tile), -(-shape.keys // keys)
        line = {
            "rows": height,
            "keys": keys,
            "warps": warps,
            "stages": stages,
            "tensor_descriptors": bool(described),
            "rule": rule,
            "us": {},
        }
        for parts in sorted({max(1, min(most, splits.MAX_SPLITS, round(rule * f))) for f in (0.5, 0.75, 1, 1.5, 2)}):
            try:
                call = _swept(shape, sets, parts, tile, None)
                line["us"][parts] = in_turns({"": graph_of(call, len(sets))}, 3)[""]
            except Exception as error:
                line["refused"] = f"{type(error).__name__}: {error}"[:200]
                break
        lines.append(line)
        sys.stderr.write(f"{label(shape)}  {line}\n")
    late = {}
    for name, early in (("early", True), ("late", False)):
        late[name] = graph_of(_swept(shape, sets, max(2, chosen(shape)), None, early), len(sets))
    return {**asdict(shape), "lines": lines, "combine_launched": in_turns(late)}


def _swept(shape: Shape, sets: list, parts: int, tile: TritonTile | None, early: bool | None) -> Call:
    return lambda i: decoded(shape, sets[i], num_splits=parts, tile=tile, early=early)


def eager(caches: Caches) -> dict[str, float]:
    """Microseconds from call to call without a graph, the host's work among them: batch 1 against 4k keys."""
    shape = ISSUE[0]
    sets = caches.sets(shape)
    found = {}
    for name, call in calls_of(shape, sets).items():
        try:
            for i in range(20):
                call(i % len(sets))
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for i in range(300):
                call(i % len(sets))
            torch.cuda.synchronize()
            found[name] = round((time.perf_counter() - begin) / 300 * 1e6, 1)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:200]
    return found


def report() -> Iterator[dict]:
    """The report as it grows: after every row and every sweep."""
    torch.manual_seed(0)
    sources = sorted((HERE / "decode").glob("*.py")) + [HERE / "triton" / f"{name}.py" for name in ("arithmetic", "loads", "tiles")]
    protocol = {"rounds": ROUNDS, "graph_s": GRAPH_S, "cold_bytes": COLD_BYTES, "data": "normal", "statistic": "median"}
    result = record.begun(SCHEMA, __file__, sources) | {"protocol": protocol, "sweeps": []}
    caches = Caches(max(shape.cache_elements for shape in ISSUE))
    for shape in ISSUE + OTHER_DIMS + EDGES:
        result["rows"].append(row_of(shape, caches))
        torch.cuda.empty_cache()
        sys.stderr.write(line_of(result["rows"][-1]) + "\n")
        yield result
    result["eager_us"] = eager(caches)
    for shape, tiles in ((shape, tiles) for shapes, tiles in SWEPT.values() for shape in shapes):
        result["sweeps"].append(sweep(shape, tiles, caches))
        result["seconds"] = round(time.monotonic() - record.STARTED, 1)
        yield result


def label(shape: Shape) -> str:
    """A shape in a few words."""
    mask = " causal" if shape.causal else ""
    return f"{shape.batch:>2} x {shape.queries:>2}/{shape.keys:<6} {shape.heads}/{shape.kv_heads} d{shape.head_dim}{mask}"


def line_of(row: dict) -> str:
    """One row as a line: microseconds (TB/s) of each kernel."""
    shape = Shape(**{name: row[name] for name in Shape.__dataclass_fields__})
    cells = [
        f"{name} {each['us']:.1f} ({each['tb_per_s']:.2f})" if "us" in each else f"{name} {each['refused'][:60]}"
        for name, each in row["kernels"].items()
    ]
    return f"{label(shape):32} in {row['parts']:>3}  " + "  ".join(cells)


def table_of(result: dict) -> str:
    """The rows, then the best of each sweep."""
    lines = [line_of(row) for row in result["rows"]] + [f"eager, us: {result.get('eager_us')}"]
    for found in result["sweeps"]:
        shape = Shape(**{name: found[name] for name in Shape.__dataclass_fields__})
        for line in found["lines"]:
            tile = f"{line['rows']}x{line['keys']}x{line['warps']}x{line['stages']} {'TMA' if line['tensor_descriptors'] else ''}"
            lines.append(f"{label(shape):32} {tile:16} rule {line['rule']}: {line.get('refused') or line['us']}")
        lines.append(f"{label(shape):32} combine {found['combine_launched']}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write DIR/decode.json as it grows, show the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for decode.json")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for result in report():
        (given.out / "decode.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table_of(result))


if __name__ == "__main__":
    main()
