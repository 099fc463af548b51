"""Power and SM clock against the activity of the units, on all SMs, from a cold start and after seconds.

`python -m kernels.calibrate.power --out DIR` writes `DIR/power.json`. Every workload idles, then launches kernels of
about two milliseconds back to back for two or three seconds; each launch reports its own mean clock. `burst` is the
first 30 ms, as short benchmarks see it; `settled` 0.5 to 1.5 s, as attention kernels are measured; `sustained` the last
second. The units' activity is counted by Nsight Compute in launches of the same length (power_counts.py).
"""

import time

import numpy as np

from ..measure import counters
from . import power_counts
from .harness import SM_COUNT_H200, Module, parse_out, write
from .power_workloads import WORKLOADS, Data, launcher, source

IDLE_S, LAUNCH_MS, BATCH = 0.7, 2.0, 10


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
