"""A compiled kernel in the place of a schedule: `--kernel FILE`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..simulator.errors import UsageError
from . import output

if TYPE_CHECKING:
    from ..simulator.problem.workload import Workload


def adopted(
    asked: str, workloads: Sequence[Workload], orders: tuple[str, ...], tile: str | None
) -> tuple[int, tuple[str, ...]]:
    """(exit status, names that stand for the kernel asked for): in its own order, or in that of each schedule in `orders`.

    `tile`, as 128x128, says how many consumers there are where the machine code does not.
    Says on stderr what was read and what was assumed. Raises UsageError, one sentence, where it cannot be read.
    """
    from dataclasses import replace

    from ..kernels.compile.disassemble import MissingDisassembler
    from ..kernels.compile.kernel_file import pipeline_of
    from ..simulator.problem.tile import Tile
    from ..simulator.schedules import adopt

    if any(workload.direction != "forward" for workload in workloads):
        raise UsageError("--kernel reads forward kernels alone: leave --pass out")
    try:
        pipeline = pipeline_of(asked, workloads[0])
    except MissingDisassembler as error:
        output.note(f"fasim: {error}")
        return 3, ()
    name = Path(asked).name
    if tile is not None:
        rows, keys = Tile.parse(tile).block_m, Tile.parse(tile).block_n
        pipeline = replace(pipeline, consumers=pipeline.consumers or max(1, rows // pipeline.rows))
        if (rows, keys) != (pipeline.rows * pipeline.consumers, pipeline.block_n):
            compiled = f"{pipeline.rows * pipeline.consumers}x{pipeline.block_n}"
            raise UsageError(f"--tile {tile}: {name} is compiled for {compiled}; leave --tile out, or give another kernel")
    found = [adopt(f"{name} with the order of {order}", pipeline, order) for order in orders]
    found = found or [adopt(f"{name} as compiled", pipeline)]
    estimated = "a tile's first block and its end" + (" are" if pipeline.masked else ", and masks, are")
    output.note(
        f"{name}: tile {found[0].tile}, d{pipeline.head_dim}, {pipeline.consumers} consumers, the order of their loop and its "
        f"{pipeline.instructions} instructions a block are read; {estimated} estimated"
        + ("" if pipeline.stages else ", two stages assumed")
        + ("; how V is transposed is left out" if pipeline.element_bytes == 1 else "")
    )
    return 0, tuple(each.name for each in found)
