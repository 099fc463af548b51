"""Our Triton kernels beside PyTorch's attention on one GPU: `python -m fasim.kernels.measure.beside_triton --out DIR`.

The protocol is that of beside.py, without rests. Writes triton.json; the table goes to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path

import torch

from ...simulator.problem.workload import Workload
from .. import ops
from .beside import BACKENDS, BUFFERS, BURST_S, HIDDEN, SCHEMA, TOKENS, Case, Meter, buffers, calls_of, error_of, in_turns

HERE = Path(ops.__file__).parent
ROUNDS = 20


def cases(quick: bool) -> list[Case]:
    """Forward in fp16, backward in bf16; head_dim 128 at every length, the others at 4k and 16k."""
    chosen = []
    for backward, dtype in ((False, "fp16"), (True, "bf16")):
        for head_dim, lengths in ((128, (4096, 16384) if quick else (1024, 4096, 16384)), (64, (16384,)), (256, (16384,))):
            for seqlen in lengths:
                for causal in (False, True):
                    shape = Workload(TOKENS // seqlen, HIDDEN // head_dim, seqlen, head_dim, dtype, causal)
                    chosen.append(Case(backward, shape))
    return chosen


def run_case(case: Case, meter: Meter) -> list[dict]:
    """Every kernel of one case, in turns; a kernel that cannot run says why."""
    w = case.workload
    sets = buffers(case)
    by_head = [tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors) for tensors in sets]
    names = ["fasim-fa2", *BACKENDS]
    if not case.backward and w.head_dim == 128 and w.seqlen >= 4096:
        names.append("flex")
    rows, calls = {}, {}
    for name in names:
        rows[name] = {"pass": "backward" if case.backward else "forward", **w.to_dict(), "kernel": name}
        try:
            call = calls_of(name, case, by_head if name == "flex" else sets)  # each in its own layout
            rows[name]["relative_error"] = error_of(call, case, sets[0])
            calls[name] = call
        except Exception as error:  # a peer that refuses a shape is a finding
            rows[name]["refused"] = f"{type(error).__name__}: {error}"[:300]
    timed = in_turns(calls, case.flops, meter, ROUNDS, seed=w.seqlen)
    return [row | timed.get(name, {}) for name, row in rows.items()]


def report(quick: bool) -> dict:
    """All cases with their provenance."""
    meter = Meter()
    rows = []
    for case in cases(quick):
        done = run_case(case, meter)
        rows += done
        sys.stderr.write(line_of(done) + "\n")
    sources = [HERE / "ops.py", *sorted((HERE / "triton").glob("*.py"))]
    return {
        "schema": SCHEMA,
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "driver": meter.driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "packages": {name: importlib.metadata.version(name) for name in ("torch", "triton")},
        "protocol": {"rounds": ROUNDS, "burst_s": BURST_S, "buffers": BUFFERS, "data": "normal", "statistic": "median"},
        "source": "kernels/measure/beside_triton.py",
        "source_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "kernel_sha256": {str(path.relative_to(HERE.parent)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sources},
        "rows": rows,
    }


def line_of(rows: list[dict]) -> str:
    """One case as a line: TFLOP/s of each kernel, and ours over each peer."""
    first = rows[0]
    mask = "causal" if first["causal"] else "full"
    head = f"{first['pass']:8} {first['dtype']:4} d{first['head_dim']:<3} {first['seqlen_q']:>6} {mask:6}"
    ours = first.get("tflops")
    cells = []
    for row in rows:
        rate = row.get("tflops")
        ratio = f" ({ours / rate:.2f}x)" if ours and rate and row is not first else ""
        cells.append(f"{row['kernel']} {rate if rate else 'refused'}{ratio}")
    return f"{head}  " + "  ".join(cells)


def table_of(result: dict) -> str:
    """The whole report as text, one line per case."""
    by_case: dict[tuple, list[dict]] = {}
    for row in result["rows"]:
        by_case.setdefault(tuple(row[k] for k in ("pass", "dtype", "head_dim", "seqlen_q", "causal")), []).append(row)
    return "\n".join(line_of(rows) for rows in by_case.values()) + "\n"


def main() -> None:
    """Measure, write DIR/triton.json, show the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for triton.json")
    parser.add_argument("--quick", action="store_true", help="leave out the short lengths")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    result = report(given.quick)
    (given.out / "triton.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table_of(result))


if __name__ == "__main__":
    main()
