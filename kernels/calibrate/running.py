"""The running softmax, one to three warpgroups of it, alone and beside the GEMMs of one or two more.

`python -m kernels.calibrate.running --out DIR` writes `DIR/running.json`. Two GEMM warpgroups keep the tensor cores busy
without a gap; one leaves them idle while it waits.
"""

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, parse_out, spread, write
from .ptx import PRELUDE, wgmma_wrappers

REPS = 400
SMEM_BYTES = 3 * 64 * 128 * 2 + 88 * 1024 + 128
WIDTHS = (48, 64, 96, 128)
CASES = [(n, softmaxes, gemms) for n in WIDTHS for softmaxes in (1, 2, 3) for gemms in (0, 1, 2) if softmaxes + gemms <= 4]
CASES += [(128, 0, 1), (128, 0, 2)]


def source():
    """The whole CUDA source."""
    parts = [(HERE / part).read_text() for part in ("gemm.cuh", "softmax.cuh", "running.cuh", "running.cu")]
    return PRELUDE + wgmma_wrappers((128,)) + "".join(parts) + "".join(f"RUNNING({n}, {s}, {g})\n" for n, s, g in CASES)


def main():
    """Run every case and write the result."""
    import torch

    out = parse_out(__doc__)
    text = source()
    module = Module(text)
    results = {}
    for n, softmaxes, gemms in CASES:
        groups, name = softmaxes + gemms, f"running_n{n}_{softmaxes}_{gemms}"
        seen = torch.zeros(SM_COUNT_H200 * groups * 4 * 2, dtype=torch.int64, device="cuda")
        for _ in range(2):
            module.launch(name, SM_COUNT_H200, groups * 128, [seen, REPS], SMEM_BYTES)
        torch.cuda.synchronize()
        cycles = seen.cpu().numpy().reshape(SM_COUNT_H200, groups, 4, 2).astype(np.float64)
        per_unit = cycles[..., 0] / np.maximum(cycles[..., 1], 1)
        row = {"local_bytes": module.registers(name)[1]}
        if softmaxes:
            row["softmax_cycles"] = spread(per_unit[:, :softmaxes])
        if gemms:
            row["gemm_cycles"] = spread(per_unit[:, softmaxes:])
        results[f"n{n}_{softmaxes}softmax_{gemms}gemm"] = row
    write(out, "running", "kernels/calibrate/running.py", text, {"cases": results})


if __name__ == "__main__":
    main()
