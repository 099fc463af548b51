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
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

from ..simulator.devices.device import FIELDS, Device, load_device
from ..simulator.errors import UsageError
from ..simulator.problem.tile import Tile
from ..simulator.problem.workload import Workload
from ..simulator.results.run import Run
from ..simulator.schedules import is_compiled
from ..simulator.schedules.own import is_own
from . import store
from .files import cache_folder
from .workers import spawned

MAX_KEPT = 20_000
"""Predictions in the folder, some 6 kB each; beyond it the oldest are deleted."""
LOOKS = 200
"""So many times while the folder fills it is looked at, which takes as long as a lookup for every few hundred files."""
MAX_PROCESSES = 8
"""Each holds a compiled engine and one workload's traffic."""
AHEAD = 4
"""Questions that a process has at hand."""
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


Elsewhere = Callable[[Sequence[Question]], Iterator[tuple[Question, "Run | UsageError"]]]
"""What makes predictions somewhere else, and yields each as it comes."""


def stream(
    questions: Iterable[Question], processes: int = 1, elsewhere: Elsewhere | None = None
) -> Iterator[tuple[Question, Run | UsageError]]:
    """Every question with its prediction, or with why there is none, as they come: those that are kept first, none twice.

    In that many processes, or `elsewhere`. Nothing is held here, so that there may be any number of them.
    """
    missing = []
    for question in dict.fromkeys(questions):
        run = _kept(question)
        if run is None:
            missing.append(question)
        else:
            yield question, run
    if elsewhere is not None:
        for question, answer in elsewhere(missing):
            if isinstance(answer, Run):
                _keep(question, answer)
            yield question, answer
        return
    left = dict.fromkeys(missing)
    if processes > 1 and len(missing) > 4 * processes:
        first, *others = missing
        yield first, tried(first)  # the engine is compiled once, and kept for the others
        del left[first]
        with suppress(OSError, BrokenProcessPool):  # no further process to be had: the rest is made here
            for question, answer in _in_processes(others, processes, tried):
                del left[question]
                yield question, answer
    for question in left:
        yield question, tried(question)


def tried(question: Question) -> Run | UsageError:
    """The prediction, made and kept, or the sentence that says why there is none."""
    try:
        return _made(question)
    except ValueError as error:  # a UsageError, or parts of the model that contradict each other: one of many goes without
        return UsageError(str(error))  # whatever it was, it pickles


def content(question: Question) -> str | None:
    """What a prediction follows from, as the hash that it is kept by; None where a file of the user's decides it too."""
    if is_own(question.schedule) or is_compiled(question.schedule):
        return None
    device = question.device if isinstance(question.device, Device) else load_device(question.device)
    asked = vars(question) | {
        "workload": question.workload.to_dict(),
        "device": {name: getattr(device, name) for name in FIELDS},
        "tile": question.tile and asdict(question.tile),
    }
    text = json.dumps([simulator_hash(), asked], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def processes() -> int:
    """How many processes are worth while here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_PROCESSES)


# -- making -----------------------------------------------------------------------------------------------------------


def _made(question: Question) -> Run:
    from ..simulator.predict import predict

    run = predict(**question.asked(), spans=False)
    _keep(question, run)
    return run


def _in_processes(
    missing: Sequence[Question], processes: int, make: Callable[[Question], Run | UsageError] | None = None
) -> Iterator[tuple[Question, Run | UsageError]]:
    """As they come; a few more than there are processes are handed out at a time, so that answers do not pile up."""
    waiting = iter(missing)
    with spawned(processes) as pool:
        asked = {pool.submit(make or _made, question): question for question in islice(waiting, AHEAD * processes)}
        while asked:
            done, _ = wait(asked, return_when=FIRST_COMPLETED)
            for each in done:
                yield asked.pop(each), each.result()
            asked |= {pool.submit(make or _made, question): question for question in islice(waiting, len(done))}


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
        _added.append(path)
        if len(_added) * LOOKS > MAX_KEPT:
            _added.clear()
            _delete_the_oldest(path.parent)
    except (UsageError, OSError):
        pass  # next time it is made again


_added: list[Path] = []
"""Kept by this process since it last looked at the folder."""


def _delete_the_oldest(folder: Path) -> None:
    kept = list(folder.iterdir())
    if len(kept) > MAX_KEPT:
        for path in sorted(kept, key=lambda each: each.stat().st_mtime)[: len(kept) - MAX_KEPT * 3 // 4]:
            path.unlink(missing_ok=True)


def _place(question: Question) -> Path | None:
    folder = cache_folder("predictions")
    key = None if folder is None else content(question)
    return key and folder / f"{key}.run.json"


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
