"""What a kernel that does nothing takes under counters: cycles from launch to end, caches emptied, as attention is counted.

`python -m kernels.calibrate.launch_counted --out DIR` runs itself under Nsight Compute and writes `DIR/launch_counted.json`.
More CTAs than SMs say what a CTA adds that finds its SM free, and clusters what launching in pairs does.
"""

import os

from ...traces.nsight import CYCLES
from .harness import SM_COUNT_H200, Module, parse_out, spread, write
from .launch import LARGE_SMEM_BYTES, source
from .profiler import counters

CASES = {
    "1_cta": ("empty", 1, 32, 0),
    "132_small_ctas": ("empty", SM_COUNT_H200, 384, 0),
    "132_ctas": ("empty_large", SM_COUNT_H200, 384, LARGE_SMEM_BYTES),
    "528_ctas": ("empty_large", 4 * SM_COUNT_H200, 384, LARGE_SMEM_BYTES),
    "5280_ctas": ("empty_large", 40 * SM_COUNT_H200, 384, LARGE_SMEM_BYTES),
    "132_ctas_in_pairs": ("empty_cluster", SM_COUNT_H200, 384, LARGE_SMEM_BYTES),
}
"""Name: (kernel, CTAs, threads, bytes of shared memory)."""
LAUNCHES = 20
CHILD = "FASIM_LAUNCH_COUNTED_CHILD"


def launch_all():
    """The profiled process."""
    import torch

    module = Module(source())
    for kernel, grid, threads, smem in CASES.values():
        for _ in range(LAUNCHES):
            module.launch(kernel, grid, threads, [], smem)
    torch.cuda.synchronize()


def main():
    """Profile and write, or, inside the profiler, launch."""
    if os.environ.get(CHILD):
        launch_all()
        return
    out = parse_out(__doc__)
    seen = [each[CYCLES] for each in counters(__spec__.name, CHILD, "regex:empty", [CYCLES])]
    if len(seen) != LAUNCHES * len(CASES):
        raise RuntimeError(f"{len(seen)} launches were profiled where {LAUNCHES * len(CASES)} were made")
    cycles = {name: seen[place * LAUNCHES : (place + 1) * LAUNCHES] for place, name in enumerate(CASES)}
    write(out, "launch_counted", "kernels/calibrate/launch.cu", source(), {k: spread(v) for k, v in cycles.items()}, cycles)


if __name__ == "__main__":
    main()
