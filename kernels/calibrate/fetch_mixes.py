"""Instruction fetch behind work that is slower than it: is what is not in the nearest cache waited for, or hidden?

`python -m kernels.calibrate.fetch_mixes --out DIR` writes `DIR/fetch_mixes.json`: cycles from the start of a straight run to its
8th ... 512th instruction, after 0 to 128 KiB of other code, as fetch.py has it; for instructions that issue every cycle
(ffma), every two (fmnmx), about three (weights: two exponentials and what belongs to them in eight) and eight (ex2).
"""

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, parse_out, write
from .ptx import PRELUDE

AT = (8, 16, 32, 64, 128, 256, 512)
STAMPS = 12
REPS, WARM = 12, 4
PIECE_KIB = 8
PIECES = (0, 4, 8, 16)
MIXES = ("ffma", "fmnmx", "weights", "ex2")
CASES = {"one_warp": (1, 0), "one_warpgroup": (4, 0), "two_together": (8, 0), "two_600_apart": (8, 600), "three_together": (12, 0)}
"""Name: (warps, cycles by which the warpgroups behind the first begin later)."""


def source():
    """The whole CUDA source."""
    return PRELUDE + (HERE / "fetch_mixes.cu").read_text()


def measure(module, mix, warps, delay, pieces):
    """Median cycles at each place of the run by warpgroup, and those of the first run of a launch."""
    import torch

    out = torch.zeros((REPS, SM_COUNT_H200, warps, STAMPS), dtype=torch.int32, device="cuda")
    module.launch(f"fetch_{mix}", SM_COUNT_H200, 32 * warps, [out, REPS, pieces, delay])
    torch.cuda.synchronize()
    seen = out.cpu().numpy().astype(np.int64) & 0xFFFFFFFF
    since = (seen[..., 1 : 1 + len(AT)] - seen[..., :1]) & 0xFFFFFFFF
    groups = [slice(first, min(first + 4, warps)) for first in range(0, warps, 4)]
    return {
        "cycles": [np.median(since[WARM:, :, group], axis=(0, 1, 2)).tolist() for group in groups],
        "first": [np.median(since[0, :, group], axis=(0, 1)).tolist() for group in groups],
    }


def main():
    """Run every case and write the result."""
    out = parse_out(__doc__)
    text = source()
    module = Module(text)
    results = {"instructions": list(AT), "mixes": {}}
    for mix in MIXES:
        cases = results["mixes"][mix] = {}
        for name, (warps, delay) in CASES.items():
            cases[name] = {f"{pieces * PIECE_KIB}KiB": measure(module, mix, warps, delay, pieces) for pieces in PIECES}
    write(out, "fetch_mixes", "kernels/calibrate/fetch_mixes.py", text, results)


if __name__ == "__main__":
    main()
