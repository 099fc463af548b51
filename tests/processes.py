"""Processes that a test has made."""

from __future__ import annotations

import time
from collections.abc import Collection
from multiprocessing.process import BaseProcess


def have_ended(children: Collection[BaseProcess], within_s: float = 30.0) -> bool:
    """Whether every one of `children` ends within that time.

    Asked again and again: where the pool's own thread has just reaped a child, `join` comes back at once and `is_alive` still
    says yes, until that thread has written the end down.
    """
    until = time.monotonic() + within_s
    while alive := [child for child in children if child.is_alive()]:
        if time.monotonic() > until:
            return False
        alive[0].join(0.05)
        time.sleep(0.01)
    return True
