"""Reading: every file from outside passes through here, bounded in bytes, depth and digits before anything is made of it.

What cannot be read, is too large or is malformed is one sentence, a UsageError, that names the file. Only regular files are
opened: a pipe or a device would be waited for, or never end.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import stat
import tomllib
import zlib
from collections import Counter
from pathlib import Path

from .errors import UsageError
from .values import printable, shown

MAX_BYTES = 32 << 20
"""Of a file, and of what a compressed one unpacks to; the largest recording has 5 MB. Parsed, the worst text takes twenty
times its size: some 700 MB."""
MAX_TOML_BYTES = 1 << 20
"""tomllib is slow: a megabyte takes it a second or two."""
MAX_DEPTH = 32
"""Tables and lists within one another; ours have six."""
MAX_DIGITS = 40
"""Of a whole number: twice those of the largest one of 64 bits."""
MAX_CELL = 131_072
"""Characters of one cell of a CSV table, Python's own limit."""
_DOTTED = re.compile(r"""(?<![\w-])(?:(?:[\w-]{1,200}|"[^"\n]{0,200}"|'[^'\n]{0,200}')[ \t]*\.[ \t]*){32}""")
"""A dotted key of so many parts nests as deep, and takes tomllib time that grows with the square of them."""


def read_bytes(path: Path, what: str, most: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file, `what` in the words of the sentence that is raised where it cannot be read."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise UsageError(f"{what} {path} cannot be read: it is a folder, pipe or device and not a regular file")
            data = file.read(most + 1)
    except FileNotFoundError:
        raise UsageError(f"{what} {path} does not exist") from None
    except OSError as error:
        raise UsageError(f"{what} {path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a path that no system has, with a NUL or a lone surrogate in it
        raise UsageError(f"{what} {shown(str(path))} cannot be read: {error}") from None
    if len(data) > most:
        raise UsageError(f"{what} {path} is larger than the {most:,} bytes that are read")
    return data


def read_text(path: Path, what: str, most: int = MAX_BYTES) -> str:
    """The text of a file: UTF-8, with or without a byte order mark. Raises UsageError."""
    return _decoded(read_bytes(path, what, most), f"{what} {path}")


def read_json(path: Path, what: str, most: int = MAX_BYTES) -> object:
    """The JSON value of a file, plain or gzip's by its content. Raises UsageError."""
    data, where = read_bytes(path, what, most), f"{what} {path}"
    if data[:2] == b"\x1f\x8b":
        data = _unpacked(data, where)
    return parse_json(_decoded(data, where), where)


def parse_json(text: str, where: str) -> object:
    """A JSON value: finite numbers, whole ones of up to MAX_DIGITS, no key twice, nested up to MAX_DEPTH. Raises UsageError."""
    try:
        value = json.loads(
            text, parse_constant=_no_constant, parse_int=_whole, parse_float=_finite, object_pairs_hook=_once
        )
    except RecursionError:
        raise UsageError(f"{where} is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise UsageError(f"{where} is damaged or cut short: {_sentence(error)}") from None
    _not_too_deep(value, where)
    return value


def read_toml(path: Path, what: str) -> dict:
    """The table of a TOML file, nested up to MAX_DEPTH. Raises UsageError."""
    text, where = read_text(path, what, MAX_TOML_BYTES), f"{what} {path}"
    try:
        if _DOTTED.search(text):
            raise RecursionError
        tree = tomllib.loads(text)
    except RecursionError:
        raise UsageError(f"{where} is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # TOMLDecodeError, and a number of too many digits
        raise UsageError(f"{where} is not valid TOML: {_sentence(error)}") from None
    _not_too_deep(tree, where)
    return tree


def parse_csv(text: str, where: str, least: int | None = None) -> list[list[str]]:
    """The rows of a CSV table, all as long as the first, whose names are all different; where only the first `least` columns have
    to be there, shorter rows are filled with empty cells. Raises UsageError.
    """
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except csv.Error as error:
        raise UsageError(f"{where} is damaged: {_sentence(error)} (a cell has at most {MAX_CELL:,} characters)") from None
    if not rows:
        raise UsageError(f"{where} is empty")
    header = rows[0]
    for name, times in Counter(header).items():
        if times > 1:
            raise UsageError(f"{where} has {times:,} columns of the name {shown(name)}")
    for row in rows:
        if not (least or len(header)) <= len(row) <= len(header):
            raise UsageError(f"{where} is cut short: a row has {len(row)} of {len(header)} columns")
    return [row + [""] * (len(header) - len(row)) for row in rows]


def read_csv(path: Path, what: str) -> list[dict[str, str]]:
    """The rows of a CSV file by the names of its first row. Raises UsageError."""
    header, *rows = parse_csv(read_text(path, what), f"{what} {path}")
    return [dict(zip(header, row, strict=True)) for row in rows]


# -- the parts ------------------------------------------------------------------------------------------------------------


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is damaged or no text: {error.reason} at byte {error.start:,} of UTF-8") from None


def _unpacked(data: bytes, where: str) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            unpacked = file.read(MAX_BYTES + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise UsageError(f"{where} is damaged or cut short: {_sentence(error)}") from None
    if len(unpacked) > MAX_BYTES:
        raise UsageError(f"{where} unpacks to more than the {MAX_BYTES:,} bytes that are read")
    return unpacked


def _not_too_deep(value: object, where: str) -> None:
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, (dict, list))]:
        depth += 1
        if depth > MAX_DEPTH:
            raise UsageError(f"{where} is nested deeper than {MAX_DEPTH} levels")
        level = [part for each in level for part in (each.values() if isinstance(each, dict) else each)]


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a whole number has {len(digits):,} digits, possible are {MAX_DIGITS}")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if value - value != 0.0:
        raise ValueError(f"{digits[:MAX_DIGITS]} is not a finite number")
    return value


def _once(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shown(max(names, key=names.count))} is there twice")
    return found


def _sentence(error: Exception) -> str:
    return printable(" ".join(str(error).split()))[:200] or type(error).__name__
