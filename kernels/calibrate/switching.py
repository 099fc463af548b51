"""A warpgroup's second GEMM behind its first: when is it issued, if it goes to the same accumulators or to others?

`python -m kernels.calibrate.switching --out DIR` writes `DIR/switching.json`. GEMM A and GEMM B, a commit group each, are
issued without a wait between; then a wait for A, then for B. Alone, and beside another warpgroup's stream of GEMMs.
"""

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, parse_out, write
from .ptx import PRELUDE, wgmma_wrappers

SLOTS, A_STEPS, A_COMMITTED, B_STEPS, B_COMMITTED, A_DONE, B_DONE, B_FENCED = 40, 1, 17, 18, 34, 35, 36, 37
SMEM_BYTES = 3 * 64 * 128 * 2 + 88 * 1024
REPS, WARM = 24, 8
GEMMS = {  # operands of A and B: (from, n, k steps)
    "d128_s_s": (("SS", 128, 8), ("SS", 128, 8)),
    "d128_s_pv": (("SS", 128, 8), ("RS", 128, 8)),
    "d128_pv_s": (("RS", 128, 8), ("SS", 128, 8)),
    "d128_pv_pv": (("RS", 128, 8), ("RS", 128, 8)),
    "d64_s_pv": (("SS", 96, 4), ("RS", 64, 6)),
    "d64_pv_s": (("RS", 64, 4), ("SS", 64, 4)),
    "d256_s_pv": (("SS", 64, 16), ("RS", 256, 4)),
    "d256_pv_s": (("RS", 256, 3), ("SS", 48, 16)),
    "short_s_s": (("SS", 128, 1), ("SS", 128, 8)),
}
# gemms, accumulators, fence before B, gap in cycles, a stamp each k step, k steps the other has issued ahead (0: a stream)
CASES = [(name, "OTHER", fence, 0, stamped, 0) for name in GEMMS for fence in (True, False) for stamped in (False, True)]
CASES += [(name, "SAME", True, 0, stamped, 0) for name in ("d128_s_s", "d128_s_pv", "d128_pv_pv") for stamped in (False, True)]
CASES += [("d128_s_pv", "OTHER", True, gap, False, 0) for gap in (200, 400, 600)]
AHEAD = ("d128_s_pv", "d128_pv_s", "d256_s_pv", "d256_pv_s", "short_s_s")
CASES += [(name, "OTHER", fence, 0, True, ahead) for name in AHEAD for fence in (True, False) for ahead in (8, 16, 32)]


def name_of(gemms, accumulators, fence, gap, stamped, ahead):
    """The kernel of a case, such as `d128_s_pv_other_stamped`."""
    marks = "_unfenced" * (not fence) + f"_gap{gap}" * bool(gap) + "_stamped" * stamped + f"_behind{ahead}" * bool(ahead)
    return f"{gemms}_{accumulators.lower()}{marks}"


def source():
    """The whole CUDA source."""
    widths = {n for pair in GEMMS.values() for _, n, _ in pair} | {128}
    text = PRELUDE + wgmma_wrappers(widths) + (HERE / "gemm.cuh").read_text() + (HERE / "switching.cu").read_text()
    lines = []
    for case in CASES:
        gemms, accumulators, fence, gap, stamped, ahead = case
        shapes = ", ".join(f"{n}, {steps}, {operands}" for operands, n, steps in GEMMS[gemms])
        lines.append(f"SWITCHED({name_of(*case)}, {shapes}, {accumulators}, {int(fence)}, {gap}, {int(stamped)}, {ahead})\n")
    return text + "".join(lines)


def measure(module, case, groups):
    """Median cycles since the start: each k step's issue, the commits and the waits; `groups` 2 runs the other warpgroup too."""
    import torch

    out = torch.zeros((REPS, SM_COUNT_H200, 4, SLOTS), dtype=torch.int32, device="cuda")
    module.launch(name_of(*case), SM_COUNT_H200, 128 * groups, [out, REPS], SMEM_BYTES)
    torch.cuda.synchronize()
    seen = (out.cpu().numpy()[WARM:].astype(np.int64) & 0xFFFFFFFF).reshape(-1, SLOTS)
    since = (seen - seen[:, :1]) & 0xFFFFFFFF
    low, middle, high = np.percentile(since, [10, 50, 90], axis=0)
    (_, _, steps_a), (_, _, steps_b) = GEMMS[case[0]]
    found = {}
    if case[4]:
        found["a_issued"] = middle[A_STEPS : A_STEPS + steps_a].tolist()
        found["b_fenced"] = middle[B_FENCED]
        found["b_issued"] = middle[B_STEPS : B_STEPS + steps_b].tolist()
    places = {"a_committed": A_COMMITTED, "b_committed": B_COMMITTED, "a_done": A_DONE, "b_done": B_DONE}
    for name, place in places.items():
        found[name] = {"median": middle[place], "p10": low[place], "p90": high[place]}
    return found


def main():
    """Run every case alone and beside a stream of GEMMs, and write the result."""
    out = parse_out(__doc__)
    text = source()
    module = Module(text)
    results = {
        f"{name_of(*case)}{suffix}": measure(module, case, groups)
        for case in CASES
        for groups, suffix in ([(2, "")] if case[-1] else [(1, ""), (2, "__beside_gemms")])
    }
    write(out, "switching", "kernels/calibrate/switching.py", text, {"cases": results})


if __name__ == "__main__":
    main()
