"""Whether numba compiles: the engine's first replay on a machine takes some ten seconds before anything happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from numba.core import event

COMPILES = "(compiles the engine first: once, some ten seconds)"
"""What a progress bar says meanwhile."""


@contextmanager
def heard(begun: Callable[[], None]) -> Iterator[None]:
    """Call `begun` when numba starts to compile something, once; loading what it kept from before is no compiling."""
    with event.install_listener("numba:compile", _Once(begun)):
        yield


class _Once(event.Listener):
    def __init__(self, begun: Callable[[], None]) -> None:
        self.begun: Callable[[], None] | None = begun

    def on_start(self, _: event.Event) -> None:
        begun, self.begun = self.begun, None
        if begun:
            begun()

    def on_end(self, _: event.Event) -> None:
        """Nothing to do."""
