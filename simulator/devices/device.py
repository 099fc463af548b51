"""Device: the GPU as named numbers, each with its unit and its source, read from a TOML file."""

from __future__ import annotations

import os
from dataclasses import Field, dataclass, field, fields, replace
from functools import cache
from pathlib import Path

from ..errors import UsageError, did_you_mean
from ..reading import read_toml
from ..values import Within, name, number, plain, shown, text

DEVICE_NAMES = ("h100-sxm", "h100-pcie", "h200", "a100-sxm")
"""Devices that come with the package."""

ARCHITECTURES = ("hopper", "ampere")
_FILES = Path(__file__).parent
_ENTRY_KEYS = {"value", "unit", "source"}


def _text() -> Field:
    """A device field that is a name."""
    return field(metadata={"unit": "name"})


def _quantity(unit: str, least: float, most: float) -> Field:
    """A device field: its unit, and the least and the most that a GPU could have, generously; beyond is a slip of the pen."""
    return field(metadata={"unit": unit, "within": Within(least, most)})


@dataclass(frozen=True)
class Device:
    """One GPU. "Per sub-partition" means one of the four quarters of an SM, each with its own warp scheduler."""

    # the chip
    name: str = _text()
    architecture: str = _text()  # "hopper" or "ampere"
    sms: int = _quantity("count", 1, 1024)
    max_clock_hz: float = _quantity("Hz", 1e8, 1e10)  # boost clock of the SMs

    # memory
    memory_bytes: int = _quantity("B", 10**8, 10**13)
    hbm_bytes_per_s: float = _quantity("B/s", 1e9, 1e15)  # datasheet peak, reads and writes together
    hbm_efficiency: float = _quantity("ratio", 0.01, 1)  # achieved over peak, of a large copy
    hbm_read_efficiency: float = _quantity("ratio", 0.01, 1)  # the same of a loop that only reads
    hbm_queue_cycles: float = _quantity("cycles", 0, 1e4)  # as l2_queue_cycles, of what misses L2, u of HBM's rate
    hbm_latency_cycles: int = _quantity("cycles", 1, 10_000)  # a load that misses L2
    l2_bytes: int = _quantity("B", 1 << 16, 1 << 34)
    l2_partitions: int = _quantity("count", 1, 4)
    l2_effective_fraction: float = _quantity("ratio", 0.01, 1.5)  # reuse distance over capacity where half the reads hit
    l2_spread: float = _quantity("ratio", 0, 1)  # standard deviation of that distance over L2's sets
    l2_ways: int = _quantity("count", 1, 128)  # lines of a set, where slices of rows fall into sets by chance
    l2_bytes_per_cycle: float = _quantity("B/cycle", 1, 1e5)  # reads that hit, shared by many SMs, the whole chip
    l2_lookup_bytes_per_cycle: float = _quantity("B/cycle", 1, 1e5)  # reads that hit, no two SMs the same line at a time
    l2_sharing: float = _quantity("ratio", 0, 0.99)  # g SMs that read a line at a time look it up g^(1 - this) times
    l2_queue_cycles: float = _quantity("cycles", 0, 1e4)  # a load waits so long x u / 2(1 - u) at a share u of that rate
    l2_bytes_per_cycle_per_sm: float = _quantity("B/cycle", 1, 1e5)  # the port of one SM
    l2_hit_latency_cycles: int = _quantity("cycles", 1, 10_000)  # a load that hits
    tma_latency_cycles: int = _quantity("cycles", 0, 10_000)  # added to either latency when TMA does the load

    # the SM
    smem_bytes_per_sm: int = _quantity("B", 1 << 13, 1 << 24)
    smem_bytes_per_cta: int = _quantity("B", 1 << 13, 1 << 24)
    smem_bytes_per_cycle: int = _quantity("B/cycle", 1, 100_000)
    smem_latency_cycles: int = _quantity("cycles", 1, 10_000)
    tma_store_bytes_per_cycle: float = _quantity("B/cycle", 1, 1e5)  # at which a copy out reads shared memory
    add_bytes_per_cycle_per_sm: float = _quantity("B/cycle", 1, 1e5)  # fp32 that one SM adds to memory, by L2
    l2_add_bytes_per_cycle: float = _quantity("B/cycle", 1, 1e6)  # that all SMs do together
    tma_store_latency_cycles: int = _quantity("cycles", 0, 10_000)  # until a copy out of nothing lets go of shared memory
    registers_per_sm: int = _quantity("count", 1 << 13, 1 << 20)  # of 32 bits
    max_registers_per_thread: int = _quantity("count", 32, 1024)
    max_threads_per_sm: int = _quantity("count", 128, 8192)
    max_ctas_per_sm: int = _quantity("count", 1, 64)

    # tensor cores
    tensor_flops_per_cycle: int = _quantity("FLOP/cycle", 64, 1 << 16)  # fp16 and bf16, dense, per SM
    fp8_ratio: float = _quantity("ratio", 0, 16)  # fp8 rate over fp16 rate, 0 where there is none
    mma_sync_efficiency: float = _quantity("ratio", 0.01, 1)  # share of the peak that mma.sync m16n8k16 reaches
    mma_latency_cycles: int = _quantity("cycles", 1, 10_000)  # one dependent mma.sync m16n8k16
    ldmatrix_issue_cycles: float = _quantity("cycles", 0, 1e4)  # of the issue port, per ldmatrix.x4 beside mma.sync
    wgmma: int = _quantity("flag", 0, 1)
    tma: int = _quantity("flag", 0, 1)
    wgmma_issue_cycles: int = _quantity("cycles", 0, 10_000)  # a warpgroup's issue of one group, before it runs on
    wgmma_beside_cycles: int = _quantity("cycles", 0, 10_000)  # added to the issue of a GEMM beside warps in arithmetic
    wgmma_step_issue_cycles: int = _quantity("cycles", 0, 10_000)  # between the issues of two k steps of a warpgroup, at least
    wgmma_step_issue_share: float = _quantity("ratio", 0, 1)  # the same, of the cycles a k step executes
    wgmma_latency_cycles: int = _quantity("cycles", 0, 10_000)  # tail behind the last k step
    wgmma_queue_ksteps: int = _quantity("k steps", 0, 64)  # k steps a warpgroup may queue before its issue stalls
    wgmma_arbitration_ksteps: int = _quantity("k steps", 0, 64)  # before another's turn; 0: order of issue
    wgmma_register_share: float = _quantity("ratio", 0, 1)  # of the register file: instructions beyond the rest slow k steps
    red_interference: float = _quantity("ratio", 0, 0.99)  # rate that WGMMA loses while a warpgroup adds from registers
    store_beside_most: float = _quantity("B/cycle", 1, 1e5)  # of shared memory's, by 16-byte stores beside WGMMA: at most
    store_beside_least: float = _quantity("B/cycle", 1, 1e5)  # at least, whatever WGMMA's operands take; what they leave, between
    matrix_beside_most: float = _quantity("B/cycle", 1, 1e5)  # by a stream of LDSM and STSM beside WGMMA: at most
    matrix_beside_more: float = _quantity("B/cycle", 0, 1e5)  # than WGMMA's operands leave
    matrix_interference: float = _quantity("ratio", 0, 0.99)  # rate that WGMMA loses beside it
    load_beside_cycles: int = _quantity("cycles", 0, 10_000)  # LDS of 16 bytes a lane, four warps, beside WGMMA
    load_interference_least: float = _quantity("ratio", 0, 0.99)  # rate that WGMMA loses beside them, A in registers
    load_interference_most: float = _quantity("ratio", 0, 0.99)  # where operands need all of shared memory
    store_interference: float = _quantity("ratio", 0, 0.99)  # rate that WGMMA loses where operands and the least do not both fit

    # pipes: cycles that one warp instruction holds its sub-partition's pipe, then latencies from issue to use
    issue_per_cycle: int = _quantity("1/cycle", 1, 64)  # warp instructions a sub-partition issues
    fma_cycles: int = _quantity("cycles", 1, 10_000)
    alu_cycles: int = _quantity("cycles", 1, 10_000)
    mufu_cycles: int = _quantity("cycles", 1, 10_000)
    mufu_spacing_cycles: int = _quantity("cycles", 1, 10_000)  # between two EX2 of a softmax, which also feeds them by FFMA
    convert_cycles: int = _quantity("cycles", 1, 10_000)
    # while WGMMA executes: of each instruction the issue, of FMA after FMA each one, and what the slower pipes add to the issue
    issue_beside_wgmma_cycles: float = _quantity("cycles", 0, 1000)
    fma_beside_wgmma_cycles: float = _quantity("cycles", 0, 1000)
    alu_beside_wgmma_cycles: float = _quantity("cycles", 0, 1000)
    mufu_beside_wgmma_cycles: float = _quantity("cycles", 0, 1000)
    dependent_latency_cycles: int = _quantity("cycles", 1, 10_000)
    shuffle_latency_cycles: int = _quantity("cycles", 1, 10_000)
    mufu_latency_cycles: int = _quantity("cycles", 1, 10_000)
    vote_cycles: int = _quantity("cycles", 0, 10_000)  # compare, vote of a warp and branch on it
    divide_cycles: int = _quantity("cycles", 0, 10_000)  # 32 bits by a run-time value
    branch_cycles: int = _quantity("cycles", 0, 10_000)  # a branch that is taken, behind dependent instructions
    branch_beside_cycles: int = _quantity("cycles", 0, 10_000)  # the same beside other warps' softmax
    chain_dilation: float = _quantity("ratio", 0, 10)  # how much longer dependent instructions take there
    fetch_cycles: float = _quantity("cycles", 0, 1e4)  # added to an instruction that the nearest instruction caches have lost
    fetch_latency_cycles: int = _quantity("cycles", 0, 10_000)  # the first wait of such a run
    cold_fetch_cycles: float = _quantity("cycles", 0, 1e4)  # an instruction whose code the SM has out of L2
    cold_fetch_latency_cycles: int = _quantity("cycles", 0, 10_000)  # the first wait of such a run

    # synchronisation and launch
    mbarrier_arrive_cycles: int = _quantity("cycles", 1, 10_000)
    mbarrier_issue_cycles: int = _quantity("cycles", 0, 10_000)  # a warp's arrival, before it runs on
    mbarrier_wait_cycles: int = _quantity("cycles", 1, 10_000)  # try_wait on a completed phase until the branch on it
    draw_latency_cycles: int = _quantity("cycles", 1, 10_000)  # atomicAdd on global memory, with its result
    named_barrier_cycles: int = _quantity("cycles", 1, 10_000)
    cluster_arrive_cycles: int = _quantity("cycles", 0, 10_000)  # an mbarrier arrival on another SM of the cluster
    tma_issue_cycles: int = _quantity("cycles", 0, 10_000)  # the producer's issue of one TMA load
    kernel_launch_cycles: int = _quantity("cycles", 0, 1_000_000)  # an empty kernel, caches emptied, at max_clock_hz
    kernel_train_cycles: int = _quantity("cycles", 0, 1_000_000)  # the same behind another kernel that was launched before
    cta_launch_cycles: int = _quantity("cycles", 0, 10_000)
    setup_cycles: int = _quantity("cycles", 0, 10_000)  # barrier initialisation and descriptor fetch of one CTA

    # power: the watts a unit adds at full rate on all SMs, or joules, at max_clock_hz and its voltage
    power_limit_w: float = _quantity("W", 1, 1e4)  # the board's limit, held over seconds
    power_limit_overshoot: float = _quantity("ratio", 0.1, 2)  # drawn while it is held, over the limit: between rare dips
    burst_w: float = _quantity("W", 1, 1e4)  # power above which the clock falls at once; half of the excess is given up
    tensor_clock_droop: float = _quantity("ratio", 0, 0.9)  # clock given up at tensor_droop_activity and above
    tensor_droop_activity: float = _quantity("ratio", 0.01, 1)  # share of cycles in which tensor cores are busy
    idle_w: float = _quantity("W", 0, 1e4)  # clocks running, no work
    tensor_w: float = _quantity("W", 0, 1e4)  # on fp16 data that are new every time
    tensor_bf16_ratio: float = _quantity("ratio", 0.01, 2)  # bf16 over fp16
    issue_w: float = _quantity("W", 0, 1e4)  # one warp instruction of softmax per cycle per sub-partition
    mufu_w: float = _quantity("W", 0, 1e4)  # on top of its issue
    smem_w: float = _quantity("W", 0, 1e4)  # smem_bytes_per_cycle on every SM
    l2_joules_per_byte: float = _quantity("J/B", 0, 1e-6)  # delivered to an SM, or written by one
    l2_lookup_joules_per_byte: float = _quantity("J/B", 0, 1e-6)  # on top where L2 looks it up, once for SMs in step
    hbm_joules_per_byte: float = _quantity("J/B", 0, 1e-6)  # HBM to L2, whatever the SM clock
    voltage_floor: float = _quantity("ratio", 0.01, 1)  # supply voltage at zero clock, extrapolated, over that at max

    sources: dict[str, tuple[str, str]] = field(default_factory=dict, compare=False, repr=False)
    """field -> (unit, source)"""

    @property
    def hbm_achieved_bytes_per_s(self) -> float:
        """Bandwidth that a large copy reaches, bytes per second."""
        return self.hbm_bytes_per_s * self.hbm_efficiency

    def hbm_rate(self, moved: int, written: int) -> float:
        """Bandwidth that a kernel reaches which moves so many bytes, some of them written; bytes per second."""
        reads_alone = written < ONLY_READS * moved
        return self.hbm_bytes_per_s * (self.hbm_read_efficiency if reads_alone else self.hbm_efficiency)

    def tensor_rate(self, element_bytes: int) -> float:
        """Dense tensor FLOPs per cycle of one SM for operands of this size.

        Raises UsageError for fp8 on a device without it.
        """
        if element_bytes > 1:
            return float(self.tensor_flops_per_cycle)
        if self.fp8_ratio == 0:
            raise UsageError(f"{self.name} has no fp8 tensor cores; use --dtype fp16 or bf16, or a Hopper device")
        return self.tensor_flops_per_cycle * self.fp8_ratio


ONLY_READS = 0.02
"""Share of the bytes that a kernel may write and still be one that reads alone."""
FIELDS: dict[str, Field] = {f.name: f for f in fields(Device) if "unit" in f.metadata}
"""The fields a device file gives, in order."""


def load_device(name_or_path: str) -> Device:
    """A built-in device by name, or a user's TOML file by path (it ends in .toml or contains a path separator).

    A file gives every field as `field = {value = .., unit = "..", source = ".."}`, in sections or not; with
    `base = "h200"` at its top it gives only the fields that differ from that built-in device.

    Raises UsageError, one sentence naming file and field, for whatever is missing, unknown or of the wrong kind.
    """
    asked = str(name_or_path)
    if asked in DEVICE_NAMES:
        return built_in(asked)
    if asked.endswith(".toml") or "/" in asked or os.sep in asked:
        return _build(_read(Path(asked)), f"device file {asked}")
    known = f"{', '.join(DEVICE_NAMES)}, or the path of a .toml file"
    raise UsageError(f"device {shown(asked)} is not known ({known}){did_you_mean(asked, DEVICE_NAMES)}")


@cache
def built_in(known: str) -> Device:
    """The device of a name in DEVICE_NAMES, and nothing else."""
    if known not in DEVICE_NAMES:
        raise UsageError(f"device {shown(known)} is not known ({', '.join(DEVICE_NAMES)})")
    return _build(_read(_FILES / f"{known}.toml"), f"device {known}")


def with_fields(device: Device, values: dict, where: str, source: str) -> Device:
    """The device with other values of some fields, held to their ranges as a file's are. Raises UsageError."""
    checked = {key: _checked(FIELDS[key], value, f"{where}: field {key!r}") for key, value in values.items()}
    sources = device.sources | {key: (FIELDS[key].metadata["unit"], source) for key in checked}
    found = replace(device, **checked, sources=sources)
    _agree(found, where)
    return found


@cache
def sections() -> dict[str, str]:
    """The section of each field, as the files of the built-in devices have it."""
    tree = read_toml(_FILES / "h200.toml", "device file")
    return {key: section for section, inner in tree.items() if isinstance(inner, dict) for key in inner}


def _read(path: Path) -> dict[str, dict]:
    """The entries of one file, field -> {value, unit, source}, on top of its base's."""
    where = f"device file {path}"
    tree = read_toml(path, "device file")
    entries: dict[str, dict] = {}
    base = tree.pop("base", None)
    if base is not None:
        if base not in DEVICE_NAMES:
            raise UsageError(f"{where}: base={shown(base)} is not a built-in device ({', '.join(DEVICE_NAMES)})")
        if path == _FILES / f"{base}.toml":
            raise UsageError(f"{where}: base={base!r} is the file itself")
        entries.update(_read(_FILES / f"{base}.toml"))
    own = _flatten(tree, where)
    if base is not None and "name" not in own:  # a variant is not the device that it starts from
        own["name"] = {"value": plain(path.stem), "unit": "name", "source": "the file's name"}
    entries.update(own)
    return entries


def _flatten(tree: dict, where: str) -> dict[str, dict]:
    own: dict[str, dict] = {}

    def add(key: str, entry: object) -> None:
        if key in own:
            raise UsageError(f"{where}: field {key!r} is given twice")
        if key not in FIELDS:
            raise UsageError(f"{where}: unknown field {shown(key)}; `fasim devices h200` lists the fields")
        if not isinstance(entry, dict) or "value" not in entry:
            raise UsageError(f'{where}: field {key!r} must be {{value = .., unit = "..", source = ".."}}')
        own[key] = entry

    for key, item in tree.items():
        if isinstance(item, dict) and not (_ENTRY_KEYS & item.keys()) and key not in FIELDS:
            for inner, entry in item.items():
                add(inner, entry)
        else:
            add(key, item)
    return own


def _build(entries: dict[str, dict], where: str) -> Device:
    values, sources = {}, {}
    for key, spec in FIELDS.items():
        if key not in entries:
            raise UsageError(f'{where}: field {key!r} is missing; give it, or start from base = "h200"')
        entry, here = entries[key], f"{where}: field {key!r}"
        if unknown := entry.keys() - _ENTRY_KEYS:
            raise UsageError(f"{here} has an unknown key {shown(min(unknown))} (value, unit, source)")
        unit, source = entry.get("unit"), entry.get("source")
        if unit != spec.metadata["unit"]:
            raise UsageError(f"{here} has unit {shown(unit)}, expected {spec.metadata['unit']!r}")
        if not isinstance(source, str) or not source.strip():
            raise UsageError(f"{here} has no source; say where the value comes from")
        values[key] = _checked(spec, entry["value"], here)
        sources[key] = (unit, text(" ".join(source.split()), f"{here}: its source"))
    device = Device(**values, sources=sources)
    _agree(device, where)
    return device


def _checked(spec: Field, value: object, here: str) -> str | int | float:
    if spec.name == "name":
        return name(value, here)
    if spec.name == "architecture":
        return text(value, here, ARCHITECTURES)
    return number(value, {"int": int, "float": float}[spec.type], spec.metadata["within"], here)


def _agree(device: Device, where: str) -> None:
    """What no field can say alone."""
    for lower, upper in (("idle_w", "power_limit_w"), ("idle_w", "burst_w"), ("smem_bytes_per_cta", "smem_bytes_per_sm")):
        low, high = getattr(device, lower), getattr(device, upper)
        if low > high:
            raise UsageError(f"{where}: field {lower!r} is {low:g}, expected at most {upper!r}, which is {high:g}")
    if 0 < device.fp8_ratio < 0.25:
        raise UsageError(f"{where}: field 'fp8_ratio' is {device.fp8_ratio:g}, expected 0 where there is no fp8, or 0.25 to 16")
