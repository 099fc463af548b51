"""A walk over the tiles of S on a terminal: which tile, what moves from level to level, and how many bytes so far."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Protocol

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.text import Text

from ..simulator.units import scaled
from ..traces.walk import LEVELS, Step, Walk
from .keys import BACK, NEXT, QUIT

CELLS = {"#": "bold green", "+": "cyan", ".": "dim"}
LEGEND = (("#", "now"), ("+", "done"), (".", "to come"))
_NAMES, _BYTES, _BAR = max(map(len, LEVELS)), 9, 16
_AROUND = 13
"""Lines beside the matrix."""
_PLAYED_IN, _SLOWEST, _FASTEST = 20.0, 2.0, 25.0


class Frame:
    """One step of a walk, as wide as the console and no higher than `height` lines, if that is given."""

    def __init__(self, walk: Walk, number: int, height: int | None = None) -> None:
        self.walk, self.number, self.height = walk, number, height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        walk, width = self.walk, options.max_width
        step = walk.steps[self.number]
        yield Text.assemble((walk.schedule, "bold"), f" on {walk.device}, {walk.workload}, tile {walk.tile}")
        yield Text(f"step {self.number + 1} of {len(walk.steps)} · {_place(walk, step)}")
        yield Text(f"S: rows are tiles of {walk.tile.block_m} queries, columns blocks of {walk.tile.block_n} keys", "dim")
        yield from self._cells(width)
        signs = (Text.assemble((sign * 2, CELLS[sign]), f" {what}") for sign, what in LEGEND)
        yield Group(Text("   ").join(signs), "", *self._meters(width))

    def _cells(self, width: int) -> Iterable[Text]:
        """The matrix, or as much of it around the present tile as there is room for."""
        cells, step = self.walk.cells(self.number), self.walk.steps[self.number]
        wide = 3 * self.walk.columns + 1 <= width
        room = self.walk.columns if wide else width - 2
        left = _first(step.column, room, self.walk.columns)
        top, high = 0, self.walk.rows
        if self.height is not None:
            high = max(3, self.height - _AROUND)
            top = _first(step.row, high, self.walk.rows)
        for row in cells[top : top + high]:
            line = Text(" ", no_wrap=True)
            for cell in row[left : left + room]:
                line.append(cell * 2 + " " if wide else cell, CELLS.get(cell, ""))
            yield line

    def _meters(self, width: int) -> Iterable[Text]:
        """Level by level the bytes of this step, the bytes so far, and which tensors move."""
        step, so_far = self.walk.steps[self.number], self.walk.so_far
        most = max(so_far[-1])
        yield Text(f"{'':<{_NAMES}}{'this step':>{_BYTES + 2}}{'so far':>{_BYTES + 2}}", "dim")
        for level, (name, now, total) in enumerate(zip(LEVELS, step.levels, so_far[self.number], strict=True)):
            length = min(_BAR, -(-total * _BAR // most))
            line = Text(f"{name:<{_NAMES}}  {_size(now):>{_BYTES}}  {_size(total):>{_BYTES}}  ", no_wrap=True)
            line.append("█" * length, "green").append(" " * (_BAR - length + 2))
            yield line.append(", ".join(tensors_of(step, level)), "bold")


def _size(nbytes: int) -> str:
    return scaled(nbytes, "B") if nbytes else "-"


def _first(at: int | None, room: int, of: int) -> int:
    """The first of `room` places to show, so that the one `at` is amid them."""
    return max(0, min((at or 0) - room // 2, of - room))


def _place(walk: Walk, step: Step) -> str:
    if not step.kernel:
        return "done: L2 writes back what was stored"
    head = f"head {step.head + 1} of {walk.workload.batch * walk.workload.heads}"
    if step.row is None or step.column is None:
        return f"{step.kernel}, {head}: no query of its CTA sees a key here"
    return f"{step.kernel}, {head}: queries {step.row + 1} of {walk.rows}, keys {step.column + 1} of {walk.columns}"


def tensors_of(step: Step, level: int) -> list[str]:
    """Which tensors move at a level; a load that another CTA of the cluster made is said so."""
    if level == 2:
        return []
    written = level > 2
    field = "hbm" if level in (0, 4) else "sram"
    return [
        move.tensor + (" (shared)" if field == "sram" and not move.l2 else "")
        for move in step.moves
        if move.written is written and getattr(move, field)
    ]


def evenly(of: int, frames: int) -> list[int]:
    """So many steps of `of`, the first and the last among them, in order."""
    if frames >= of:
        return list(range(of))
    return sorted({round(n * (of - 1) / max(1, frames - 1)) for n in range(frames)})


def pace(walk: Walk) -> float:
    """Steps a second at which a walk takes a third of a minute, within what an eye follows."""
    return min(_FASTEST, max(_SLOWEST, len(walk.steps) / _PLAYED_IN))


class PressedKeys(Protocol):
    """Where keys come from while a walk plays."""

    def listening(self) -> AbstractContextManager[bool]:
        """Keys are heard as they are pressed."""

    def key(self) -> str:
        """The next key."""

    def within(self, seconds: float) -> str | None:
        """The next key, if one comes in time."""


def play(console: Console, walk: Walk, keys: PressedKeys, speed: float) -> None:
    """Play a walk: space stops and goes on, n and p step, q leaves."""
    number, going, last = 0, True, len(walk.steps) - 1
    with keys.listening(), Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            hint = "space stops" if going and number < last else "space plays" if number < last else "that was the last step"
            shown = Group(Frame(walk, number, console.height), Text(f"[{hint}, n and p step, q leaves]", "dim"))
            live.update(shown, refresh=True)
            key = keys.within(1 / speed) if going and number < last else keys.key()
            if key == QUIT:
                return
            if key in (NEXT, BACK):
                going, number = False, min(last, max(0, number + (1 if key == NEXT else -1)))
            elif key == " ":
                going = not going
            elif key is None:
                number += 1
