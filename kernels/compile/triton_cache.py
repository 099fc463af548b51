"""Where Triton keeps what it has compiled: where that cannot be written, a folder of this process's own."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import warnings
from functools import cache
from pathlib import Path

import triton


@cache
def ensure_writable() -> None:
    """Once a process: without this Triton raises where its cache cannot be written, and nothing runs."""
    folder = Path(triton.knobs.cache.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return
    except OSError:
        pass
    triton.knobs.cache.dir = tempfile.mkdtemp(prefix="fasim-triton-")
    atexit.register(shutil.rmtree, triton.knobs.cache.dir, ignore_errors=True)
    warnings.warn(
        f"Triton's cache {folder} cannot be written; set TRITON_CACHE_DIR to a folder that can, or every start compiles anew",
        stacklevel=2,
    )
