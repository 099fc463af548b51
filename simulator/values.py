"""Values: one value from outside held to its declaration, and text made fit to be shown.

A declaration is a type, for a number with the range in which it makes sense (`Within`). What is not of that type or out of
that range is refused in one sentence that names the place, what was found and what is possible.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from .errors import UsageError

MAX_TEXT = 4096
"""Characters of one text value."""
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_NAME = re.compile(r"\w[\w .,()+-]*")


class Within(NamedTuple):
    """The range of a number, both ends included."""

    least: float
    most: float

    def __str__(self) -> str:
        return " to ".join(f"{end:,}" if isinstance(end, int) else f"{end:,g}" for end in self)


FRACTION = Within(0, 1)
WHOLE = Within(0, 2**62)
"""A count of anything: room is left below 64 bits for a few of them to be added."""


def printable(text: str) -> str:
    """`text` with everything that is no visible character (control and escape sequences, marks that reverse or hide text,
    bytes that are no UTF-8) written as its escape, so that a terminal shows it and does not obey it."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(value: object, most: int = 60) -> str:
    """A value as a sentence quotes it: short, on one line, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {round(value.bit_length() * math.log10(2)):,} digits"
    if isinstance(value, (dict, list, tuple)):
        kind = "a table" if isinstance(value, dict) else "a list"
        return f"{kind} of {len(value):,}"
    text = repr(value[: most + 1] if isinstance(value, str) else value)
    return text if len(text) <= most else f"{text[:most]}.."


def number(value: object, kind: type, within: Within, where: str) -> int | float:
    """`value` as a `kind` (int, or float, which whole numbers serve for too) within its range.

    Raises UsageError, one sentence that begins with `where`.
    """
    right = type(value) is int or (kind is float and type(value) is float)
    if not right or not within.least <= value <= within.most:  # also false for nan
        raise UsageError(f"{where} is {shown(value)}, expected {_WORDS[kind]} from {within}")
    return kind(value)


def flag(value: object, where: str) -> bool:
    """`value`, which must be true or false. Raises UsageError."""
    if type(value) is not bool:
        raise UsageError(f"{where} is {shown(value)}, expected {_WORDS[bool]}")
    return value


def text(value: object, where: str, possible: tuple[str, ...] = ()) -> str:
    """`value`, which must be a text without control characters, and one of those possible where they are named.

    Raises UsageError.
    """
    if type(value) is not str:
        raise UsageError(f"{where} is {shown(value)}, expected {_WORDS[str]}")
    if possible and value not in possible:
        raise UsageError(f"{where} is {shown(value)}, possible are {', '.join(possible)}")
    if len(value) > MAX_TEXT:
        raise UsageError(f"{where} is a text of {len(value):,} characters, possible are {MAX_TEXT:,}")
    if not value.isprintable():
        bad = next(c for c in value if not c.isprintable())
        raise UsageError(f"{where} has a character that is not visible text (U+{ord(bad):04X})")
    return value


def name(value: object, where: str) -> str:
    """`value`, which must be a plain name: letters, digits and a few marks, so that it is no path. Raises UsageError."""
    plain = text(value, where)
    if len(plain) > 64 or not _NAME.fullmatch(plain) or plain.lower().endswith((".toml", ".json")):
        raise UsageError(f"{where} is {shown(plain)}, expected a name of up to 64 letters, digits and . , ( ) + - _, not a path")
    return plain


def plain(words: str) -> str:
    """The nearest that `name` accepts."""
    found = re.sub(r"[^\w ,()+-]", "-", words)[:64]
    return found if _NAME.fullmatch(found) else f"x{found}"[:64]
