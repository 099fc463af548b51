"""What the model estimates that a kernel of ours issues, in instructions of one warp."""

from __future__ import annotations

from collections import Counter

from fasim.simulator.language.ops import Op
from fasim.simulator.language.program import trace
from fasim.simulator.problem.tile import default_for
from fasim.simulator.problem.workload import Workload
from fasim.simulator.schedules import find_schedule

ARITHMETIC = ("fma", "mufu", "convert")


def estimated_block(schedule: str, workload: Workload) -> Counter[str]:
    """Instructions by pipe of one block amid a tile, as the schedule records them; "rest" is all that is no arithmetic."""
    found = find_schedule(schedule)
    tile, _ = default_for(found.family, workload)

    def total(blocks: int) -> Counter[str]:
        program = trace(found.kernels[0], workload, tile, [(blocks, 0)])
        rows = program.stream(program.warps.index("WG0"))
        phases = program.phases[rows["record"][rows["op"] == Op.COMPUTE]]
        counted = Counter({pipe: int((phases[pipe] * phases["chunks"]).sum()) for pipe in ARITHMETIC})
        counted["rest"] = int(((phases["alu"] + phases["other"]) * phases["chunks"]).sum() + rows["issues"].sum())
        return counted

    two = total(8)
    two.subtract(total(6))
    return Counter({pipe: count // 2 for pipe, count in two.items()})
