"""`python -m fasim.kernels.measure --out DIR --plan PLAN [--counters | --timeline]`: many runs where only torch is installed."""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ...simulator.errors import UsageError
from ...simulator.reading import read_json
from ...simulator.results.run import Run
from ...traces import store
from ..validation.check import MissingTool
from .plan import Entry, read
from .runs import L2_STATES, REGIMES, Refused, complete, launch_for_profiler, measure_all, summary
from .trains import SUSTAINED_S


def main() -> int:
    """Exit status: 0 all measured, 1 one was wrong or refused, 2 usage, 3 no GPU or tool."""
    parser = argparse.ArgumentParser(prog="python -m fasim.kernels.measure", description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path, help="TOML file of [[runs]]")
    parser.add_argument("--out", type=Path, help="folder for the runs")
    parser.add_argument("--counters", action="store_true", help="also count under Nsight Compute")
    parser.add_argument("--timeline", action="store_true", help="measure the build that stamps what it does; keep its spans")
    parser.add_argument("--regime", default="sustained", choices=REGIMES)
    parser.add_argument("--l2", default="cold", choices=L2_STATES)
    parser.add_argument("--seconds", type=float, default=SUSTAINED_S, help="length of a sustained run")
    parser.add_argument("--deadline", type=float, default=math.inf, help="take no run behind so many seconds; --resume goes on")
    parser.add_argument("--resume", action="store_true", help="leave out what --out holds already")
    parser.add_argument("--complete", action="store_true", help="count for the runs in --out that were timed without")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that Nsight Compute ends with this
    try:
        if given.child:
            launch_for_profiler([Entry.from_dict(each) for each in read_json(given.child, "plan")])
            return 0
        if given.complete and given.out:
            return _complete(given.out)
        if not given.plan or not given.out:
            parser.error("give --plan and --out")
        return _take(given)
    except UsageError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except MissingTool as error:
        sys.stderr.write(f"{error}\n")
        return 3


def _take(given: argparse.Namespace) -> int:
    plan = read(given.plan)
    given.out.mkdir(parents=True, exist_ok=True)
    plan = left(plan, given.out) if given.resume else plan
    status, began, remaining = 0, time.monotonic(), len(plan)
    how = {name: getattr(given, name) for name in ("counters", "regime", "l2", "seconds", "timeline")}
    for found in measure_all(plan, **how):
        status |= _kept(found, given.out)
        remaining -= 1
        if remaining and time.monotonic() - began > given.deadline:
            sys.stdout.write(f"{remaining} of {len(plan)} runs are left after {given.deadline:g} seconds; --resume goes on\n")
            return 1
    return status


def _complete(folder: Path) -> int:
    status = 0
    for found in complete([run for run in store.load_folder(folder).values() if not run.measurement.counters]):
        status |= _kept(found, folder)
    return status


def _kept(found: Run | Refused, folder: Path) -> int:
    """Keep a run and say what it is, or why there is none: 0 or 1."""
    if isinstance(found, Refused):
        sys.stdout.write(f"{found.entry.kernel}, {found.entry.workload}: {found.reason}\n")
    else:
        store.save(found, folder / store.file_name(found))
        sys.stdout.write(f"{summary(found)}\n")
    sys.stdout.flush()
    return int(isinstance(found, Refused))


def left(plan: Sequence[Entry], folder: Path) -> list[Entry]:
    """What of a plan a folder of runs does not hold yet."""
    found = store.load_folder(folder).values() if any(folder.glob("*.run.json*")) else ()
    taken = {(run.schedule, run.workload) for run in found}
    return [entry for entry in plan if (entry.kernel, entry.workload) not in taken]


if __name__ == "__main__":
    sys.exit(main())
