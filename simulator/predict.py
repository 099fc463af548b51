"""Predict: workload, schedule and device to a Run. The whole pipeline, step by step."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .clock import Clock
from .code.estimate import STATISTICS
from .devices.device import Device, load_device
from .devices.doubling import RESOURCES, saving
from .errors import UsageError
from .language.check import IllegalProgram, check
from .language.program import ACCESS_FIELDS, Program, trace
from .language.view import TileView, element_bytes
from .limits import affordable, recordable
from .problem import parts
from .problem.order import splits_that_fill, work_items
from .problem.tile import HEAD_DIMS, Tile, default_for
from .problem.workload import Workload
from .replay.chip import recorded
from .replay.engine import U_ALU, U_FMA, U_ISSUE, U_MUFU, U_SMEM, U_TENSOR, replay
from .replay.extrapolation import beyond_recorded
from .replay.fit import occupancy
from .replay.l2 import ACCESS, KV, ON_EXIT, PAIR, ROW, STATIC, WALKED
from .replay.sample import chosen_kernel, copies
from .replay.settle import Grid, Problem, Settled, breakdown, memory_of, settle
from .replay.traffic import Launch, TensorLayout, replay_traffic
from .results import bottleneck
from .results.run import Activity, Run, Sample, Traffic
from .schedules import Kernel, Schedule, find_schedule

_MODE = {"K": KV, "V": KV, "dK": KV, "dV": KV, "S": PAIR, "P": PAIR, "dP": PAIR, "dS": PAIR}
TIMELINE_BLOCKS = 10
"""Loop length of the two tiles whose spans a Run keeps for the timeline."""
MAX_SPANS = 40_000
OWN_BLOCKS = 12
"""Blocks of a user's own schedule that are checked, whose later blocks may differ; of ours the third is as any other."""


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

    problem = replace(_laid_out(chosen, workload, tile, gpu), pinned_hz=clock_hz, regime=regime)
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
    return _laid_out(chosen, workload, tile, gpu)


def fits(workload: Workload, schedule: str, device: str | Device, tile: Tile) -> int:
    """CTAs of this tile that share an SM, of the schedule's kernels the fewest.

    Raises UsageError, one sentence, where the tile is not possible or does not fit.
    """
    chosen, gpu, tile = _agreed(workload, schedule, device, tile)
    rooms = []
    for kernel in chosen.kernels:
        kernel = _dealt(kernel, chosen, workload, tile, gpu)
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
    kernels = [_dealt(kernel, chosen, workload, tile, gpu) for kernel in chosen.kernels]
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
    if workload.lengths and (schedule.family not in ("hopper", "3-stage") or schedule.tile):  # whose tiles are dealt as ours are
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


# -- laying the grid ----------------------------------------------------------------------------------------------------


def _tensor_names(schedule: Schedule) -> list[str]:
    if schedule.direction == "backward":
        inside = ["P", "dP", "dS"] if schedule.family.startswith("standard") else ["O", "LSE", "delta", "dQaccum"]
        return ["Q", "K", "V", "dO", *inside, "dQ", "dK", "dV"]
    if schedule.packs:
        return ["Q", "K", "V", "O", "LSE", *(["Opart", "LSEpart"] if len(schedule.kernels) > 1 else [])]
    names = ["Q", "K", "V", "O"]
    names += {"standard": ["S", "P"], "fa1": ["l", "m"]}.get(schedule.family, ["LSE"])
    return names


@functools.lru_cache(maxsize=4)
def _laid_out(schedule: Schedule, workload: Workload, tile: Tile, device: Device) -> Problem:
    """The problem at a free clock; the same question at another clock moves the same bytes."""
    tensors = _tensor_names(schedule)
    grids = [_lay_out(kernel, schedule, workload, tile, device, tensors) for kernel in schedule.kernels]
    seen = parts.packed(workload, tile) if schedule.packs else workload
    return Problem(
        workload, tile, grids, *replay_traffic(seen, [g.launch for g in grids], [TensorLayout(t) for t in tensors], device)
    )


def _dealt(kernel: Kernel, schedule: Schedule, workload: Workload, tile: Tile, device: Device) -> Kernel:
    """The kernel with the number of CTAs that share a head, if it is one that fills the SMs so."""
    if not kernel.fills:
        return kernel
    room = occupancy(schedule, workload, tile, device, trace(kernel, workload, tile, [(1, 0)]), kernel)
    q_blocks = -(-workload.seqlen_q // tile.block_m)
    splits = splits_that_fill(workload.batch * workload.heads, device.sms * room.ctas_per_sm, q_blocks)
    return replace(kernel, splits=splits)


def _lay_out(
    kernel: Kernel, schedule: Schedule, workload: Workload, tile: Tile, device: Device, tensors: Sequence[str]
) -> Grid:
    order = {"rows": "grid"}.get(kernel.grid, kernel.grid)
    dealing = ON_EXIT
    if kernel.persistent:
        order = "longest-first" if workload.causal else "persistent"
        dealing = STATIC if kernel.strides or not workload.causal else ON_EXIT
    if workload.lengths:
        order, dealing = "packed", ON_EXIT
    seen = workload if kernel.skips_masked else replace(workload, causal=False)
    kernel = _dealt(kernel, schedule, workload, tile, device)
    if schedule.packs:
        return _lay_out_parts(kernel, schedule, workload, tile, device, tensors)
    items = work_items(seen, tile.block_m, tile.block_n, order, kernel.splits, kernel.section_bytes)
    longest = int(items["blocks"].max())
    masked = np.zeros(longest + 1, np.int64)
    if workload.causal and not kernel.skips_masked:
        masked[:] = np.arange(longest + 1)  # a mask that leaves out no block is applied to every block
    else:
        np.maximum.at(masked, items["blocks"], items["masked"])

    brief = 1 if kernel.grid == "heads" else min(OWN_BLOCKS if kernel.where else 3, longest)
    short = recorded(kernel, workload, tile, brief, int(masked[longest] > 0), 2)
    _checked(kernel, short)
    room = occupancy(schedule, workload, tile, device, short, kernel)
    launch = Launch(
        items=items,
        accesses=_accesses(kernel, workload, tile, longest, tuple(tensors)),
        slots=device.sms * room.ctas_per_sm,
        block_m=tile.block_m,
        block_n=tile.block_n,
        cluster=tile.cluster,
        descending=kernel.descending,
        dealing=dealing,
        boxes=schedule.hopper and not kernel.plain,
    )
    return Grid(kernel, items, room, launch, masked, bool(workload.lengths))


def _lay_out_parts(
    kernel: Kernel, schedule: Schedule, workload: Workload, tile: Tile, device: Device, tensors: Sequence[str]
) -> Grid:
    """A walk of parts, or their combine; the walk compares every block's keys with the end."""
    items = parts.part_items(workload, tile) if kernel.grid == "parts" else parts.combine_items(workload, tile)
    longest = int(items["blocks"].max())
    short = recorded(kernel, workload, tile, min(3, longest), min(3, longest), 2)
    _checked(kernel, short)
    room = occupancy(schedule, workload, tile, device, short, kernel)
    launch = Launch(
        items=items,
        accesses=_accesses(kernel, workload, tile, longest, tuple(tensors)),
        slots=device.sms * room.ctas_per_sm,
        block_m=parts.rows_of(workload, tile),
        block_n=tile.block_n,
    )
    return Grid(kernel, items, room, launch, np.arange(longest + 1))


def _checked(kernel: Kernel, program: Program) -> None:
    """`check`; of a user's own schedule the fault is said with file and line of its function."""
    try:
        check(program)
    except IllegalProgram as error:
        raise IllegalProgram(f"{kernel.where}: {kernel.name}: {error}" if kernel.where else str(error)) from None


@functools.lru_cache(maxsize=64)
def _accesses(kernel: Kernel, workload: Workload, tile: Tile, longest: int, tensors: tuple[str, ...]) -> np.ndarray:
    """One CTA's global loads and stores at the longest loop, with the coordinates the traffic replay needs."""
    whole_head = kernel.grid == "heads"
    program = recorded(kernel, workload, tile, 1 if whole_head else max(1, longest), 0, 1)
    loads = np.array(list(program.accesses), dtype=[(name, "i4") for name in ACCESS_FIELDS])
    if kernel.by_row:  # tiles are too coarse to see single rows: a tile's readings come one after another, its writing last
        loads = loads[np.argsort(loads["step"], kind="stable")]
    least = 0
    if whole_head:
        loads, least = _every_block(loads, TileView(tile, workload, longest, splits=kernel.splits), program.tensors)
    names = np.array([tensors.index(name) for name in program.tensors])
    mode = np.array([_MODE.get(name, ROW) for name in tensors])
    elements = np.array([1 if name in STATISTICS else workload.head_dim for name in tensors])
    size = np.array([element_bytes(name, workload) for name in tensors])
    out = np.zeros(len(loads), ACCESS)
    out["tensor"] = names[loads["tensor"]]
    out["mode"] = mode[out["tensor"]]
    walked = (kernel.grid == "columns") & (loads["step"] >= 0)
    rows = (out["mode"] == ROW) & ~walked
    out["mode"] += np.where(walked, WALKED, 0).astype(np.int32)
    out["m_offset"] = np.where(rows, loads["block"], 0)
    out["block"] = np.where(rows, least, loads["block"])
    out["step"] = -1 if whole_head else loads["step"]
    out["elements"] = elements[out["tensor"]]
    out["element_bytes"] = size[out["tensor"]]
    out["write"] = loads["write"]
    out["multicast"] = loads["multicast"]
    return out


def _every_block(first: np.ndarray, view: TileView, tensors: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The accesses under the first K/V block (every Q block), repeated for each K/V block with the Q blocks it meets.

    Where CTAs share a head, with those of any of them; beside each access the first Q block that sees the K/V block.
    """
    keys = np.isin(first["tensor"], [tensors.index(name) for name in ("K", "V")])
    parts, least = [], []
    for j in view.kv_blocks:
        sees = view.first_q_block(j)
        block = first[keys | (first["block"] >= view.q_blocks(j).start)].copy()
        of_keys = np.isin(block["tensor"], first["tensor"][keys])
        block["block"][of_keys] = j
        parts.append(block)
        least.append(np.full(len(block), sees))
    return np.concatenate(parts), np.concatenate(least)


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
