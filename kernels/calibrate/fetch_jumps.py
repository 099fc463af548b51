"""A taken branch to code that the nearest instruction caches have lost.

`python -m kernels.calibrate.fetch_jumps --out DIR` writes `DIR/fetch_jumps.json`: cycles of ten pieces of 8 to 64 FFMA, each with a
branch over 2 KiB behind it, after 0 to 64 KiB of other code; by one warp, one warpgroup, and a second one beside or behind it.
"""

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, parse_out, write
from .ptx import PRELUDE

LENGTHS = (8, 16, 32, 64)
JUMPS = 10
REPS, WARM = 12, 4
PIECE_KIB = 8
PIECES = (0, 4, 6, 8)
CASES = {"one_warp": (1, 0), "one_warpgroup": (4, 0), "two_together": (8, 0), "two_600_apart": (8, 600)}
"""Name: (warps, cycles by which the second warpgroup is behind)."""


def source():
    """The whole CUDA source."""
    return PRELUDE + (HERE / "fetch_jumps.cu").read_text()


def measure(module, length, warps, delay, pieces):
    """Median cycles by warpgroup, and those of the first run of a launch."""
    import torch

    out = torch.zeros((REPS, SM_COUNT_H200, warps), dtype=torch.int32, device="cuda")
    module.launch(f"jumps_{length}", SM_COUNT_H200, 32 * warps, [out, REPS, pieces, delay, 0])
    torch.cuda.synchronize()
    seen = out.cpu().numpy()
    groups = [slice(first, min(first + 4, warps)) for first in range(0, warps, 4)]
    return {
        "cycles": [float(np.median(seen[WARM:, :, group])) for group in groups],
        "first": [float(np.median(seen[0, :, group])) for group in groups],
    }


def main():
    """Run every case and write the result."""
    out = parse_out(__doc__)
    text = source()
    module = Module(text)
    results = {"jumps": JUMPS, "lengths": {}}
    for length in LENGTHS:
        results["lengths"][str(length)] = {
            name: {f"{pieces * PIECE_KIB}KiB": measure(module, length, warps, delay, pieces) for pieces in PIECES}
            for name, (warps, delay) in CASES.items()
        }
    write(out, "fetch_jumps", "kernels/calibrate/fetch_jumps.py", text, results)


if __name__ == "__main__":
    main()
