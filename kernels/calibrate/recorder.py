"""All microbenchmarks, one process each, into one folder of recordings."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ...simulator.errors import UsageError
from ..measure import counters
from ..measure.runs import require_gpu
from ..validation.check import MissingTool

BENCHMARKS = (
    "tensor_cores", "tensor_cores_8bit", "pipes", "softmax", "contention", "running", "pipes_contended", "two_warps", "switching",
    "pace", "chains", "branches", "fetch", "fetch_mixes", "fetch_jumps", "mma_sync", "fp8_accumulation", "memory", "l2_capacity",
    "fp8_rates", "l2_sets", "loaded", "reduce_add", "beside_stores", "load_behind_stores", "shared_operands", "addresses_contended",
    "launch", "launch_counted", "power",
)  # fmt: skip
"""In the order they run; power last, since it heats the board."""
TIMEOUT_S = 600


def record(out: Path, only: Sequence[str] = (), advance: Callable[[int, int, str], None] | None = None) -> None:
    """Run the microbenchmarks (or `only` these) on this machine's Hopper GPU; each writes `out`/NAME.json.

    Raises UsageError for an unknown name or a benchmark that fails, MissingTool for what this machine lacks, before
    anything has run.
    """
    if unknown := sorted(set(only) - set(BENCHMARKS)):
        raise UsageError(f"no microbenchmark is called {unknown[0]!r} ({', '.join(BENCHMARKS)})")
    chosen = [name for name in BENCHMARKS if name in (only or BENCHMARKS)]
    require(chosen)
    for done, name in enumerate(chosen):
        if advance:
            advance(done, len(chosen), name)
        command = [sys.executable, "-m", f"{__package__}.{name}", "--out", str(out)]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise UsageError(f"microbenchmark {name} did not end within {TIMEOUT_S} s") from None
        if ran.returncode:
            last = next((line for line in reversed(ran.stderr.strip().splitlines()) if line.strip()), "no output")
            raise UsageError(f"microbenchmark {name} failed: {last.strip()}")


def require(chosen: Sequence[str] = BENCHMARKS) -> None:
    """Raise MissingTool, one sentence, for what this machine lacks."""
    require_gpu()
    import torch

    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        name = torch.cuda.get_device_name()
        raise MissingTool(f"the microbenchmarks are for compute capability 9.0 and {name} has {capability[0]}.{capability[1]}")
    for module, package in (("cuda.core", "cuda-core"), ("pynvml", "nvidia-ml-py")):
        try:
            missing = importlib.util.find_spec(module) is None
        except ModuleNotFoundError:
            missing = True
        if missing:
            raise MissingTool(f"the microbenchmarks need {package}, which is not installed: pip install 'fasim[kernels]'")
    if {"l2_capacity", "l2_sets", "loaded", "reduce_add", "launch_counted", "power"} & set(chosen):
        counters.require()
