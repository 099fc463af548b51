"""What the units do in each workload of power_workloads.py, counted by Nsight Compute: the process runs itself under ncu.

Counts are per unit of work, so that they hold at any clock: warp instructions issued, those of the MUFU, and sectors
that L2 looked up. What no counter is needed for, tensor cycles and bytes of tiles, the workload knows.
"""

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from ...simulator.reading import read_json
from .harness import SM_COUNT_H200, Module
from .power_workloads import MEBIBYTE, WORKLOADS, Data, launcher, source
from .profiler import counters

METRICS = {
    "instructions": "smsp__inst_executed.sum",
    "mufu": "sm__inst_executed_pipe_xu.sum",
    "sectors_read": "lts__t_sectors_op_read.sum",
    "sectors_written": "lts__t_sectors_op_write.sum",
    "hbm_read": "dram__bytes_read.sum",
    "cycles": "sm__cycles_elapsed.max",
}
CHILD = "FASIM_POWER_PACES"
SUBPARTITIONS = 4
MUFU_CYCLES = 8
SECTOR_BYTES = 32
UNCOUNTED = ("sleep", "hbm_copy")
"""Workloads whose activity is known, or whose data are too large for ncu to save and restore."""


def inside():
    """Whether this process is the profiled one."""
    return CHILD in os.environ


def counted_names():
    """The workloads that are profiled, in order."""
    return [name for name in WORKLOADS if name not in UNCOUNTED]


def launch_all():
    """The profiled process: one launch of each workload at the pace it was measured with, tiles already in L2."""
    import torch

    paces = read_json(Path(os.environ[CHILD]), "list of paces")
    module, data = Module(source()), Data(mebibytes=256, copy=False)
    log = torch.zeros((SM_COUNT_H200, 2), dtype=torch.int64, device="cuda")
    for name in counted_names():
        workload = WORKLOADS[name]
        if workload.window > 16 * MEBIBYTE:
            workload = replace(workload, window=256 * MEBIBYTE)
        else:
            data.tiles[workload.data].sum()
        launcher(module, workload, data)(log, *paces[name])
    torch.cuda.synchronize()


def profile(paces):
    """{workload: {metric: count per unit on the chip}}; raises MissingTool without ncu."""
    kernels = "|".join(sorted({WORKLOADS[name].kernel for name in counted_names()}))
    with tempfile.TemporaryDirectory(prefix="fasim-power-") as folder:
        listed = Path(folder) / "paces.json"
        listed.write_text(json.dumps(paces))
        seen = counters(f"{__package__}.power", CHILD, f"regex:^({kernels})$", METRICS.values(), value=str(listed), cache="none")
    found = {}
    for name, row in zip(counted_names(), seen, strict=True):
        work = paces[name][0] * WORKLOADS[name].units
        found[name] = {key: round(row[metric] / work, 2) for key, metric in METRICS.items()}
    return found


def activity(workload, row, counted):
    """Rates per SM cycle, as the power model takes them: shares of a unit, or bytes (shared memory: of one SM)."""
    cycles = row["cycles_per_unit"]
    rates = {
        "tensor": workload.unit_tensor_cycles / cycles,
        "smem_bytes": workload.unit_smem_bytes / cycles,
        "l2_bytes": SM_COUNT_H200 * workload.unit_l2_bytes / cycles,
        "hbm_bytes": SM_COUNT_H200 * workload.unit_hbm_bytes / cycles,
    }
    if workload.unit_hbm_bytes:  # half read, half written; what HBM delivers is looked up twice
        rates["l2_bytes"], rates["l2_lookup_bytes"] = rates["hbm_bytes"], 1.5 * rates["hbm_bytes"]
    if counted:
        pipes = SUBPARTITIONS * SM_COUNT_H200 * cycles
        rates["issue"] = counted["instructions"] / pipes
        rates["mufu"] = MUFU_CYCLES * counted["mufu"] / pipes
        rates["l2_lookup_bytes"] = SECTOR_BYTES * counted["sectors_read"] / cycles
        if workload.groups == SM_COUNT_H200:
            rates["hbm_bytes"] = rates["l2_bytes"]
    return {name: round(value, 5) for name, value in rates.items()}
