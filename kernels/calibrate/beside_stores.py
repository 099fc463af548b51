"""What stores to shared memory cost exponentials, loads and GEMMs beside them, and GEMMs of one kind those of another.

`python -m kernels.calibrate.beside_stores --out DIR` writes `DIR/beside_stores.json`. In a backward a warpgroup takes its
exponentials, and reads LSE and delta from shared memory, while another stores dQ and two or three have GEMMs under way. Warpgroup
0 repeats a pattern (cycles a copy, of one warp a sub-partition), 3 stores (bytes a cycle of the SM), 1 and 2 multiply, of one kind
or two.
"""

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, parse_out, spread, write
from .ptx import PRELUDE, wgmma_wrappers
from .sass import loop_counts

PATTERNS = ("none", "EX2", "FFMA+EX2", "F2FP", "LDS", "LDS shared")
STORES = ("none", "sts64", "sts128", "stsm")
"""In the order of the enums of beside_stores.cu; a turn of any is 16 KiB."""
KINDS = {"ss64": (64, "SS"), "ss128": (128, "SS"), "rs64": (64, "RS"), "rs128": (128, "RS")}
PAIRS = (
    ("ss64", "ss64"), ("rs128", "rs128"), ("ss64", "rs128"), ("ss128", "ss128"), ("rs64", "rs64"), ("ss64", "ss128"),
    ("ss64", "rs64"), ("ss128", "rs128"),
)  # fmt: skip
WHOLE = PAIRS[:3]
"""Of which all patterns are run beside all stores; of the others the GEMMs alone and beside stores."""
GEMMS, STEPS, STORED_BYTES = 300, 8, 16 * 1024
SMEM_BYTES = 3 * 64 * 128 * 2 + 88 * 1024 + 2 * STORED_BYTES + 128


def entry(pair):
    """The kernel of two kinds of GEMM."""
    return "beside_" + "_".join(pair)


def source():
    """The whole CUDA source."""
    text = PRELUDE + wgmma_wrappers((64, 128)) + "".join((HERE / part).read_text() for part in ("gemm.cuh", "beside_stores.cu"))
    return text + "".join(f"BESIDE({entry(pair)}, {', '.join(f'{n}, {a}' for n, a in map(KINDS.get, pair))})\n" for pair in PAIRS)


def measured(module, pair, pattern, stores, gemms):
    """One launch, behind one that warms up."""
    import torch

    seen = torch.zeros((SM_COUNT_H200, 4, 4, 2), dtype=torch.int64, device="cuda")
    for _ in range(2):
        args = [seen, PATTERNS.index(pattern), STORES.index(stores), gemms]
        module.launch(entry(pair), SM_COUNT_H200, 512, args, SMEM_BYTES)
    torch.cuda.synchronize()
    cycles, units = seen.cpu().numpy().astype(np.float64).transpose(3, 0, 1, 2)
    found = {}
    if pattern != "none":
        found["cycles_per_copy"] = spread(cycles[:, 0].max(axis=1) / units[:, 0].mean(axis=1))
    if stores != "none":
        found["stored_bytes_per_clk"] = spread(STORED_BYTES * units[:, 3].mean(axis=1) / cycles[:, 3].max(axis=1))
    if gemms:
        per_cycle = units.mean(axis=2) / np.maximum(cycles.mean(axis=2), 1)
        busy = [KINDS[kind][0] / 2 * STEPS * per_cycle[:, 1 + n] for n, kind in enumerate(pair)]
        found["tensor_utilisation"] = spread(sum(busy))
        found["tensor_utilisation_first"] = spread(busy[0])
    return found


def main():
    """Run everything and write the result."""
    out = parse_out(__doc__)
    text = source()
    module, results = Module(text), {"without": {}, "beside": {}}
    for pattern in PATTERNS:
        for stores in STORES:
            if pattern != "none" or stores != "none":
                results["without"][f"{pattern} {stores}"] = measured(module, PAIRS[0], pattern, stores, 0)
    for pair in PAIRS:
        for pattern in PATTERNS if pair in WHOLE else PATTERNS[:1]:
            for stores in STORES:
                results["beside"][f"{' '.join(pair)}, {pattern}, {stores}"] = measured(module, pair, pattern, stores, GEMMS)
    results["local_bytes"] = {entry(pair): module.registers(entry(pair))[1] for pair in PAIRS}
    results["sass_loop"] = loop_counts(module.cubin, [entry(PAIRS[0])])
    write(out, "beside_stores", "kernels/calibrate/beside_stores.py", text, results)


if __name__ == "__main__":
    main()
