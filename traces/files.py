"""Files whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from ..simulator.errors import UsageError


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to a temporary file beside `path` and move it into place, so that no half-written file is ever left.

    Raises UsageError, one sentence, where the folder or the file cannot be written.
    """
    write_all({path: data})


def write_all(files: Mapping[Path, bytes]) -> None:
    """Write several files whole, or none: each goes beside its place first, and they move when all are written.

    Raises UsageError, one sentence, where one cannot be written.
    """
    staged: list[tuple[Path, Path]] = []
    path = Path()
    try:
        for path, data in files.items():
            check_place(path)
            temporary = path.parent / f".{path.name[:100]}.{secrets.token_hex(8)}.tmp"
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)  # less the umask
            staged.append((temporary, path))
            with open(handle, "wb") as file:
                file.write(data)
        while staged:
            temporary, path = staged[0]
            os.replace(temporary, path)
            staged.pop(0)
    except (OSError, ValueError) as error:  # ValueError: a name that no system has
        raise UsageError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Raises UsageError where no file can be at `path`: a folder is, something that is no file, or its folder is not there."""
    why = ""
    if is_folder(path):
        why = "it is a folder"
    elif os.path.exists(path) and not os.path.isfile(path):
        why = "it is no file"  # a device, say, which a file moved there would replace
    elif not is_folder(path.parent):
        why = os.strerror(errno.ENOTDIR if os.path.exists(path.parent) else errno.ENOENT)
    if why:
        raise UsageError(f"cannot write {path}: {why}")


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder that can be seen; a path that no system has is none."""
    return os.path.isdir(path)


def cache_folder(kind: str) -> Path | None:
    """Where things of a kind are kept between calls: under FASIM_CACHE_DIR, or fasim/ in XDG_CACHE_HOME or ~/.cache.

    None where there is no home either. Whatever is in it can be deleted at any time.
    """
    chosen = os.environ.get("FASIM_CACHE_DIR")
    try:
        if chosen:
            return Path(chosen).expanduser() / kind
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasim" / kind
    except RuntimeError:  # pathlib's, where no home is known
        return None
