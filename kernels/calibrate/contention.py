"""What softmax and WGMMA cost each other when they run on one SM at the same time.

`python -m kernels.calibrate.contention --out DIR` writes `DIR/contention.json`. Warpgroup 0 is timed over a fixed
count; the others work in the background until it ends. One unit of work: a 64 x n softmax tile, S = Q K^T or O += P V
of that tile at head_dim 128, 32 rows of 16-byte shared-memory reads, or 512 FFMA.
"""

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, parse_out, spread, write
from .ptx import PRELUDE, wgmma_wrappers

REPS = 300
SMEM_BYTES = 3 * 64 * 128 * 2 + 88 * 1024 + 128
ROLES = {
    "softmax": "SOFTMAX_TILE",
    "qk": "QK_GEMM",
    "pv": "PV_GEMM",
    "smem": "SMEM_READ",
    "ffma": "FFMA_ONLY",
    "exp": "EXP_ONLY",
}
MEASURED = ("softmax", "qk", "pv", "ffma", "exp")
CASES = [(176, (role,)) for role in ROLES] + [(128, (role,)) for role in ROLES]
CASES += [(176, (a, b)) for a in MEASURED for b in ROLES]
CASES += [(128, (a, b)) for a in ("softmax", "qk", "pv") for b in ("softmax", "qk", "pv")]
CASES += [
    (128, (a, b, c))
    for a, b, c in (
        ("softmax", "qk", "qk"),
        ("softmax", "pv", "pv"),
        ("softmax", "qk", "softmax"),
        ("qk", "softmax", "softmax"),
        ("pv", "softmax", "softmax"),
        ("qk", "qk", "softmax"),
        ("softmax", "softmax", "softmax"),
    )
]
# two warpgroups keep the tensor cores' queue full, so a longer unit means a lower rate, not a longer wait
CASES += [
    (128, (gemm, gemm, other))
    for gemm in ("qk", "pv")
    for other in ("softmax", "exp", "smem", "ffma")
    if (gemm, other) != ("qk", "softmax")
]


def name_of(n, roles):
    """The kernel of a case, such as `n176_softmax_qk`."""
    return f"n{n}_" + "_".join(roles)


def source():
    """The whole CUDA source."""
    parts = [(HERE / part).read_text() for part in ("gemm.cuh", "softmax.cuh", "contention.cu")]
    lines = []
    for n, roles in CASES:
        filled = [ROLES[r] for r in roles] + [ROLES[roles[-1]]] * (3 - len(roles))
        lines.append(f"CONTEND({name_of(n, roles)}, {len(roles)}, {n}, {', '.join(filled)})\n")
    return PRELUDE + wgmma_wrappers((128, 176)) + "".join(parts) + "".join(lines)


def main():
    """Run every case and write the result."""
    import torch

    out = parse_out(__doc__)
    text = source()
    module = Module(text)
    results = {}
    for n, roles in CASES:
        seen = torch.zeros(SM_COUNT_H200 * len(roles) * 4 * 2, dtype=torch.int64, device="cuda")
        for _ in range(2):
            module.launch(name_of(n, roles), SM_COUNT_H200, len(roles) * 128, [seen, REPS], SMEM_BYTES)
        torch.cuda.synchronize()
        cycles = seen.cpu().numpy().reshape(SM_COUNT_H200, len(roles), 4, 2).astype(np.float64)
        per_unit = cycles[..., 0] / np.maximum(cycles[..., 1], 1)
        results[name_of(n, roles)] = {
            "cycles_per_unit": {f"{w}:{role}": spread(per_unit[:, w]) for w, role in enumerate(roles)},
            "local_bytes": module.registers(name_of(n, roles))[1],
        }
    write(out, "contention", "kernels/calibrate/contention.py", text, {"cases": results})


if __name__ == "__main__":
    main()
