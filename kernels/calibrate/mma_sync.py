"""The FlashAttention-2 style inner loop in pieces: mma.sync GEMMs fed by ldmatrix, softmax, cp.async, alone and in pairs.

`python -m kernels.calibrate.mma_sync --out DIR` writes `DIR/mma_sync.json`. A group is four warps, one on each
sub-partition. Group 0 is timed over a fixed count of units; the others repeat theirs beside it until it ends. One unit:
a block's S = Q K^T or O += P V of a head dimension, its online softmax, a 16 KiB copy, or 128 copies of a pattern.
"""

import dataclasses

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, line, parse_out, spread, write
from .pipes import ALTERNATE, PATTERNS, identifier
from .ptx import PRELUDE
from .sass import disassembler, hottest_loop, instructions

REPS = 200
GROUP_BYTES = 64 * 1024
GROUP_CHUNKS = GROUP_BYTES // 16
WGMMA_CYCLES_PER_MMA = 4  # 16 x 8 x 16 on one sub-partition at 512 FMA per cycle
CHAINS, UNROLL = 8, 16


@dataclasses.dataclass(frozen=True)
class Shape:
    """One warp's part of a GEMM: 16-row tiles, columns, k steps of 16, and where A comes from."""

    row_tiles: int
    columns: int
    steps: int
    a: str

    @property
    def mma(self):
        """mma.sync instructions of one warp."""
        return self.row_tiles * self.columns // 8 * self.steps

    @property
    def loads(self):
        """ldmatrix.x4 instructions of one warp."""
        return self.steps * (self.columns // 16 + (self.row_tiles if self.a == "A_SHARED" else 0))


# s128 is S = Q K^T at head_dim 128 of a 128 x 64 block, o128 its O += P V; 128 x 128 at 64, 64 x 64 at 256
SHAPES = {
    "s128": Shape(2, 64, 8, "A_SHARED"),
    "o128": Shape(2, 128, 4, "A_REGISTERS"),
    "s64": Shape(2, 128, 4, "A_SHARED"),
    "o64": Shape(2, 64, 8, "A_REGISTERS"),
    "s256": Shape(1, 64, 16, "A_SHARED"),
    "o256": Shape(1, 256, 4, "A_REGISTERS"),
}
DEPTHS = {f"s128_k{k}": Shape(2, 64, k, "A_SHARED") for k in (2, 4, 6, 8)}
DEPTHS |= {f"o128_k{k}": Shape(2, 128, k, "A_REGISTERS") for k in (2, 4, 6, 8)}
CHAINED = {f"chains{n}": Shape(1, 8 * n, 128 // n, "REGISTERS") for n in (1, 2, 4, 8, 16)}
SOFTMAX = {"softmax128": "Softmax<2, 64, 128>", "softmax64": "Softmax<2, 128, 64>", "softmax256": "Softmax<1, 64, 256>"}
PATTERNS_HERE = {
    name: PATTERNS[name] for name in ("FFMA", "FADD", "FMUL", "FMNMX", "MUFU.EX2", "F2FP", "SHFL.BFLY", "EX2+FFMA", "EX2+4FFMA")
} | {"LOP3": ["lop3.b32 %0, %0, %3, {k}, 0xe8;"]}
SPARSE = {f"{name} {chains} chains": (name, chains) for name in ("FFMA", "FMNMX", "MUFU.EX2") for chains in (1, 2, 4)}
BESIDE = ((), ("s128_reg",), ("s128_reg", "s128_reg"), ("s128",), ("s128", "s128"), ("o128",), ("s128_ld",))


def gemm(shape, form, serial=False):
    """The C++ type of a GEMM role."""
    return f"SyncGemm<{shape.row_tiles}, {shape.columns}, {shape.steps}, {form}, {str(serial).lower()}>"


def roles():
    """{role: C++ type}. `_serial` waits for its results, `_reg` has its operands in registers, `_ld` only loads them."""
    found = dict(SOFTMAX) | {"copy": "Copy<0>", "copy_ahead": "Copy<1>"}
    for name, shape in SHAPES.items():
        found[name] = gemm(shape, shape.a)
        found[name + "_serial"] = gemm(shape, shape.a, serial=True)
        found[name + "_reg"] = gemm(shape, "REGISTERS")
        found[name + "_ld"] = gemm(shape, "LOADS_" + shape.a)
    found |= {name: gemm(shape, shape.a, serial=True) for name, shape in DEPTHS.items()}
    found |= {name: gemm(shape, "REGISTERS") for name, shape in CHAINED.items()}
    return found | {pattern_role(name): f"Pattern_{pattern_role(name)}" for name in (*PATTERNS_HERE, *SPARSE)}


def pattern_role(name):
    """The role that repeats an instruction pattern."""
    return "pipe_" + identifier(name).replace(" ", "_")


def cases():
    """Which groups run side by side."""
    found = [(role,) for role in (*DEPTHS, *CHAINED, *SOFTMAX, "copy", "copy_ahead")]
    for name in SHAPES:
        for form in ("", "_serial", "_reg", "_ld"):
            found += [(name + form,) * groups for groups in (1, 2)]
    found += [("s128" + form,) * 3 for form in ("", "_reg", "_ld")] + [("s256",) * 3]
    for dim in (128, 64, 256):
        softmax, s, o = f"softmax{dim}", f"s{dim}", f"o{dim}"
        found.append((softmax, softmax))
        for form in ("", "_serial", "_reg", "_ld"):
            found += [(softmax, s + form), (softmax, o + form)]
        for form in ("", "_serial"):
            found += [(s + form, softmax), (o + form, softmax), (s + form, o + form), (o + form, s + form)]
    found += [(pattern_role(name), *beside) for name in PATTERNS_HERE for beside in BESIDE]
    found += [(pattern_role(name), *beside) for name in SPARSE for beside in BESIDE[:3]]
    found += [("copy", "copy"), ("copy_ahead", "copy_ahead"), ("s128", "copy"), ("s128", "copy_ahead")]
    found += [("o128", "copy_ahead"), ("softmax128", "copy_ahead"), ("copy", "s128"), ("copy_ahead", "s128")]
    return found


def name_of(groups):
    """The kernel of a case, such as `softmax128__s128`."""
    return "__".join(groups)


def pattern(name):
    """A role that runs UNROLL x CHAINS copies of the pattern, on eight independent chains or as few as it says."""
    plain, chains = SPARSE.get(name, (name, CHAINS))
    parts, body = PATTERNS_HERE[plain], []
    for copy in range(UNROLL * CHAINS // chains):
        for text in [parts[copy % len(parts)]] if plain in ALTERNATE else parts:
            for chain in range(chains):
                ptx = text.format(k=copy * chains + chain)
                kind = "r" if ptx.startswith("lop3") else "f"
                x = f"reinterpret_cast<u32&>(x[{chain}])" if kind == "r" else f"x[{chain}]"
                body.append(f'asm volatile("{ptx}" : "+{kind}"({x}) : "f"(a), "f"(b), "r"(n));')
    body = "\n    ".join(body)
    return f"""
struct Pattern_{pattern_role(name)} {{
  float x[{CHAINS}], a, b;
  int n;
  __device__ __forceinline__ void start(const Place& at) {{
    a = 0.3f + (float)at.zero; b = 0.7f - (float)at.zero; n = 5 + at.zero;
    for (int c = 0; c < {CHAINS}; ++c) x[c] = 0.1f + 0.01f * (float)(threadIdx.x + c);
  }}
  __device__ __forceinline__ void step() {{
    n += 3;
    {body}
  }}
  __device__ __forceinline__ float total() {{
    float t = 0.0f;
    for (int c = 0; c < {CHAINS}; ++c) t += x[c];
    return t;
  }}
}};
"""


def source():
    """The whole CUDA source."""
    types, text = roles(), PRELUDE + "".join((HERE / part).read_text() for part in ("softmax.cuh", "mma_sync.cu"))
    text += "".join(pattern(name) for name in (*PATTERNS_HERE, *SPARSE))
    for groups in cases():
        filled = [types[role] for role in groups] + [types[groups[-1]]] * (3 - len(groups))
        text += f"""
extern "C" __global__ void __launch_bounds__({len(groups) * 128}, 1)
    {name_of(groups)}(u64* out, long long reps, const uint4* source) {{
  contend<{len(groups)}, {", ".join(filled)}>(out, reps, source);
}}"""
    return text + "\n"


def run_cases(module, copied):
    """Cycles per unit of every group of every case."""
    import torch

    found = {}
    for groups in cases():
        name, shape = name_of(groups), (SM_COUNT_H200, len(groups), 4, 2)
        seen = torch.zeros(shape, dtype=torch.int64, device="cuda")
        for _ in range(2):
            smem_bytes = len(groups) * GROUP_BYTES + 128
            module.launch(name, SM_COUNT_H200, len(groups) * 128, [seen, REPS, copied], smem_bytes)
        torch.cuda.synchronize()
        cycles = seen.cpu().numpy().astype(np.float64)
        per_unit = cycles[..., 0] / np.maximum(cycles[..., 1], 1)
        registers, local_bytes = module.registers(name)
        found[name] = {
            "cycles_per_unit": {f"{g}:{role}": spread(per_unit[:, g]) for g, role in enumerate(groups)},
            "registers": registers,
            "local_bytes": local_bytes,
        }
    return found


def median(found, *groups, of=0):
    """Median cycles of a unit of group `of` in a case."""
    return found[name_of(groups)]["cycles_per_unit"][f"{of}:{groups[of]}"]["median"]


def gemms(found):
    """Per shape and form: cycles of a unit, of a k step and of an mma, and the share of the WGMMA peak of all groups."""
    rows = {}
    for name, shape in SHAPES.items():
        for form in ("", "_serial", "_reg", "_ld"):
            for groups in (1, 2, 3):
                case = (name + form,) * groups
                if name_of(case) not in found:
                    continue
                cycles = np.mean([median(found, *case, of=g) for g in range(groups)])
                row = {"cycles_per_gemm": round(cycles, 1), "cycles_per_k_step": round(cycles / shape.steps / groups, 2)}
                if form == "_ld":
                    row["bytes_per_cycle"] = round(groups * 4 * 512 * shape.loads / cycles, 1)
                else:
                    row["cycles_per_mma"] = round(cycles / shape.mma / groups, 3)
                    row["share_of_wgmma_peak"] = round(WGMMA_CYCLES_PER_MMA * shape.mma * groups / cycles, 4)
                rows[f"{name}{form} x{groups}"] = row
    return rows


def fits(found):
    """Cycles of a k step and fixed cost of a GEMM that waits for its results; cycles per mma by independent accumulators."""
    lines = {}
    for kind in ("s128", "o128"):
        shapes = {name: shape.steps for name, shape in DEPTHS.items() if name.startswith(kind)}
        lines[kind] = line(list(shapes.values()), [median(found, name) for name in shapes])
    chains = {name: round(median(found, name) / shape.mma, 2) for name, shape in CHAINED.items()}
    return {"cycles_by_k_steps": lines, "cycles_per_mma_by_accumulators": chains}


def pairs(found, counts):
    """Two groups side by side: how much longer each takes, and what the softmax loses for each mma of the other.

    `filled`: the time that both units' instructions fill if an mma holds the sub-partition's issue for its full time
    (as two streams of them do) and every other instruction for a cycle, over the time that passed.
    """
    rows, mma_cycles = {}, gemms(found)["s128_reg x2"]["cycles_per_mma"]

    def held(role):
        opcodes = counts[role]
        return sum(opcodes.values()) + opcodes.get("HMMA", 0) * (mma_cycles - 1)

    for groups in cases():
        kinds = [role.split("_")[0] in SHAPES or role.startswith("softmax") for role in groups]
        if len(groups) != 2 or not all(kinds):
            continue
        cycles = [median(found, *groups, of=g) for g in (0, 1)]
        alone = [median(found, role) for role in groups]
        row = {"cycles": cycles, "alone": alone, "slower": [round(c / a, 3) for c, a in zip(cycles, alone, strict=True)]}
        for g, other in ((0, 1), (1, 0)):
            shape = SHAPES.get(groups[other].split("_")[0])
            if groups[g].startswith("softmax") and shape and not groups[other].endswith("_ld"):
                mmas = shape.mma * cycles[g] / cycles[other]
                row["softmax_cycles_lost_per_mma"] = round((cycles[g] - alone[g]) / mmas, 3)
                row["mma_share_of_wgmma_peak"] = round(WGMMA_CYCLES_PER_MMA * shape.mma / cycles[other], 4)
        if not isinstance(counts, str):
            row["filled"] = round(sum(held(role) / c for role, c in zip(groups, cycles, strict=True)), 3)
        rows[name_of(groups)] = row
    return rows


def issue_budget(rows, counts):
    """Issue cycles of an mma, an ldmatrix and any other instruction: the fit that fills the time of softmax beside GEMM."""
    if isinstance(counts, str):
        return counts
    slots = []
    for name, row in rows.items():
        groups = name.split("__")
        if sum(role.startswith("softmax") for role in groups) != 1 or any(role.endswith("_ld") for role in groups):
            continue
        rate = np.zeros(3)
        for role, cycles in zip(groups, row["cycles"], strict=True):
            mma, loads = counts[role].get("HMMA", 0), counts[role].get("LDSM", 0)
            rate += np.array([mma, loads, sum(counts[role].values()) - mma - loads]) / cycles
        slots.append(rate)
    slots = np.array(slots)
    cost = np.linalg.lstsq(slots, np.ones(len(slots)), rcond=None)[0]
    found = {kind: round(c, 3) for kind, c in zip(("mma", "ldmatrix", "other"), cost, strict=True)}
    return found | {"cases": len(slots), "worst_residual": round(np.abs(slots @ cost - 1).max(), 4)}


def pipes(found):
    """Cycles per warp instruction of each pattern beside mma.sync streams, and what the streams keep of the peak.

    `cycles_not_mma`: what an instruction takes from a sub-partition on which every mma holds its own full time.
    """
    rows = {}
    mma_cycles = gemms(found)["s128_reg x2"]["cycles_per_mma"]
    for name in (*PATTERNS_HERE, *SPARSE):
        parts = PATTERNS_HERE.get(name, [""])
        count = UNROLL * CHAINS * (1 if name in ALTERNATE else len(parts))
        row = {"instructions": count}
        for beside in BESIDE:
            if name_of((pattern_role(name), *beside)) not in found:
                continue
            groups = (pattern_role(name), *beside)
            key = "+".join(beside) or "alone"
            row[key] = {"cycles_per_instruction": round(median(found, *groups) / count, 3)}
            if beside and not beside[0].endswith("_ld"):
                mma = SHAPES[beside[0].split("_")[0]].mma
                rate = sum(mma / median(found, *groups, of=g) for g in range(1, len(groups)))
                left = median(found, *groups) * (1 - rate * mma_cycles)
                row[key]["share_of_wgmma_peak"] = round(WGMMA_CYCLES_PER_MMA * rate, 4)
                row[key]["cycles_not_mma_per_instruction"] = round(left / count, 3)
        rows[name] = row
    return rows


def copies(module, copied):
    """Stamps around cp.async: issue of n and the commit, wait until they landed, barrier, idle wait, idle barrier."""
    import torch

    found = {}
    stages = ("issue", "wait", "barrier", "wait_for_nothing", "barrier_again")
    for count in (1, 2, 4, 8, 16):
        for groups in (1, 2):
            seen = torch.zeros((SM_COUNT_H200, groups * 4, 5), dtype=torch.int64, device="cuda")
            for _ in range(2):
                args = [seen, REPS, copied]
                module.launch(f"copies_{count}", SM_COUNT_H200, groups * 128, args, groups * GROUP_BYTES)
            torch.cuda.synchronize()
            cycles = seen.cpu().numpy() / REPS
            found[f"{count} x{groups}"] = {stage: spread(cycles[..., i]) for i, stage in enumerate(stages)}
    return found


def ldmatrix(module, copied):
    """Latency of ldmatrix.x4 to its first and last register, a LOP3 included, and four warps at once."""
    import torch

    found = {}
    for name in ("ldmatrix_first", "ldmatrix_last", "ldmatrix_trans_last"):
        for warps in (1, 4):
            seen = torch.zeros((SM_COUNT_H200, warps), dtype=torch.int64, device="cuda")
            for _ in range(2):
                module.launch(name, SM_COUNT_H200, warps * 32, [seen, REPS, copied])
            torch.cuda.synchronize()
            found[f"{name} {warps} warps"] = spread(seen.cpu().numpy() / (REPS * 16))
    return found


def sass(module):
    """Opcodes in the hot loop of each GEMM and softmax alone: none was hoisted or dropped, and what they hold."""
    if disassembler() is None:
        return "no cuobjdump found"
    code = instructions(module.cubin)
    names = [name + form for name in SHAPES for form in ("", "_serial", "_reg", "_ld")] + list(SOFTMAX)
    return {name: hottest_loop(code[name]) for name in names}


def main():
    """Run every part and write the result."""
    import torch

    out = parse_out(__doc__)
    text = source()
    module = Module(text)
    copied = torch.randn(SM_COUNT_H200 * 3 * GROUP_CHUNKS * 8, device="cuda").half()
    cycles = run_cases(module, copied)
    counts = sass(module)
    beside = pairs(cycles, counts)
    results = {
        "gemms": gemms(cycles),
        "fits": fits(cycles),
        "pairs": beside,
        "issue_cycles": issue_budget(beside, counts),
        "pipes": pipes(cycles),
        "copies": copies(module, copied),
        "ldmatrix": ldmatrix(module, copied),
        "sass_per_unit": counts,
        "cases": cycles,
    }
    write(out, "mma_sync", "kernels/calibrate/mma_sync.py", text, results)


if __name__ == "__main__":
    main()
