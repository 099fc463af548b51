"""Hardware counters of a benchmark's launches: the benchmark runs itself again under Nsight Compute."""

import os
import subprocess
import sys

from ...traces.nsight import parse
from ..measure.counters import require


def counters(module, child, kernel, metrics, value="1", cache="all"):
    """A {metric: value in base units} per launch of `kernel` (or regex:...) by `module`, which sees the variable `child` set.

    `cache` "none" leaves L2 as it is between launches. Raises MissingTool without ncu, CalledProcessError where the child fails.
    """
    command = [require(), "--clock-control", "none", "--cache-control", cache, "--csv", "--page", "raw", "--kernel-name", kernel]
    command += ["--metrics", ",".join(metrics), sys.executable, "-m", module, "--out", os.devnull]
    done = subprocess.run(command, env=os.environ | {child: value}, capture_output=True, text=True, check=True)
    return [{metric: launch.metrics[metric] for metric in metrics} for launch in parse(done.stdout)]
