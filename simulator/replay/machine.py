"""Machine: what the engine reads and returns. Device, memory and programs as flat tables; the replay as plain data."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from ..devices.device import Device
from ..language.ops import Op
from ..language.program import Program
from ..results.run import Lane

UNITS = ("TMA", "tensor cores", "MUFU", "FMA", "ALU", "barriers", "issue", "smem bytes")
"""Units of an SM, in the order of their lanes and of the busy counters."""
STSM_BYTES = 4 * 512
"""One STSM.x4 of the four warps: 16 bytes a lane."""
DRAWN_UNITS = 6
"""How many of them have a lane in the timeline."""


def unit_lanes(programs: Sequence[Program]) -> tuple[Lane, ...]:
    """The units' lanes; copies are named by what moves them: cp.async where no load goes by TMA."""
    loads = [program.recorded(Op.LOAD)[1] for program in programs]
    by_warps = any(len(each) for each in loads) and all((each["by_warps"] == 1).all() for each in loads)
    names = ("cp.async" if by_warps else UNITS[0], *UNITS[1:DRAWN_UNITS])
    return tuple(Lane(name, "unit") for name in names)


class Deadlock(RuntimeError):
    """Warps wait for what will never come; the message names warp, verb and buffer."""


@dataclass(frozen=True, eq=False)
class Memory:
    """What one SM sees of the chip's memory system while the kernel runs. Each is equal to itself alone.

    Rates are bytes per cycle: `l2` and `hbm` are shared by all SMs of the replay; `read_miss` and `write_through` give
    per tensor name the fraction of bytes that HBM has to move; `read_late` that of loads which wait for HBM, be it that
    another SM asked first (default: those that miss); `l2_wait` and `hbm_wait` are the cycles that a load waits
    for those of the other SMs, beyond the latency.
    """

    l2: float
    hbm: float
    read_miss: dict[str, float]
    write_through: dict[str, float]
    read_late: dict[str, float] = field(default_factory=dict)
    l2_wait: float = 0.0
    hbm_wait: float = 0.0
    adds: float = 0.0  # bytes a cycle that L2 adds to memory for one SM, 0: for it alone


@dataclass(frozen=True)
class Replay:
    """What the replay of some programs gave, in cycles from the start of the first CTA."""

    cycles: int
    tile_ends: np.ndarray  # (CTA slot, tile): when the last warp finished the tile
    busy: np.ndarray  # (SM, unit) busy cycles; SMEM in bytes
    lanes: tuple[Lane, ...]
    labels: tuple[str, ...]
    spans: np.ndarray  # SPAN, of the first SM


def _record(text: str) -> np.dtype:
    return np.dtype([(name, "i8") for name in text.split()])


MACHINE = _record(
    "issue_rate fma alu mufu mufu_spacing convert dependent shuffle_latency mufu_latency "
    "fetch_q10 fetch_latency cold_q10 cold_latency "
    "vote divide branch branch_beside chain_q10 "
    "tensor_flops tensor_flops_8bit mma_flops_q10 mma_latency ldmatrix_q10 "
    "wgmma_start wgmma_beside wgmma_issue wgmma_issue_q10 wgmma_latency queue arbitration port_q10 "
    "issue_beside_q10 fma_beside_q10 alu_beside_q10 mufu_beside_q10 "
    "store_most_q10 store_least_q10 matrix_most_q10 matrix_more_q10 storing_q10 moving_q10 "
    "load_beside loading_least_q10 loading_most_q10 "
    "smem_bytes smem_latency stsm store_q20 store_latency port_q20 l2_q20 hbm_q20 l2_latency draw_latency "
    "tma_latency hbm_latency tma_issue add_q20 add_chip_q20 adding_q10 "
    "mbarrier_arrive mbarrier_wait mbarrier_issue named_arrive named_wait cluster_arrive cta_launch setup"
)
"""Cycles, unless the name says a rate: `_q10` and `_q20` are fixed-point, times 2^10 and 2^20 (cycles per byte). `_beside_q10`
are the cycles that an instruction takes while WGMMA executes; that of shared memory is a factor."""

WARP = _record(
    "sm slot lane first_tensor pc end time state "
    "part "  # of its instruction: chunks or k steps done
    "since awaits target "  # waiting since when, for which barrier, for which generation or group
    "first_group committed finished "  # WGMMA groups
    "queue_head queue_length admitted "  # its k steps in the SM's queue; whether it has been given room for one more
    "store_done turn_since"
)
"""One warp role: where its program is, and what it waits for."""

BARRIER = _record("kind expected initial first_completion arrivals latest generation")
"""One barrier: arrivals of the generation that is open, and how many are complete."""

SM = _record(
    "tensor_free tensor_owner tensor_run wgmma_until pending pending_bytes steps tickets served issuer "
    "crowded_until crowded_q10 issue_free smem_free load_free store_free adding_until moving_until loading_until"
)
"""One SM: when each unit is free, whose k steps the tensor cores serve, the cycles and operand bytes of those of the GEMMs under
way, how many are in the queue, how often a warp had to wait for room in it, when a k step left it, the number, from 1, of the warp
that is amid the issue of a GEMM, and until when, and by how much, arithmetic makes k steps longer; `adding_until` and
`moving_until`: until when adds from registers do, and LDSM and STSM; `loading_until`: until when LDS do."""

K_STEP = _record("cycles products nbytes ends_group issued instruction")
"""One queued k step of a WGMMA: how long it takes, and multiplies, at least."""

CHIP = _record("l2_free hbm_free last_event spans")
"""What all SMs share, and the count of spans recorded."""

TENSOR = _record("read_miss_q10 read_late_q10 write_through_q10")


def _q20(bytes_per_cycle: float) -> int:
    return max(1, round((1 << 20) / bytes_per_cycle))


@lru_cache(maxsize=8)
def machine_of(device: Device, memory: Memory) -> np.ndarray:
    """The device's cycle parameters as one MACHINE record, read-only."""
    values = {
        "issue_rate": device.issue_per_cycle,
        "fma": device.fma_cycles,
        "alu": device.alu_cycles,
        "mufu": device.mufu_cycles,
        "mufu_spacing": device.mufu_spacing_cycles,
        "convert": device.convert_cycles,
        "dependent": device.dependent_latency_cycles,
        "shuffle_latency": device.shuffle_latency_cycles,
        "mufu_latency": device.mufu_latency_cycles,
        "fetch_q10": round(1024 * device.fetch_cycles),
        "fetch_latency": device.fetch_latency_cycles,
        "cold_q10": round(1024 * device.cold_fetch_cycles),
        "cold_latency": device.cold_fetch_latency_cycles,
        "vote": device.vote_cycles,
        "divide": device.divide_cycles,
        "branch": device.branch_cycles,
        "branch_beside": device.branch_beside_cycles,
        "chain_q10": round(1024 * device.chain_dilation),
        "tensor_flops": device.tensor_flops_per_cycle,
        "tensor_flops_8bit": int(device.tensor_flops_per_cycle * (device.fp8_ratio or 1)),
        "mma_flops_q10": round(device.tensor_flops_per_cycle * device.mma_sync_efficiency * 1024),
        "mma_latency": device.mma_latency_cycles,
        "ldmatrix_q10": round(1024 * device.ldmatrix_issue_cycles),
        "wgmma_start": device.wgmma_issue_cycles,
        "wgmma_beside": device.wgmma_beside_cycles,
        "wgmma_issue": device.wgmma_step_issue_cycles,
        "wgmma_issue_q10": round(1024 * device.wgmma_step_issue_share),
        "wgmma_latency": device.wgmma_latency_cycles,
        "queue": device.wgmma_queue_ksteps,
        "arbitration": device.wgmma_arbitration_ksteps,
        "port_q10": round(1024 * device.wgmma_register_share),
        "issue_beside_q10": round(1024 * device.issue_beside_wgmma_cycles),
        "fma_beside_q10": round(1024 * device.fma_beside_wgmma_cycles),
        "alu_beside_q10": round(1024 * device.alu_beside_wgmma_cycles),
        "mufu_beside_q10": round(1024 * device.mufu_beside_wgmma_cycles),
        "store_most_q10": round(1024 * device.store_beside_most),
        "store_least_q10": round(1024 * device.store_beside_least),
        "matrix_most_q10": round(1024 * device.matrix_beside_most),
        "matrix_more_q10": round(1024 * device.matrix_beside_more),
        "load_beside": device.load_beside_cycles,
        "loading_least_q10": round(1024 / (1 - device.load_interference_least)) - 1024,
        "loading_most_q10": round(1024 / (1 - device.load_interference_most)) - 1024,
        "storing_q10": round(1024 / (1 - device.store_interference)) - 1024,
        "moving_q10": round(1024 / (1 - device.matrix_interference)) - 1024,
        "smem_bytes": device.smem_bytes_per_cycle,
        "smem_latency": device.smem_latency_cycles,
        "stsm": -(-STSM_BYTES // device.smem_bytes_per_cycle),
        "store_q20": _q20(device.tma_store_bytes_per_cycle),
        "store_latency": device.tma_store_latency_cycles,
        "port_q20": _q20(device.l2_bytes_per_cycle_per_sm),
        "l2_q20": _q20(memory.l2),
        "hbm_q20": _q20(memory.hbm),
        "l2_latency": round(device.l2_hit_latency_cycles + memory.l2_wait),
        "draw_latency": device.draw_latency_cycles,
        "tma_latency": device.tma_latency_cycles,
        "hbm_latency": round(device.hbm_latency_cycles + memory.hbm_wait),
        "tma_issue": device.tma_issue_cycles,
        "add_q20": _q20(min(device.tma_store_bytes_per_cycle, device.add_bytes_per_cycle_per_sm)),
        "add_chip_q20": _q20(memory.adds if memory.adds > 0 else device.l2_add_bytes_per_cycle),
        "adding_q10": round(1024 / (1 - device.red_interference)) - 1024,
        "mbarrier_arrive": device.mbarrier_arrive_cycles,
        "mbarrier_wait": device.mbarrier_wait_cycles,
        "mbarrier_issue": device.mbarrier_issue_cycles,
        "named_arrive": device.named_barrier_cycles,
        "named_wait": device.named_barrier_cycles,
        "cluster_arrive": device.cluster_arrive_cycles,
        "cta_launch": device.cta_launch_cycles,
        "setup": device.setup_cycles,
    }
    return np.array([tuple(values[name] for name in MACHINE.names)], MACHINE)


class Layout:
    """Several programs as the flat arrays of the jitted loop, before anything has run: a row per warp, barrier, tensor and SM."""

    def __init__(self, programs: Sequence[Program], placement: Sequence[int]):
        self.programs = programs
        labels: dict[str, int] = {}
        code, warps, barriers, tensors, names = [], [], [], [], []
        position = groups = 0
        records = dict.fromkeys(Op, 0)  # how many rows of its op's table there are so far
        for slot, program in enumerate(programs):
            rows = program.code.copy()
            remap = np.array([labels.setdefault(text, len(labels)) for text in program.labels], np.int32)
            rows["label"] = remap[rows["label"]]
            rows["barrier"][rows["barrier"] >= 0] += len(barriers)
            for ops, table in program.tables:
                if records[ops[0]]:
                    rows["record"][np.isin(rows["op"], ops)] += records[ops[0]]
                records[ops[0]] += len(table)
            for number, name in enumerate(program.warps):
                begin, end = (position + int(program.starts[number + k]) for k in (0, 1))
                state = {"sm": placement[slot], "slot": slot, "pc": begin, "end": end}
                warps.append(state | {"first_tensor": len(tensors), "first_group": groups})
                groups += int((program.stream(number)["op"] == Op.WGMMA).sum())
                names.append((slot, number, name))
            code.append(rows)
            barriers += program.barriers
            tensors += program.tensors
            position += len(rows)
        self.code = np.concatenate(code)
        self.phases = np.concatenate([program.phases for program in programs])
        self.gemms = np.concatenate([program.gemms for program in programs])
        self.copies = np.concatenate([program.copies for program in programs])
        self.homes = self._homes()
        self.labels = tuple(labels)
        self._names = names
        self.warps = _rows(WARP, warps)
        self.tensors, self.groups, self.sm_count = tuple(tensors), groups, max(placement) + 1
        self._lay_out_barriers(barriers)
        self._name_lanes()

    def _homes(self) -> np.ndarray:
        """A number for the code of each phase, and behind them of each GEMM: the row where the first CTA of its program has it."""
        first: dict[int, tuple[int, int]] = {}
        of_phases, of_gemms = [], []
        phases = gemms = 0
        for program in self.programs:
            begun = first.setdefault(id(program), (phases, gemms))
            of_phases.append(begun[0] + np.arange(len(program.phases)))
            of_gemms.append(len(self.phases) + begun[1] + np.arange(len(program.gemms)))
            phases, gemms = phases + len(program.phases), gemms + len(program.gemms)
        return np.concatenate([*of_phases, *of_gemms])

    def _lay_out_barriers(self, barriers: list) -> None:
        """A barrier can complete once per arrival at most: so much room in `completions`."""
        fields = [{"kind": int(b.kind), "expected": b.expected, "initial": b.initial} for b in barriers]
        self.barriers = _rows(BARRIER, fields or [{"expected": 1}])
        used = self.code["barrier"][self.code["barrier"] >= 0]
        room = np.bincount(used, minlength=len(self.barriers)) + self.barriers["initial"] + 1
        self.barriers["first_completion"] = np.cumsum(room) - room
        self.barriers["generation"] = self.barriers["initial"]
        self.room = int(room.sum())

    def _name_lanes(self) -> None:
        """A lane per warp of SM 0, then one per unit."""
        drawn = [n for n, warp in zip(self._names, self.warps, strict=True) if warp["sm"] == 0]
        several = len({slot for slot, _, _ in drawn}) > 1
        index = {name: k for k, name in enumerate(drawn)}
        self.warps["lane"] = [index.get(name, 0) for name in self._names]
        self.unit_lane = len(drawn)
        warps = tuple(Lane(f"CTA{slot} {name}" if several else name, "warp") for slot, _, name in drawn)
        self.lanes = warps + unit_lanes(self.programs)


_KEPT: OrderedDict[tuple, Layout] = OrderedDict()
LAYOUTS, CTAS = 32, 8
"""Layouts that are kept, of so many CTAs at most: a program is replayed dozens of times, under other loads and at other clocks."""


def _laid_out(programs: Sequence[Program], placement: tuple[int, ...]) -> Layout:
    """The layout of these very programs, kept where they are those of one SM; programs never change."""
    if len(programs) > CTAS:
        return Layout(tuple(programs), placement)
    key = (tuple(map(id, programs)), placement)
    found = _KEPT.pop(key, None) or Layout(tuple(programs), placement)
    _KEPT[key] = found  # the last used is the last to go
    while len(_KEPT) > LAYOUTS:
        _KEPT.popitem(last=False)
    return found


class Tables:
    """A layout with what a replay changes: where each warp stands, what has arrived, what the SMs are busy with."""

    def __init__(self, programs: Sequence[Program], placement: Sequence[int], memory: Memory):
        laid = _laid_out(programs, tuple(placement))
        self.programs, self.code, self.phases = laid.programs, laid.code, laid.phases
        self.gemms, self.copies, self.homes = laid.gemms, laid.copies, laid.homes
        self.labels, self.lanes, self.unit_lane, self._names = laid.labels, laid.lanes, laid.unit_lane, laid._names
        self.warps, self.barriers = laid.warps.copy(), laid.barriers.copy()
        self.completions = np.zeros(laid.room, np.int64)
        self.sms = np.zeros(laid.sm_count, SM)
        self.sms["tensor_owner"] = -1
        self.busy = np.zeros((len(self.sms), len(UNITS)), np.int64)
        self.pipe_free = np.zeros((len(self.sms), 5), np.int64)
        self.chip = np.zeros(1, CHIP)
        self.group_ends = np.zeros(laid.groups + 1, np.int64)
        self.tile_ends = np.zeros((len(programs), max(p.tiles for p in programs)), np.int64)
        missed = [memory.read_miss.get(t, 0.0) for t in laid.tensors]
        late = [memory.read_late.get(t, share) for t, share in zip(laid.tensors, missed, strict=True)]
        through = [memory.write_through.get(t, 1.0) for t in laid.tensors]
        shares = list(zip(missed, late, through, strict=True)) or [(0.0, 0.0, 1.0)]
        self.tensors = np.array([tuple(round(1024 * share) for share in each) for each in shares], TENSOR)

    def stuck(self) -> list[str]:
        """One phrase per warp that did not finish."""
        phrases = []
        for (slot, _, name), warp in zip(self._names, self.warps, strict=True):
            if warp["pc"] < warp["end"]:
                before = sum(len(program.code) for program in self.programs[:slot])
                program = self.programs[slot]
                phrases.append(f"{name} is stuck at '{program.describe(program.code[warp['pc'] - before])}'")
        return phrases


def _rows(dtype: np.dtype, rows: list[dict[str, int]]) -> np.ndarray:
    """Records of a dtype from dictionaries; fields not given are zero."""
    table = np.zeros(len(rows), dtype)
    for number, row in enumerate(rows):
        for name, value in row.items():
            table[number][name] = value
    return table
