"""Files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..simulator.errors import UsageError


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to a temporary file beside `path` and move it into place, so that no half-written file is ever left.

    Raises UsageError, one sentence, where the folder or the file cannot be written.
    """
    temporary = None
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
