"""What a branch costs that is taken, by how much it skips and how many warps share a scheduler.

`python -m kernels.calibrate.branches --out DIR` writes `DIR/branches.json`: cycles of a loop of 384 FFMA with one, four or eight
branches over 0 (none) to 256 others; and of eight times 16 dependent FFMA with a branch each, beside softmax of 0 to 2 warpgroups.
"""

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, parse_out, write
from .ptx import PRELUDE

COUNTS = (1, 4, 8)
SKIPPED = (0, 16, 64, 128, 256)
WARPS = (1, 4, 8, 12)
CHAINS, SOFTMAXES = 8, (0, 1, 2)
REPS = 400


def source():
    """The whole CUDA source."""
    lines = [f"BRANCHES({count}, {skipped})\n" for count in COUNTS for skipped in SKIPPED]
    lines += [f"BESIDE({CHAINS}, {skipped}, {softmaxes})\n" for skipped in SKIPPED for softmaxes in SOFTMAXES]
    parts = [(HERE / part).read_text() for part in ("softmax.cuh", "running.cuh", "branches.cu")]
    return PRELUDE + "".join(parts) + "".join(lines)


def loop_cycles(module, name, warps, others=0):
    """Cycles of one loop, median over its warps and SMs."""
    import torch

    out = torch.zeros(SM_COUNT_H200 * warps, dtype=torch.int32, device="cuda")
    for _ in range(2):
        module.launch(name, SM_COUNT_H200, 32 * (warps + others), [out, REPS, 0])
    torch.cuda.synchronize()
    return round(float(np.median(out.cpu().numpy())) / REPS, 2)


def main():
    """Run every case and write the result."""
    out = parse_out(__doc__)
    text = source()
    module = Module(text)
    results = {"loop_cycles": {}, "beside_softmax": {}}
    for count in COUNTS:
        for skipped in SKIPPED:
            by_warps = {str(warps): loop_cycles(module, f"branches_{count}_{skipped}", warps) for warps in WARPS}
            results["loop_cycles"][f"{count}_over_{skipped}"] = by_warps
    for skipped in SKIPPED:
        results["beside_softmax"][f"over_{skipped}"] = {
            str(others): loop_cycles(module, f"beside_{CHAINS}_{skipped}_{others}", 4, 4 * others) for others in SOFTMAXES
        }
    write(out, "branches", "kernels/calibrate/branches.py", text, results)


if __name__ == "__main__":
    main()
