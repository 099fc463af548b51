"""Sample: which kernel of a schedule the spans of a predicted run are of, and what its copies move."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..errors import UsageError
from ..language.ops import Op
from ..language.program import Program
from ..problem.tile import Tile
from ..problem.workload import Workload
from ..results.run import Copies
from ..schedules import Schedule
from .chip import recorded
from .engine import Memory


def chosen_kernel(schedule: Schedule, asked: str | None, workload: Workload, tile: Tile) -> int:
    """Index of the kernel asked for, by name or by its number from 1; without one, of the first that takes exponentials.

    Raises UsageError naming those there are.
    """
    names = [kernel.name for kernel in schedule.kernels]
    if asked is None:
        return next((n for n, kernel in enumerate(schedule.kernels) if _takes_exponentials(kernel, workload, tile)), 0)
    if asked in names:
        return names.index(asked)
    if asked.isdecimal() and asked.isascii() and len(asked) < 4 and 1 <= int(asked) <= len(names):
        return int(asked) - 1
    known = ", ".join(f"{number} {name}" for number, name in enumerate(names, start=1))
    raise UsageError(f"'{schedule.name}' has no kernel {asked[:40]!r}: give a name or a number of {known}")


def _takes_exponentials(kernel, workload: Workload, tile: Tile) -> bool:
    short = replace(workload, seqlen_q=tile.block_m, seqlen_k=tile.block_n) if kernel.grid == "heads" else workload
    return bool((recorded(kernel, short, tile, 1, 0, 1).phases["mufu"] > 0).any())


def copies(program: Program, memory: Memory) -> tuple[Copies, ...]:
    """Bytes behind every span that copies, in the mean: each load, and all stores of one tensor together in a step of a warp."""
    out = []
    loads = program.code[program.code["op"] == Op.LOAD]
    for label in np.unique(loads["label"]).tolist():
        first = loads[loads["label"] == label][0]
        copy = program.copies[first["record"]]
        tensor = program.tensors[copy["tensor"]]
        nbytes = int(copy["nbytes"]) // max(1, int(copy["sharing"]))
        out.append(Copies(program.labels[label], "read", nbytes, nbytes * memory.read_miss.get(tensor, 0.0)))
    stream = program.stream(len(program.warps) - 1)  # a consumer
    stores = stream[stream["op"] == Op.STORE]
    for label in np.unique(stores["label"]).tolist():
        first = stores[stores["label"] == label][0]
        tensor = program.tensors[program.copies[first["record"]]["tensor"]]
        together = stores[(stores["label"] == label) & (stores["tile"] == first["tile"]) & (stores["step"] == first["step"])]
        nbytes = int(program.copies[together["record"]]["nbytes"].sum())
        out.append(Copies(f"stage {tensor}", "written", nbytes, nbytes * memory.write_through.get(tensor, 1.0)))
    return tuple(out)
