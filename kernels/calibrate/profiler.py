"""Hardware counters of a benchmark's launches: the benchmark runs itself again under Nsight Compute."""

import csv
import io
import os
import shutil
import subprocess
import sys

UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


def counters(module, child, kernel, metrics):
    """A {metric: value in base units} per launch of `kernel` by `module`, which sees the variable `child` set.

    Raises FileNotFoundError without ncu, and CalledProcessError where the child fails.
    """
    tool = shutil.which("ncu")
    if tool is None:
        raise FileNotFoundError("ncu (Nsight Compute) is not on the path")
    command = [tool, "--clock-control", "none", "--csv", "--page", "raw", "--kernel-name", kernel]
    command += ["--metrics", ",".join(metrics), sys.executable, "-m", module, "--out", os.devnull]
    done = subprocess.run(command, env=os.environ | {child: "1"}, capture_output=True, text=True, check=True)
    units, *rows = csv.DictReader(io.StringIO(done.stdout[done.stdout.index('"ID"') :]))
    return [{m: float(row[m].replace(",", "")) * UNITS.get(units[m], 1) for m in metrics} for row in rows]
