"""compute-sanitizer around a few small calls of the subject: out-of-bounds accesses and shared-memory races.

NVIDIA compute-sanitizer, tools memcheck and racecheck. It runs the subject in a process of its own,
`python -m fasim.kernels.validation --exercise NAME`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .check import Fault, MissingTool, Trial

if TYPE_CHECKING:
    from .bench import Bench

TOOLS = {"memcheck": "accesses out of bounds", "racecheck": "races in shared memory"}
NAMES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64", "float8_e4m3fn": "e4m3"}
_SEARCHED = ("/usr/local/cuda/bin",)
_TIMEOUT_S = 540
KEPT = 20
"""Complaints of a tool that a report keeps, each with all that the tool says of it, addresses and blocks and frames."""
_COMPLAINT = re.compile(r"Invalid|Error|Warning|Race|Program hit")


def find() -> str | None:
    """Path of compute-sanitizer, or None."""
    return shutil.which("compute-sanitizer") or next(
        (path for folder in _SEARCHED if (path := shutil.which("compute-sanitizer", path=folder))), None
    )


def require() -> str:
    """Path of compute-sanitizer; raises MissingTool where it is not installed."""
    found = find()
    if not found:
        raise MissingTool("--sanitize needs compute-sanitizer, which is not on the PATH: it comes with the CUDA toolkit")
    return found


def trials(bench: Bench, kind: str = "dense") -> list[Trial]:
    """One trial per tool."""
    return [Trial(f"{tool}: {what}", lambda tool=tool: _run(bench, tool, kind)) for tool, what in TOOLS.items()]


def command(tool: str, subject: str, dtype: str, seed: int, kind: str = "dense") -> list[str]:
    """The command line that exercises `subject`, a kernel of that kind, under `tool`."""
    exercise = [sys.executable, "-m", "fasim.kernels.validation", "--exercise", subject]
    return [require(), "--tool", tool, "--error-exitcode", "86", *exercise, "--kind", kind, "--dtype", dtype, "--seed", str(seed)]


def _run(bench: Bench, tool: str, kind: str) -> dict:
    dtype = NAMES[str(bench.dtype).removeprefix("torch.")]
    path = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command(tool, bench.subject.name, dtype, bench.seed, kind),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            env=environment,
        )
    except subprocess.TimeoutExpired as error:
        raise Fault(f"{tool} did not end within {_TIMEOUT_S} s") from error
    return read(tool, done.stdout + done.stderr, done.returncode)


def read(tool: str, text: str, status: int) -> dict:
    """What the tool said: figures where it found nothing, otherwise a Fault with its first complaint, and with all that differ.

    Raises MissingTool where the tool itself could not work on this device.
    """
    summary = re.search(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", text)
    if "Device not supported" in text or summary is None:
        last = next((line for line in reversed(text.strip().splitlines()) if line.strip()), "no output")
        raise MissingTool(f"compute-sanitizer {tool} could not run here: {last.strip('= ')}")
    count = int(summary[1] or summary[2])
    if count or status:
        found = complaints(text)
        said = found[0][0] if found else f"exit status {status}"
        every = "\n".join("\n  ".join(lines) for lines in found[:KEPT])
        more = f"\nand {len(found) - KEPT} others" if len(found) > KEPT else ""
        raise Fault(f"{tool} reports {count} errors; the first: {said}" + (f"\n{every}{more}" if every != said else ""))
    return {"errors": 0}


def complaints(text: str) -> list[list[str]]:
    """The complaints of a tool in its words, a line each and those indented under it; of the same ones the first."""
    found: list[list[str]] = []
    belongs = False  # whether what is indented does so to a complaint
    for line in re.findall(r"^========= ?(.*)$", text, re.MULTILINE):
        if not line.startswith(" "):
            belongs = bool(_COMPLAINT.match(line))
            found += [[line]] if belongs else []
        elif belongs and line.strip():
            found[-1].append(line.strip())
    return [lines for place, lines in enumerate(found) if lines not in found[:place]]
