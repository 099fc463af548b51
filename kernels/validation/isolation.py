"""A subject in a process of its own: what ends that process (a signal, an exit, a lost GPU) is a finding, and the rest is asked.

The child runs `suite.validate` and keeps a journal, one JSON value a line: which question it is at, and each answer. The parent
reads along. Where the child ends before its journal does, the question it was at has failed, and another child goes on behind it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ...simulator.errors import UsageError
from ...simulator.reading import parse_json, read_json
from .check import FAIL, Check, MissingTool
from .report import SURVEY, Report

MOST_DEATHS = 8
"""After so many lost processes the rest is not asked: each takes seconds to replace."""
POLL_S = 0.05
STDERR = 2
"""What the subject prints goes there, not between the lines of a report."""
_ARGUMENTS = ("device", "dtype", "kind", "seed", "quick", "only", "head_dims", "forward_only", "with_sanitizer")

Advance = Callable[[int, int, str], None]


@dataclass
class _Reading:
    """What the journals of all children have said so far."""

    report: Report | None = None
    at: tuple[int, int, str, str] | None = None  # number, of how many, group, case: the question without an answer yet
    last: int = -1  # number of the last question with an answer
    ended: bool = False
    lost: bool = False  # the last child gave up, since its GPU no longer answers; it has said so in a check
    error: Exception | None = None
    checks: list[Check] = field(default_factory=list)


def validate_apart(
    name: str, *, arguments: tuple[str, ...] = (), advance: Advance = lambda done, total, what: None, **options
) -> Report:
    """`suite.validate` of what `name` names (`subjects.resolve`), in a process of its own; `options` are those of `suite.validate`.

    A process that dies fails the check it died in, by the name of the signal. Raises what `suite.validate` raises.
    """
    began, so_far, deaths = time.perf_counter(), _Reading(), 0
    order = {"name": name, "arguments": list(arguments)} | options | {"head_dims": list(map(str, options.get("head_dims", ())))}
    while not so_far.ended:
        with tempfile.TemporaryDirectory(prefix="fasim-validate-") as room:
            status = _child(Path(room), order, so_far, advance)
        if so_far.error:
            raise so_far.error
        if so_far.ended:
            break
        deaths += 1
        if so_far.lost and deaths < MOST_DEATHS:
            so_far.lost = False
            continue
        if so_far.report is None:
            raise UsageError(f"{name} cannot be loaded: the process {_died(status)} before anything was asked")
        if so_far.lost:
            break
        number, _, group, case = so_far.at or (so_far.last, 0, SURVEY, "plain call")
        rest = f"; after {MOST_DEATHS} lost processes the rest is not asked" if deaths == MOST_DEATHS else ""
        so_far.checks.append(Check(group, case, FAIL, so_far.report.seed, f"the process {_died(status)} in this check{rest}"))
        so_far.last, so_far.at = max(number, so_far.last), None
        if group == SURVEY or deaths == MOST_DEATHS:
            break
    report = so_far.report
    report.checks = so_far.checks
    report.seconds = time.perf_counter() - began
    return report


def _child(room: Path, order: dict, so_far: _Reading, advance: Advance) -> int:
    """One child from the question behind the last answered one; returns its exit status once it has ended."""
    journal, asked = room / "journal", room / "order.json"
    asked.write_text(json.dumps(order | {"begin": so_far.last + 1}), encoding="utf-8")
    journal.touch()
    command = [sys.executable, "-m", f"{__package__}.isolation", str(asked), str(journal)]
    where = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # it finds what this process finds
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=STDERR, env=where)
    try:
        with journal.open(encoding="utf-8") as lines:
            rest = ""
            while True:
                over = child.poll() is not None
                rest = _read(rest + lines.read(), so_far, advance, order["name"])
                if over:
                    return child.returncode
                time.sleep(POLL_S)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


def _read(text: str, so_far: _Reading, advance: Advance, name: str) -> str:
    """Take in the whole lines of `text`; returns what follows the last of them."""
    *lines, rest = text.split("\n")
    for line in lines:
        kind, value = parse_json(line, "the journal of a process")
        value = _floats(value)
        if kind == "report" and so_far.report is None:
            so_far.report = Report(**value | {"options": tuple(value["options"])})
        elif kind == "asking":
            so_far.at = tuple(value)
            advance(value[0], value[1], f"{name}, {value[2]}: {value[3]}")
        elif kind == "check":
            so_far.checks.append(Check(**value))
            if so_far.at:
                so_far.last, so_far.at = so_far.at[0], None
        elif kind == "rmse":
            so_far.report.rmse = value
        elif kind == "usage":
            so_far.error = UsageError(value)
        elif kind == "missing":
            so_far.error = MissingTool(value)
        elif kind == "lost":
            so_far.lost = True
        elif kind == "end":
            so_far.ended = True
    return rest


def _plain(value: object) -> object:
    """NaN and infinities, which JSON has not, as {"float": "nan"}."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return {"float": repr(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _floats(value: object) -> object:
    """The inverse of `_plain`."""
    if isinstance(value, dict):
        return float(value["float"]) if set(value) == {"float"} else {key: _floats(each) for key, each in value.items()}
    return [_floats(each) for each in value] if isinstance(value, list) else value


def _died(status: int) -> str:
    """How a process ended: "was ended by SIGFPE", "exited with status 3"."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def main() -> int:
    """The child: ORDER.json JOURNAL."""
    from .precision import DENSE, subjects_of
    from .suite import validate

    order = read_json(Path(sys.argv[1]), "order")
    told = set()
    with Path(sys.argv[2]).open("a", encoding="utf-8") as file:

        def journal(kind: str, value: object) -> None:
            told.add(kind)
            file.write(json.dumps([kind, _plain(value)], default=str, allow_nan=False) + "\n")
            file.flush()

        options = {key: order[key] for key in _ARGUMENTS if key in order}
        try:
            resolve = subjects_of(options.get("dtype", ""), options.get("kind", DENSE)).resolve
            subject = resolve(order["name"], options.get("device", "cuda"), order["arguments"])
            validate(subject, **options, begin=order["begin"], journal=journal)
        except UsageError as error:
            journal("usage", str(error))
        except MissingTool as error:
            journal("missing", str(error))
        else:
            if "lost" not in told:
                journal("end", None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
