"""Whose lines leave L2 when loads say so: keys that all SMs read again and again beside queries that pass by and results.

`python -m kernels.calibrate.l2_hints --out DIR` runs itself under Nsight Compute and writes `DIR/l2_hints.json`. What is kept are
slices of 256 bytes of every 4 KiB, as one head of attention has; amid them every SM reads boxes of its own once, or writes some,
or both. Loads carry no hint, or those of FlashAttention-3's mainloop: keys leave last, queries first. Bytes from and to HBM of
one warm pass, over what is kept and over what passes.
"""

import os

from .harness import HERE, SM_COUNT_H200, Module, parse_out, tensor_map_2d, write
from .profiler import counters
from .ptx import PRELUDE

MEBIBYTE = 1 << 20
SIZES_MIB = (16, 20, 24, 28)
STREAMS = {"reads": (4, 0), "writes": (0, 4), "both": (4, 4)}
"""Boxes of 16 KiB that each SM reads, and writes, in one pass: 8.3 MiB of all SMs."""
NORMAL, FIRST, LAST = 0x1000000000000000, 0x12F0000000000000, 0x14F0000000000000
"""Cache policies as CUTLASS names them: EVICT_NORMAL, EVICT_FIRST, EVICT_LAST (cute/arch/copy_sm90_desc.hpp)."""
HINTS = {"none": (NORMAL, NORMAL), "passing_first": (NORMAL, FIRST), "kept_last": (LAST, NORMAL), "both": (LAST, FIRST)}
PASSES = (2, 6)
STAGES = 8
WIDTH, ROW, BOX_ROWS, BOX_BYTES = 256, 4096, 128, 128 * 128
METRICS = ["dram__bytes_read.sum", "dram__bytes_write.sum"]
CHILD = "FASIM_L2_HINTS_CHILD"


def source():
    """The whole CUDA source."""
    return PRELUDE + (HERE / "l2_hints.cu").read_text()


def launches():
    """Every (size, stream, hints, passes), in the order in which the child launches them."""
    return [(size, stream, hint, passes) for size in SIZES_MIB for stream in STREAMS for hint in HINTS for passes in PASSES]


def launch_all():
    """The profiled process: one launch of each case."""
    import torch

    module = Module(source())
    out = torch.zeros(SM_COUNT_H200, dtype=torch.int64, device="cuda")
    kept = torch.zeros((max(SIZES_MIB) * MEBIBYTE // WIDTH, ROW // 2), dtype=torch.float16, device="cuda").random_(-8, 8)
    rows = max(PASSES) * max(reads for reads, _ in STREAMS.values()) * SM_COUNT_H200 * BOX_ROWS
    read, written = (torch.zeros((rows, 64), dtype=torch.float16, device="cuda") for _ in range(2))
    maps = [tensor_map_2d(each, BOX_ROWS, 64) for each in (kept, read, written)]
    for size, stream, hint, passes in launches():
        shape = [size * MEBIBYTE // WIDTH // BOX_ROWS, WIDTH // 128, passes, *STREAMS[stream], STAGES]
        module.launch("keep_and_pass", SM_COUNT_H200, 32, [out, *maps, *shape, *HINTS[hint]], (STAGES + 1) * BOX_BYTES)
    torch.cuda.synchronize()


def main():
    """Profile and write, or, inside the profiler, launch."""
    if os.environ.get(CHILD):
        launch_all()
        return
    out = parse_out(__doc__)
    seen = counters(__spec__.name, CHILD, "keep_and_pass", METRICS)
    moved = {case: [row[metric] for metric in METRICS] for case, row in zip(launches(), seen, strict=True)}
    results = {}
    for size in SIZES_MIB:
        for stream, (reads, writes) in STREAMS.items():
            for hint in HINTS:
                few, many = (moved[size, stream, hint, passes] for passes in PASSES)
                read, written = ((b - a) / (PASSES[1] - PASSES[0]) for a, b in zip(few, many, strict=True))
                passed, sent = (boxes * SM_COUNT_H200 * BOX_BYTES for boxes in (reads, writes))
                found = {"warm_over_kept": round((read - passed) / (size * MEBIBYTE), 4)}
                if sent:
                    found["written_over_sent"] = round(written / sent, 4)
                results.setdefault(f"{size}MiB", {}).setdefault(stream, {})[hint] = found
    write(out, "l2_hints", "kernels/calibrate/l2_hints.py", source(), results, {"hbm_bytes": [[*k, *v] for k, v in moved.items()]})


if __name__ == "__main__":
    main()
