"""Barrier hand-offs, register reallocation, launches and the mma.sync path.

`python -m kernels.calibrate.launch --out DIR` writes `DIR/launch.json`.
"""

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, parse_out, spread, write
from .ptx import PRELUDE

REPS = 512
LARGE_SMEM_BYTES = 200 * 1024


def source():
    """The whole CUDA source."""
    return PRELUDE + (HERE / "launch.cu").read_text()


def barriers(module):
    """Cycles of one hand-off and of each barrier operation alone."""
    import torch

    def measure(name, threads, words):
        out = torch.zeros((SM_COUNT_H200, words), dtype=torch.int32, device="cuda")
        args = [out] if name == "register_split" else [out, REPS]
        module.launch(name, SM_COUNT_H200, threads, args)
        torch.cuda.synchronize()
        return out.cpu().numpy()

    costs = measure("barrier_costs", 384, 4)
    split = measure("register_split", 384, 3)
    return {
        "mbarrier_handoff_cycles": spread(measure("mbarrier_handoff", 64, 1) / (2 * REPS)),
        "named_barrier_handoff_cycles": spread(measure("named_handoff", 256, 1) / (2 * REPS)),
        "bar_sync_384_threads_cycles": spread(costs[:, 0] / REPS),
        "mbarrier_arrive_cycles": spread(costs[:, 1] / REPS),
        "mbarrier_try_wait_ready_cycles": spread(costs[:, 2] / REPS),
        "try_wait_was_ready": bool((costs[:, 3] == REPS).all()),
        "setmaxnreg_dec_24_cycles": spread(split[:, 0]),
        "setmaxnreg_inc_240_cycles": spread(split[:, 1:]),
    }


def launch_overhead(module):
    """Microseconds that CUDA events see around empty kernels, one at a time and per kernel of a train of 200."""
    import torch

    found = {}
    cases = {
        "empty_1cta": ("empty", 1, 32, 0),
        "empty_132x384_200kb": ("empty_large", SM_COUNT_H200, 384, LARGE_SMEM_BYTES),
        "empty_528x384_200kb": ("empty_large", 4 * SM_COUNT_H200, 384, LARGE_SMEM_BYTES),
        "empty_5280x384_200kb": ("empty_large", 40 * SM_COUNT_H200, 384, LARGE_SMEM_BYTES),
        "empty_cluster2_132x384_200kb": ("empty_cluster", SM_COUNT_H200, 384, LARGE_SMEM_BYTES),
        "empty_cluster2_5280x384_200kb": ("empty_cluster", 40 * SM_COUNT_H200, 384, LARGE_SMEM_BYTES),
    }
    for name, (kernel, grid, threads, smem) in cases.items():
        single, train = [], []
        for count, samples in ((1, single), (200, train)):
            for _ in range(60):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(200_000 if count == 1 else 4_000_000)  # the queue fills while this one runs
                begin.record()
                for _ in range(count):
                    module.launch(kernel, grid, threads, [], smem)
                end.record()
                torch.cuda.synchronize()
                samples.append(begin.elapsed_time(end) * 1000 / count)
        found[name] = {"single_us": spread(single[5:]), "per_kernel_of_a_train_us": spread(train[5:])}
    return found


def cta_succession(module):
    """From one CTA's last instruction to the next one's first on the same SM, and the skew of the first wave."""
    import torch

    found = {}
    for name, waves in (("cta_stamps", 8), ("cluster_stamps", 8)):
        grid = SM_COUNT_H200 * waves
        for smem in (LARGE_SMEM_BYTES,):  # one CTA on an SM at a time
            out = torch.zeros((grid, 5), dtype=torch.int64, device="cuda")
            for _ in range(3):
                module.launch(name, grid, 384, [out, 20_000], smem)
            torch.cuda.synchronize()
            seen = out.cpu().numpy()
            gaps, first = [], []
            for sm in np.unique(seen[:, 0]):
                mine = seen[seen[:, 0] == sm]
                mine = mine[np.argsort(mine[:, 1])]
                first.append(mine[0, 3])
                gaps.extend(mine[1:, 1] - mine[:-1, 2])
            key = f"{name}_{smem // 1024}kb"
            found[key] = {"gap_cycles": spread(gaps), "first_wave_skew_ns": int(max(first) - min(first))}
            found[key]["skew_ns"] = spread(np.array(first) - min(first))
    return found


def mma_sync(module):
    """Fraction of the WGMMA peak (1024 fp16 FMA per cycle per sub-partition quartet) that mma.sync m16n8k16 reaches."""
    import torch

    found = {}
    for warps in (4, 8, 12, 16):
        out = torch.zeros((SM_COUNT_H200, warps), dtype=torch.int64, device="cuda")
        for _ in range(2):
            module.launch("mma_sync", SM_COUNT_H200, warps * 32, [out, REPS])
        torch.cuda.synchronize()
        slowest = out.cpu().numpy().max(axis=1)
        flop = 2 * 16 * 8 * 16 * 32 * REPS * warps
        found[f"{warps}_warps"] = {
            "flop_per_clk_per_sm": round(flop / float(np.median(slowest)), 1),
            "fraction_of_wgmma_peak": round(flop / float(np.median(slowest)) / 4096, 4),
            "cycles_per_instruction_per_partition": round(float(np.median(slowest)) / (REPS * 32 * warps / 4), 2),
        }
    return found


def main():
    """Run every part and write the result."""
    out = parse_out(__doc__)
    text = source()
    module = Module(text)
    results = {}
    for part in (barriers, launch_overhead, cta_succession, mma_sync):
        results[part.__name__] = part(module)
        write(out, "launch", "kernels/calibrate/launch.py", text, results)


if __name__ == "__main__":
    main()
