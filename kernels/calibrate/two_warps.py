"""What two warps of a sub-partition cost each other in arithmetic, beside idle and beside full tensor cores.

`python -m kernels.calibrate.two_warps --out DIR` writes `DIR/two_warps.json`: cycles that one warp a sub-partition takes for a
mix of instructions while the other does nothing ("one") or repeats its own ("two": both are given), and the rate that the
GEMMs of two further warpgroups keep. A mix is a string of instructions in the order in which the warp issues them, each on a
register last written seventeen instructions before: F (FFMA), A (FADD), M (FMNMX), E (EX2), C (F2FP). "E|F": EX2 in one warp,
FFMA in the other.
"""

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, parse_out, spread, write
from .ptx import PRELUDE, wgmma_wrappers
from .sass import loop_counts

REPS, GEMMS, REGISTERS, BODY = 64, 800, 17, 238
GEMM_CYCLES = 512  # 8 x m64n128k16
SMEM_BYTES = 3 * 64 * 128 * 2 + 88 * 1024 + 128
INSTRUCTION = {
    "F": "fma.rn.ftz.f32 %0, %0, %1, %2;",
    "A": "add.ftz.f32 %0, %0, %1;",
    "M": "max.ftz.f32 %0, %0, %3;",
    "E": "ex2.approx.ftz.f32 %0, %0;",
    "C": "{ .reg .b32 t; cvt.rn.f16x2.f32 t, %0, %1; mov.b32 %0, t; }",
}
WEIGHTS = "FEAFEAC"
"""Two exponentials of a softmax: scale and subtract, EX2, the row sum, and their conversion."""
ALONE = ("F", "M", "E", "C", "FE", "FFE", "FFFE", "FFFFE", "FFFFFFE", "ME", "MME", "CE", "MF", "MFF", "CFF", WEIGHTS)
MIXED = (("E", "F"), ("E", "M"), ("E", "C"), ("M", "F"), ("M", "C"), (WEIGHTS, "M"), (WEIGHTS, "F"), (WEIGHTS, "E"))


def kernels():
    """{name of a row: (entry point, mix of warpgroup 0, mix of warpgroup 3)}."""
    pairs = [(mix, mix) for mix in ALONE] + list(MIXED)
    names = [one if one == other else f"{one}|{other}" for one, other in pairs]
    return {name: (f"pair_{number}", *pair) for number, (name, pair) in enumerate(zip(names, pairs, strict=True))}


def copies(mix):
    """How often a loop's body repeats a mix."""
    return BODY // len(mix)


def repeated(mix):
    """The mix as a function of its repetitions, a lambda of CUDA C++."""
    body = [
        f'asm volatile("{INSTRUCTION[kind]}" : "+f"(x[{place % REGISTERS}]) : "f"(a), "f"(b), "f"(m));'
        for place, kind in enumerate(copies(mix) * mix)
    ]
    body = "\n      ".join(body)
    return f"""[&](long long reps) {{
    float x[{REGISTERS}], a = 0.3f + (float)reps * 1e-7f, b = 0.7f - (float)reps * 1e-7f, m = 0.5f;
    for (int c = 0; c < {REGISTERS}; ++c) x[c] = 0.1f + 0.01f * (float)(threadIdx.x + c);
#pragma unroll 1
    for (long long i = 0; i < reps; ++i) {{
      m += 0.01f;
      {body}
    }}
    float kept = 0.0f;
    for (int c = 0; c < {REGISTERS}; ++c) kept += x[c];
    return kept;
  }}"""


def source():
    """The whole CUDA source."""
    text = PRELUDE + wgmma_wrappers((128,)) + "".join((HERE / part).read_text() for part in ("gemm.cuh", "two_warps.cu"))
    for entry, one, other in kernels().values():
        text += f"""
extern "C" __global__ void __launch_bounds__(512, 1) {entry}(u64* out, long long reps, long long gemms, int two) {{
  contended(out, reps, gemms, two, {repeated(one)}, {repeated(other)});
}}
"""
    return text


def main():
    """Run every pair of mixes and write the result."""
    import torch

    out = parse_out(__doc__)
    text = source()
    module, results = Module(text), {}
    for name, (entry, one, other) in kernels().items():
        row = results[name] = {"local_bytes": module.registers(entry)[1]}
        for gemms, busy in ((0, "idle"), (GEMMS, "busy")):
            for two, warps in ((0, "one"), (1, "two")):
                seen = torch.zeros((SM_COUNT_H200, 4, 4, 2), dtype=torch.int64, device="cuda")
                for _ in range(2):
                    module.launch(entry, SM_COUNT_H200, 512, [seen, REPS, gemms, two], SMEM_BYTES)
                torch.cuda.synchronize()
                cycles = seen.cpu().numpy().astype(np.float64)
                row[f"cycles_{busy}_{warps}"] = spread(cycles[:, 0, :, 0].max(axis=1) / (REPS * copies(one)))
                if two:
                    rate = cycles[:, 3, :, 0] / np.maximum(cycles[:, 3, :, 1], 1)
                    row[f"cycles_{busy}_other"] = spread(rate.mean(axis=1) / copies(other))
                if gemms:
                    rate = cycles[:, 1:3, :, 1].mean(axis=2) / np.maximum(cycles[:, 1:3, :, 0].mean(axis=2), 1)
                    row[f"tensor_utilisation_{warps}"] = spread(rate.sum(axis=1) * GEMM_CYCLES)
    counts = loop_counts(module.cubin, [entry for entry, one, other in kernels().values() if one == other])
    write(out, "two_warps", "kernels/calibrate/two_warps.py", text, {"cycles_per_mix": results, "sass_loop": counts})


if __name__ == "__main__":
    main()
