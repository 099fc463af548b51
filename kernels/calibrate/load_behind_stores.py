"""How long a load from shared memory takes behind the stores of another warp of its sub-partition, beside GEMMs.

`python -m kernels.calibrate.load_behind_stores --out DIR` writes `DIR/load_behind_stores.json`: cycles of a load that waits for
the one before, by one warp or by four, alone, behind a warpgroup's stores, beside two warpgroups' GEMMs, and both; and what the
stores and the GEMMs keep.
"""

import numpy as np

from .beside_stores import GEMMS, KINDS, PAIRS, SMEM_BYTES, STEPS, STORED_BYTES, STORES
from .harness import HERE, SM_COUNT_H200, Module, parse_out, spread, write
from .ptx import PRELUDE, wgmma_wrappers

FILES = ("gemm.cuh", "beside_stores.cu", "load_behind_stores.cu")


def entry(pair):
    """The kernel of two kinds of GEMM."""
    return "behind_" + "_".join(pair)


def source():
    """The whole CUDA source."""
    text = PRELUDE + wgmma_wrappers((64, 128)) + "".join((HERE / part).read_text() for part in FILES)
    return text + "".join(
        f"BEHIND({entry(pair)}, {', '.join(f'{n}, {a}' for n, a in map(KINDS.get, pair))})\n" for pair in PAIRS[:4]
    )


def measured(module, pair, lone, stores, gemms):
    """One launch, behind one that warms up."""
    import torch

    seen = torch.zeros((SM_COUNT_H200, 4, 4, 2), dtype=torch.int64, device="cuda")
    for _ in range(2):
        module.launch(entry(pair), SM_COUNT_H200, 512, [seen, lone, STORES.index(stores), gemms], SMEM_BYTES)
    torch.cuda.synchronize()
    cycles, units = seen.cpu().numpy().astype(np.float64).transpose(3, 0, 1, 2)
    found = {"cycles_per_load": spread(cycles[:, 0, 0] / units[:, 0, 0])}
    if stores != "none":
        found["stored_bytes_per_clk"] = spread(STORED_BYTES * units[:, 3].mean(axis=1) / cycles[:, 3].max(axis=1))
    if gemms:
        per_cycle = units.mean(axis=2) / np.maximum(cycles.mean(axis=2), 1)
        busy = [KINDS[kind][0] / 2 * STEPS * per_cycle[:, 1 + n] for n, kind in enumerate(pair)]
        found["tensor_utilisation"] = spread(sum(busy))
    return found


def main():
    """Run everything and write the result."""
    out = parse_out(__doc__)
    text = source()
    module, results = Module(text), {}
    for lone, who in ((1, "one warp"), (0, "four warps")):
        for stores in STORES:
            results[f"{who}, no GEMMs, {stores}"] = measured(module, PAIRS[0], lone, stores, 0)
            for pair in PAIRS[:4]:
                results[f"{who}, {' '.join(pair)}, {stores}"] = measured(module, pair, lone, stores, GEMMS)
    write(out, "load_behind_stores", "kernels/calibrate/load_behind_stores.py", text, results)


if __name__ == "__main__":
    main()
