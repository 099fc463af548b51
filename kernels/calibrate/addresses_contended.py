"""What instructions that are no arithmetic of a softmax cost beside WGMMA: addresses on the uniform datapath, integers.

`python -m kernels.calibrate.addresses_contended --out DIR` writes `DIR/addresses_contended.json`: cycles per copy of a pattern (one
warp a sub-partition) with idle and with full tensor cores, and the rate that these keep, as `pipes_contended` has them. WGMMA
and arithmetic slow each other since both want the register file; the uniform datapath has registers of its own.
"""

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, parse_out, spread, write
from .ptx import PRELUDE, wgmma_wrappers
from .sass import loop_counts

REPS, COPIES, CHAINS, GEMM_CYCLES = 64, 64, 4, 512
SMEM_BYTES = 3 * 64 * 128 * 2 + 88 * 1024 + 128
UNIFORM = 'asm volatile("{what} %0, %0, %1;" : "+r"(u) : "r"(s));'
LANES = 'asm volatile("{what}" : "+r"(v[{chain}]) : "r"(s), "r"(t));'
FLOATS = 'asm volatile("{what}" : "+f"(x[{chain}]) : "f"(a), "f"(b));'
ADD, XOR = UNIFORM.replace("{what}", "add.u32"), UNIFORM.replace("{what}", "xor.b32")
EX2 = FLOATS.replace("{what}", "ex2.approx.ftz.f32 %0, %0;")
FFMA = FLOATS.replace("{what}", "fma.rn.ftz.f32 %0, %0, %1, %2;")
PATTERNS = {
    "uniform": [ADD, XOR],
    "LOP3": [LANES.replace("{what}", "lop3.b32 %0, %0, %1, %2, 0x96;")],
    "IADD3": [LANES.replace("{what}", "add.u32 %0, %0, %1;")],
    "IMAD": [LANES.replace("{what}", "mad.lo.u32 %0, %0, %1, %2;")],
    "EX2": [EX2],
    "EX2+2 uniform": [EX2, ADD, XOR],
    "EX2+4FFMA": [EX2, *[FFMA] * 4],
    "EX2+4FFMA+2 uniform": [EX2, *[FFMA] * 4, ADD, XOR],
}


def identifier(name):
    """A C name for a pattern's kernel."""
    return name.replace("+", "_").replace(" ", "_").lower()


def repeated(name):
    """The pattern as a function of its repetitions, a lambda of CUDA C++; `u` and `s` are the same in all threads, of which a
    compiler makes one chain on the uniform datapath."""
    lines = [text.format(chain=copy % CHAINS) for copy in range(COPIES) for text in PATTERNS[name]]
    body = "\n      ".join(lines)
    return f"""[&](long long reps) {{
    u32 u = (u32)reps, v[{CHAINS}], s = (u32)gemms + 3, t = (u32)reps + threadIdx.x;
    float x[{CHAINS}], a = 0.3f + (float)reps * 1e-7f, b = 0.7f - (float)reps * 1e-7f, kept = 0.0f;
    for (int c = 0; c < {CHAINS}; ++c) {{ v[c] = threadIdx.x * 77 + c; x[c] = 0.1f + 0.01f * (float)v[c]; }}
#pragma unroll 1
    for (int i = 0; i < (int)reps; ++i) {{
      {body}
    }}
    for (int c = 0; c < {CHAINS}; ++c) kept += x[c] + (float)(u ^ v[c]);
    return kept;
  }}"""


def kernel(name):
    """One kernel: the pattern handed to `contended`."""
    return f"""
extern "C" __global__ void __launch_bounds__(384, 1) {identifier(name)}(u64* out, long long reps, long long gemms) {{
  contended<RS>(out, reps, gemms, {repeated(name)});
}}
"""


def source():
    """The whole CUDA source."""
    text = PRELUDE + wgmma_wrappers((128,)) + (HERE / "gemm.cuh").read_text() + (HERE / "pipes_contended.cu").read_text()
    return text + "".join(map(kernel, PATTERNS))


def main():
    """Run every pattern beside idle and busy tensor cores and write the result."""
    import torch

    out = parse_out(__doc__)
    text = source()
    module, results = Module(text), {"cycles_per_copy": {}}
    for name in PATTERNS:
        row = {}
        for gemms, label in ((0, "idle"), (400, "busy")):
            seen = torch.zeros((SM_COUNT_H200, 3, 4, 2), dtype=torch.int64, device="cuda")
            for _ in range(2):
                module.launch(identifier(name), SM_COUNT_H200, 384, [seen, REPS, gemms], SMEM_BYTES)
            torch.cuda.synchronize()
            cycles, done = seen.cpu().numpy().astype(np.float64).transpose(3, 0, 1, 2)
            row[f"cycles_{label}"] = spread(cycles[:, 0].max(axis=1) / (REPS * COPIES))
            if gemms:
                rate = done[:, 1:].mean(axis=2) / np.maximum(cycles[:, 1:].mean(axis=2), 1)
                row["tensor_utilisation"] = spread(GEMM_CYCLES * rate.sum(axis=1))
        results["cycles_per_copy"][name] = row
    results["sass_loops"] = loop_counts(module.cubin, [identifier(name) for name in PATTERNS])
    write(out, "addresses_contended", "kernels/calibrate/addresses_contended.py", text, results)


if __name__ == "__main__":
    main()
