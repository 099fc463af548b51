"""Power and SM clock against the activity of the units, on all SMs, from a cold start and after seconds.

`python -m kernels.calibrate.power --out DIR` writes `DIR/power.json`. Every workload idles one second, then launches
kernels of about two milliseconds back to back for three; each launch reports its own mean clock. `burst` is the first
30 ms, as short benchmarks see it; `sustained` is the last second.
"""

import time

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, parse_out, spread, write
from .ptx import PRELUDE, wgmma_wrappers

SMEM_BYTES = 3 * 64 * 128 * 2 + 88 * 1024
LAUNCH_MS, RUN_S, IDLE_S, BATCH = 2.0, 3.0, 1.0, 10
MEBIBYTE = 1 << 20
STEP_CYCLES = 88  # one m64n176k16
GEMM_CYCLES = 704  # one unit of gemm_*, tensor-core cycles per warpgroup (8 x m64n176k16 or 11 x m64n128k16)

# name: (kernel, threads, units in a burst, asked duty, window bytes)
DUTIES = (0.25, 0.5, 0.75, 0.9, 1.0)
WORKLOADS = {"sleep": ("sleep", 256, 0, 0.01, 0)}
WORKLOADS |= {f"gemm_qk_{duty}": ("gemm_qk", 256, 20, duty, 0) for duty in DUTIES}
WORKLOADS |= {f"gemm_pv_{duty}": ("gemm_pv", 256, 20, duty, 0) for duty in (0.5, 1.0)}
WORKLOADS |= {
    "gemm_mixed_1.0": ("gemm_mixed", 256, 20, 1.0, 0),
    "short_gemm_1": ("short_gemm_1", 128, 160, 1.0, 0),
    "short_gemm_2": ("short_gemm_2", 128, 80, 1.0, 0),
    "short_gemm_8": ("short_gemm_8", 128, 20, 1.0, 0),
    "gemm_and_exp_0.7": ("gemm_and_exp", 384, 20, 0.7, 0),
    "gemm_and_exp_1.0": ("gemm_and_exp", 384, 20, 1.0, 0),
    "softmax": ("softmax", 256, 20, 1.0, 0),
    "exp": ("exp_loop", 256, 20, 1.0, 0),
    "ffma": ("ffma_loop", 512, 20, 1.0, 0),
    "smem_read": ("smem_read", 512, 20, 1.0, 0),
    "l2_read": ("global_read", 1024, 20, 1.0, 16 * MEBIBYTE),
    "hbm_read": ("global_read", 1024, 20, 1.0, 2048 * MEBIBYTE),
    "hbm_copy": ("global_copy", 1024, 20, 1.0, 2048 * MEBIBYTE),
}


def source():
    """The whole CUDA source."""
    parts = [(HERE / part).read_text() for part in ("gemm.cuh", "softmax.cuh", "power.cu")]
    return PRELUDE + wgmma_wrappers((128, 176)) + "".join(parts)


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


def run(module, board, data, workload):
    """One workload: idle, then batches of launches; returns its row of the table and its clock trace."""
    import torch

    name, threads, units, duty, window = workload
    log = torch.zeros((4096, SM_COUNT_H200, 2), dtype=torch.int64, device="cuda")

    def launch(slot, bursts, sleep_ns):
        args = [log[slot], data, window, bursts, units, sleep_ns]
        module.launch(name, SM_COUNT_H200, threads, args, SMEM_BYTES)

    def nanoseconds(slot):
        torch.cuda.synchronize()
        return float(log[slot, :, 1].double().median())

    if name == "sleep":
        sleep_ns, bursts = 1_000_000, 2
    else:
        launch(0, 20, 0)
        launch(0, 20, 0)
        burst_ns = nanoseconds(0) / 20
        sleep_ns = int(burst_ns * (1 - duty) / duty)
        bursts = max(1, int(LAUNCH_MS * 1e6 / (burst_ns / duty)))
    torch.cuda.synchronize()
    time.sleep(IDLE_S)

    samples, events, slot, start = [board.sample()], [], 0, time.perf_counter()
    while time.perf_counter() - start < RUN_S and slot + BATCH <= len(log):
        for _ in range(BATCH):
            launch(slot, bursts, sleep_ns)
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
    ends = np.cumsum(elapsed_ns) / 1e9
    late, early = ends > ends[-1] - 1.0, ends < 0.03
    tail = [s for s in samples if s[0] > samples[-1][0] - 1.0]
    row = {
        "sm_mhz_burst": round(float(np.median(mhz[early])), 1),
        "sm_mhz_sustained": round(float(np.median(mhz[late])), 1),
        "watts_instant_sustained": round(float(np.median([s[1] for s in tail])), 1),
        "watts_energy_sustained": round((tail[-1][2] - tail[0][2]) / (tail[-1][0] - tail[0][0]), 1),
        "temperature_c": tail[-1][4],
        "busy_fraction_of_wall": round(float(ends[-1] / (samples[-1][0] - start)), 3),
        "units_per_launch": bursts * units,
        "ns_per_launch": round(float(np.median(elapsed_ns[late]))),
    }
    if "gemm" in name:
        per_unit = STEP_CYCLES * int(name[-1]) if name.startswith("short") else 2 * GEMM_CYCLES
        cycles = np.median(seen[late][..., 0])
        row["tensor_utilisation"] = round(per_unit * bursts * units / cycles, 4)
    if name.startswith("global"):
        moved = bursts * units * 8 * 16 * threads * SM_COUNT_H200 * (2 if name == "global_copy" else 1)
        row["bytes_per_s"] = round(moved / (row["ns_per_launch"] * 1e-9))
        row["bytes_per_clk"] = round(moved / np.median(seen[late][..., 0]), 1)
    picks = np.unique(np.geomspace(1, len(mhz), 40).astype(int) - 1)
    trace = {"seconds": ends[picks].round(4).tolist(), "sm_mhz": mhz[picks].round(0).tolist()}
    trace["watts"] = [[round(s[0] - start, 3), s[1]] for s in samples[:: max(1, len(samples) // 40)]]
    return row, trace


def tensor_power_law(rows):
    """Watts over the sleeping chip per (tensor utilisation x GHz^2), of the pure GEMM workloads, and its spread."""
    rest = rows["sleep"]["watts_instant_sustained"]
    gemms = {name: row for name, row in rows.items() if name.split("_")[0] in ("gemm", "short") and "exp" not in name}
    factors = {
        name: (row["watts_instant_sustained"] - rest)
        / (row["tensor_utilisation"] * (row["sm_mhz_sustained"] / 1000) ** 2)
        for name, row in gemms.items()
    }
    return {"rest_watts": rest, "watts_per_utilisation_ghz2": spread(list(factors.values())), "each": factors}


def main():
    """Run every workload and write the result after each."""
    import torch

    out = parse_out(__doc__)
    text = source()
    module = Module(text)
    board = Board()
    data = torch.randint(0, 256, (4100 * MEBIBYTE,), dtype=torch.uint8, device="cuda")
    results, raw = {"power_limit_watts": board.limit_watts(), "workloads": {}}, {}
    for name, workload in WORKLOADS.items():
        results["workloads"][name], raw[name] = run(module, board, data, workload)
        write(out, "power", "kernels/calibrate/power.py", text, results, raw)
    results["tensor_power_law"] = tensor_power_law(results["workloads"])
    write(out, "power", "kernels/calibrate/power.py", text, results, raw)


if __name__ == "__main__":
    main()
