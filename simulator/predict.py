"""Predict: workload, schedule and device to a Run. The whole pipeline, step by step."""

from __future__ import annotations

import functools
from dataclasses import replace

from .clock import Clock
from .devices.device import Device, load_device
from .devices.doubling import RESOURCES, saving
from .errors import UsageError
from .language.program import Program, trace
from .language.view import TileView
from .layout import dealt, lay_out
from .limits import affordable, recordable
from .problem import parts
from .problem.tile import HEAD_DIMS, OURS, Tile, default_for
from .problem.workload import Workload
from .replay.chip import recorded
from .replay.engine import U_ALU, U_FMA, U_ISSUE, U_MUFU, U_SMEM, U_TENSOR, replay
from .replay.extrapolation import beyond_recorded
from .replay.fit import occupancy
from .replay.sample import chosen_kernel, copies
from .replay.settle import Grid, Problem, Settled, breakdown, memory_of, settle
from .results import bottleneck
from .results.run import Activity, Run, Sample, Traffic
from .schedules import Schedule, find_schedule

TIMELINE_BLOCKS = 10
"""Loop length of the two tiles whose spans a Run keeps for the timeline."""
MAX_SPANS = 40_000


def predict(
    workload: Workload,
    schedule: str = "fa3",
    device: str | Device = "h100-sxm",
    tile: Tile | None = None,
    clock_hz: float | None = None,
    regime: str = "sustained",
    kernel: str | None = None,
    why: bool = False,
    spans: bool = True,
) -> Run:
    """What the device would do with this workload under this schedule.

    `tile` defaults to the schedule's own (see `default_tile`); `clock_hz` pins the SM clock in Hz, otherwise power
    decides it, after seconds of load or in a "burst" (see `clock.sustained`). `kernel`, by name or number from 1, is the
    one whose spans the run keeps for the timeline (default: the one with the softmax); all are predicted. With `why` the
    run also says what each resource twice as fast would save; without `spans` it keeps none, which takes less time.
    Raises UsageError, one sentence, for whatever is not possible.
    """
    chosen, gpu, tile = _agreed(workload, schedule, device, tile)
    number = chosen_kernel(chosen, kernel, workload, tile)

    problem = replace(lay_out(chosen, workload, tile, gpu), pinned_hz=clock_hz, regime=regime)
    found = settle(problem, gpu)
    grids, busy = problem.grids, found.busy
    whole = replace(problem.traffic, smem_bytes=int(busy[U_SMEM]))
    shown = _sample(problem, number, gpu, found) if spans else None
    whole_time, by_kernel = breakdown(problem, gpu, found)
    run = Run(
        origin="predicted",
        workload=workload,
        schedule=schedule,
        tile=tile,
        device=gpu.name,
        cycles=found.cycles,
        sm_clock_hz=found.state.clock_hz,
        power_w=found.state.power_w,
        activity=Activity(
            sms=gpu.sms, tensor=busy[U_TENSOR], mufu=busy[U_MUFU], issue=busy[U_ISSUE], fma=busy[U_FMA], alu=busy[U_ALU]
        ),
        traffic=whole,
        bottleneck=bottleneck.UNKNOWN,
        warnings=tuple(_warnings(workload, tile, gpu, found.state, grids, whole)),
        **(shown or {}),
        breakdown=whole_time,
        kernels=tuple((grid.kernel.name, float(taken)) for grid, taken in zip(grids, found.by_kernel, strict=True)),
    )

    @functools.cache
    def time_with(other: Device) -> float:
        settled = found if other == gpu else settle(problem, other)
        return settled.cycles / settled.state.clock_hz

    def facts_of(part: str) -> bottleneck.Facts:
        return _facts(grids, max(range(len(grids)), key=lambda each: by_kernel[each].get(part, 0.0)))

    named = bottleneck.explain(run, gpu, facts_of, time_with)
    savings = tuple(saving(name, gpu, time_with) for name in RESOURCES) if why else None
    return replace(run, bottleneck=named, savings=savings)


def default_tile(workload: Workload, schedule: str, device: str | Device = "h100-sxm", packed: bool = True) -> Tile:
    """The tile a schedule takes when none is asked for; a cluster only where the Q tiles of a head pair up. Not `packed`, one
    for each query head, which a schedule that packs them can be asked for."""
    chosen, gpu = find_schedule(schedule, workload.direction), load_device(device) if isinstance(device, str) else device
    _supported(chosen, workload, gpu)
    if chosen.packs:
        return parts.tile_for(workload, gpu.sms, packed)
    tile = chosen.tile or default_for(chosen.family, workload)[0]
    tile = replace(tile, packed=packed)
    if workload.lengths or -(-workload.seqlen_q // tile.block_m) % tile.cluster:
        tile = replace(tile, cluster=1)
    return tile


def laid_out(workload: Workload, schedule: str, device: str | Device, tile: Tile | None = None) -> Problem:
    """The schedule's kernels laid over the problem, with the bytes they move; no cycle of it is replayed.

    Raises UsageError, one sentence, for whatever is not possible.
    """
    chosen, gpu, tile = _agreed(workload, schedule, device, tile)
    return lay_out(chosen, workload, tile, gpu)


def fits(workload: Workload, schedule: str, device: str | Device, tile: Tile) -> int:
    """CTAs of this tile that share an SM, of the schedule's kernels the fewest.

    Raises UsageError, one sentence, where the tile is not possible or does not fit.
    """
    chosen, gpu, tile = _agreed(workload, schedule, device, tile)
    rooms = []
    for kernel in chosen.kernels:
        kernel = dealt(kernel, chosen, workload, tile, gpu)
        program = trace(kernel, workload, tile, [(1, 0)])
        rooms.append(occupancy(chosen, workload, tile, gpu, program, kernel).ctas_per_sm)
    return min(rooms)


def programs(
    workload: Workload, schedule: str, device: str | Device, tile: Tile | None = None, kv_blocks: int = 3
) -> list[Program]:
    """The recorded instruction streams of one CTA, one program per kernel, with the loop cut to `kv_blocks`."""
    chosen = find_schedule(schedule, workload.direction)
    _supported(chosen, workload, load_device(device) if isinstance(device, str) else device)
    tile = tile or default_tile(workload, schedule, device)
    chosen = chosen.cut(tile)
    if kv_blocks < 1:
        raise UsageError(f"kv_blocks={kv_blocks} must be positive")
    for kernel in chosen.kernels:
        recordable(kernel, workload, tile, kv_blocks)
    gpu = load_device(device) if isinstance(device, str) else device
    kernels = [dealt(kernel, chosen, workload, tile, gpu) for kernel in chosen.kernels]
    return [trace(kernel, workload, tile, [(kv_blocks, 0)]) for kernel in kernels]


# -- what is possible ---------------------------------------------------------------------------------------------------


def _agreed(workload: Workload, name: str, device: str | Device, tile: Tile | None) -> tuple[Schedule, Device, Tile]:
    """Schedule, device and tile of a question that can be answered. Raises UsageError otherwise."""
    chosen = find_schedule(name, workload.direction)
    gpu = load_device(device) if isinstance(device, str) else device
    _supported(chosen, workload, gpu)
    tile = default_tile(workload, name, gpu) if tile is None else tile
    _cluster_fits(chosen, workload, tile)
    _parts_fit(chosen, workload, tile)
    chosen = chosen.cut(tile)
    affordable(chosen.kernels, parts.packed(workload, tile) if chosen.packs else workload, tile, gpu.l2_partitions)
    return chosen, gpu, tile


def _supported(schedule: Schedule, workload: Workload, device: Device) -> None:
    if workload.head_dim not in schedule.head_dims:
        instead = "wide" if workload.head_dim > max(schedule.head_dims) else "fa3"
        other = f"; use --schedule fa2 or {instead}" if workload.head_dim in HEAD_DIMS else ""
        raise UsageError(
            f"head_dim={workload.head_dim} is not supported by '{schedule.name}' ({', '.join(map(str, schedule.head_dims))}){other}"
        )
    if schedule.hopper and not (device.wgmma and device.tma):
        raise UsageError(f"'{schedule.name}' needs TMA and WGMMA, which {device.name} does not have; use --schedule fa2")
    if workload.dtype not in schedule.dtypes:
        what = f"the backward of '{schedule.name}'" if workload.backward else f"'{schedule.name}'"
        raise UsageError(f"dtype={workload.dtype} is not supported by {what} ({', '.join(schedule.dtypes)})")
    if workload.lengths and (schedule.family not in OURS or schedule.tile):  # whose tiles are dealt as ours are
        raise UsageError(f"'{schedule.name}' is not predicted on packed sequences: give --schedule fa3, or one length")
    device.tensor_rate(workload.element_bytes)  # where there is none for fp8, it says so


def _cluster_fits(schedule: Schedule, workload: Workload, tile: Tile) -> None:
    if tile.cluster > 1 and not schedule.hopper:
        raise UsageError(f"'{schedule.name}' has no clusters; use --cluster 1")
    q_tiles = -(-workload.seqlen_q // tile.block_m)
    if tile.cluster > 1 and workload.lengths:
        raise UsageError("CTAs of a cluster walk one sequence, which packed ones of any length prevent; use --cluster 1")
    if tile.cluster > 1 and workload.causal:
        raise UsageError("CTAs of a cluster walk the same K/V blocks, which a causal mask prevents; use --cluster 1")
    if q_tiles % tile.cluster:
        raise UsageError(
            f"cluster={tile.cluster} does not divide the {q_tiles} Q tiles of a head; use --cluster 1 or another tile"
        )


def _parts_fit(schedule: Schedule, workload: Workload, tile: Tile) -> None:
    if not tile.packed and not schedule.packs:
        raise UsageError(f"'{schedule.name}' has a tile for each query head as it is: leave --no-pack-gqa out")
    if tile.parts > 1 and not schedule.packs:
        raise UsageError(f"'{schedule.name}' walks its keys in one part: give --schedule decode for --splits {tile.parts}")
    blocks = -(-workload.seqlen_k // tile.block_n)
    if tile.parts > blocks:
        raise UsageError(
            f"{tile.parts} parts of {blocks} blocks of {tile.block_n} keys leave some without any: give --splits {blocks} or less"
        )


# -- what is shown ------------------------------------------------------------------------------------------------------


def _facts(grids: list[Grid], number: int) -> bottleneck.Facts:
    grid = grids[number]
    return bottleneck.Facts(
        kernel=grid.kernel.name if len(grids) > 1 else None,
        ctas=len(grid.items),
        slots=grid.launch.slots,
        blocks=float(grid.items["blocks"].mean()),
        whole_heads=grid.kernel.grid == "heads",
    )


def _sample(problem: Problem, number: int, device: Device, found: Settled) -> dict[str, object]:
    """The spans of one SM's first two tiles, or the one it has (loops cut short), of one kernel, and what they are of; as a Run's
    fields. They are drawn as in the course of a kernel, whose code the SM has run before: a first pass would hide what repeats."""
    workload, tile, grid = problem.workload, problem.tile, problem.grids[number]
    whole = max(1, int(grid.items["blocks"].max()))
    longest = min(1 if grid.kernel.grid == "heads" else TIMELINE_BLOCKS, whole)
    masked = int(grid.masked[min(longest, len(grid.masked) - 1)])
    shown, steps = workload, (longest, whole)
    if grid.kernel.grid == "heads":  # its loop is that over Q
        shown = replace(workload, seqlen_q=min(workload.seqlen_q, TIMELINE_BLOCKS * tile.block_m))
        steps = tuple(len(TileView(tile, each, longest, splits=grid.kernel.splits).q_blocks(0)) for each in (shown, workload))
    ctas = min(grid.occupancy.ctas_per_sm, -(-len(grid.items) // device.sms))
    tiles = 2 if len(grid.items) > device.sms * ctas else 1
    program = trace(grid.kernel, shown, tile, [(longest, masked)] * tiles)
    memory = memory_of(problem, number, device, found.clock_hz, found.loads[number])
    warm = replace(device, cold_fetch_cycles=0.0, cold_fetch_latency_cycles=0)
    replayed = replay(
        [program] * ctas, warm, memory, max_spans=MAX_SPANS,
        eight_bit=workload.element_bytes == 1,
    )  # fmt: skip
    names = tuple(each.kernel.name for each in problem.grids)
    sample = Sample(names, number + 1, grid.kernel.step, *steps, copies(program, memory))
    return {"lanes": replayed.lanes, "labels": replayed.labels, "spans": replayed.spans, "sample": sample}


def _warnings(
    workload: Workload, tile: Tile, device: Device, state: Clock, grids: list[Grid], traffic: Traffic
) -> list[str]:
    notes = []
    if state.over_limit:
        notes.append(
            f"at the pinned clock the model draws {state.power_w:.0f} W, above the {device.power_limit_w:.0f} W limit of "
            f"{device.name}; the hardware would lower the clock"
        )
    held = sum(workload.tensor_bytes.values())
    for name in ("S", "P", "dP", "dS"):
        if name in traffic.by_tensor:
            held += traffic.by_tensor[name].algorithmic_write
    if held > device.memory_bytes:
        notes.append(
            f"out of memory: the tensors take {held / 1e9:.1f} GB, {device.name} has {device.memory_bytes / 1e9:.1f} GB"
        )
    if not tile.packed:
        notes.append("no kernel here has a tile for each query head of few queries: the decode kernel packs those of a K/V head")
    items = len(grids[0 if grids[0].kernel.grid == "parts" else -1].items)
    if items < device.sms:
        notes.append(f"only {items} CTAs for {device.sms} SMs: {device.sms - items} SMs stay idle")
    walked = [grid for grid in grids if grid.kernel.grid == "columns"] if workload.backward else grids
    notes += beyond_recorded([grid.launch for grid in walked], "Q blocks" if workload.backward else "K/V blocks")
    if workload.dtype == "e4m3" and "V^T" not in recorded(grids[-1].kernel, workload, tile, 1, 0, 1).smem_parts:
        notes.append("e4m3: the transposition of V inside the kernel (FlashAttention-3 section 3.3) is not modelled")
    return notes
