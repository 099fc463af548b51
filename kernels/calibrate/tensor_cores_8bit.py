"""WGMMA in e4m3 on one SM: rate and latency of a chain, and what one, two or three warpgroups reach back to back.

`python -m kernels.calibrate.tensor_cores_8bit --out DIR` writes `DIR/tensor_cores_8bit.json`, as tensor_cores.py does for 16 bits.
"""

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, line, parse_out, spread, write
from .ptx import PRELUDE, wgmma_wrappers
from .tensor_cores import SMEM_BYTES, label, stamps

REPS = 200
STEPS = (2, 8, 16)
WIDTHS = {"SS": (64, 128, 160, 224, 256), "RS": (64, 128, 256)}
# S = Q K^T at head_dim 64, 128 and 256, O += P V over 224, 160 and 128 keys
QK, PV, QK_D64, PV_D64 = ("SS", 224, 4), ("RS", 128, 7), ("SS", 160, 2), ("RS", 64, 5)
QK_D256, PV_D256 = ("SS", 128, 8), ("RS", 256, 4)
STREAMS = [(QK,), (PV,), (QK, QK), (PV, PV), (QK, PV), (QK_D64, PV_D64), (QK_D256, PV_D256), (QK_D64, PV_D64, QK_D64)]


def chains():
    """(operand, n, k steps) of every chain."""
    return [(operand, n, steps) for operand, widths in WIDTHS.items() for n in widths for steps in STEPS]


def source():
    """The whole CUDA source."""
    widths = [n for roles in [chains(), *STREAMS] for _, n, _ in roles]
    parts = [(HERE / part).read_text() for part in ("gemm.cuh", "tensor_cores.cu")]
    lines = []
    alone = [[role] for role in chains()]
    for macro, prefix, sets, suffix in (("STAMPED", "solo", alone, "false"), ("STREAMED", "stream", STREAMS, "0")):
        for roles in sets:
            name = f"{prefix}_{'__'.join(map(label, roles))}"
            filled = list(roles) + [roles[-1]] * (3 - len(roles))
            lines += [f"#define {name}_{i} {n}, {steps}, {operand}, {suffix}" for i, (operand, n, steps) in enumerate(filled)]
            lines.append(f"{macro}({name}, {len(roles)}, {name}_0, {name}_1, {name}_2)")
    return PRELUDE + wgmma_wrappers(widths, eight_bit=True) + "".join(parts) + "\n".join(lines) + "\n"


def main():
    """Run every part and write the result."""
    import torch

    out = parse_out(__doc__)
    text = source()
    module = Module(text)
    solo, fits, streams = {}, {}, {}
    for role in chains():
        seen = stamps(module, f"solo_{label(role)}", 1)
        solo[label(role)] = spread(seen[..., -1] - seen[..., 0])
    for operand, widths in WIDTHS.items():
        for n in widths:
            waited = [solo[label((operand, n, steps))]["median"] for steps in STEPS]
            fits[f"{operand.lower()}_n{n}"] = line(STEPS, waited) | {"cycles_at_peak": n / 2}
    for roles in STREAMS:
        name = f"stream_{'__'.join(map(label, roles))}"
        raw = torch.zeros(2 * SM_COUNT_H200 * 4 * len(roles), dtype=torch.int64, device="cuda")
        module.launch(name, SM_COUNT_H200, 128 * len(roles), [raw, REPS], SMEM_BYTES)
        torch.cuda.synchronize()
        seen = raw.cpu().numpy().reshape(SM_COUNT_H200, len(roles), 4, 2)
        cycles = (seen[..., 1] - seen[..., 0]) / REPS
        ideal = sum(n / 2 * steps for _, n, steps in roles)
        streams[name.removeprefix("stream_")] = {
            "cycles_per_gemm": [spread(cycles[:, w]) for w in range(len(roles))],
            "tensor_utilisation": round(ideal / np.median(cycles), 4),
        }
    results = {"solo_fit_cycles_per_k32_step": fits, "solo_waited": solo, "streams": streams}
    write(out, "tensor_cores_8bit", "kernels/calibrate/tensor_cores_8bit.py", text, results)


if __name__ == "__main__":
    main()
