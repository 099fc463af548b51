"""Latency of dependent instructions around a GEMM or a TMA copy, and of a draw from a queue in global memory.

`python -m kernels.calibrate.chains --out DIR` writes `DIR/chains.json`. One warp an SM (a named barrier: four); the cycles of
each copy in a loop of sixteen, the loop's own three instructions included.
"""

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, parse_out, spread, write
from .ptx import PRELUDE
from .sass import loop_counts

REPS, UNROLL = 64, 16
CHAINS = {  # name: (warps, a, b)
    "multiply": (1, 1, 3),
    "add_xor": (1, 1, 3),
    "shared_load": (1, 0, 0),
    "elect_branch": (1, 1, 3),
    "ballot": (1, 1, 3),
    "compare_branch": (1, 1, 2),
    "vote_branch": (1, 1, 2),
    "divide": (1, 1_000_003, 3),
    "reduce_add": (1, 1, 3),
    "fence_proxy": (1, 1, 3),
    "store_fence_proxy": (1, 1, 3),
    "barrier": (4, 1, 3),
    "warp_sync": (1, 1, 3),
    "barrier_ready": (1, 1, 3),
}
DRAWS = 32


def source():
    """The whole CUDA source."""
    return PRELUDE + (HERE / "chains.cu").read_text()


def latencies(module):
    """Cycles of one copy of each chain, median over SMs."""
    import torch

    found = {}
    for name, (warps, a, b) in CHAINS.items():
        out = torch.zeros(SM_COUNT_H200 * warps + 256, dtype=torch.int32, device="cuda")
        for _ in range(2):
            module.launch(name, SM_COUNT_H200, 32 * warps, [out, REPS, a, b])
        torch.cuda.synchronize()
        cycles = out.cpu().numpy()[: SM_COUNT_H200 * warps].reshape(SM_COUNT_H200, warps).max(axis=1)
        found[name] = round(float(np.median(cycles)) / (REPS * UNROLL), 2)
    return found


def draws(module):
    """Cycles of a draw: one CTA alone (each SM in turn), all CTAs at once for the first time, and all without a pause."""
    import torch

    queue = torch.zeros(64, dtype=torch.int32, device="cuda")
    alone = []
    for sm in range(SM_COUNT_H200):
        out = torch.zeros((SM_COUNT_H200, DRAWS), dtype=torch.int32, device="cuda")
        module.launch("draws", SM_COUNT_H200, 32, [out, queue, DRAWS, sm])
        alone.append(out[sm])
    alone = torch.stack(alone).cpu().numpy()
    together = []
    for _ in range(8):
        out = torch.zeros((SM_COUNT_H200, DRAWS), dtype=torch.int32, device="cuda")
        module.launch("draws", SM_COUNT_H200, 32, [out, queue, DRAWS, -1])
        together.append(out)
    together = torch.stack(together).cpu().numpy()
    return {
        "alone": spread(alone[:, 4:]),
        "alone_first": spread(alone[:, 0]),
        "all_at_once_first": spread(together[:, :, 0]),
        "all_without_pause": spread(together[:, :, 8:]),
    }


def main():
    """Run every chain and write the result."""
    out = parse_out(__doc__)
    text = source()
    module = Module(text)
    results = {"cycles": latencies(module), "draw_cycles": draws(module), "sass_loops": loop_counts(module.cubin, CHAINS)}
    write(out, "chains", "kernels/calibrate/chains.py", text, results)


if __name__ == "__main__":
    main()
