"""Forward and backward together, as a step of training has them: `python -m fasim.kernels.measure.beside_training --out DIR`.

Ours, FlashAttention-4's for Hopper and cuDNN's through torch.autograd, by beside.py's protocol: shuffled bursts, each after a rest,
on random normal data, medians between CUDA events. The gradients of each are held to the fp64 oracle before. DIR/training.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ...simulator.problem.workload import Workload
from ..backward import READY, SCHEDULES
from ..ops import flash_attn_func
from . import beside, gradients
from .bench import TOLERANCE, largest_error
from .beside_cuda import BURST_S, REST_S
from .names import packages_of

CASES = ((128, 4096, True), (128, 4096, False), (64, 4096, True), (128, 1024, True), (128, 16384, True))
"""(head dim, length, causal), at 16k tokens and hidden size 2048."""
STEP_FLOPS = 1 + beside.FLOPS_BACKWARD


def attentions(workload: Workload, backward: str) -> dict[str, Callable[..., torch.Tensor]]:
    """Name -> O of (q, k, v), differentiable; FlashAttention-4 where its wheel is."""
    ready = READY.get((workload.dtype, workload.head_dim, workload.causal), "fa2")
    chosen = ready if backward == "auto" else backward
    found = {f"fasim-{chosen}": lambda q, k, v: flash_attn_func(q, k, v, causal=workload.causal, backward=backward)}
    try:
        from flash_attn.cute import flash_attn_func as theirs
    except ImportError as error:
        sys.stderr.write(f"without FlashAttention-4: {error}\n")
    else:

        def fa4(q, k, v):
            o = theirs(q, k, v, causal=workload.causal)
            return o[0] if isinstance(o, tuple) else o

        found["peer:fa4"] = fa4
    return found | {"peer:cudnn": beside.attention_of("cudnn", workload)}


def step_of(attend: Callable[..., torch.Tensor], sets: list) -> beside.Call:
    """A call that takes O of buffer set i and its gradients."""
    leaves = [([x.detach().requires_grad_() for x in inputs], do) for *inputs, do in sets]

    def step(i: int) -> tuple[torch.Tensor, ...]:
        inputs, do = leaves[i]
        return torch.autograd.grad(attend(*inputs), inputs, do)

    return step


def main() -> int:
    """Measure, write DIR/training.json, print a line a case; 3 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for training.json")
    parser.add_argument("--backward", choices=("auto", *SCHEDULES), default="auto", help="our backward")
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("no GPU here: it needs an H100 or H200\n")
        return 3
    given.out.mkdir(parents=True, exist_ok=True)
    meter = beside.Meter()
    result = {
        "schema": beside.SCHEMA, "date": datetime.date.today().isoformat(), "device": torch.cuda.get_device_name(),
        "driver": meter.driver(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "packages": packages_of("peer:fa4") | {"torch": torch.__version__}, "source": "kernels/measure/beside_training.py",
        "rows": [],
    }  # fmt: skip
    for head_dim, seqlen, causal in CASES:
        heads, batch = beside.HIDDEN // head_dim, beside.TOKENS // seqlen
        workload = Workload(batch, heads, seqlen, head_dim, "bf16", causal, direction="backward")
        sets = beside.buffers(beside.Case(True, workload))
        right, calls, rows = gradients.expected(sets[0], workload), {}, {}
        for name, attend in attentions(workload, given.backward).items():
            step = step_of(attend, sets)
            rows[name] = {"pass": "both", **workload.to_dict(), "kernel": name}
            error = rows[name]["relative_error"] = largest_error(gradients.compared(step(0), right, workload))
            if error <= TOLERANCE["bf16"]:
                calls[name] = step
        forward = Workload(batch, heads, seqlen, head_dim, "bf16", causal)
        timed = beside.in_turns(calls, STEP_FLOPS * forward.paper_flops, meter, given.rounds, BURST_S, REST_S, seed=seqlen)
        best = max((row["tflops"] for name, row in timed.items() if name.startswith("peer:")), default=None)
        for name, row in timed.items():
            rows[name] |= row | ({} if name.startswith("peer:") or not best else {"vs_best_peer": round(row["tflops"] / best, 4)})
        result["rows"] += rows.values()
        (given.out / "training.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        said = {name: f"{row.get('tflops', 'wrong')} {row.get('vs_best_peer', '')}".strip() for name, row in rows.items()}
        cells = ", ".join(f"{name} {each}" for name, each in said.items())
        sys.stdout.write(f"d{head_dim} {batch}x{heads}x{seqlen} {'causal' if causal else 'full'}: {cells}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
