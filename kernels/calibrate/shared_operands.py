"""GEMMs whose operands take all of shared memory: what is lost where warpgroups take turns, by how many k steps a GEMM has.

`python -m kernels.calibrate.shared_operands --out DIR` writes `DIR/shared_operands.json`. With 64 columns and A in shared
memory a k step reads 128 bytes a cycle. One to three warpgroups repeat a GEMM of so many k steps, or one and then another
kind, and wait for them, some idle a while behind it. If the loss is of the rate, it grows with the steps; if of the turn, not.
"""

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, parse_out, spread, write
from .ptx import PRELUDE, wgmma_wrappers
from .sass import loop_counts

SMEM_BYTES = 3 * 64 * 128 * 2 + 88 * 1024
REPS, WARPGROUPS = 400, (1, 2, 3)
ONE = [("SS", 64, steps) for steps in (2, 4, 8, 16, 32)] + [("SS", n, 8) for n in (32, 48, 72, 80, 96)]
ONE += [("SS", 48, 16), ("SS", 80, 16), ("SS", 128, 8), ("RS", 64, 8), ("RS", 256, 4)]
TWO = [
    (("SS", 64, 16), ("RS", 256, 4)), (("RS", 256, 4), ("SS", 64, 16)), (("SS", 64, 8), ("RS", 128, 4)),
    (("SS", 80, 16), ("RS", 256, 5)), (("SS", 128, 8), ("RS", 128, 8)),
]  # fmt: skip
"""S and O += P V of a block of keys: at d256 of 64 and 80, at d128 of 64 and 128."""
NOTHING = ("RS", 64, 0)
IDLE = (0, 256, 512)
"""Cycles behind each turn; not 0 for the first of ONE with 16 k steps and the first of TWO."""
CASES = [(each, None, 0) for each in ONE] + [(*pair, 0) for pair in TWO]
CASES += [(("SS", 64, 16), None, idle) for idle in IDLE[1:]] + [(*TWO[0], idle) for idle in IDLE[1:]]


def entry(first, second, idle):
    """The kernel of a case, such as `ss64x16_rs256x4_idle512`."""
    named = [f"{operands.lower()}{n}x{steps}" for operands, n, steps in ((first, second) if second else (first,))]
    return "_".join(named) + f"_idle{idle}" * bool(idle)


def most_warpgroups(first, second):
    """Of a CTA: as many as registers allow."""
    return 3 if second is None and first[1] < 256 else 2


def source():
    """The whole CUDA source."""
    widths = {each[1] for first, second, _ in CASES for each in (first, second) if each}
    parts = [(HERE / part).read_text() for part in ("gemm.cuh", "shared_operands.cu")]
    text, lines = PRELUDE + wgmma_wrappers(sorted(widths | {NOTHING[1]})) + "".join(parts), []
    for first, second, idle in CASES:
        (one, n1, steps1), (two, n2, steps2) = first, second or NOTHING
        shapes = f"{n1}, {steps1}, {one}, {n2}, {steps2}, {two}, {idle}"
        lines.append(f"TURNS({entry(first, second, idle)}, {128 * most_warpgroups(first, second)}, {shapes})\n")
    return text + "".join(lines)


def measured(module, case, groups):
    """Cycles a turn of each warpgroup, once all have begun, and what the tensor cores are busy meanwhile."""
    import torch

    first, second, _ = case
    out = torch.zeros((SM_COUNT_H200, groups, 2), dtype=torch.int64, device="cuda")
    for _ in range(2):
        module.launch(entry(*case), SM_COUNT_H200, 128 * groups, [out, REPS], SMEM_BYTES)
    torch.cuda.synchronize()
    start, end = out.cpu().numpy().astype(np.float64).transpose(2, 0, 1)
    each = (end - start).mean(axis=1) / (REPS - REPS // 4)
    peak = sum(n / 2 * steps for _, n, steps in (first, *([second] if second else [])))
    return {"cycles_per_turn": spread(each), "peak_cycles": peak, "tensor_utilisation": spread(groups * peak / each)}


def main():
    """Run everything and write the result."""
    out = parse_out(__doc__)
    text = source()
    module, results = Module(text), {}
    for groups in WARPGROUPS:
        cases = [case for case in CASES if groups <= most_warpgroups(*case[:2])]
        results[f"warpgroups_{groups}"] = {entry(*case): measured(module, case, groups) for case in cases}
    results["local_bytes"] = {entry(*case): module.registers(entry(*case))[1] for case in CASES}
    results["sass_loop"] = loop_counts(module.cubin, [entry(*CASES[0])])
    write(out, "shared_operands", "kernels/calibrate/shared_operands.py", text, results)


if __name__ == "__main__":
    main()
