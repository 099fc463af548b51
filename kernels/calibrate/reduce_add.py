"""Adding fp32 to global memory, as a backward's dQ is summed: rates, latencies, and what it takes of shared memory beside WGMMA.

`python -m kernels.calibrate.reduce_add --out DIR` writes `DIR/reduce_add.json`, and runs itself under Nsight Compute for
the sectors that L2 counts. Bulk copies out of shared memory (cp.reduce.async.bulk .add.f32) and red.global.add.f32 of 1, 2
and 4 floats a lane, of 1 to 132 SMs: each on tiles of its own, all on the same tiles at the same time, or each somewhere in
the same 16 MiB. Then both directions of bulk copies and stores to shared memory beside two warpgroups' GEMMs.
"""

import os

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, line, parse_out, spread, write
from .profiler import counters
from .ptx import PRELUDE, wgmma_wrappers

MEBIBYTES = 16
SMS = (1, 2, 4, 8, 16, 33, 66, 132)
SIZES = (2048, 4096, 8192, 16384, 32768)
"""Bytes of one bulk add; a warpgroup's dQ of 64 queries at head_dim 128 is 16 KiB."""
PATTERNS = ("apart", "same", "scattered")
WIDTHS = (1, 2, 4)
THREADS = 256
COUNT, RED_COUNT, REPS = 512, 2048, 600
GEMMS = {f"ss{n}": (n, "SS") for n in (64, 80, 128, 176)} | {f"rs{n}": (n, "RS") for n in (64, 128)}
OTHERS = ("loads", "adds", "stores", "reds")
"""Bulk copies in, bulk adds out, 16-byte stores to shared memory, red of four floats a lane; the last two by one warpgroup."""
TOGETHER = [(), *((other,) for other in OTHERS), ("loads", "adds"), ("loads", "reds"), ("adds", "stores"), OTHERS[:3]]
PIECE = 16 * 1024
COUNTED = (
    "lts__t_sectors_op_red.sum", "lts__t_sectors_op_atom.sum", "lts__t_sectors_op_read.sum", "lts__t_sectors_op_write.sum",
    "dram__bytes_read.sum", "dram__bytes_write.sum",
)  # fmt: skip
CHILD = "FASIM_REDUCE_ADD_CHILD"


def source():
    """The whole CUDA source."""
    parts = [(HERE / part).read_text() for part in ("gemm.cuh", "reduce_add.cu")]
    lines = [f"BESIDE(beside_{name}, {n}, {operand})\n" for name, (n, operand) in GEMMS.items()]
    return PRELUDE + wgmma_wrappers(n for n, _ in GEMMS.values()) + "".join(parts) + "".join(lines)


def begins(sms, tiles, pattern):
    """The first tile of each SM, int32."""
    number = np.arange(sms)
    if pattern == "same":
        return np.zeros(sms, np.int32)
    if pattern == "apart":
        return (number * (tiles // sms)).astype(np.int32)
    return np.random.default_rng(0).integers(0, tiles, sms).astype(np.int32)


def buffer(mebibytes=MEBIBYTES):
    """fp32 zeros on the device."""
    import torch

    return torch.zeros(mebibytes << 18, dtype=torch.float32, device="cuda")


def rates(module, name, data, sms, pattern, tiles, args, threads, smem, nbytes):
    """Bytes per SM cycle of the chip and of each SM, of one launch behind one that warms up; what was added must be there."""
    import torch

    where = torch.from_numpy(begins(sms, tiles, pattern)).cuda()
    out = torch.zeros((sms, 2), dtype=torch.int64, device="cuda")
    data.zero_()
    for _ in range(2):
        module.launch(name, sms, threads, [out, where, data, tiles, *args], smem)
    torch.cuda.synchronize()
    if float(data.sum(dtype=torch.float64)) != 2 * sms * nbytes / 4:
        raise RuntimeError(f"{name} of {sms} SMs, {pattern}: not all that was added is there")
    cycles, ns = out.cpu().numpy().astype(np.float64).T
    return {
        "bytes_per_clk_chip": round(float((nbytes / cycles).sum()), 1),
        "bytes_per_clk_sm": spread(nbytes / cycles),
        "sm_mhz": round(float(np.median(cycles / ns)) * 1000),
    }


def bulk(module, data, sms, pattern, size, depth=2):
    """Bulk adds of `size` bytes."""
    tiles = data.numel() * 4 // size
    count = COUNT * 16384 // size
    return rates(module, "bulk_adds", data, sms, pattern, tiles, [count, size, depth], 32, SIZES[-1], count * size)


def red(module, data, sms, pattern, width):
    """red.global.add of `width` floats a lane, eight warps a CTA."""
    tiles = data.numel() // (THREADS * width)
    nbytes = RED_COUNT * THREADS * width * 4
    return rates(module, f"red_adds_{width}", data, sms, pattern, tiles, [RED_COUNT], THREADS, 0, nbytes)


def latency(module, data):
    """One add alone, by size: cycles until shared memory may be reused and until it is done; and lines through them."""
    import torch

    found = {}
    for size in SIZES:
        out = torch.zeros((64, 2), dtype=torch.int32, device="cuda")
        for _ in range(2):
            module.launch("bulk_add_latency", 1, 32, [out, data, 64, size], SIZES[-1])
        torch.cuda.synchronize()
        seen = out.cpu().numpy()[8:]
        found[size] = {"smem_reusable": spread(seen[:, 0]), "done": spread(seen[:, 1])}
    fits = {way: line(list(found), [each[way]["median"] for each in found.values()]) for way in ("smem_reusable", "done")}
    return {"by_bytes": found, "fit_cycles_over_bytes": fits}


def beside(module, name, others, gemms=1):
    """Cycles per GEMM of 8 k steps of each of two warpgroups, and bytes per cycle of what else one SM does."""
    import torch

    out = torch.zeros((SM_COUNT_H200, 5, 2), dtype=torch.int64, device="cuda")
    data = torch.randint(0, 255, (MEBIBYTES << 20,), dtype=torch.uint8, device="cuda")
    sums = buffer()
    smem = 3 * 64 * 128 * 2 + 88 * 1024 + 4 * PIECE
    last = 2 if "reds" in others else int("stores" in others)
    args = [out, data, sums, REPS, gemms, int("loads" in others), int("adds" in others), last]
    for _ in range(2):
        module.launch(f"beside_{name}", SM_COUNT_H200, 512, args, smem)
    torch.cuda.synchronize()
    cycles, units = out.cpu().numpy().astype(np.float64).transpose(2, 0, 1)
    found = {}
    if gemms:
        found["cycles_per_gemm"] = spread(2 * cycles[:, 0] / units[:, 0])
        together = units[:, :2].sum(axis=1) / cycles[:, :2].max(axis=1)
        found["gemms_per_1000_clk"] = spread(1000 * together)
    for place, other, nbytes in ((2, "loads", PIECE), (3, "adds", PIECE), (4, "stores", 2048), (4, "reds", 2048)):
        if other in others:
            found[f"{other}_bytes_per_clk"] = spread(nbytes * units[:, place] / cycles[:, place])
    return found


def cases():
    """(pattern, kind) of the launches whose sectors are counted: data that L2 has not, 132 SMs."""
    return [(pattern, kind) for pattern in ("apart", "same") for kind in ("bulk", *WIDTHS)]


def launch_all():
    """The profiled process: one launch of each case."""
    import torch

    module, data = Module(source()), buffer()
    for pattern, kind in cases():
        if kind == "bulk":
            args, name, threads, smem, tiles = [COUNT, 16384, 2], "bulk_adds", 32, SIZES[-1], data.numel() * 4 // 16384
        else:
            args, name, threads, smem, tiles = [RED_COUNT], f"red_adds_{kind}", THREADS, 0, data.numel() // (THREADS * kind)
        where = torch.from_numpy(begins(SM_COUNT_H200, tiles, pattern)).cuda()
        out = torch.zeros((SM_COUNT_H200, 2), dtype=torch.int64, device="cuda")
        module.launch(name, SM_COUNT_H200, threads, [out, where, data, tiles, *args], smem)
    torch.cuda.synchronize()


def counted():
    """Bytes by counter over the bytes added."""
    seen = counters(__spec__.name, CHILD, "regex:_adds", COUNTED)
    found = {}
    for (pattern, kind), row in zip(cases(), seen, strict=True):
        added = SM_COUNT_H200 * (COUNT * 16384 if kind == "bulk" else RED_COUNT * THREADS * kind * 4)
        found[f"{pattern}_{kind}"] = {"bytes_added": added} | {
            name: round(float(row[name]) * (32 if "sectors" in name else 1) / added, 4) for name in COUNTED
        }
    return found


def main():
    """Rates, latencies, what is beside WGMMA; then, under the profiler, sectors."""
    if os.environ.get(CHILD):
        launch_all()
        return
    out = parse_out(__doc__)
    text = source()
    module, data = Module(text), buffer()
    results = {"latency": latency(module, data)}
    results["bulk"] = {f"{p}_{n}": bulk(module, data, n, p, 16384) for p in PATTERNS for n in SMS}
    results["bulk_by_bytes"] = {f"{p}_{size}": bulk(module, data, SM_COUNT_H200, p, size) for p in PATTERNS for size in SIZES}
    results["bulk_alone_by_bytes"] = {f"{size}_{d}": bulk(module, data, 1, "apart", size, d) for size in SIZES for d in (1, 2)}
    results["red"] = {f"{p}_{w}_{n}": red(module, data, n, p, w) for p in PATTERNS for w in WIDTHS for n in SMS}
    large = buffer(1024)
    results["bulk_beyond_l2"] = bulk(module, large, SM_COUNT_H200, "apart", 16384)
    results["red_beyond_l2"] = {w: red(module, large, SM_COUNT_H200, "apart", w) for w in WIDTHS}
    results["beside"] = {
        f"{name}_{'_'.join(others) or 'alone'}": beside(module, name, others) for name in GEMMS for others in TOGETHER
    }
    results["without_gemms"] = {"_".join(o): beside(module, "ss64", o, gemms=0) for o in TOGETHER if o}
    write(out, "reduce_add", "kernels/calibrate/reduce_add.py", text, results)
    results["sectors"] = counted()
    write(out, "reduce_add", "kernels/calibrate/reduce_add.py", text, results)


if __name__ == "__main__":
    main()
