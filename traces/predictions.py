"""Predictions kept between calls, so that tables of hundreds of them are there in seconds the second time.

Each is a run file, without its spans, whose name is a hash of all that the prediction follows from: the simulator's
sources, the device's fields, workload, tile, schedule, clock. A changed source asks anew, and what is old is never found
again. The folder can be deleted at any time; one that is damaged or cannot be written costs time, not the answer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from ..simulator.devices.device import FIELDS, Device, load_device
from ..simulator.errors import UsageError
from ..simulator.problem.tile import Tile
from ..simulator.problem.workload import Workload
from ..simulator.results.run import SPAN, Run
from ..simulator.schedules import is_compiled
from ..simulator.schedules.own import is_own
from . import store
from .files import cache_folder
from .workers import spawned

MAX_KEPT = 4000
"""Predictions in the folder, some 6 kB each; beyond it the oldest are deleted."""
MAX_PROCESSES = 8
"""Each holds a compiled engine and one workload's traffic."""
Advance = Callable[[int, int, str], None]
Predict = Callable[..., Run]


@dataclass(frozen=True)
class Question:
    """What `simulator.predict.predict` is asked, in its own words."""

    workload: Workload
    schedule: str = "fa3"
    device: str | Device = "h100-sxm"
    tile: Tile | None = None
    clock_hz: float | None = None
    regime: str = "sustained"
    why: bool = False

    def asked(self) -> dict:
        """The arguments by name."""
        return dict(vars(self))

    @property
    def name(self) -> str:
        """For a progress bar."""
        return f"{self.schedule}, {self.workload}"


def predict_cached(question: Question, advance: Advance | None = None) -> Run:
    """The prediction without its spans: looked up, or made and kept. Raises UsageError as predict does."""
    return predict_all([question], advance=advance)[question]


def predict_all(
    questions: Iterable[Question], predict: Predict | None = None, advance: Advance | None = None, processes: int = 1
) -> dict[Question, Run]:
    """The prediction of every question, without spans: looked up, or made and kept, in that many processes.

    `predict` takes the place of looking up and simulating; `advance` hears how many are done, of how many, and what comes
    next. Raises UsageError as predict does.
    """
    wanted = list(dict.fromkeys(questions))
    tell = advance or (lambda done, total, what: None)
    if predict is not None:
        return {each: predict(**each.asked()) for each in wanted}
    found = {each: _kept(each) for each in wanted}
    missing = [each for each, run in found.items() if run is None]
    if not missing:
        return found
    from ..simulator.compiling import COMPILES, heard

    def count() -> int:
        return sum(run is not None for run in found.values())

    def make(question: Question) -> None:
        tell(count(), len(wanted), question.name)
        found[question] = _made(question)

    with heard(lambda: tell(count(), len(wanted), COMPILES)):
        make(missing[0])
        if processes > 1 and len(missing) > 4 * processes:
            with suppress(OSError, BrokenProcessPool):  # no further process to be had: the rest is made here
                for question, run in _in_processes(missing[1:], processes):
                    found[question] = run
                    tell(count(), len(wanted), question.name)
        for question in missing:
            if found[question] is None:
                make(question)
    return found


def processes() -> int:
    """How many processes are worth while here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_PROCESSES)


# -- making -----------------------------------------------------------------------------------------------------------


def _made(question: Question) -> Run:
    from ..simulator.predict import predict

    run = replace(predict(**question.asked()), lanes=(), labels=(), spans=np.zeros(0, SPAN), sample=None)
    _keep(question, run)
    return run


def _in_processes(missing: Sequence[Question], processes: int) -> Iterator[tuple[Question, Run]]:
    with spawned(processes) as pool:
        asked = {pool.submit(_made, question): question for question in missing}
        for each in as_completed(asked):
            yield asked[each], each.result()


# -- keeping ----------------------------------------------------------------------------------------------------------


def _kept(question: Question) -> Run | None:
    path = _place(question)
    if path is None or not os.path.exists(path):  # pathlib's would raise where the folder is closed to this user
        return None
    try:
        run = store.load(path)
    except UsageError:
        return None
    return run if (run.workload, run.schedule) == (question.workload, question.schedule) else None


def _keep(question: Question, run: Run) -> None:
    path = _place(question)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        store.save(run, path)
        _delete_the_oldest(path.parent)
    except (UsageError, OSError):
        pass  # next time it is made again


def _delete_the_oldest(folder: Path) -> None:
    kept = list(folder.iterdir())
    if len(kept) > MAX_KEPT:
        for path in sorted(kept, key=lambda each: each.stat().st_mtime)[: len(kept) - MAX_KEPT * 3 // 4]:
            path.unlink(missing_ok=True)


def _place(question: Question) -> Path | None:
    folder = cache_folder("predictions")
    if folder is None or is_own(question.schedule) or is_compiled(question.schedule):  # a user's file may have changed
        return None
    device = question.device if isinstance(question.device, Device) else load_device(question.device)
    asked = vars(question) | {
        "workload": question.workload.to_dict(),
        "device": {name: getattr(device, name) for name in FIELDS},
        "tile": question.tile and asdict(question.tile),
    }
    text = json.dumps([simulator_hash(), asked], sort_keys=True)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()}.run.json"


@cache
def simulator_hash() -> str:
    """SHA-256 of the simulator's sources and of the versions of what it computes with."""
    room = Path(store.__file__).parents[1] / "simulator"
    found = hashlib.sha256()
    for path in sorted(room.rglob("*.py")):
        found.update(path.relative_to(room).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    for package in ("numba", "numpy"):
        try:
            found.update(f"{package} {version(package)}".encode())
        except PackageNotFoundError:
            found.update(package.encode())
    return found.hexdigest()
