"""`fasim walk`: a schedule's tiles of S one after another, and what moves for each."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ...simulator.errors import UsageError
from .. import output
from ..options import Json, Schedule, TileOptions, WalkedOptions

if TYPE_CHECKING:
    from ...traces.walk import Walk

FRAMES = 5
"""Printed where nothing plays, unless asked otherwise."""


_DEFAULT = WalkedOptions()
_MACHINE = TileOptions()


def walk(
    schedule: Schedule = "fa2",
    workload: WalkedOptions = _DEFAULT,
    machine: TileOptions = _MACHINE,
    *,
    frames: int | None = None,
    pace: float | None = None,
    json: Json = False,
) -> None:
    """Walk over the tiles of S as a schedule does: which tile, what moves between HBM, L2, shared memory and registers.

    In a terminal it plays; space stops and goes on, n and p step, q leaves. Elsewhere some steps are printed. One CTA works at
    a time, in the order in which they are handed out. The bytes are those of the prediction: the last step has the sums
    that `fasim predict` prints for each tensor.

    Example: fasim walk fa1 --causal

    Example: fasim walk fa3 --tile 64x64 --frames 3

    Theory: K and V travel once for each tile of queries (fa2, fa3), or Q and O once for each block of keys (fa1), or S and P
    to HBM and back (standard). The sum of a level says which.

    Parameters
    ----------
    frames
        Print so many steps, evenly spread, and play nothing.
    pace
        Steps a second. [default: all in 20 seconds, 2 to 25 a second]
    """
    workload.forward_only("fasim walk")
    if frames is not None and frames < 1:
        raise UsageError(f"--frames {frames} is not possible: give 1 or more")
    if pace is not None and not 0.1 <= pace <= 100:
        raise UsageError(f"--pace {pace:g} is not possible: give 0.1 to 100 steps a second")
    from ...simulator.schedules import find_schedule
    from ...traces.walk import walk as walked

    device, problem = machine.load(), workload.build()
    tile = machine.choose_tile(problem, find_schedule(schedule).name, device)
    show(walked(problem, schedule, device, tile), frames, pace, json)


def show(found: Walk, frames: int | None = None, pace: float | None = None, json: bool = False) -> None:
    """Play a walk in a terminal; print some of its steps, or all as JSON, elsewhere."""
    from .. import walk as drawn

    if json:
        output.emit_json(found.to_dict())
        return
    console = output.stdout()
    if frames is None and sys.stdin is not None and sys.stdin.isatty() and console.is_terminal:
        from ..keys import TerminalKeys

        drawn.play(console, found, TerminalKeys(), pace or drawn.pace(found))
        return
    for number in drawn.evenly(len(found.steps), frames or FRAMES):
        console.print(drawn.Frame(found, number))
        console.print()
