"""L2 and HBM: latency by load and by TMA, bandwidth of one SM and of the chip.

`python -m kernels.calibrate.memory --out DIR` writes `DIR/memory.json`. The capacity of L2 is `l2_capacity.py`'s
subject.
"""

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, line, parse_out, spread, tensor_map_2d, write
from .ptx import PRELUDE

MEBIBYTE = 1 << 20
COLS = 64
STAGE_BYTES = 16 * 1024


def source():
    """The whole CUDA source."""
    return PRELUDE + (HERE / "memory.cu").read_text()


def matrix(mebibytes):
    """A matrix of 64 fp16 columns (128 bytes a row) of random normal data."""
    import torch

    return torch.randn((mebibytes * MEBIBYTE // 128, COLS), device="cuda").half()


def flush():
    """Push everything else out of L2."""
    import torch

    torch.empty(256 * MEBIBYTE, dtype=torch.uint8, device="cuda").fill_(1)
    torch.cuda.synchronize()


def histogram(cycles):
    """Counts in bins of 20 cycles, as {lower edge: count}, bins with under 0.2 % left out."""
    edges = np.arange(0, 2000, 20)
    counts, _ = np.histogram(cycles, edges)
    return {int(e): int(c) for e, c in zip(edges, counts, strict=False) if c > 0.002 * cycles.size}


def load_latency(module):
    """Cycles of one LDG: L2 hits of an SM that read the line before, hits of lines that another SM brought in,
    and HBM misses.
    """
    import torch

    data = torch.zeros(1024 * MEBIBYTE, dtype=torch.uint8, device="cuda")

    def measure(stride, count, passes, only_sm):
        out = torch.zeros((SM_COUNT_H200 if only_sm < 0 else 1, count), dtype=torch.int32, device="cuda")
        module.launch("load_latency", SM_COUNT_H200, 32, [out, data, stride, count, passes, only_sm])
        torch.cuda.synchronize()
        return out.cpu().numpy()

    def summary(cycles):
        return spread(cycles) | {"histogram": histogram(cycles)}

    found = {"l2_hit_all_sms": summary(measure(4224, 496, 4, -1)), "l2_hit_one_sm": summary(measure(4224, 496, 4, 0))}
    others = {}
    for sm in range(1, SM_COUNT_H200, 10):
        flush()
        measure(4224, 496, 2, 0)
        others[sm] = measure(4224, 496, 1, sm)
    found["l2_hit_brought_in_by_sm0"] = {
        "all": summary(np.concatenate(list(others.values()))),
        "median_by_sm": {sm: float(np.median(cycles)) for sm, cycles in others.items()},
    }
    for name, stride, count in (("hbm_same_2mib_pages", 4224, 7900), ("hbm_new_page_each", 2 * MEBIBYTE + 128, 500)):
        flush()
        found[name] = summary(measure(stride, count, 1, 0))
    return found


def tma_latency(module):
    """TMA tiles of 1 to 256 rows of 128 bytes: L2 hits, HBM misses, and the first use of a descriptor."""
    import torch

    data = matrix(64)
    found, count = {}, 64
    for rows in (1, 8, 16, 32, 64, 128, 176, 256):
        tensor_map = tensor_map_2d(data, rows, COLS)
        row = {}
        for name, passes in (("l2_hit", 3), ("hbm", 1)):
            flush()
            out = torch.zeros((1, count, 2), dtype=torch.int32, device="cuda")
            args = [out, tensor_map, rows, rows * 128, count, passes, 1]
            module.launch("tma_latency", 1, 32, args, 64 * 1024)
            torch.cuda.synchronize()
            seen = out.cpu().numpy()[0]
            row[name] = spread(seen[:, 1])
            row["issue"] = spread(seen[:, 0])
        found[f"rows_{rows}"] = row
    sizes = [128 * int(key.removeprefix("rows_")) for key in found]
    fits = {name: line(sizes, [row[name]["median"] for row in found.values()]) for name in ("l2_hit", "hbm")}
    first = {}
    for name, prefetch in (("first_use", 0), ("first_use_after_prefetch", 1)):
        cold, warm = [], []
        for _ in range(10):
            tensor_map = tensor_map_2d(data, 64, COLS)
            warm_up = torch.zeros((1, 64, 2), dtype=torch.int32, device="cuda")
            module.launch("tma_latency", 1, 32, [warm_up, tensor_map_2d(data, 64, COLS), 64, 8192, 64, 1, 0], 64 * 1024)
            out = torch.zeros((1, 16, 2), dtype=torch.int32, device="cuda")
            module.launch("tma_latency", 1, 32, [out, tensor_map, 64, 8192, 16, 1, prefetch], 64 * 1024)
            torch.cuda.synchronize()
            seen = out.cpu().numpy()[0, :, 1]
            cold.append(seen[0])
            warm.append(np.median(seen[4:]))
        first[name] = {"first_tile_cycles": spread(cold), "later_tile_cycles": spread(warm)}
    stores = {}
    for rows in (64, 128):
        out = torch.zeros((1, count, 2), dtype=torch.int32, device="cuda")
        module.launch("tma_store_latency", 1, 128, [out, tensor_map_2d(data, rows, COLS), rows, count], 64 * 1024)
        torch.cuda.synchronize()
        seen = out.cpu().numpy()[0, 8:]
        stores[f"rows_{rows}"] = {"smem_reusable": spread(seen[:, 0]), "written": spread(seen[:, 1])}
    return {"loads": found, "fit_cycles_over_bytes": fits, "descriptor": first, "stores": stores}


def streams(module):
    """Bytes per cycle of TMA streams of 16 KiB tiles out of L2, by SM count, stages and sharing."""
    import torch

    found = {}
    for mebibytes in (8, 16):
        data = matrix(mebibytes)
        tensor_map = tensor_map_2d(data, 128, COLS)
        tiles = mebibytes * MEBIBYTE // STAGE_BYTES
        for sms in (1, 2, 33, 66, SM_COUNT_H200):
            for stages in (1, 2, 4, 8, 12):
                for name, groups in (("same_tiles", 1), ("four_groups", 4), ("disjoint", sms)):
                    if (sms < SM_COUNT_H200 and name != "disjoint") or (mebibytes == 8 and stages != 8):
                        continue
                    passes = max(2, 2000 * groups // tiles)
                    out = torch.zeros((sms, 2), dtype=torch.int64, device="cuda")
                    for _ in range(2):
                        args = [out, tensor_map, tiles, groups, passes, stages]
                        module.launch("tma_stream", sms, 32, args, 12 * STAGE_BYTES)
                    torch.cuda.synchronize()
                    seen = out.cpu().numpy()
                    moved = tiles // groups * passes * STAGE_BYTES
                    found[f"{mebibytes}MiB_{sms}sm_{stages}stages_{name}"] = {
                        "bytes_per_clk_per_sm": round(moved / float(np.median(seen[:, 0])), 2),
                        "bytes_per_clk_chip": round(moved * sms / float(seen[:, 0].max()), 1),
                        "sm_mhz": round(float(np.median(seen[:, 0] / seen[:, 1])) * 1000),
                    }
    return found


def hbm(module):
    """HBM bandwidth of disjoint slices: read, write and copy of 4 GiB, timed by events."""
    import torch

    data = torch.randint(0, 256, (8 * 1024 * MEBIBYTE,), dtype=torch.uint8, device="cuda")
    count = 4 * 1024 * MEBIBYTE // 16
    out = torch.zeros(SM_COUNT_H200 * 16, dtype=torch.int64, device="cuda")
    found = {}
    for name, factor in (("read", 1), ("write", 1), ("copy", 2)):
        for ctas in (2, 8, 16):
            seconds = []
            for _ in range(8):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                module.launch(f"sweep_{name}", SM_COUNT_H200 * ctas, 256 if ctas > 2 else 1024, [out, data, count])
                end.record()
                torch.cuda.synchronize()
                seconds.append(begin.elapsed_time(end) / 1000)
            found[f"{name}_{ctas}ctas"] = {"bytes_per_s": round(factor * count * 16 / float(np.median(seconds[2:])))}
    return found


def main():
    """Run every part and write the result."""
    out = parse_out(__doc__)
    text = source()
    module = Module(text)
    results = {}
    for part in (load_latency, tma_latency, streams, hbm):
        results[part.__name__] = part(module)
        write(out, "memory", "kernels/calibrate/memory.py", text, results)


if __name__ == "__main__":
    main()
