"""Our forward schedules beside each other: `python -m fasim.kernels.measure.beside_schedules --out DIR`.

Microseconds of a call in a replayed CUDA graph, the median of rounds in which the schedules take turns with a rest between, random
normal bf16, 16k tokens, hidden size 2048. What "auto" takes by shape (`kernels/cuda/fastest.py`) is held to it. Writes
schedules.json; the table goes to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import ops
from ..compile import build
from ..cuda import config
from .beside_decode import graph_of, in_turns, version_of

SCHEMA = "fasim.schedule-times/1"
HERE = Path(ops.__file__).parent
TOKENS, HIDDEN = 16 << 10, 2048
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
ROUNDS = 9


def row_of(head_dim: int, length: int, causal: bool) -> dict:
    """Every schedule's microseconds on one shape."""
    shape = (TOKENS // length, length, HIDDEN // head_dim, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def call(name: str) -> tuple:
        return graph_of(lambda _: ops.flash_attn_func(q, k, v, causal=causal, schedule=name), 1)

    graphs = {name: call(name) for name in config.SCHEDULES}
    us = in_turns(graphs, ROUNDS, rest_s=0.01)
    return {"head_dim": head_dim, "seqlen": length, "causal": causal, "batch": shape[0], "heads": shape[2], "us": us}


def report() -> Iterator[dict]:
    """The report as it grows, after every row."""
    torch.manual_seed(0)
    import pynvml

    pynvml.nvmlInit()
    build.build_all([each.source for each in config.variants() if each.dtype == "bf16"])
    sources = sorted((HERE / "cuda").glob("*.cu*"))
    result = {
        "schema": SCHEMA,
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "cuda": torch.version.cuda,
        "packages": {name: version_of(name) for name in ("torch", "triton")},
        "source": "kernels/measure/beside_schedules.py",
        "source_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "kernel_sha256": {str(path.relative_to(HERE.parent)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sources},
        "rows": [],
    }
    for head_dim in config.HEAD_DIMS:
        for causal in (False, True):
            for length in LENGTHS:
                result["rows"].append(row_of(head_dim, length, causal))
                sys.stderr.write(line_of(result["rows"][-1]) + "\n")
                yield result


def line_of(row: dict) -> str:
    """One row as a line: how much longer than the fastest each schedule takes."""
    least = min(row["us"].values())
    mask = "causal" if row["causal"] else "full"
    cells = [f"{name} {us:.1f} (+{100 * (us / least - 1):.1f} %)" for name, us in row["us"].items()]
    return f"d{row['head_dim']} {row['seqlen']} {mask}: {', '.join(cells)}"


def main() -> None:
    """Measure, write DIR/schedules.json as it grows, show the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for schedules.json")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for result in report():
        (given.out / "schedules.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write("\n".join(line_of(row) for row in result["rows"]) + "\n")


if __name__ == "__main__":
    main()
