"""Recorded runs of ours that are no longer of today's kernel, measured again: `python -m fasim.kernels.measure.renew --out DIR`.

A run is stale where a file of its kernel has changed since, and the machine code with it, or where the kernel takes another tile
by now. Each is taken again as it was: regime, L2, counters or the in-kernel trace. DIR gets a folder for each that is read (runs,
blind, timelines), to be copied over it. `--list` only says which they are and needs no GPU.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from ...simulator.results.run import Run
from ...traces import store
from ..cuda.config import DTYPES, SCHEDULES, config_for
from . import earlier
from .names import tile_of
from .plan import Entry

FOLDERS = (store.RECORDED, store.BLIND, store.TIMELINES)
SECONDS = 0.5
"""Of load before and under a sustained run, as the recorded ones had."""


def stale(run: Run) -> list[str]:
    """What of the run's kernel is not as it was recorded: "tile", or files that make other machine code by now."""
    if run.tile and run.tile != tile_of(run.schedule, run.workload):
        return ["tile"]
    changed = [path for path, digest in run.measurement.sources.items() if earlier.sha256(path) != digest]
    if run.schedule not in SCHEDULES or run.workload.dtype not in DTYPES or run.workload.backward:
        return changed
    w, traced = run.workload, bool(len(run.spans))
    kernels = [config_for(run.schedule, w.dtype, w.head_dim, w.causal, trace) for trace in {False, traced}]
    return [path for path in changed if not all(earlier.stands(path, run.measurement.sources[path], each) for each in kernels)]


def how(run: Run) -> tuple[bool, bool, str, str]:
    """(timeline, counters, regime, L2) with which it was taken."""
    taken = run.measurement
    return bool(len(run.spans)), bool(taken.counters), taken.regime, taken.l2


def found(folders: Sequence[Path]) -> list[tuple[Path, Run]]:
    """The stale runs of some folders, timelines first, then those on another tile."""
    runs = [(folder, run, stale(run)) for folder in folders for run in store.load_folder(folder).values()]
    runs = [each for each in runs if each[2]]
    return [each[:2] for each in sorted(runs, key=lambda each: (not how(each[1])[0], how(each[1]), "tile" not in each[2]))]


def main() -> int:
    """0 where every run that was asked for was taken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*", default=FOLDERS, help="recorded runs (default: all of ours)")
    parser.add_argument("--out", type=Path, help="folder for the new runs")
    parser.add_argument("--list", action="store_true", help="only say which are stale, and why")
    parser.add_argument("--share", default="0/1", help="I/N: every N-th from the I-th on, where several GPUs share the work")
    parser.add_argument("--deadline", type=float, default=math.inf, help="take no run behind so many seconds")
    given = parser.parse_args()
    number, of = map(int, given.share.split("/"))
    runs = found(given.folders)[number::of]
    if given.list:
        for folder, run in runs:
            sys.stdout.write(f"{folder.name}: {run.schedule}, {run.workload}: {', '.join(stale(run))}\n")
        return 0
    if not given.out:
        parser.error("--out is where the new runs go")
    return _take(runs, given.out, given.deadline)


def _take(runs: Sequence[tuple[Path, Run]], out: Path, deadline_s: float) -> int:
    from .runs import Refused, measure_all, summary

    began, status = time.monotonic(), 0
    for (timeline, counters, regime, l2), group in groupby(runs, key=lambda each: how(each[1])):
        chosen = list(group)
        plan = [Entry(run.schedule, run.workload) for _, run in chosen]
        settings = {"timeline": timeline, "counters": counters, "regime": regime, "l2": l2, "seconds": SECONDS}
        if time.monotonic() - began > deadline_s:
            return 1
        for (folder, _), taken in zip(chosen, measure_all(plan, **settings), strict=True):
            if isinstance(taken, Refused):
                sys.stdout.write(f"{taken.entry.kernel}, {taken.entry.workload}: {taken.reason}\n")
                status = 1
            else:
                (out / folder.name).mkdir(parents=True, exist_ok=True)
                store.save(taken, out / folder.name / store.file_name(taken))
                sys.stdout.write(f"{folder.name}: {summary(taken)}\n")
            sys.stdout.flush()
            if time.monotonic() - began > deadline_s:
                return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
