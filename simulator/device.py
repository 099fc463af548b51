"""Device: the GPU as named numbers, each with its unit and its source, read from a TOML file."""

from __future__ import annotations

import os
import tomllib
from dataclasses import Field, dataclass, field, fields
from pathlib import Path

from .errors import UsageError, did_you_mean

DEVICE_NAMES = ("h100-sxm", "h100-pcie", "h200", "a100-sxm")
"""Devices that come with the package."""

ARCHITECTURES = ("hopper", "ampere")
_FILES = Path(__file__).parent / "devices"
_ENTRY_KEYS = {"value", "unit", "source"}


def _quantity(unit: str, least: float | None = None, most: float | None = None) -> Field:
    """A device field: its unit, and its bounds (without `least` it must be greater than zero)."""
    return field(metadata={"unit": unit, "least": least, "most": most})


@dataclass(frozen=True)
class Device:
    """One GPU. "Per sub-partition" means one of the four quarters of an SM, each with its own warp scheduler."""

    # the chip
    name: str = _quantity("name")
    architecture: str = _quantity("name")  # "hopper" or "ampere"
    sms: int = _quantity("count")
    max_clock_hz: float = _quantity("Hz")  # boost clock of the SMs

    # memory
    memory_bytes: int = _quantity("B")
    hbm_bytes_per_s: float = _quantity("B/s")  # datasheet peak, reads and writes together
    hbm_efficiency: float = _quantity("ratio", most=1.0)  # achieved over peak, of a large copy
    hbm_queue_cycles: float = _quantity("cycles", least=0.0)  # as l2_queue_cycles, of what misses L2, u of HBM's rate
    hbm_latency_cycles: int = _quantity("cycles")  # a load that misses L2
    l2_bytes: int = _quantity("B")
    l2_partitions: int = _quantity("count")
    l2_effective_fraction: float = _quantity("ratio", most=1.5)  # reuse distance over capacity where half the reads hit
    l2_spread: float = _quantity("ratio", least=0.0, most=1.0)  # standard deviation of that distance over L2's sets
    l2_ways: int = _quantity("count")  # lines of a set, where slices of rows fall into sets by chance
    l2_bytes_per_cycle: float = _quantity("B/cycle")  # reads that hit, shared by many SMs, the whole chip
    l2_lookup_bytes_per_cycle: float = _quantity("B/cycle")  # reads that hit, no two SMs the same line at a time
    l2_sharing: float = _quantity("ratio", least=0.0, most=0.99)  # g SMs that read a line at a time look it up g^(1 - this) times
    l2_queue_cycles: float = _quantity("cycles", least=0.0)  # a load waits so long x u / 2(1 - u) at a share u of that rate
    l2_bytes_per_cycle_per_sm: float = _quantity("B/cycle")  # the port of one SM
    l2_hit_latency_cycles: int = _quantity("cycles")  # a load that hits
    tma_latency_cycles: int = _quantity("cycles", least=0)  # added to either latency when TMA does the load

    # the SM
    smem_bytes_per_sm: int = _quantity("B")
    smem_bytes_per_cta: int = _quantity("B")
    smem_bytes_per_cycle: int = _quantity("B/cycle")
    smem_latency_cycles: int = _quantity("cycles")
    tma_store_bytes_per_cycle: float = _quantity("B/cycle")  # at which a copy out reads shared memory
    tma_store_latency_cycles: int = _quantity("cycles", least=0)  # until a copy out of nothing lets go of shared memory
    registers_per_sm: int = _quantity("count")  # of 32 bits
    max_registers_per_thread: int = _quantity("count")
    max_threads_per_sm: int = _quantity("count")
    max_ctas_per_sm: int = _quantity("count")

    # tensor cores
    tensor_flops_per_cycle: int = _quantity("FLOP/cycle")  # fp16 and bf16, dense, per SM
    fp8_ratio: float = _quantity("ratio", least=0.0)  # fp8 rate over fp16 rate, 0 where there is none
    mma_sync_efficiency: float = _quantity("ratio", most=1.0)  # share of the peak that mma.sync m16n8k16 reaches
    mma_latency_cycles: int = _quantity("cycles")  # one dependent mma.sync m16n8k16
    ldmatrix_issue_cycles: float = _quantity("cycles", least=0.0)  # of the issue port, per ldmatrix.x4 beside mma.sync
    wgmma: int = _quantity("flag", least=0, most=1)
    tma: int = _quantity("flag", least=0, most=1)
    wgmma_issue_cycles: int = _quantity("cycles", least=0)  # a warpgroup's issue of one group, before it runs on
    wgmma_contended_cycles: int = _quantity("cycles", least=0)  # added to the issue of a GEMM beside warps in softmax
    wgmma_beside_sparse_cycles: int = _quantity("cycles", least=0)  # the same beside warps whose arithmetic MUFU bounds
    wgmma_step_issue_cycles: int = _quantity("cycles", least=0)  # between the issues of two k steps of a warpgroup, at least
    wgmma_step_issue_share: float = _quantity("ratio", least=0.0, most=1.0)  # the same, of the cycles a k step executes
    wgmma_latency_cycles: int = _quantity("cycles", least=0)  # tail behind the last k step
    wgmma_queue_ksteps: int = _quantity("k steps", least=0)  # k steps a warpgroup may queue before its issue stalls
    wgmma_arbitration_ksteps: int = _quantity("k steps", least=0)  # before another's turn; 0: order of issue
    wgmma_dilation: float = _quantity("ratio", least=0.0)  # how much longer a k step takes beside a softmax
    smem_interference: float = _quantity("ratio", least=0.0, most=0.99)  # rate that shared-memory accesses lose beside WGMMA
    mufu_interference: float = _quantity("ratio", least=0.0, most=0.99)  # rate MUFU loses beside WGMMA where it binds
    mufu_interference_alone: float = _quantity("ratio", least=0.0, most=0.99)  # rate one warp that MUFU binds loses
    tensor_interference: float = _quantity("ratio", least=0.0, most=0.99)  # rate other pipes lose beside WGMMA

    # pipes: cycles that one warp instruction holds its sub-partition's pipe, then latencies from issue to use
    fma_cycles: int = _quantity("cycles")
    alu_cycles: int = _quantity("cycles")
    mufu_cycles: int = _quantity("cycles")
    mufu_spacing_cycles: int = _quantity("cycles")  # between two EX2 of a softmax, which also feeds them by FFMA
    convert_cycles: int = _quantity("cycles")
    shuffle_cycles: int = _quantity("cycles")
    dependent_latency_cycles: int = _quantity("cycles")
    shuffle_latency_cycles: int = _quantity("cycles")
    mufu_latency_cycles: int = _quantity("cycles")
    vote_cycles: int = _quantity("cycles", least=0)  # compare, vote of a warp and branch on it
    divide_cycles: int = _quantity("cycles", least=0)  # 32 bits by a run-time value
    branch_cycles: int = _quantity("cycles", least=0)  # a branch that is taken, behind dependent instructions
    branch_beside_cycles: int = _quantity("cycles", least=0)  # the same beside other warps' softmax
    chain_dilation: float = _quantity("ratio", least=0.0)  # how much longer dependent instructions take there
    fetch_cycles: float = _quantity("cycles", least=0.0)  # added to an instruction that the nearest instruction caches have lost
    fetch_latency_cycles: int = _quantity("cycles", least=0)  # the first wait of such a run

    # synchronisation and launch
    mbarrier_arrive_cycles: int = _quantity("cycles")
    mbarrier_issue_cycles: int = _quantity("cycles", least=0)  # a warp's arrival, before it runs on
    mbarrier_wait_cycles: int = _quantity("cycles")  # try_wait on a completed phase until the branch on it
    draw_latency_cycles: int = _quantity("cycles")  # atomicAdd on global memory, with its result
    named_barrier_cycles: int = _quantity("cycles")
    cluster_arrive_cycles: int = _quantity("cycles", least=0)  # an mbarrier arrival on another SM of the cluster
    tma_issue_cycles: int = _quantity("cycles", least=0)  # the producer's issue of one TMA load
    kernel_launch_cycles: int = _quantity("cycles", least=0)  # an empty kernel between two CUDA events, at max_clock_hz
    cta_launch_cycles: int = _quantity("cycles", least=0)
    setup_cycles: int = _quantity("cycles", least=0)  # barrier initialisation and descriptor fetch of one CTA

    # power: the watts a unit adds at full rate on all SMs, or joules, at max_clock_hz and its voltage
    power_limit_w: float = _quantity("W")  # the board's limit, held over seconds
    power_limit_overshoot: float = _quantity("ratio", most=2.0)  # drawn while it is held, over the limit: between rare dips
    burst_w: float = _quantity("W")  # power above which the clock falls at once; half of the excess is given up
    tensor_clock_droop: float = _quantity("ratio", least=0.0, most=0.9)  # clock given up at tensor_droop_activity and above
    tensor_droop_activity: float = _quantity("ratio", most=1.0)  # share of cycles in which tensor cores are busy
    idle_w: float = _quantity("W", least=0.0)  # clocks running, no work
    tensor_w: float = _quantity("W", least=0.0)  # on fp16 data that are new every time
    tensor_bf16_ratio: float = _quantity("ratio", most=2.0)  # bf16 over fp16
    issue_w: float = _quantity("W", least=0.0)  # one warp instruction of softmax per cycle per sub-partition
    mufu_w: float = _quantity("W", least=0.0)  # on top of its issue
    smem_w: float = _quantity("W", least=0.0)  # smem_bytes_per_cycle on every SM
    l2_joules_per_byte: float = _quantity("J/B", least=0.0)  # delivered to an SM, or written by one
    l2_lookup_joules_per_byte: float = _quantity("J/B", least=0.0)  # on top where L2 looks it up, once for SMs in step
    hbm_joules_per_byte: float = _quantity("J/B", least=0.0)  # HBM to L2, whatever the SM clock
    voltage_floor: float = _quantity("ratio", most=1.0)  # supply voltage at zero clock, extrapolated, over that at max

    sources: dict[str, tuple[str, str]] = field(default_factory=dict, compare=False, repr=False)
    """field -> (unit, source)"""

    @property
    def hbm_achieved_bytes_per_s(self) -> float:
        """Bandwidth that a large copy reaches, bytes per second."""
        return self.hbm_bytes_per_s * self.hbm_efficiency

    def tensor_rate(self, element_bytes: int) -> float:
        """Dense tensor FLOPs per cycle of one SM for operands of this size.

        Raises UsageError for fp8 on a device without it.
        """
        if element_bytes > 1:
            return float(self.tensor_flops_per_cycle)
        if self.fp8_ratio == 0:
            raise UsageError(f"{self.name} has no fp8 tensor cores; use --dtype fp16 or bf16, or a Hopper device")
        return self.tensor_flops_per_cycle * self.fp8_ratio


FIELDS: dict[str, Field] = {f.name: f for f in fields(Device) if "unit" in f.metadata}
"""The fields a device file gives, in order."""


def load_device(name_or_path: str) -> Device:
    """A built-in device by name, or a user's TOML file by path (it ends in .toml or contains a path separator).

    A file gives every field as `field = {value = .., unit = "..", source = ".."}`, in sections or not; with
    `base = "h200"` at its top it gives only the fields that differ from that built-in device.

    Raises UsageError, one sentence naming file and field, for whatever is missing, unknown or of the wrong kind.
    """
    text = str(name_or_path)
    if text in DEVICE_NAMES:
        return _build(_read(_FILES / f"{text}.toml", text), text)
    if text.endswith(".toml") or "/" in text or os.sep in text:
        return _build(_read(Path(text), text), text)
    known = f"{', '.join(DEVICE_NAMES)}, or the path of a .toml file"
    raise UsageError(f"device {text!r} is not known ({known}){did_you_mean(text, DEVICE_NAMES)}")


def _read(path: Path, shown: str) -> dict[str, dict]:
    """The entries of one file, field -> {value, unit, source}, on top of its base's."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"device file {shown} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"device file {shown} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"device file {shown} is not valid TOML: {error}") from None
    entries: dict[str, dict] = {}
    base = tree.pop("base", None)
    if base is not None:
        if base not in DEVICE_NAMES:
            raise UsageError(f"device file {shown}: base={base!r} is not a built-in device ({', '.join(DEVICE_NAMES)})")
        if path == _FILES / f"{base}.toml":
            raise UsageError(f"device file {shown}: base={base!r} is the file itself")
        entries.update(_read(_FILES / f"{base}.toml", base))
    own = _flatten(tree, shown)
    if base is not None and "name" not in own:  # a variant is not the device that it starts from
        own["name"] = {"value": path.stem, "unit": "name", "source": "the file's name"}
    entries.update(own)
    return entries


def _flatten(tree: dict, shown: str) -> dict[str, dict]:
    own: dict[str, dict] = {}

    def add(name: str, entry: object) -> None:
        if name in own:
            raise UsageError(f"device file {shown}: field {name!r} is given twice")
        if name not in FIELDS:
            raise UsageError(f"device file {shown}: unknown field {name!r}; `fasim devices` lists the fields")
        if not isinstance(entry, dict) or "value" not in entry:
            raise UsageError(f'device file {shown}: field {name!r} must be {{value = .., unit = "..", source = ".."}}')
        own[name] = entry

    for key, item in tree.items():
        if isinstance(item, dict) and not (_ENTRY_KEYS & item.keys()) and key not in FIELDS:
            for name, entry in item.items():
                add(name, entry)
        else:
            add(key, item)
    return own


def _build(entries: dict[str, dict], shown: str) -> Device:
    values, sources = {}, {}
    for name, spec in FIELDS.items():
        if name not in entries:
            raise UsageError(f'device file {shown}: field {name!r} is missing; give it, or start from base = "h200"')
        entry = entries[name]
        unit, source = entry.get("unit"), entry.get("source")
        if unit != spec.metadata["unit"]:
            wanted = spec.metadata["unit"]
            raise UsageError(f"device file {shown}: field {name!r} has unit {unit!r}, expected {wanted!r}")
        if not isinstance(source, str) or not source.strip():
            raise UsageError(f"device file {shown}: field {name!r} has no source; say where the value comes from")
        unknown = entry.keys() - _ENTRY_KEYS
        if unknown:
            key = min(unknown)
            raise UsageError(f"device file {shown}: field {name!r} has an unknown key {key!r} (value, unit, source)")
        values[name] = _checked(name, spec, entry["value"], shown)
        sources[name] = (unit, source.strip())
    if values["architecture"] not in ARCHITECTURES:
        raise UsageError(
            f"device file {shown}: field 'architecture' is {values['architecture']!r}, "
            f"possible are {' and '.join(ARCHITECTURES)}"
        )
    return Device(**values, sources=sources)


def _checked(name: str, spec: Field, value: object, shown: str) -> str | int | float:
    kind = {"str": str, "int": int, "float": float}[spec.type]
    words = {str: "a text", int: "a whole number", float: "a number"}[kind]
    good = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if not good:
        raise UsageError(f"device file {shown}: field {name!r} is {value!r}, expected {words}")
    if kind is str:
        if not value:
            raise UsageError(f"device file {shown}: field {name!r} is empty")
        return value
    least, most = spec.metadata["least"], spec.metadata["most"]
    if not value < float("inf"):  # also false for nan
        raise UsageError(f"device file {shown}: field {name!r} is {value}, expected a finite number")
    if least is None and value <= 0:
        raise UsageError(f"device file {shown}: field {name!r} is {value}, it must be positive")
    if least is not None and value < least:
        raise UsageError(f"device file {shown}: field {name!r} is {value}, it must be at least {least:g}")
    if most is not None and value > most:
        raise UsageError(f"device file {shown}: field {name!r} is {value}, it must be at most {most:g}")
    return kind(value)


