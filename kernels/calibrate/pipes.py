"""Issue cost and latency of the instructions of softmax, per sub-partition of an SM.

`python -m kernels.calibrate.pipes --out DIR` writes `DIR/pipes.json`: cycles per warp instruction at 1, 2, 3 and 4
warps per sub-partition with eight independent chains, and the dependent latency (one warp, one chain).
"""

import numpy as np

from .harness import SM_COUNT_H200, Module, parse_out, write
from .ptx import PRELUDE
from .sass import loop_counts

REPS, UNROLL, CHAINS = 64, 16, 8
WARPS_PER_PARTITION = (1, 2, 3, 4)

# Each pattern is one or more PTX instructions on the chain %0 (a 32-bit float register); %1 and %2 are loop-invariant
# floats, %3 a loop-varying int. `{k}` counts the unrolled copies, so that no two neighbours fold into one.
PATTERNS = {
    "FFMA": ["fma.rn.ftz.f32 %0, %0, %1, %2;"],
    "FADD": ["add.ftz.f32 %0, %0, %1;"],
    "FMUL": ["mul.ftz.f32 %0, %0, %1;"],
    "FMNMX": ["max.ftz.f32 %0, %0, %1;", "min.ftz.f32 %0, %0, %2;"],
    "MUFU.EX2": ["ex2.approx.ftz.f32 %0, %0;"],
    "F2FP": ["{{ .reg .b32 t; cvt.rn.f16x2.f32 t, %0, %1; mov.b32 %0, t; }}"],
    "SHFL.BFLY": ["shfl.sync.bfly.b32 %0, %0, 1, 31, -1;"],
    "ISETP+FSEL": ["{{ .reg .pred p; setp.lt.s32 p, %3, {k}; selp.f32 %0, %0, %1, p; }}"],
    "FSEL": ["{{ .reg .pred p; setp.lt.s32 p, %3, 5; selp.f32 %0, %0, %1, p; }}", "add.ftz.f32 %0, %0, %1;"],
    "EX2+FFMA": ["fma.rn.ftz.f32 %0, %0, %1, %2;", "ex2.approx.ftz.f32 %0, %0;"],
    "EX2+4FFMA": ["ex2.approx.ftz.f32 %0, %0;"] + 4 * ["fma.rn.ftz.f32 %0, %0, %1, %2;"],
    "EX2+8FFMA": ["ex2.approx.ftz.f32 %0, %0;"] + 8 * ["fma.rn.ftz.f32 %0, %0, %1, %2;"],
    "FMNMX+2FFMA": ["max.ftz.f32 %0, %0, %1;"] + 2 * ["fma.rn.ftz.f32 %0, %0, %1, %2;"],
    "F2FP+EX2": ["ex2.approx.ftz.f32 %0, %0;", "{{ .reg .b32 t; cvt.rn.f16x2.f32 t, %0, %1; mov.b32 %0, t; }}"],
}
ALTERNATE = {"FMNMX"}  # the patterns take turns over the unrolled copies; elsewhere all of them run in each copy


def identifier(name):
    """A C name for a pattern's kernel."""
    return name.replace("+", "_").replace(".", "_").lower()


def kernel(name, chains):
    """One kernel: UNROLL copies of the pattern on `chains` independent registers inside a loop."""
    parts, body = PATTERNS[name], []
    for copy in range(UNROLL):
        for text in [parts[copy % len(parts)]] if name in ALTERNATE else parts:
            for chain in range(chains):
                ptx = text.format(k=copy * chains + chain)
                body.append(f'asm volatile("{ptx}" : "+f"(x[{chain}]) : "f"(a), "f"(b), "r"(n));')
    body = "\n    ".join(body)
    return f"""
extern "C" __global__ void {identifier(name)}_{chains}(u64* out, long long reps, long long seed) {{
  float x[{chains}], a = (float)seed * 0.3f, b = (float)seed * 0.7f;
  for (int c = 0; c < {chains}; ++c) x[c] = 0.1f + 0.01f * (float)(threadIdx.x + c);
  int n = (int)seed;
  __syncthreads();
  u64 start = clock_wide();
#pragma unroll 1
  for (int i = 0; i < reps; ++i) {{
    n += 3;
    {body}
  }}
  float kept = 0.0f;
  for (int c = 0; c < {chains}; ++c) kept += x[c];
  if (kept == 1.2345f) out[0] = 1;
  u64 stop = clock_wide();
  if (threadIdx.x % 32 == 0) out[(long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32] = stop - start;
}}
"""


def source():
    """The whole CUDA source."""
    return PRELUDE + "".join(kernel(name, chains) for name in PATTERNS for chains in (1, CHAINS))


def main():
    """Run every pattern and write the result."""
    import torch

    out = parse_out(__doc__)
    text = source()
    module = Module(text)
    results = {}
    for name, parts in PATTERNS.items():
        row = {}
        for warps, chains in [(1, 1)] + [(w, CHAINS) for w in WARPS_PER_PARTITION]:
            cycles = torch.zeros(SM_COUNT_H200 * warps * 4, dtype=torch.int64, device="cuda")
            for _ in range(2):
                module.launch(f"{identifier(name)}_{chains}", SM_COUNT_H200, warps * 128, [cycles, REPS, 1])
            torch.cuda.synchronize()
            copies = REPS * UNROLL * chains * warps
            slowest = cycles.cpu().numpy().reshape(SM_COUNT_H200, -1).max(axis=1)
            per_copy = np.median(slowest / copies)
            row["latency" if chains == 1 else f"cycles_at_{warps}_warps"] = round(float(np.round(per_copy, 3)), 3)
        row["instructions_per_copy"] = 1 if name in ALTERNATE else len(parts)
        results[name] = row
    counts = loop_counts(module.cubin, [f"{identifier(name)}_{CHAINS}" for name in PATTERNS])
    write(out, "pipes", "kernels/calibrate/pipes.py", text, {"cycles_per_copy": results, "sass_loop": counts})


if __name__ == "__main__":
    main()
