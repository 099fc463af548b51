"""WGMMA on one SM: rate, latency, issue queue, and how two or three warpgroups share the tensor cores.

`python -m kernels.calibrate.tensor_cores --out DIR` writes `DIR/tensor_cores.json`.
"""

import numpy as np

from .arbitration import judge
from .harness import HERE, SM_COUNT_H200, Module, line, parse_out, spread, write
from .ptx import PRELUDE, wgmma_wrappers

SLOTS = 40
SMEM_BYTES = 3 * 64 * 128 * 2 + 88 * 1024
REPS, WARM = 12, 4

# (n, k-steps, operands): S = Q K^T at head_dim 128 and 64, O += P V over 176, 128 and 80 keys
SOLO = [("SS", n, steps) for n in (64, 80, 128, 176, 192, 256) for steps in (1, 2, 4, 8, 16, 32)]
SOLO += [("RS", n, steps) for n in (64, 128, 256) for steps in (1, 2, 4, 8, 11, 16, 32)]
QK, PV, QK_LONG, QK_D64, PV_D64 = ("SS", 176, 8), ("RS", 128, 11), ("SS", 176, 32), ("SS", 128, 4), ("RS", 64, 8)
PV_LONG = ("RS", 128, 32)
QK_128 = ("SS", 128, 8)
PAIRS = [(QK, QK), (PV, PV), (QK, PV), (PV, QK), (QK_LONG, QK), (QK_LONG, PV), (PV_LONG, QK), (QK_D64, PV_D64)]
TRIPLES = [(QK_128, QK_128, QK_128), (QK_D64, PV_D64, QK_D64)]
DELAYS = (0, 100, 300, 600)
STREAMS = [(QK,), (PV,), (QK_128,), (QK_D64,), (QK, QK), (PV, PV), (QK, PV), (QK_128, QK_128, QK_128)]


def label(role):
    """`("SS", 176, 8)` as `ss_n176_k8`."""
    return f"{role[0].lower()}_n{role[1]}_k{role[2]}"


def source():
    """The whole CUDA source: prelude, wrappers, kernels and their instantiations."""
    widths = [n for _, n, _ in SOLO]
    text = PRELUDE + wgmma_wrappers(widths) + (HERE / "gemm.cuh").read_text() + (HERE / "tensor_cores.cu").read_text()
    lines = []

    def add(macro, name, roles, suffix):
        filled = list(roles) + [roles[-1]] * (3 - len(roles))
        for place, (operand, n, steps) in enumerate(filled):
            lines.append(f"#define {name}_{place} {n}, {steps}, {operand}, {suffix}")
        lines.append(f"{macro}({name}, {len(roles)}, {name}_0, {name}_1, {name}_2)")

    for role in SOLO:
        add("STAMPED", f"solo_{label(role)}", [role], "false")
    for role in (QK, PV, QK_LONG, PV_LONG):
        add("STAMPED", f"steps_{label(role)}", [role], "true")
    for roles in PAIRS + TRIPLES:
        add("STAMPED", f"steps_{'__'.join(map(label, roles))}", roles, "true")
        add("STAMPED", f"plain_{'__'.join(map(label, roles))}", roles, "false")
    for roles in STREAMS:
        add("STREAMED", f"stream_{'__'.join(map(label, roles))}", roles, "0")
    return text + "\n".join(lines) + "\n"


def stamps(module, name, warpgroups, delays=(0, 0)):
    """Launch on every SM; returns int64 (rep, sm, warpgroup, warp, slot) with the warm-up reps dropped."""
    import torch

    out = torch.zeros(REPS * SM_COUNT_H200 * warpgroups * 4 * SLOTS, dtype=torch.int32, device="cuda")
    module.launch(name, SM_COUNT_H200, warpgroups * 128, [out, *delays, REPS], SMEM_BYTES)
    torch.cuda.synchronize()
    shaped = out.cpu().numpy().astype(np.int64).reshape(REPS, SM_COUNT_H200, warpgroups, 4, SLOTS)
    return shaped[WARM:]


def solo(module):
    """Issue and completion cycles of one GEMM alone, and the line through the chain lengths of each width."""
    table, fits = {}, {}
    for role in SOLO:
        seen = stamps(module, f"solo_{label(role)}", 1)
        table[label(role)] = {
            "committed": spread(seen[..., -2] - seen[..., 0]),
            "waited": spread(seen[..., -1] - seen[..., 0]),
        }
    for operand, n in dict.fromkeys((operand, n) for operand, n, _ in SOLO):
        steps = [s for o, m, s in SOLO if (o, m) == (operand, n)]
        waited = [table[label((operand, n, s))]["waited"]["median"] for s in steps]
        fits[f"{operand.lower()}_n{n}"] = line(steps, waited) | {"cycles_at_peak": n / 2}
    return table, fits


def typical(seen):
    """Median stamps of each warpgroup relative to the first start: start, k-steps, committed, waited."""
    origin = seen[..., 0].min(axis=(2, 3), keepdims=True)[..., None]
    relative = np.where(seen == 0, np.nan, seen - origin)
    middle = np.median(relative, axis=(0, 1, 3))
    return [
        {
            "start": row[0],
            "issued": [x for x in row[1:-2] if not np.isnan(x)],
            "committed": row[-2],
            "waited": row[-1],
        }
        for row in middle
    ]


def contention(module):
    """Stamps of two and three warpgroups whose GEMMs start `delay` cycles apart."""
    found = {}
    for roles in PAIRS + TRIPLES:
        for delay in DELAYS:
            for kind in ("steps", "plain"):
                name = "__".join(map(label, roles))
                seen = stamps(module, f"{kind}_{name}", len(roles), (delay, 2 * delay))
                waited = [spread(seen[:, :, w, :, -1] - seen[:, :, 0, :, 0]) for w in range(len(roles))]
                found[f"{kind} {name} +{delay}"] = {"warpgroups": typical(seen), "waited_after_first_start": waited}
    return found


def streams(module):
    """Cycles per GEMM of each warpgroup when all of them run GEMMs back to back, waiting for each."""
    import torch

    found = {}
    for roles in STREAMS:
        reps, name = 200, f"stream_{'__'.join(map(label, roles))}"
        out = torch.zeros(2 * SM_COUNT_H200 * 4 * len(roles), dtype=torch.int64, device="cuda")
        module.launch(name, SM_COUNT_H200, 128 * len(roles), [out, reps], SMEM_BYTES)
        torch.cuda.synchronize()
        seen = out.cpu().numpy().reshape(SM_COUNT_H200, len(roles), 4, 2)
        cycles = (seen[..., 1] - seen[..., 0]) / reps
        ideal = sum(n / 2 * steps for _, n, steps in roles)
        found[name.removeprefix("stream_")] = {
            "cycles_per_gemm": [spread(cycles[:, w]) for w in range(len(roles))],
            "tensor_utilisation": round(ideal / np.median(cycles), 4),
        }
    return found


def main():
    """Run every part and write the result."""
    out = parse_out(__doc__)
    text = source()
    module = Module(text)
    table, fits = solo(module)
    issue = {label(r): typical(stamps(module, f"steps_{label(r)}", 1))[0] for r in (QK, PV, QK_LONG, PV_LONG)}
    results = {"solo_fit_cycles_per_k16_step": fits, "solo": table, "solo_issue": issue}
    results |= {"streams": streams(module), "contention": contention(module)}
    results["arbitration_error_cycles"] = judge(results["contention"], lambda role: int(role.split("_n")[1].split("_")[0]) / 2)
    write(out, "tensor_cores", "kernels/calibrate/tensor_cores.py", text, results)


if __name__ == "__main__":
    main()
