"""Where the warps of kernels wait, by Nsight Compute: `python -m fasim.kernels.measure.stalls --out DIR KERNEL ..`.

Of one shape, bf16: cycles, how busy tensor cores and issue slots are, instructions, and for each reason how many warps stall so, on
average, per warp that issues. Writes DIR/stalls.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from ...simulator.problem.workload import Workload
from ...simulator.reading import parse_csv
from .beside_gluon import attention_of

METRICS = {
    "sm__cycles_elapsed.max": "cycles",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": "tensor_pct",
    "smsp__issue_active.avg.pct_of_peak_sustained_elapsed": "issue_pct",
    "smsp__inst_executed.sum": "instructions",
}
REASONS = ("barrier", "branch_resolving", "dispatch_stall", "gmma", "long_scoreboard", "math_pipe_throttle", "membar",
           "mio_throttle", "no_instruction", "not_selected", "short_scoreboard", "sleeping", "wait")  # fmt: skip
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
SECONDS = 60


def workload_of(causal: bool) -> Workload:
    """The shape that is looked at."""
    return Workload(4, 16, 4096, 128, "bf16", causal)


def call(kernels: list[str], causal: bool) -> None:
    """Each kernel once to compile and warm up, then once between two marks: what Nsight Compute is put around."""
    workload = workload_of(causal)
    shape = workload.batch, workload.seqlen_q, workload.heads, workload.head_dim
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    attends = [attention_of(name, workload) for name in kernels]
    for attend in attends:
        attend(q, k, v)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for attend in attends:
        attend(q, k, v)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def read(text: str, kernels: list[str]) -> list[dict]:
    """One row for each kernel: of the launches that the profile has, those that multiplied, in order.

    A reason that this Nsight Compute does not know is left out.
    """
    table = text[text.index('"ID"') :]
    names, _, *launches = parse_csv(table, "the profile")
    found = [dict(zip(names, launch, strict=True)) for launch in launches]
    number = lambda launch, name: float(launch[name].replace(",", ""))  # noqa: E731
    main = [launch for launch in found if number(launch, "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed") > 1]
    return [
        {"kernel": kernel, "entry": launch["Kernel Name"][:200]}
        | {ours: number(launch, name) for name, ours in METRICS.items()}
        | {"stalls": {reason: number(launch, STALL.format(reason)) for reason in REASONS if STALL.format(reason) in launch}}
        for kernel, launch in zip(kernels, main, strict=True)
    ]


def main() -> None:
    """Profile, and write DIR/stalls.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", nargs="+", help="as of `fasim measure`")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for stalls.json [default: here]")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        call(given.kernels, given.causal)
        return
    metrics = ",".join([*METRICS, *map(STALL.format, REASONS)])
    command = [shutil.which("ncu") or "ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    command += ["--metrics", metrics, sys.executable, "-m", "fasim.kernels.measure.stalls", "--inside", *given.kernels]
    command += ["--causal"] * given.causal
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "stalls.csv").write_text(done.stdout, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"Nsight Compute ended with {done.returncode}: {(done.stderr or done.stdout)[-500:]}")
    result = {
        "schema": "fasim.stalls/1",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "workload": str(workload_of(given.causal)),
        "rows": read(done.stdout, given.kernels),
    }
    (given.out / "stalls.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in result["rows"]:
        said = [f"{name} {value:.2f}" for name, value in sorted(row["stalls"].items(), key=lambda item: -item[1])[:5]]
        busy = f"tensor {row['tensor_pct']:.1f} %, issue {row['issue_pct']:.1f} %"
        sys.stdout.write(f"{row['kernel']:22} {row['cycles']:>10,.0f} cycles, {busy}, {', '.join(said)}\n")


if __name__ == "__main__":
    main()
