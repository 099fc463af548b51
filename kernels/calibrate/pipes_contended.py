"""What an instruction of softmax costs while the tensor cores are busy, and what it costs them.

`python -m kernels.calibrate.pipes_contended --out DIR` writes `DIR/pipes_contended.json`: cycles per copy of a pattern
(one warp per sub-partition, eight independent chains) with idle and with full tensor cores, and the rate they keep.
"""

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, parse_out, spread, write
from .pipes import ALTERNATE, CHAINS, PATTERNS, UNROLL, identifier
from .ptx import PRELUDE, wgmma_wrappers

REPS = 64
GEMM_CYCLES = 512  # 8 x m64n128k16
SMEM_BYTES = 3 * 64 * 128 * 2 + 88 * 1024 + 128


def repeated(name):
    """The pattern as a function of its repetitions, a lambda of CUDA C++."""
    parts, body = PATTERNS[name], []
    for copy in range(UNROLL):
        for text in [parts[copy % len(parts)]] if name in ALTERNATE else parts:
            for chain in range(CHAINS):
                ptx = text.format(k=copy * CHAINS + chain)
                body.append(f'asm volatile("{ptx}" : "+f"(x[{chain}]) : "f"(a), "f"(b), "r"(n));')
    body = "\n      ".join(body)
    return f"""[&](long long reps) {{
    float x[{CHAINS}], a = 0.3f + (float)reps * 1e-7f, b = 0.7f - (float)reps * 1e-7f;
    for (int c = 0; c < {CHAINS}; ++c) x[c] = 0.1f + 0.01f * (float)(threadIdx.x + c);
    int n = (int)reps;
#pragma unroll 1
    for (long long i = 0; i < reps; ++i) {{
      n += 3;
      {body}
    }}
    float kept = 0.0f;
    for (int c = 0; c < {CHAINS}; ++c) kept += x[c];
    return kept;
  }}"""


def kernel(name, operand):
    """One kernel: the pattern handed to `contended`."""
    return f"""
extern "C" __global__ void __launch_bounds__(384, 1)
    {identifier(name)}_{operand.lower()}(u64* out, long long reps, long long gemms) {{
  contended<{operand}>(out, reps, gemms, {repeated(name)});
}}
"""


def source():
    """The whole CUDA source."""
    text = PRELUDE + wgmma_wrappers((128,)) + (HERE / "gemm.cuh").read_text() + (HERE / "pipes_contended.cu").read_text()
    return text + "".join(kernel(name, operand) for name in PATTERNS for operand in ("SS", "RS"))


def main():
    """Run every pattern beside idle and busy tensor cores and write the result."""
    import torch

    out = parse_out(__doc__)
    text = source()
    module = Module(text)
    results = {}
    for name, parts in PATTERNS.items():
        row = {"instructions_per_copy": 1 if name in ALTERNATE else len(parts)}
        for operand, gemms, label in (("SS", 0, "idle"), ("SS", 400, "busy_ss"), ("RS", 400, "busy_rs")):
            seen = torch.zeros((SM_COUNT_H200, 3, 4, 2), dtype=torch.int64, device="cuda")
            for _ in range(2):
                args = [seen, REPS, gemms]
                module.launch(f"{identifier(name)}_{operand.lower()}", SM_COUNT_H200, 384, args, SMEM_BYTES)
            torch.cuda.synchronize()
            cycles = seen.cpu().numpy().astype(np.float64)
            row[f"cycles_{label}"] = spread(cycles[:, 0, :, 0].max(axis=1) / (REPS * UNROLL * CHAINS))
            if gemms:
                rate = cycles[:, 1:, :, 1].mean(axis=2) / np.maximum(cycles[:, 1:, :, 0].mean(axis=2), 1)
                row[f"tensor_utilisation_{label}"] = spread(rate.sum(axis=1) * GEMM_CYCLES)
        results[name] = row
    write(out, "pipes_contended", "kernels/calibrate/pipes_contended.py", text, {"cycles_per_copy": results})


if __name__ == "__main__":
    main()
