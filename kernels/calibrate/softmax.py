"""The online softmax as instructions: cycles per tile with one to four warps per sub-partition, whole and by phase.

`python -m kernels.calibrate.softmax --out DIR` writes `DIR/softmax.json`.
"""

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, parse_out, spread, write
from .ptx import PRELUDE
from .sass import loop_counts

REPS = 400
PHASES = {"max": 1, "exp": 2, "sum": 4, "convert": 8, "rescale": 16, "all": 31}
# score tile width n (64 x n scores per warpgroup), head_dim of the rescaled output
TILES = [(80, 128), (128, 64), (128, 128), (176, 128), (192, 128), (256, 64)]
WIDE = 176  # above this (and at 3 warpgroups from this on) the registers of the tile do not fit


def cases():
    """(name, warpgroups, n, head_dim, phase) of every kernel whose state fits the registers."""
    found = []
    for n, head_dim in TILES:
        for warpgroups in (1, 2, 3):
            if (n + head_dim) // 2 + 24 > {1: 255, 2: 255, 3: 168}[warpgroups]:
                continue
            for phase in PHASES:
                if phase == "all" or (n, head_dim) in ((176, 128), (128, 64)):
                    found.append((f"{phase}_n{n}_d{head_dim}_wg{warpgroups}", warpgroups, n, head_dim, phase))
    return found


def source():
    """The whole CUDA source."""
    text = PRELUDE + (HERE / "softmax.cuh").read_text() + (HERE / "softmax.cu").read_text()
    return text + "".join(f"SOFTMAX({name}, {wgs}, {n}, {d}, {PHASES[p]})\n" for name, wgs, n, d, p in cases())


def main():
    """Run every case and write the result."""
    import torch

    out = parse_out(__doc__)
    text = source()
    module = Module(text)
    scale = int(np.float32(0.18).view(np.int32))
    results = {}
    for name, warpgroups, *_ in cases():
        cycles = torch.zeros(SM_COUNT_H200 * warpgroups * 4, dtype=torch.int64, device="cuda")
        for _ in range(2):
            module.launch(name, SM_COUNT_H200, warpgroups * 128, [cycles, REPS, scale])
        torch.cuda.synchronize()
        slowest = cycles.cpu().numpy().reshape(SM_COUNT_H200, -1).max(axis=1)
        registers, local_bytes = module.registers(name)
        results[name] = spread(slowest / REPS) | {"registers": registers, "local_bytes": local_bytes}
    counts = loop_counts(module.cubin, [name for name, warpgroups, *_ in cases() if warpgroups == 1])
    write(out, "softmax", "kernels/calibrate/softmax.py", text, {"cycles_per_tile": results, "sass_per_tile": counts})


if __name__ == "__main__":
    main()
