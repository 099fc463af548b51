"""Power and SM clock against the activity of the units, on all SMs, from a cold start and after seconds.

`python -m kernels.calibrate.power --out DIR` writes `DIR/power.json`. Every workload idles, then launches kernels of
about two milliseconds back to back for two or three seconds; each launch reports its own mean clock. `burst` is the
first 30 ms, as short benchmarks see it; `settled` 0.5 to 1.5 s, as attention kernels are measured; `sustained` the last
second. The units' activity is counted by Nsight Compute in launches of the same length (power_counts.py).
"""

import time
from dataclasses import dataclass

import numpy as np

from .. import counters
from . import power_counts
from .harness import HERE, SM_COUNT_H200, Module, parse_out, tensor_map_2d, write
from .ptx import PRELUDE, wgmma_wrapper, wgmma_wrappers

KIBIBYTE, MEBIBYTE = 1 << 10, 1 << 20
TILE_BYTES = 32 * KIBIBYTE
SMEM_BYTES = 6 * TILE_BYTES  # Q and five stages
IDLE_S, LAUNCH_MS, BATCH = 0.7, 2.0, 10
UNIT_TILES = 4
GEMM_CYCLES = 512  # m64n128k128 of one warpgroup
REPEATED_CYCLES = 2 * 8 * 88  # two warpgroups' m64n176k128
A_AND_B_BYTES, B_BYTES = 48 * KIBIBYTE, 32 * KIBIBYTE
MIXED_BYTES = (A_AND_B_BYTES + B_BYTES) // 2
"""Shared memory that a GEMM reads: A and B, B alone where A is in registers, the mean of both."""
FREE, TOGETHER, TURNS, ALONE = range(4)


@dataclass(frozen=True)
class Workload:
    """A kernel and how it is launched; `unit_*` are the work of one unit on one SM."""

    kernel: str
    threads: int = 384
    duty: float = 1.0
    seconds: float = 2.0
    units: int = 1  # in a burst
    window: int = 16 * MEBIBYTE
    groups: int = 4  # CTAs of one read the same tiles in step
    skew: int = 0  # tiles between the starts of its CTAs
    company: int = 0  # of the two warpgroups: power_streams.cu's enum Company
    data: str = "fp16"
    unit_tensor_cycles: int = 0
    unit_smem_bytes: int = 0
    unit_l2_bytes: int = 0
    unit_hbm_bytes: int = 0


def _stream(kernel, tile_smem_bytes, duty, apart=False, resident=False, company=None, **more):
    """GEMMs on tiles from L2; in step as four heads, or `apart`, every SM at another tile."""
    order = {"groups": 1, "skew": 31} if apart else {}
    moved = 0 if resident else UNIT_TILES * TILE_BYTES
    company = (TOGETHER if duty < 1 else FREE) if company is None else company
    warpgroups = 1 if company == ALONE else 2
    cost = {
        "unit_tensor_cycles": UNIT_TILES * GEMM_CYCLES * warpgroups,
        "unit_smem_bytes": UNIT_TILES * tile_smem_bytes * warpgroups + moved,
        "unit_l2_bytes": moved,
    }
    return Workload(kernel, duty=duty, seconds=3.0 if duty > 0.6 else 2.0, company=company, **cost, **order, **more)


def _loads(duty, **order):
    moved = UNIT_TILES * TILE_BYTES
    return Workload("stream_loads", 32, duty, units=2, unit_smem_bytes=moved, unit_l2_bytes=moved, **order)


APART = {"groups": 1, "skew": 31}
WORKLOADS = {"sleep": Workload("sleep", 256, 0.01)}
WORKLOADS |= {f"attention_{duty}": _stream("stream_attention", MIXED_BYTES, duty) for duty in (1.0, 0.75, 0.5, 0.25, 0.1)}
WORKLOADS |= {
    "attention_long_bursts_0.5": _stream("stream_attention", MIXED_BYTES, 0.5, units=16),
    **{f"attention_turns_{duty}": _stream("stream_attention", MIXED_BYTES, duty, company=TURNS) for duty in (1.0, 0.5)},
    **{f"attention_alone_{duty}": _stream("stream_attention", MIXED_BYTES, duty, company=ALONE) for duty in (1.0, 0.5)},
    **{f"attention_apart_{duty}": _stream("stream_attention", MIXED_BYTES, duty, apart=True) for duty in (1.0, 0.5)},
    **{f"attention_bf16_{duty}": _stream("stream_attention_bf16", MIXED_BYTES, duty, data="bf16") for duty in (1.0, 0.5)},
    **{f"attention_resident_{duty}": _stream("resident_attention", MIXED_BYTES, duty, resident=True) for duty in (1.0, 0.5)},
    "attention_zeros_1.0": _stream("stream_attention", MIXED_BYTES, 1.0, data="zeros"),
    **{f"qk_{duty}": _stream("stream_qk", A_AND_B_BYTES, duty) for duty in (1.0, 0.5)},
    **{f"qk_from_registers_{duty}": _stream("stream_qk_from_registers", B_BYTES, duty, data="queries") for duty in (1.0, 0.5)},
    **{f"pv_{duty}": _stream("stream_pv", B_BYTES, duty) for duty in (1.0, 0.5)},
    **{
        f"beside_softmax_{duty}": _stream("stream_attention_beside_softmax", MIXED_BYTES, duty, threads=512)
        for duty in (1.0, 0.5)
    },
    **{f"loads_in_step_{duty}": _loads(duty) for duty in (1.0, 0.5)},
    **{f"loads_apart_{duty}": _loads(duty, **APART) for duty in (1.0, 0.5)},
    "loads_from_hbm_0.5": _loads(0.5, groups=SM_COUNT_H200, window=2048 * MEBIBYTE),
    "hbm_copy": Workload("hbm_copy", 1024, units=20, window=2048 * MEBIBYTE, unit_hbm_bytes=2 * 8 * 16 * 1024),
    "softmax": Workload("softmax_all", 256, units=20),
    "softmax_exp": Workload("softmax_exp", 256, units=20),
    "softmax_rest": Workload("softmax_rest", 256, units=20),
    "smem_read": Workload("smem_read", 512, units=20, unit_smem_bytes=32 * 16 * 512),
    "repeated_gemm_1.0": Workload(
        "repeated_gemm", 256, seconds=3.0, units=20, unit_tensor_cycles=REPEATED_CYCLES,
        unit_smem_bytes=REPEATED_CYCLES // 88 * (64 + 176) * 16 * 2,
    ),
}  # fmt: skip


def source():
    """The whole CUDA source."""
    k_major = _variant("WgmmaKMajor", "p, 1, 1, 1;", "p, 1, 1, 0;")  # A in registers, B as for QK^T
    bf16 = _variant("WgmmaBf16", "f16.f16", "bf16.bf16")
    parts = [(HERE / part).read_text() for part in ("gemm.cuh", "softmax.cuh", "power.cu", "power_streams.cu")]
    return PRELUDE + wgmma_wrappers((128, 176)) + k_major + bf16 + "".join(parts)


def _variant(name, old, new):
    return f"template <int N> struct {name};\n" + wgmma_wrapper(128).replace("Wgmma<", f"{name}<").replace(old, new)


class Board:
    """What the driver reports: instant power, energy since boot, clock, temperature."""

    def __init__(self):
        import pynvml

        pynvml.nvmlInit()
        self.nvml, self.handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)

    def sample(self):
        """(host seconds, watts, joules, MHz, degrees C)."""
        instant = self.nvml.nvmlDeviceGetFieldValues(self.handle, [self.nvml.NVML_FI_DEV_POWER_INSTANT])[0].value.uiVal
        return (
            time.perf_counter(),
            instant / 1000,
            self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1000,
            self.nvml.nvmlDeviceGetClockInfo(self.handle, self.nvml.NVML_CLOCK_SM),
            self.nvml.nvmlDeviceGetTemperature(self.handle, 0),
        )

    def limit_watts(self):
        """The enforced power limit."""
        return self.nvml.nvmlDeviceGetEnforcedPowerLimit(self.handle) / 1000


class Data:
    """Operands on the device: tiles of random normal data of each kind, and fragments of A for registers."""

    def __init__(self, mebibytes=2048, copy=True):
        import torch

        torch.manual_seed(0)
        rows = (16 * MEBIBYTE + TILE_BYTES) // 128
        normal = torch.randn((rows, 64), device="cuda")
        self.tiles = {"fp16": normal.half(), "bf16": normal.bfloat16(), "zeros": torch.zeros_like(normal).half()}
        self.tiles["queries"] = self.tiles["fp16"]
        scores = torch.randn((48, 256, 2), device="cuda")
        weights = torch.exp(scores - 3.7).clamp(max=1)  # softmax before its sum: below the largest of some thousand
        self.fragments = {
            "fp16": weights.half(), "bf16": weights.bfloat16(), "zeros": torch.zeros_like(weights).half(), "queries": scores.half(),
        }  # fmt: skip
        self.large = torch.randn(((mebibytes * MEBIBYTE + TILE_BYTES) // 128, 64), device="cuda", dtype=torch.float16)
        self.copied = torch.cat((self.large, self.large)) if copy else None

    def args(self, workload):
        """(data, tensor map, fragments) of a workload."""
        data = self.large if workload.window > 16 * MEBIBYTE else self.tiles[workload.data]
        described = tensor_map_2d(data, 128, 64)
        return self.copied if workload.kernel == "hbm_copy" else data, described, self.fragments[workload.data]


def launcher(module, workload, data):
    """A function of (log, bursts, sleep_ns) that enqueues one launch."""
    operands, described, fragments = data.args(workload)

    def launch(log, bursts, sleep_ns):
        args = [log, operands, workload.window, bursts, workload.units, sleep_ns, described, fragments]
        args += [workload.groups, workload.skew, workload.company]
        module.launch(workload.kernel, SM_COUNT_H200, workload.threads, args, SMEM_BYTES)

    return launch


def pace(launch, log, workload):
    """(bursts, nanoseconds of sleep after each) of a launch of LAUNCH_MS at the workload's duty."""
    import torch

    if workload.kernel == "sleep":
        return 2, 1_000_000
    for _ in range(2):
        launch(log[0], 20, 0)
    torch.cuda.synchronize()
    burst_ns = float(log[0, :, 1].double().median()) / 20
    return max(1, int(LAUNCH_MS * 1e6 / (burst_ns / workload.duty))), int(burst_ns * (1 - workload.duty) / workload.duty)


def run(module, board, data, workload):
    """One workload: idle, then batches of launches; returns its row of the table, its pace and its clock trace."""
    import torch

    log = torch.zeros((4096, SM_COUNT_H200, 2), dtype=torch.int64, device="cuda")
    launch = launcher(module, workload, data)
    bursts, sleep_ns = pace(launch, log, workload)
    torch.cuda.synchronize()
    time.sleep(IDLE_S)

    samples, events, slot, start = [board.sample()], [], 0, time.perf_counter()
    while time.perf_counter() - start < workload.seconds and slot + BATCH <= len(log):
        for _ in range(BATCH):
            launch(log[slot], bursts, sleep_ns)
            slot += 1
        events.append(torch.cuda.Event())
        events[-1].record()
        if len(events) > 2:
            events[-3].synchronize()
            samples.append(board.sample())
    torch.cuda.synchronize()
    samples.append(board.sample())

    seen = log[:slot].cpu().numpy().astype(np.float64)
    elapsed_ns = np.median(seen[..., 1], axis=1)
    mhz = np.median(seen[..., 0] / np.maximum(seen[..., 1], 1), axis=1) * 1000
    wall = (samples[-1][0] - start) / (elapsed_ns.sum() / 1e9)
    ends = np.cumsum(elapsed_ns) / 1e9 * wall
    windows = {"burst": (0, 0.03), "settled": (0.5, 1.5), "sustained": (ends[-1] - 1.0, ends[-1])}
    row = {}
    for name, (begin, end) in windows.items():
        inside = (ends > begin) & (ends <= end)
        taken = [s for s in samples if begin < s[0] - start <= end] or samples[-1:]
        row[f"sm_mhz_{name}"] = round(float(np.median(mhz[inside])), 1) if inside.any() else None
        if name != "burst":
            row[f"watts_instant_{name}"] = round(float(np.median([s[1] for s in taken])), 1)
            row[f"watts_energy_{name}"] = round((taken[-1][2] - taken[0][2]) / max(taken[-1][0] - taken[0][0], 1e-3), 1)
            row[f"nvml_mhz_{name}"] = float(np.median([s[3] for s in taken]))
    late = ends > windows["sustained"][0]
    units = bursts * workload.units
    cycles = float(np.median(seen[late][..., 0]))
    row |= {
        "temperature_c": samples[-2][4],
        "busy_fraction_of_wall": round(1 / wall, 3),
        "units_per_launch": units,
        "ns_per_launch": round(float(np.median(elapsed_ns[late]))),
        "cycles_per_unit": round(cycles / units, 2),
    }
    if workload.unit_tensor_cycles:
        row["tensor_utilisation"] = round(workload.unit_tensor_cycles * units / cycles, 4)
    picks = np.unique(np.geomspace(1, len(mhz), 40).astype(int) - 1)
    trace = {"seconds": ends[picks].round(4).tolist(), "sm_mhz": mhz[picks].round(0).tolist()}
    trace["watts"] = [[round(s[0] - start, 3), s[1], s[3]] for s in samples[:: max(1, len(samples) // 40)]]
    return row, (bursts, sleep_ns), trace


def main():
    """Run every workload, count its activity, and write the result after each."""
    if power_counts.inside():
        power_counts.launch_all()
        return
    counters.require()
    out = parse_out(__doc__)
    text = source()
    module = Module(text)
    board, data = Board(), Data()
    results, raw, paces = {"power_limit_watts": board.limit_watts(), "workloads": {}}, {}, {}
    for name, workload in WORKLOADS.items():
        results["workloads"][name], paces[name], raw[name] = run(module, board, data, workload)
        write(out, "power", "kernels/calibrate/power.py", text, results, raw)
    results["counted"] = power_counts.profile(paces)
    for name, row in results["workloads"].items():
        row["activity"] = power_counts.activity(WORKLOADS[name], row, results["counted"].get(name))
    write(out, "power", "kernels/calibrate/power.py", text, results, raw)


if __name__ == "__main__":
    main()
