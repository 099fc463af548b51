"""Processes that share a command's work and end with it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.context import SpawnContext, SpawnProcess


@contextmanager
def spawned(processes: int, begin: Callable[[], None] | None = None) -> Iterator[ProcessPoolExecutor]:
    """A pool of fresh processes, which start with `begin` as work comes; whatever is raised, Ctrl-C too, ends them at once.

    The work, its arguments and its answers must pickle.
    """
    before = set(active_children())
    pool = ProcessPoolExecutor(processes, mp_context=_Context(), initializer=_begin, initargs=(begin,))
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        for child in set(active_children()) - before:
            child.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise


class _Process(SpawnProcess):
    """Started whole: an interrupt of this process comes once the child knows what it is for, and the child hears none itself."""

    def start(self) -> None:
        with _interrupted_later():
            super().start()


class _Context(SpawnContext):
    Process = _Process


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """SIGINT is kept until the end, and is blocked in the processes begun meanwhile, which inherit that."""
    if threading.current_thread() is not threading.main_thread():  # Python hears signals in its main thread alone
        yield
        return
    came = []
    handler = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if came and callable(handler):
        handler(signal.SIGINT, None)


def _begin(begin: Callable[[], None] | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's, which ends its children
    if begin:
        begin()
