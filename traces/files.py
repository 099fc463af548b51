"""Files whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from ..simulator.errors import UsageError


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to a temporary file beside `path` and move it into place, so that no half-written file is ever left.

    Raises UsageError, one sentence, where the folder or the file cannot be written.
    """
    temporary = path.parent / f".{path.name[:100]}.{secrets.token_hex(8)}.tmp"
    written = False
    try:
        if is_folder(path):
            raise IsADirectoryError(None, "it is a folder")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)  # less the umask
        written = True
        with open(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
        written = False
    except (OSError, ValueError) as error:  # ValueError: a name that no system has
        raise UsageError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        if written:
            temporary.unlink(missing_ok=True)


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder that can be seen; a path that no system has is none."""
    return os.path.isdir(path)
