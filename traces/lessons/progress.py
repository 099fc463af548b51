"""Which questions have been answered rightly, kept between calls; a file that is missing or damaged is an empty one."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from ...simulator.errors import UsageError
from ...simulator.reading import read_json
from ..files import write_whole

SCHEMA = "fasim.learn/1"
MAX_BYTES = 100_000
"""Of the file; what is larger is not ours."""


@dataclass(frozen=True)
class Progress:
    """By a lesson's name the numbers of the questions answered, and how many it has."""

    answered: dict[str, frozenset[int]]
    questions: dict[str, int]

    def done(self, lesson: str) -> int:
        """How many of a lesson's questions are answered."""
        return len(self.answered.get(lesson, ()))


def state_file() -> Path | None:
    """Where progress is kept: learn.json in FASIM_STATE_DIR, or in fasim/ in XDG_STATE_HOME or ~/.local/state.

    None where there is no home either. It is not a cache: what is in FASIM_CACHE_DIR can be deleted without losing it.
    """
    chosen = os.environ.get("FASIM_STATE_DIR")
    try:
        if chosen:
            return Path(chosen).expanduser() / "learn.json"
        return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "fasim" / "learn.json"
    except RuntimeError:  # pathlib's, where no home is known
        return None


def load() -> Progress:
    """What is kept; nothing where there is no file, or none that makes sense."""
    path = state_file()
    try:
        if path is None:
            return Progress({}, {})
        found = read_json(path, "progress", MAX_BYTES)
        answered = {str(name): frozenset(map(int, numbers)) for name, numbers in found["answered"].items()}
        return Progress(answered, {str(name): int(number) for name, number in found["questions"].items()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return Progress({}, {})


def keep(lesson: str, question: int, questions: int) -> bool:
    """Add one answered question of a lesson that has so many; False where it cannot be kept."""
    path, before = state_file(), load()
    if path is None:
        return False
    answered = before.answered | {lesson: before.answered.get(lesson, frozenset()) | {question}}
    body = {
        "schema": SCHEMA,
        "answered": {name: sorted(numbers) for name, numbers in sorted(answered.items())},
        "questions": before.questions | {lesson: questions},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps(body, indent=2) + "\n").encode())
    except (OSError, UsageError, ValueError):
        return False
    return True
