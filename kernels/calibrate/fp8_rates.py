"""What an FP8 kernel's instructions cost on an SM, alone and beside e4m3 WGMMA, and the rate of e4m3 WGMMA itself.

`python -m kernels.calibrate.fp8_rates --out DIR` writes `DIR/fp8_rates.json`: cycles per copy of a pattern by one warp of
each sub-partition (eight independent chains; LDSM and STSM at addresses without bank conflicts), with no, one and two
warpgroups of GEMMs beside it, the share of their rate that the tensor cores keep, and cycles per k step of GEMMs alone.
"""

import numpy as np

from ..cuda.fp8.wgmma import wrappers
from .harness import HERE, SM_COUNT_H200, Module, parse_out, spread, write
from .pipes import identifier
from .ptx import PRELUDE

REPS, UNROLL, CHAINS = 64, 8, 8
GROUPED = 8
GEMMS_BESIDE = 800  # longer than any pattern takes
SMEM_BYTES = 3 * 64 * 128 + 256 * 128 + 32 * 1024 + 128
PATTERNS = {
    "MUFU.EX2": 'asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[c]));',
    "FFMA": 'asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(x[c]) : "f"(a), "f"(b));',
    "FFMA.SAT": 'asm volatile("fma.rn.sat.f32 %0, %0, %1, %2;" : "+f"(x[c]) : "f"(a), "f"(b));',
    "FADD": 'asm volatile("add.f32 %0, %0, %1;" : "+f"(x[c]) : "f"(a));',
    "IMAD": 'asm volatile("mad.lo.u32 %0, %0, %1, %2;" : "+r"(y[c]) : "r"(n), "r"(m));',
    "LOP3": 'asm volatile("lop3.b32 %0, %0, %1, %2, 0xe8;" : "+r"(y[c]) : "r"(n), "r"(m));',
    "PRMT": 'asm volatile("prmt.b32 %0, %0, %1, %2;" : "+r"(y[c]) : "r"(m), "r"(n));',
}  # fmt: skip
_OFFSET = '"r"((at ^ (c * 16)) + u * 4096'
for _name, _transposed in (("LDSM.T", ".trans"), ("LDSM", "")):
    PATTERNS[_name] = (
        f'asm volatile("ldmatrix.sync.aligned.m8n8.x4{_transposed}.shared.b16 {{%0, %1, %2, %3}}, [%4];" '
        f': "=r"(z[0]), "=r"(z[1]), "=r"(z[2]), "=r"(z[3]) : {_OFFSET} + (y[c] & zero))); y[c] ^= z[0] ^ z[1] ^ z[2] ^ z[3];'
    )
PATTERNS["STSM"] = (
    'asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %1, %2, %2};" '
    f':: {_OFFSET}), "r"(y[c]), "r"(m) : "memory");'
)
PATTERNS["2 F2FP.E4M3"] = (
    'asm volatile("{ .reg .b16 h, k; cvt.rn.satfinite.e4m3x2.f32 h, %0, %1; cvt.rn.satfinite.e4m3x2.f32 k, %2, %0; '
    'mov.b32 %0, {h, k}; }" : "+f"(x[c]) : "f"(a), "f"(b));'
)
GEMMS = {
    "ss_n96": (96, 4, True), "ss_n128": (128, 4, True), "ss_n192": (192, 4, True), "ss_n256": (256, 4, True),
    "rs_n64": (64, 6, False), "rs_n128": (128, 6, False), "rs_n136": (136, 6, False), "rs_n256": (256, 4, False),
}  # fmt: skip
RIVALS = ("ss_n192", "rs_n128")


def role(name):
    """A C name for a pattern."""
    return "pipe_" + identifier(name).replace(" ", "_")


def type_of(name):
    """The C++ type of a GEMM."""
    n, steps, shared = GEMMS[name]
    return f"Gemm<{n}, {steps}, {str(shared).lower()}>"


def pattern(name):
    """A pattern as a function of shared memory and repetitions, a lambda of CUDA C++."""
    return f"""[&](unsigned char* smem, long long reps) {{
    float x[{CHAINS}], a = 0.3f + (float)reps * 1e-7f, b = 0.7f - (float)reps * 1e-7f;
    u32 y[{CHAINS}], z[4], n = (u32)reps | 1u, zero = (u32)(reps >> 40), m = 0x5410u + (u32)(reps >> 8);
    const u32 lane = threadIdx.x % 32;
    const u32 at = smem_address(smem + PATTERN_AT) + lane * 128 + lane % 8 * 16;
    for (int c = 0; c < {CHAINS}; ++c) x[c] = 0.1f + 0.01f * (float)(threadIdx.x + c), y[c] = threadIdx.x + c;
#pragma unroll 1
    for (long long i = 0; i < reps; ++i) {{
#pragma unroll
      for (int u = 0; u < {UNROLL}; ++u)
#pragma unroll
        for (int c = 0; c < {CHAINS}; ++c) {{ {PATTERNS[name]} }}
    }}
    float kept = 0.0f;
    for (int c = 0; c < {CHAINS}; ++c) kept += x[c] + (float)y[c];
    return kept;
  }}"""


def stream(name):
    """GROUPED GEMMs and a wait, again and again, as such a function."""
    return f"""[&](unsigned char* smem, long long reps) {{
    {type_of(name)} gemm;
    gemm.start(smem, 0);
#pragma unroll 1
    for (long long i = 0; i < reps; ++i) {{
#pragma unroll
      for (int g = 0; g < {GROUPED}; ++g) gemm.issue();
      wgmma_wait<0>();
    }}
    return gemm.sum();
  }}"""


def kernel(name, rival, body):
    """One kernel: `body` in warpgroup 0 beside GEMMs of `rival`."""
    return f"""
extern "C" __global__ void __launch_bounds__(384, 1) {name}(u64* out, long long reps, long long gemms) {{
  measured<{type_of(rival)}>(out, reps, gemms, {body});
}}
"""


def source():
    """The whole CUDA source."""
    text = "#pragma nv_diag_suppress 177, 550\n" + PRELUDE + wrappers(tuple(sorted({n for n, _, _ in GEMMS.values()})))
    text += (HERE / "fp8_rates.cu").read_text()
    for rival in RIVALS:
        text += "".join(kernel(f"{role(name)}_{rival}", rival, pattern(name)) for name in PATTERNS)
    return text + "".join(kernel(f"stream_{name}", name, stream(name)) for name in GEMMS)


def launched(module, name, warpgroups, reps):
    """(cycles, done) of every warp, each (SMs, warpgroups, 4), of the second of two launches."""
    import torch

    found = torch.zeros(SM_COUNT_H200 * warpgroups * 4 * 2, dtype=torch.int64, device="cuda")
    for _ in range(2):
        module.launch(name, SM_COUNT_H200, warpgroups * 128, [found, reps, GEMMS_BESIDE], SMEM_BYTES)
    torch.cuda.synchronize()
    cycles, done = found.cpu().numpy().reshape(SM_COUNT_H200, warpgroups, 4, 2).transpose(3, 0, 1, 2)
    return cycles, done


def main():
    """Run every pattern and every GEMM and write the result."""
    out = parse_out(__doc__)
    text = source()
    module = Module(text)
    patterns, gemms = {}, {}
    for name in PATTERNS:
        row = {}
        for rival in RIVALS:
            n, steps, _ = GEMMS[rival]
            for warpgroups in (1, 2, 3):
                cycles, done = launched(module, f"{role(name)}_{rival}", warpgroups, REPS)
                key = "alone" if warpgroups == 1 else f"beside_{warpgroups - 1}_{rival}"
                row[key] = spread(cycles[:, 0].max(1) / (REPS * UNROLL * CHAINS))
                if warpgroups > 1:
                    rate = (done[:, 1:].max(2) / np.maximum(1, cycles[:, 1:].max(2))).sum(1) * steps * n / 2
                    row[key]["tensor_utilisation"] = round(float(np.median(rate)), 3)
        patterns[name] = row
    for name, (n, steps, _) in GEMMS.items():
        gemms[name] = {"steps": steps, "cycles_at_full_rate": n / 2}
        cycles, done = launched(module, f"stream_{name}", 1, REPS * 16)
        gemms[name]["cycles_per_step"] = spread(cycles.max(2) / (done.max(2) * GROUPED * steps))
    write(out, "fp8_rates", "kernels/calibrate/fp8_rates.py", text, {"patterns": patterns, "gemms": gemms})


if __name__ == "__main__":
    main()
