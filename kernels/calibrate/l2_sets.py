"""Do slices of rows fill the sets of L2 as evenly as a contiguous buffer? HBM bytes per traversal of slices of growing size.

`python -m kernels.calibrate.l2_sets --out DIR` runs itself under Nsight Compute and writes `DIR/l2_sets.json`. A slice is what
one head has in a (batch, seqlen, heads, dim) tensor: 128, 256 or 512 bytes of every 4 KiB; beside it the same sizes without
gaps. Every SM reads all of it in the same order, twice and six times; the difference over four is one warm traversal.
"""

import os

from .harness import HERE, SM_COUNT_H200, Module, parse_out, tensor_map_2d, write
from .profiler import counters
from .ptx import PRELUDE

MEBIBYTE = 1 << 20
SIZES_MIB = (16, 20, 22, 24, 26, 28, 30, 32, 34, 36, 40)
PATTERNS = {"contiguous_128": (128, 128), "slice_128": (128, 4096), "slice_256": (256, 4096), "slice_512": (512, 4096)}
"""Name: (bytes read of a row, bytes of a row)."""
PASSES = (2, 6)
STAGES = 8
HBM_READ = "dram__bytes_read.sum"
CHILD = "FASIM_L2_SETS_CHILD"


def source():
    """The whole CUDA source."""
    return PRELUDE + (HERE / "l2_sets.cu").read_text()


def launches():
    """Every (pattern, size, passes), in the order in which the child launches them."""
    return [(pattern, size, passes) for pattern in PATTERNS for size in SIZES_MIB for passes in PASSES]


def launch_all():
    """The profiled process: one launch of each case."""
    import torch

    module = Module(source())
    out = torch.zeros(SM_COUNT_H200, dtype=torch.int64, device="cuda")
    for width, row in PATTERNS.values():
        data = torch.zeros((max(SIZES_MIB) * MEBIBYTE // width, row // 2), dtype=torch.float16, device="cuda")
        data.random_(-8, 8)
        tensor_map = tensor_map_2d(data, 128, 64)
        for size in SIZES_MIB:
            for passes in PASSES:
                args = [out, tensor_map, size * MEBIBYTE // width // 128, width // 128, passes, STAGES]
                module.launch("read_slices", SM_COUNT_H200, 32, args, STAGES * 128 * 128)
        torch.cuda.synchronize()


def main():
    """Profile and write, or, inside the profiler, launch."""
    if os.environ.get(CHILD):
        launch_all()
        return
    out = parse_out(__doc__)
    seen = counters(__spec__.name, CHILD, "read_slices", [HBM_READ])
    read = dict(zip(launches(), (row[HBM_READ] for row in seen), strict=True))
    results = {}
    for pattern in PATTERNS:
        results[pattern] = {}
        for size in SIZES_MIB:
            few, many = (read[pattern, size, passes] for passes in PASSES)
            warm = (many - few) / (PASSES[1] - PASSES[0])
            cold = few - warm * (PASSES[0] - 1)
            whole = size * MEBIBYTE
            results[pattern][f"{size}MiB"] = {"warm_over_size": round(warm / whole, 4), "cold_over_size": round(cold / whole, 4)}
    write(out, "l2_sets", "kernels/calibrate/l2_sets.py", source(), results, {"hbm_read_bytes": [[*k, v] for k, v in read.items()]})


if __name__ == "__main__":
    main()
