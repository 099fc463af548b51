"""Hardware counters of a benchmark's launches: the benchmark runs itself again under Nsight Compute."""

import csv
import io
import os
import subprocess
import sys

from ..counters import require

UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


def counters(module, child, kernel, metrics, value="1", cache="all"):
    """A {metric: value in base units} per launch of `kernel` (or regex:...) by `module`, which sees the variable `child` set.

    `cache` "none" leaves L2 as it is between launches. Raises MissingTool without ncu, CalledProcessError where the child fails.
    """
    command = [require(), "--clock-control", "none", "--cache-control", cache, "--csv", "--page", "raw", "--kernel-name", kernel]
    command += ["--metrics", ",".join(metrics), sys.executable, "-m", module, "--out", os.devnull]
    done = subprocess.run(command, env=os.environ | {child: value}, capture_output=True, text=True, check=True)
    units, *rows = csv.DictReader(io.StringIO(done.stdout[done.stdout.index('"ID"') :]))
    return [{m: float(row[m].replace(",", "")) * UNITS.get(units[m], 1) for m in metrics} for row in rows]
