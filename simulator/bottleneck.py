"""Bottleneck: which resource holds a run back, in one sentence, from the run's own numbers."""

from __future__ import annotations

from . import metrics
from .device import Device
from .run import Bottleneck, Run

UNKNOWN = Bottleneck("unknown", "not examined")
SATURATED = 0.75
"""A unit this busy over the whole run is what limits it."""
IDLE = 0.9
"""Fewer CTAs than this share of the SMs, and the idle SMs are what to mend."""


def explain(run: Run, device: Device, grids: list[tuple[int, int]]) -> Bottleneck:
    """Name the bottleneck; `grids` has (CTAs, CTAs per SM) of each kernel."""
    traffic = run.traffic
    hbm = (traffic.total("hbm_read") + traffic.total("hbm_write")) / metrics.time_s(run) / device.hbm_achieved_bytes_per_s
    l2 = (traffic.total("l2_read") + traffic.total("l2_write")) / run.cycles / device.l2_bytes_per_cycle
    smem = traffic.smem_bytes / run.cycles / device.sms / device.smem_bytes_per_cycle
    busy = {
        "tensor cores": metrics.tensor_utilization(run),
        "MUFU": metrics.mufu_utilization(run),
        "instruction issue": metrics.issue_utilization(run),
        "shared memory": smem,
        "L2": l2,
        "HBM": hbm,
    }
    name = max(busy, key=busy.get)
    share = busy[name]
    ctas, per_sm = max(grids)
    waves = ctas / (device.sms * per_sm)
    if ctas < IDLE * device.sms and share < SATURATED:
        return Bottleneck(
            "parallelism", f"{ctas} CTAs leave {device.sms - ctas} of {device.sms} SMs idle; split the work finer"
        )
    if share >= SATURATED:
        why = _SATURATED["S and P"] if name == "HBM" and "S" in traffic.by_tensor else _SATURATED[name]
        return Bottleneck(name, why.format(share=share))
    if waves < 4 and waves % 1 and (waves / -(-waves // 1)) < 0.8:
        return Bottleneck(
            "wave quantisation", f"{waves:.2f} waves of CTAs take the time of {-(-waves // 1):.0f}: the last one is mostly idle"
        )
    return Bottleneck(
        "latency and dependencies",
        f"no unit is saturated ({name} comes closest, busy {share:.0%}): warps wait for loads and for each other's results, "
        "so more overlap would pay",
    )


_SATURATED = {
    "tensor cores": "the tensor cores execute {share:.0%} of the time; what is left is exposed softmax, prologue and epilogue",
    "MUFU": "exp2 keeps the special-function units busy {share:.0%} of the time, 16 results per cycle per SM",
    "instruction issue": "the warp schedulers issue in {share:.0%} of all slots: softmax arithmetic is the limit",
    "shared memory": "operands are read at {share:.0%} of shared memory's bandwidth",
    "L2": "K and V tiles are read from L2 at {share:.0%} of its bandwidth; a larger block_m or multicast would save reads",
    "HBM": "bytes move at {share:.0%} of the bandwidth a copy reaches; only fewer bytes help, as by GQA or a narrower dtype",
    "S and P": "bytes move at {share:.0%} of the bandwidth a copy reaches; keeping S and P on chip is the cure (IO-awareness)",
}
