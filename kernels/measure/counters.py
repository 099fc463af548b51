"""Hardware counters: calls of kernels in a process of their own under Nsight Compute, many to one process.

ncu repeats each kernel until every metric is read, emptying L2 before each pass and leaving the clock alone. The child
(`python -m fasim.kernels.measure --child PLAN`) launches, for each entry of the plan, a marker kernel and then the call;
the markers part the rows of ncu's table. The forward of our CUDA kernels is one kernel a call: a plan of these alone needs no
markers, but for a call that fails, in whose place one stands.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from ...simulator.errors import UsageError
from ...traces import nsight
from ...traces.nsight import Profiled
from ..cuda.config import SCHEDULES
from ..validation.check import MissingTool

MARKER = "spin_kernel"
"""torch.cuda._sleep's kernel."""
START_S, ENTRY_S = 120, 12
"""Time that ncu is given: to start with a plan's library, and for each entry, which it repeats a few times."""
_SEARCHED = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute")
_PERMISSION = "ERR_NVGPUCTRPERM"


def find() -> str | None:
    """Path of ncu, or None."""
    return shutil.which("ncu") or next((path for each in _SEARCHED if (path := shutil.which("ncu", path=each))), None)


def require() -> str:
    """Path of ncu; raises MissingTool where it is not installed."""
    found = find()
    if found is None:
        raise MissingTool(
            "counters need Nsight Compute, and no ncu is on the PATH: install the package nsight-compute of NVIDIA's CUDA"
            " repository, or the CUDA toolkit"
        )
    return found


def profile(plan: Sequence[dict]) -> list[list[Profiled]]:
    """The kernels of one call of each entry ({"kernel": name, "workload": Workload.to_dict()}), in the plan's order.

    An entry that could not run has none. Raises MissingTool without ncu or the permission to read counters, UsageError
    with ncu's complaint for anything else.
    """
    ncu = require()
    with tempfile.TemporaryDirectory(prefix="fasim-ncu-") as folder:
        listed, log = Path(folder) / "plan.json", Path(folder) / "ncu.csv"
        listed.write_text(json.dumps(list(plan)), encoding="utf-8")
        asked = [*command(ncu, log, list(known_metrics(ncu))), *child(listed)]
        done = _run(asked, START_S + ENTRY_S * len(plan))
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    if kept := os.environ.get("FASIM_KEEP_NCU_LOG"):
        with Path(kept).open("a", encoding="utf-8") as file:
            file.write(text + done.stderr)
    said = done.stdout + done.stderr
    if _PERMISSION in text + said:
        raise MissingTool(
            "this user may not read the GPU's counters (ERR_NVGPUCTRPERM): run as root, or load the nvidia module with"
            " NVreg_RestrictProfilingToAdminUsers=0"
        )
    if done.returncode and '"ID"' not in text:
        raise UsageError(f"ncu failed with status {done.returncode}: {nsight.complaint(text + done.stderr)}")
    return part(nsight.parse(text), len(plan), marked(plan))


def marked(plan: Sequence[dict]) -> bool:
    """Whether a marker goes before every call."""
    several = [entry.get("workload", {}) for entry in plan]
    more = any(work.get("direction") == "backward" or work.get("lengths") for work in several)
    return more or any(entry["kernel"] not in SCHEDULES for entry in plan)


def command(ncu: str, log: Path, metrics: Sequence[str]) -> list[str]:
    """ncu's command line up to the program."""
    return [
        ncu, "--target-processes", "application-only", "--clock-control", "none", "--profile-from-start", "off",
        "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log), "--metrics", ",".join(metrics),
    ]  # fmt: skip


def child(plan: Path) -> list[str]:
    """The profiled program."""
    return [sys.executable, "-m", __package__, "--child", str(plan)]


@lru_cache(maxsize=1)
def known_metrics(ncu: str) -> tuple[str, ...]:
    """The metrics to ask for: the needed ones, and those welcome that this ncu lists for this GPU."""
    listed = _run([ncu, "--query-metrics"], START_S).stdout
    listed += _run([ncu, "--query-metrics-collection", "launch", "--query-metrics"], START_S).stdout
    names = set(re.findall(r"^(\w+__\w+)\s", listed, re.MULTILINE))
    welcome = (name for name in nsight.WELCOME + nsight.LAUNCH if name.partition(".")[0] in names)
    return (*nsight.NEEDED, *welcome)


def part(kernels: Sequence[Profiled], count: int, marked: bool = True) -> list[list[Profiled]]:
    """The kernels of each of `count` calls, none for those after the program's early end.

    Raises UsageError where it ended before the first, and where the rows do not fit the plan.
    """
    groups: list[list[Profiled]] = []
    for kernel in kernels:
        if MARKER in kernel.name:
            groups.append([])
        elif not marked:
            groups.append([kernel])
        elif groups:
            groups[-1].append(kernel)
    if not groups:
        raise UsageError(f"Nsight Compute profiled none of {count} calls: the profiled program ended early")
    if len(groups) > count:
        raise UsageError(f"Nsight Compute profiled {len(groups)} calls where {count} were asked for")
    return groups + [[] for _ in range(count - len(groups))]


def _run(command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess:
    """A program's output; what it started ends with it, since a kernel left behind would disturb what is timed next."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        try:
            said, complained = process.communicate(timeout=timeout_s)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise UsageError(f"ncu did not end within {timeout_s:g} s; measure fewer workloads at a time") from None
            raise
    return subprocess.CompletedProcess(command, process.returncode, said, complained)
