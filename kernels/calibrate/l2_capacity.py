"""The capacity of L2 as attention sees it: HBM bytes read per traversal of a buffer of growing size.

`python -m kernels.calibrate.l2_capacity --out DIR` runs itself under Nsight Compute and writes `DIR/l2_capacity.json`.
Patterns: `same` (every SM reads the whole buffer in the same order, as K and V of one head), `four_groups` (four
heads at once), and `disjoint` (each SM its own slice). Two launches of each, with 2 and 6 traversals: their
difference over four is one warm traversal.
"""

import os

from .harness import SM_COUNT_H200, Module, parse_out, tensor_map_2d, write
from .memory import COLS, MEBIBYTE, STAGE_BYTES, matrix, source
from .profiler import counters

SIZES_MIB = (8, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 64, 80, 96, 128)
PATTERNS = {"same": 1, "four_groups": 4, "disjoint": SM_COUNT_H200}
PASSES = (2, 6)
METRICS = {
    "hbm_read_bytes": "dram__bytes_read.sum",
    "l2_read_sectors": "lts__t_sectors_op_read.sum",
    "l2_hit_pct": "lts__t_sector_hit_rate.pct",
    "cycles": "sm__cycles_elapsed.max",
}
CHILD = "FASIM_L2_CAPACITY_CHILD"


def launches():
    """Every (size, pattern, passes), in the order in which the child launches them."""
    return [(size, pattern, passes) for size in SIZES_MIB for pattern in PATTERNS for passes in PASSES]


def launch_all():
    """The profiled process: one launch of each case."""
    import torch

    module = Module(source())
    data = matrix(max(SIZES_MIB))
    tensor_map = tensor_map_2d(data, 128, COLS)
    out = torch.zeros((SM_COUNT_H200, 2), dtype=torch.int64, device="cuda")
    for size, pattern, passes in launches():
        tiles = size * MEBIBYTE // STAGE_BYTES
        args = [out, tensor_map, tiles, PATTERNS[pattern], passes, 8]
        module.launch("tma_stream", SM_COUNT_H200, 32, args, 8 * STAGE_BYTES)
    torch.cuda.synchronize()


def profile():
    """A {name: value} per launch, counted under ncu."""
    seen = counters(__spec__.name, CHILD, "tma_stream", list(METRICS.values()))
    return [{name: row[metric] for name, metric in METRICS.items()} for row in seen]


def main():
    """Profile and write, or, inside the profiler, launch."""
    if os.environ.get(CHILD):
        launch_all()
        return
    out = parse_out(__doc__)
    counted = dict(zip(launches(), profile(), strict=True))
    results = {}
    for size in SIZES_MIB:
        for pattern, groups in PATTERNS.items():
            few, many = (counted[size, pattern, passes] for passes in PASSES)
            span = PASSES[1] - PASSES[0]
            tiles = size * MEBIBYTE // STAGE_BYTES // groups * groups
            warm = (many["hbm_read_bytes"] - few["hbm_read_bytes"]) / span
            cold = few["hbm_read_bytes"] - warm * (PASSES[0] - 1)
            results[f"{size}MiB_{pattern}"] = {
                "warm_hbm_bytes_over_buffer": round(warm / (tiles * STAGE_BYTES), 4),
                "cold_hbm_bytes_over_buffer": round(cold / (tiles * STAGE_BYTES), 4),
                "l2_read_bytes_per_pass": round((many["l2_read_sectors"] - few["l2_read_sectors"]) / span * 32),
                "l2_hit_pct": many["l2_hit_pct"],
                "cycles_per_warm_pass": round((many["cycles"] - few["cycles"]) / span),
            }
    raw = {"launches": [[*case, *(counts[name] for name in METRICS)] for case, counts in counted.items()]}
    write(out, "l2_capacity", "kernels/calibrate/l2_capacity.py", source(), results, raw)


if __name__ == "__main__":
    main()
