"""`fasim tune`: which tile, how many stages and consumers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...simulator.errors import UsageError
from .. import output
from ..options import Json, MachineOptions, PackedOptions, Schedule

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ...traces.answers.tune import Tuned

_DEFAULT = PackedOptions()
_MACHINE = MachineOptions()


def tune(
    schedule: Schedule = "fa3",
    workload: PackedOptions = _DEFAULT,
    machine: MachineOptions = _MACHINE,
    *,
    top: int = 10,
    workers: int | None = None,
    json: Json = False,
) -> int:
    """Rank every tile, number of stages and of consumers that a schedule takes on a device.

    The first line says which to take, by how much it is ahead of the next and of the table's own tile, and which part of the
    tensor cores' time makes the difference. Tiles that do not fit shared memory or registers are left out; of those that the
    model cannot tell apart (2 %) the table's own is kept. What compiles may be fewer: `fasim kernels` has those of ours.

    Example: fasim tune fa3 --head-dim 64 --causal --seqlen 2048 --device h200

    Theory: wide tiles read K and V less often, deep rings hide latency, more consumers hide softmax; registers and shared memory
    let you have two of the three.

    Parameters
    ----------
    top
        Rows to show; --json has all.
    workers
        Processes. [default: one a core]
    """
    from ...simulator.compiling import COMPILES, heard
    from ...traces.answers.tune import tune as rank

    if machine.tile or machine.stages or machine.cluster:
        raise UsageError("fasim tune tries every tile: leave out --tile, --stages and --cluster")
    if top < 1:
        raise UsageError(f"--top {top} shows nothing: give 1 or more")
    with output.progress("tuning", estimate=True) as advance, heard(lambda: advance(0, 1, COMPILES)):
        how = {"clock_hz": machine.clock_hz, "regime": machine.regime or "sustained", "advance": advance, "workers": workers}
        found = rank(workload.build(), schedule, machine.load(), **how)
    if json:
        output.emit_json({
            "sentence": found.sentence,
            "choice": found.choice.tile.to_dict(),
            "usual": found.usual.tile.to_dict(),
            "tried_that_do_not_fit": found.illegal,
            "runs": [run.to_dict() for run in found.runs],
        })  # fmt: skip
        return 0
    output.stdout().print(_table(found, top))
    return 0


def _table(found: Tuned, top: int) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from ...simulator.results import metrics
    from ...simulator.units import percent, scaled
    from ..tables import house_table

    first = found.runs[0]
    table = house_table("", "tile", ">stages", ">consumers", ">cluster", ">time", ">behind", ">TFLOP/s", ">tensor", "bottleneck")
    places = [(number, run) for number, run in enumerate(found.runs, 1) if number <= top or run is found.usual]
    for number, run in places:
        tile, behind = run.tile, metrics.time_s(run) / metrics.time_s(first) - 1
        mark = "the table's" if run is found.usual else ""
        table.add_row(
            f"{number}", str(tile), f"{tile.stages}", f"{tile.consumers}", f"{tile.cluster}", scaled(metrics.time_s(run), "s"),
            percent(behind), f"{metrics.tflops(run):.0f}", percent(metrics.tensor_utilization(run)),
            f"{run.bottleneck.resource}{', ' if mark else ''}{mark}",
        )  # fmt: skip
    title = Text(f"{first.schedule} on {first.device}, {first.workload}", "dim")
    return Group(Text(found.sentence, "bold"), Text(""), title, table)
