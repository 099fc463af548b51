"""Lengths of packed sequences, as typed or in a file."""

from __future__ import annotations

import re
from pathlib import Path

from ..simulator.errors import UsageError
from ..simulator.values import shown

MAX_BYTES = 1 << 20
_LENGTH = re.compile(r"([0-9]{1,10})(k?)(?::([0-9]{1,10})(k?))?", re.IGNORECASE)


def lengths(given: str) -> tuple[tuple[int, int], ...]:
    """Queries and keys of each sequence, from "100,2000,37" or "256:8k,37" (queries:keys), or a file of such, also one a line.

    Raises UsageError, one sentence, for what is neither.
    """
    words = _words(given)
    matches = [_LENGTH.fullmatch(word) for word in words]
    if not all(matches) and len(words) == 1:
        words = _words(_read(given))
        matches = [_LENGTH.fullmatch(word) for word in words]
    if not words or not all(matches):
        wrong = next((word for word, match in zip(words, matches, strict=True) if not match), given)
        possible = "100,2000,37, as 256:8000 where keys differ, or a file"
        raise UsageError(f"--lengths {shown(wrong)} is no length: give them as {possible}")
    return tuple((_count(m[1], m[2]), _count(m[3] or m[1], m[4] if m[3] else m[2])) for m in matches)


def _words(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _count(digits: str, unit: str) -> int:
    return int(digits) * (1024 if unit else 1)


def _read(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError):
        return path  # no file of that name: it is what was typed that is wrong
    if len(data) > MAX_BYTES:
        raise UsageError(f"--lengths {shown(path)}: the file is longer than the {MAX_BYTES:,} bytes that are read")
    return data.decode("utf-8", "replace")
