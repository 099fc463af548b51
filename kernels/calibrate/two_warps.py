"""What two warps of a sub-partition cost each other in arithmetic, beside idle and beside full tensor cores. Not recorded yet.

`python -m kernels.calibrate.two_warps --out DIR` writes `DIR/two_warps.json`: cycles per copy of a pattern of pipes.py in one warp
a sub-partition while the other does nothing ("one"), or repeats its own pattern until the first is done ("two"), and the rate
that the GEMMs of two further warpgroups keep. "A|B" are different patterns in the two. Takes seconds on an H200.
"""

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, parse_out, spread, write
from .pipes import CHAINS, PATTERNS, UNROLL
from .pipes_contended import GEMM_CYCLES, REPS, SMEM_BYTES, repeated
from .ptx import PRELUDE, wgmma_wrappers

GEMMS = 800
ALONE = ("FFMA", "FMNMX", "MUFU.EX2", "F2FP", "EX2+FFMA", "EX2+4FFMA", "FMNMX+2FFMA", "F2FP+EX2")
MIXED = (("MUFU.EX2", "FFMA"), ("MUFU.EX2", "FMNMX"), ("EX2+4FFMA", "FMNMX"), ("EX2+4FFMA", "MUFU.EX2"))


def kernels():
    """{name of a row: (entry point, pattern of warpgroup 0, pattern of warpgroup 3)}."""
    pairs = [(name, name) for name in ALONE if name in PATTERNS] + [pair for pair in MIXED if set(pair) <= PATTERNS.keys()]
    names = [one if one == other else f"{one}|{other}" for one, other in pairs]
    return {name: (f"pair_{number}", *pair) for number, (name, pair) in enumerate(zip(names, pairs, strict=True))}


def source():
    """The whole CUDA source."""
    text = PRELUDE + wgmma_wrappers((128,)) + "".join((HERE / part).read_text() for part in ("gemm.cuh", "two_warps.cu"))
    for entry, one, other in kernels().values():
        text += f"""
extern "C" __global__ void __launch_bounds__(512, 1) {entry}(u64* out, long long reps, long long gemms, int two) {{
  contended(out, reps, gemms, two, {repeated(one)}, {repeated(other)});
}}
"""
    return text


def main():
    """Run every pair of patterns and write the result."""
    import torch

    out = parse_out(__doc__)
    text = source()
    module, results = Module(text), {}
    for name, (entry, _, _) in kernels().items():
        row = results[name] = {}
        for gemms, busy in ((0, "idle"), (GEMMS, "busy")):
            for two, warps in ((0, "one"), (1, "two")):
                seen = torch.zeros((SM_COUNT_H200, 4, 4, 2), dtype=torch.int64, device="cuda")
                for _ in range(2):
                    module.launch(entry, SM_COUNT_H200, 512, [seen, REPS, gemms, two], SMEM_BYTES)
                torch.cuda.synchronize()
                cycles = seen.cpu().numpy().astype(np.float64)
                row[f"cycles_{busy}_{warps}"] = spread(cycles[:, 0, :, 0].max(axis=1) / (REPS * UNROLL * CHAINS))
                if gemms:
                    rate = cycles[:, 1:3, :, 1].mean(axis=2) / np.maximum(cycles[:, 1:3, :, 0].mean(axis=2), 1)
                    row[f"tensor_utilisation_{warps}"] = spread(rate.sum(axis=1) * GEMM_CYCLES)
    write(out, "two_warps", "kernels/calibrate/two_warps.py", text, results)


if __name__ == "__main__":
    main()
