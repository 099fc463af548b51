"""TMA loads with all SMs asking: latency against the load on L2 and HBM, and how many lookups L2 is spared.

`python -m kernels.calibrate.loaded --out DIR` writes `DIR/loaded.json`, and runs itself under Nsight Compute for the
lookups. Every SM asks for 32 KiB (two boxes, as a K or V block at head_dim 128) at a fixed interval, four requests out at
most. SMs are in groups that read the same tiles at the same time but for a random delay (`jitter`, cycles); groups read
tiles of the same 16 MiB at other times, or, to miss L2, tiles of their own.
"""

import os

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, parse_out, spread, tensor_map_2d, write
from .memory import COLS, matrix
from .profiler import counters
from .ptx import PRELUDE

BOX_BYTES, BOXES, SLOTS = 16 * 1024, 2, 4
COUNT = 512
"""Requests of an SM; the first eighth is left out."""
L2_MEBIBYTES, HBM_MEBIBYTES = 16, 4096
INTERVALS = {
    "hit": (16384, 8192, 4096, 3072, 2048, 1536, 1365, 1228, 1117, 1024, 960, 896, 768, 512),
    "miss": (32768, 16384, 8192, 5461, 4096, 3277, 2731, 2341, 2185, 2048, 1820, 1366),
}
GROUPS = (1, 2, 4, 8, 16, 33, 66, 132)
JITTERS = (0, 30, 100, 300, 1000)
PACE = 1365
"""Interval of the lookups, and of latency by group: 24 bytes per cycle and SM."""
SECTORS = "lts__t_sectors_op_read.sum"
CHILD = "FASIM_LOADED_CHILD"


def source():
    """The whole CUDA source."""
    return PRELUDE + (HERE / "loaded.cu").read_text()


def begins(sms, tiles, group, interval, jitter, apart):
    """(SM, [first tile, cycles late]) as int32; a group begins anywhere in the data and in the interval."""
    random = np.random.default_rng(0)
    number = np.arange(sms) // group
    first = number * (tiles // max(1, number[-1] + 1)) if apart else random.integers(0, tiles, number[-1] + 1)[number]
    late = random.integers(0, interval, number[-1] + 1)[number] + random.integers(0, jitter + 1, sms)
    return np.stack([first, late], axis=1).astype(np.int32)


def launch(module, data, interval, group, jitter=0, apart=False, sms=SM_COUNT_H200):
    """(issue and latency of each request, cycles and ns of each SM) of one launch."""
    import torch

    tiles = data.shape[0] // 128
    where = torch.from_numpy(begins(sms, tiles, group, interval, jitter, apart)).cuda()
    out = torch.zeros((sms, COUNT, 2), dtype=torch.int32, device="cuda")
    rate = torch.zeros((sms, 2), dtype=torch.int64, device="cuda")
    args = [out, rate, where, tensor_map_2d(data, 128, COLS), tiles, COUNT, interval, BOXES]
    module.launch("paced_loads", sms, 64, args, SLOTS * BOXES * BOX_BYTES)
    torch.cuda.synchronize()
    return out.cpu().numpy(), rate.cpu().numpy()


def summary(seen, rate):
    """One row: bytes per cycle of the chip, and the latency of a request in cycles."""
    late = seen[:, COUNT // 8 :]
    issued = late[..., 0].astype(np.uint32)
    span = (issued[:, -1] - issued[:, 0]).astype(np.float64) / (issued.shape[1] - 1)
    cycles, ns = rate.astype(np.float64).T
    return {
        "bytes_per_clk_chip": round(float((BOXES * BOX_BYTES / span).sum()), 1),
        "latency": spread(late[..., 1]),
        "mean_latency": round(float(late[..., 1].mean()), 1),
        "sm_mhz": round(float(np.median(cycles / ns)) * 1000),
    }


def by_load(module, kind):
    """Latency by interval, of one SM and of all, each its own group."""
    data = matrix(HBM_MEBIBYTES if kind == "miss" else L2_MEBIBYTES)
    if kind == "hit":
        launch(module, data, 1024, SM_COUNT_H200)  # brings it into L2
    rows = {}
    for interval in INTERVALS[kind]:
        seen = launch(module, data, interval, 1, apart=kind == "miss")
        rows[interval] = summary(*seen)
    alone = summary(*launch(module, data, INTERVALS[kind][0], 1, apart=True, sms=1))
    return {"alone": alone, "by_interval": rows}


def cases():
    """(group, jitter) of the lookups, in the order of launches."""
    return [(group, jitter) for group in GROUPS for jitter in JITTERS]


def launch_all():
    """The profiled process: one launch of each case."""
    module, data = Module(source()), matrix(L2_MEBIBYTES)
    for group, jitter in cases():
        launch(module, data, PACE, group, jitter)


def lookups():
    """Bytes looked up in L2 over bytes delivered, by group and jitter."""
    counted = counters(__spec__.name, CHILD, "paced_loads", [SECTORS])
    asked = SM_COUNT_H200 * COUNT * BOXES * BOX_BYTES
    return {f"{g}_{j}": round(row[SECTORS] * 32 / asked, 4) for (g, j), row in zip(cases(), counted, strict=True)}


def main():
    """Latencies, then, under the profiler, lookups."""
    if os.environ.get(CHILD):
        launch_all()
        return
    out = parse_out(__doc__)
    text = source()
    module = Module(text)
    results = {kind: by_load(module, kind) for kind in INTERVALS}
    data = matrix(L2_MEBIBYTES)
    results["by_group"] = {f"{g}_{j}": summary(*launch(module, data, PACE, g, j)) for g, j in cases()}
    write(out, "loaded", "kernels/calibrate/loaded.py", text, results)
    results["lookups"] = lookups()
    write(out, "loaded", "kernels/calibrate/loaded.py", text, results)


if __name__ == "__main__":
    main()
