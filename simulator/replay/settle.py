"""Settle: replays a problem on a device until load, clock and cycles agree.

What SMs see of L2 and HBM depends on how loaded these are and on the clock, which follow from the replay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..clock import Clock, Rates, sustained
from ..devices.device import Device
from ..problem.tile import Tile
from ..problem.workload import Workload
from ..results.breakdown import Breakdown, of_cycles
from ..results.run import Traffic
from ..schedules import Kernel
from . import account
from .chip import Durations, burst_rate, ends_of_sms, measure_durations, queue_wait
from .engine import U_ISSUE, U_MUFU, U_SMEM, U_TENSOR, UNITS, Memory
from .fit import Occupancy
from .l2 import ROW, STATIC
from .sums import Sums
from .traffic import Launch, Moved

ROUNDS, SETTLED = 16, 0.02
"""Load and clock are found by repeating the replay until neither moves by more than 2 %, at most 16 times (fa3 takes 3, standard
attention near HBM's limit 10)."""


@dataclass(frozen=True)
class Grid:
    """One kernel of the schedule laid over the problem."""

    kernel: Kernel
    items: np.ndarray
    occupancy: Occupancy
    launch: Launch
    masked: np.ndarray  # masked blocks by loop length
    packed: bool = False  # whether it walks packed sequences, which another kernel lists and describes before
    sums: Sums | None = None  # of a backward that keeps dQ's sums of a few heads at a time

    @cached_property
    def lengths(self) -> np.ndarray:
        """The loop length of every CTA, in dispatch order."""
        return self.items["blocks"].astype(np.int64)

    @cached_property
    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """The lengths there are, ascending, and how many CTAs have each; of items that are shared those of their parts too."""
        if self.sums is None or not len(self.sums.parts):
            return np.unique(self.lengths, return_counts=True)
        parts = self.sums.parts["blocks"].astype(np.int64)
        behind = self.lengths[self.sums.parts["item"].max() + 1 :]
        lengths = np.union1d(self.lengths, parts)
        found = np.searchsorted(lengths, np.concatenate([parts, behind]))
        return lengths, np.bincount(found, minlength=len(lengths))

    def ends(self, durations: Durations, tile: Tile, device: Device) -> tuple[np.ndarray, float]:
        """When the last CTA of each SM is done, and when all that the kernel writes out besides is out."""
        if self.sums is None:
            ends = ends_of_sms(durations, self.lengths, device.sms, tile.cluster, self.kernel.strides)
            return ends, float(ends.max())
        return self.sums.ends(durations, self.items, device.sms, self.launch.dealing == STATIC, device)

    @cached_property
    def first_loads(self) -> tuple[float, float]:
        """Bytes that one CTA waits for before its first GEMM, and that all CTAs of the first wave wait for together."""
        launch = self.launch
        begun = launch.items[: launch.slots]
        keys = len(np.unique(np.stack([begun["kv_head"], begun["n"], begun["blocks"] * launch.descending]), axis=1).T)
        alone = together = 0.0
        waited = launch.accesses[(launch.accesses["step"] <= 0) & (launch.accesses["write"] == 0)]
        of_keys = np.flatnonzero(waited["mode"] != ROW)[1:]  # V is not waited for
        for access in np.delete(waited, of_keys):
            rows = launch.block_m if access["mode"] == ROW else launch.block_n
            size = float(rows * access["elements"] * access["element_bytes"])
            alone += size
            together += size * (len(begun) if access["mode"] == ROW else keys)
        return alone, together


NEARLY = 0.9
"""Of what its CTAs take, what HBM needs for a kernel's bytes at least to hold them up."""


@dataclass(frozen=True)
class Problem:
    """What is asked, laid out, with its traffic: all that does not depend on how fast the device is."""

    workload: Workload
    tile: Tile
    grids: list[Grid]
    traffic: Traffic
    hits: dict[str, float]  # share of each tensor's reads that L2 has
    late: dict[str, float]  # and of those that wait for HBM
    moved: Sequence[Moved]  # by kernel
    pinned_hz: float | None = None
    regime: str = "sustained"


@dataclass(frozen=True)
class Load:
    """Utilisation of the servers that all SMs share, while one kernel runs: L2's ports, its slices, and HBM."""

    l2: float
    lookups: float
    hbm: float

    def towards(self, found: Load) -> Load:
        """What the replay under this load found; half way to it where a server nears saturation and it would swing."""
        pairs = ((self.l2, found.l2), (self.lookups, found.lookups), (self.hbm, found.hbm))
        return Load(*(f if f < 0.5 else (s + min(1.0, f)) / 2 for s, f in pairs))

    def near(self, other: Load) -> bool:
        """Whether the two differ by less than matters."""
        pairs = ((self.l2, other.l2), (self.lookups, other.lookups), (self.hbm, other.hbm))
        return all(abs(s - o) < SETTLED for s, o in pairs)


@dataclass(frozen=True)
class Settled:
    """A replay of all kernels, the clock and loads it ran under, and the loads and clock that follow from it."""

    by_kernel: Sequence[int]  # cycles
    busy: np.ndarray  # cycles of each unit, summed over SMs
    state: Clock
    loads: Sequence[Load]  # by kernel
    ran_at_hz: float
    ran_under: Sequence[Load]

    @property
    def cycles(self) -> int:
        """Of the whole call."""
        return sum(self.by_kernel)

    @property
    def clock_hz(self) -> float:
        """The SM clock."""
        return self.state.clock_hz


def settle(problem: Problem, device: Device) -> Settled:
    """Cycles, clock and power of a problem on a device."""
    clock, loads = problem.pinned_hz or device.max_clock_hz, [Load(1.0, 1.0, 1.0)] * len(problem.grids)
    for _ in range(ROUNDS):
        ran_at, ran_under = clock, loads
        each, busy = _replay_all(problem, device, clock, loads)
        cycles = sum(each)
        loads = [
            load.towards(_load(moved, taken, clock, device)) for load, moved, taken in zip(loads, problem.moved, each, strict=True)
        ]
        rates = _rates(problem.traffic, busy, cycles, device, problem.workload.dtype)
        state = sustained(device, rates, problem.pinned_hz, problem.regime)
        clock = state.clock_hz
        if all(map(Load.near, loads, ran_under)) and abs(clock / ran_at - 1) < SETTLED:
            break
    return Settled(each, busy, state, loads, ran_at, ran_under)


def breakdown(problem: Problem, device: Device, found: Settled) -> tuple[Breakdown, list[dict[str, float]]]:
    """Where the tensor cores' time goes in a settled replay, which is repeated with its spans; and the cycles by kernel."""
    each = []
    rate = device.tensor_rate(problem.workload.element_bytes)
    for number, grid in enumerate(problem.grids):
        durations = _durations(problem, number, device, found.ran_at_hz, found.ran_under[number], explain=True)
        ends, out = grid.ends(durations, problem.tile, device)
        parts = account.of_kernel(durations, grid.items, ends, problem.workload, problem.tile, grid.kernel.grid, rate)
        start = _start(grid, device, found.ran_at_hz)
        lasts = _lasts(problem, number, device, found.ran_at_hz, max(float(ends.max()), out) + start)
        waits = (lasts - float(ends.max())) * device.sms
        launch = _launch(grid, device, found.ran_at_hz)
        each.append(parts | {"launch": launch * device.sms, "memory": parts["memory"] + waits})
    return of_cycles(sum(map(Counter, each), Counter()), found.cycles * device.sms), each


def memory_of(problem: Problem, number: int, device: Device, clock_hz: float, load: Load) -> Memory:
    """What one SM sees of L2 and HBM while all SMs that have work run a kernel."""
    moved = problem.moved[number]
    active = max(1, min(device.sms, len(problem.grids[number].items)))
    through = {name: min(1.0, b.hbm_write / b.l2_write) if b.l2_write else 1.0 for name, b in problem.traffic.by_tensor.items()}
    return Memory(
        l2=burst_rate(device.l2_bytes_per_cycle, active, load.l2),
        hbm=burst_rate(device.hbm_rate(moved.hbm, moved.written) / clock_hz, active, load.hbm),
        read_miss={name: 1.0 - hit for name, hit in problem.hits.items()},
        write_through=through,
        read_late=problem.late,
        l2_wait=queue_wait(device.l2_queue_cycles, load.lookups),
        hbm_wait=queue_wait(device.hbm_queue_cycles, load.hbm),
        adds=device.l2_add_bytes_per_cycle / active,
    )


def _replay_all(problem: Problem, device: Device, clock_hz: float, loads: Sequence[Load]) -> tuple[list[int], np.ndarray]:
    """Cycles of each kernel, none faster than HBM moves its bytes, and the busy cycles of every unit summed over SMs."""
    each, busy = [], np.zeros(len(UNITS))
    for number, (grid, load) in enumerate(zip(problem.grids, loads, strict=True)):
        durations = _durations(problem, number, device, clock_hz, load)
        ends, out = grid.ends(durations, problem.tile, device)
        longest = _lasts(problem, number, device, clock_hz, max(float(ends.max()), out) + _start(grid, device, clock_hz))
        each.append(int(np.ceil(_launch(grid, device, clock_hz) + longest)))
        busy += grid.counts[1] @ durations.busy
    return each, busy


def _durations(problem: Problem, number: int, device: Device, clock_hz: float, load: Load, explain: bool = False) -> Durations:
    grid = problem.grids[number]
    return measure_durations(
        grid.kernel, problem.workload, problem.tile, _fetching(device, grid), memory_of(problem, number, device, clock_hz, load),
        grid.occupancy.ctas_per_sm, grid.counts[0], lambda n: int(grid.masked[min(n, len(grid.masked) - 1)]), explain,
    )  # fmt: skip


def _launch(grid: Grid, device: Device, clock_hz: float) -> float:
    """SM cycles of a kernel's launch, which takes its time whatever their clock; of packed sequences two: one lists them first."""
    cycles = device.kernel_train_cycles if grid.kernel.early else device.kernel_launch_cycles
    cycles += device.kernel_train_cycles * grid.packed
    return cycles * clock_hz / device.max_clock_hz


def _start(grid: Grid, device: Device, clock_hz: float) -> float:
    """SM cycles that a kernel's first loads take longer than one CTA's would alone: all CTAs begin at once, with an empty L2.

    What they wait for before their first GEMM, rows of their own and the first block of keys of each head, comes through HBM.
    """
    alone, together = grid.first_loads
    return max(0.0, together / device.hbm_achieved_bytes_per_s * clock_hz - alone / device.l2_bytes_per_cycle_per_sm)


def _fetching(device: Device, grid: Grid) -> Device:
    """The device as a kernel finds it whose code is near, if this one's is."""
    near = getattr(grid.kernel.code, "near", False)
    return replace(device, cold_fetch_cycles=0.0, cold_fetch_latency_cycles=0) if near else device


def _lasts(problem: Problem, number: int, device: Device, clock_hz: float, ends: float) -> float:
    """SM cycles of a kernel whose CTAs end at `ends` if HBM keeps up. Else HBM's, at the rate that a copy reaches, and those in
    which it has nothing to do: what a CTA of one block takes beside its bytes, until it asks for them and when it has them.
    """
    moved, grid = problem.moved[number], problem.grids[number]
    rate = device.hbm_rate(moved.hbm, moved.written) / clock_hz
    bytes_last = moved.hbm / rate
    if bytes_last < NEARLY * ends:
        return ends
    brief = measure_durations(
        grid.kernel, problem.workload, problem.tile, _fetching(device, grid),
        memory_of(problem, number, device, clock_hz, Load(0.0, 0.0, 0.0)),
        1, np.array([1]), lambda n: int(grid.masked[min(n, len(grid.masked) - 1)]),
    )  # fmt: skip
    of_a_block = moved.hbm / max(1, int(grid.items["blocks"].sum())) / rate  # burst_rate of an idle HBM
    return max(ends, bytes_last + max(0.0, float(brief.first[0, 0]) - of_a_block))


def _load(moved: Moved, cycles: int, clock_hz: float, device: Device) -> Load:
    return Load(
        l2=moved.l2 / cycles / device.l2_bytes_per_cycle,
        lookups=moved.lookups / cycles / device.l2_lookup_bytes_per_cycle,
        hbm=moved.hbm / cycles * clock_hz / device.hbm_rate(moved.hbm, moved.written),
    )


def _rates(traffic: Traffic, busy: np.ndarray, cycles: int, device: Device, dtype: str) -> Rates:
    per_sm = busy / (cycles * device.sms)
    return Rates(
        tensor=per_sm[U_TENSOR],
        mufu=per_sm[U_MUFU],
        issue=per_sm[U_ISSUE],
        smem_bytes_per_cycle=per_sm[U_SMEM],
        l2_bytes_per_cycle=(traffic.total("l2_read") + traffic.total("l2_write")) / cycles,
        hbm_bytes_per_cycle=(traffic.total("hbm_read") + traffic.total("hbm_write")) / cycles,
        l2_lookup_bytes_per_cycle=(traffic.l2_lookup_bytes + traffic.total("l2_write")) / cycles,
        dtype=dtype,
    )
