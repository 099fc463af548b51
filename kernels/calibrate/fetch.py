"""Instruction fetch: a straight run of code that other code has pushed out of the instruction caches.

`python -m kernels.calibrate.fetch --out DIR` writes `DIR/fetch.json`: cycles from the start of the run to its 8th, 16th, ...
2048th FFMA (16 bytes each), after 0 to 256 KiB of other code; by one warp, one warpgroup, and a second one behind the first.
"""

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, parse_out, write
from .ptx import PRELUDE

AT = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
STAMPS = 12
REPS, WARM = 12, 4
PIECE_KIB = 8
PIECES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32)
CASES = {"one_warp": (1, 0), "one_warpgroup": (4, 0), "two_together": (8, 0), "two_200_apart": (8, 200), "two_600_apart": (8, 600)}
"""Name: (warps, cycles by which the second warpgroup is behind)."""


def source():
    """The whole CUDA source."""
    return PRELUDE + (HERE / "fetch.cu").read_text()


def measure(module, warps, delay, pieces):
    """Median cycles at each place of the run by warpgroup, and those of a kernel's very first run."""
    import torch

    out = torch.zeros((REPS, SM_COUNT_H200, warps, STAMPS), dtype=torch.int32, device="cuda")
    module.launch("fetch_code", SM_COUNT_H200, 32 * warps, [out, REPS, pieces, delay])
    torch.cuda.synchronize()
    seen = out.cpu().numpy().astype(np.int64) & 0xFFFFFFFF
    since = (seen[..., 1:10] - seen[..., :1]) & 0xFFFFFFFF
    groups = [slice(first, min(first + 4, warps)) for first in range(0, warps, 4)]
    return {
        "cycles": [np.median(since[WARM:, :, group], axis=(0, 1, 2)).tolist() for group in groups],
        "p95": [np.percentile(since[WARM:, :, group], 95, axis=(0, 1, 2)).tolist() for group in groups],
        "first": [np.median(since[0, :, group], axis=(0, 1)).tolist() for group in groups],
    }


def main():
    """Run every case and write the result."""
    out = parse_out(__doc__)
    text = source()
    module = Module(text)
    results = {"instructions": list(AT), "cases": {}}
    for name, (warps, delay) in CASES.items():
        results["cases"][name] = {f"{pieces * PIECE_KIB}KiB": measure(module, warps, delay, pieces) for pieces in PIECES}
    write(out, "fetch", "kernels/calibrate/fetch.py", text, results)


if __name__ == "__main__":
    main()
