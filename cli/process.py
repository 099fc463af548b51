"""The process that a command runs in: Ctrl-C, warnings, and variables of the environment that make no sense.

Python hears a signal between two of its own instructions. Compiling the replay, NVRTC or a GPU's library can hold it back for
many seconds; so the operating system tells a thread of its own too, which waits a moment and then ends the process. Files are
written whole or not at all (traces/files.py), so nothing half-written is left behind.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import warnings

from . import output

INTERRUPTED = 130
GRACE_S = 0.3
"""What Python has to hear Ctrl-C, clean up and end by itself."""
_SIZES = {"COLUMNS": range(20, 1001), "LINES": range(2, 1001)}
"""What a terminal can be; rich would make room for any number of columns."""


def prepare() -> None:
    """Call once, from the main thread, before a command runs."""
    for name, possible in _SIZES.items():
        said = os.environ.get(name, "")
        if not (said.isascii() and said.isdecimal() and len(said) < 9 and int(said) in possible):
            os.environ.pop(name, None)
    warnings.showwarning = _remark
    heard, told = socket.socketpair()
    told.setblocking(False)
    signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_wait, args=(heard, told), name="interrupt", daemon=True).start()


def _remark(message: Warning | str, *_: object, **__: object) -> None:
    """A Python warning as one line on stderr, without the place in the source."""
    output.note(f"fasim: {str(message).strip().splitlines()[0]}")


def _wait(heard: socket.socket, told: socket.socket) -> None:
    """End the process GRACE_S after SIGINT if it has not ended; `told` is held only so that it stays open."""
    while number := heard.recv(1):
        if number[0] == signal.SIGINT:
            time.sleep(GRACE_S)
            for child in multiprocessing.active_children():
                child.kill()  # they would wait for ever for more to do
            if sys.stderr is not None and sys.stderr.isatty():
                os.write(sys.stderr.fileno(), b"\x1b[?25h")  # a progress bar hides the cursor
            os._exit(INTERRUPTED)
