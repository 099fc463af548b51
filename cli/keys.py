"""One key at a time from a terminal, for what a reader steps through."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol

ENTER, QUIT, NEXT, BACK = "enter", "q", "n", "p"
_ARROWS = {"[C": NEXT, "[B": NEXT, "[D": BACK, "[A": BACK, "[6~": NEXT, "[5~": BACK, "OC": NEXT, "OB": NEXT, "OD": BACK, "OA": BACK}


class Keys(Protocol):
    """Where a session's keys and lines come from."""

    def key(self) -> str:
        """The next key: a character, ENTER, NEXT or BACK for arrows; QUIT where there is no more."""

    def line(self) -> str | None:
        """The next line without its end; None where there is no more."""


class TerminalKeys:
    """Keys of the terminal on a file descriptor, read as they are pressed; whole lines where it is no terminal."""

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = sys.stdin.fileno() if descriptor is None else descriptor

    def key(self) -> str:
        """The next key, see Keys."""
        with _raw(self.descriptor) as raw:
            if not raw:
                line = self.line()
                return QUIT if line is None else line.strip()[:1].lower() or ENTER
            char = self._read()
            if char == "\x1b":
                return _ARROWS.get(self._escape(), "escape")
        if char in ("", "\x04", "\0"):  # the end of input, which a terminal marks by a zero where it came before it was asked
            return QUIT
        if char == "\x03":
            raise KeyboardInterrupt
        return ENTER if char in "\r\n" else char.lower()

    def listening(self) -> AbstractContextManager[bool]:
        """Meanwhile keys are neither echoed nor wait for Enter; whether that is so (not where the descriptor is no terminal)."""
        return _raw(self.descriptor)

    def within(self, seconds: float) -> str | None:
        """The next key if it comes within so many seconds, else None."""
        import select

        return self.key() if select.select([self.descriptor], [], [], seconds)[0] else None

    def line(self) -> str | None:
        """The next line, which the terminal lets its user edit."""
        out = bytearray()
        while byte := os.read(self.descriptor, 1):
            if byte == b"\n":
                return out.decode(errors="replace")
            out += byte
        return out.decode(errors="replace") if out else None

    def _read(self) -> str:
        """One character, however many bytes it has."""
        first = os.read(self.descriptor, 1)
        if not first:
            return ""
        more = 3 if first[0] >= 0xF0 else 2 if first[0] >= 0xE0 else 1 if first[0] >= 0xC0 else 0
        return (first + b"".join(os.read(self.descriptor, 1) for _ in range(more))).decode(errors="replace")

    def _escape(self) -> str:
        """What follows an escape character at once; nothing where the key itself was pressed."""
        import select

        out = ""
        while len(out) < 8 and select.select([self.descriptor], [], [], 0.05)[0]:
            out += self._read()
            if len(out) > 1 and (out[-1].isalpha() or out[-1] == "~"):
                break
        return out


@contextmanager
def _raw(descriptor: int) -> Iterator[bool]:
    """Keys without waiting for Enter and without echo; False where the descriptor is no terminal or the system has none."""
    try:
        import termios
        import tty

        before = termios.tcgetattr(descriptor)
    except Exception:  # termios.error is no OSError, and a system without termios cannot name it
        yield False
        return
    try:
        tty.setcbreak(descriptor, termios.TCSADRAIN)
        yield True
    finally:
        with suppress(Exception):
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
