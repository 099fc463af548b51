"""Layout: a schedule's kernels over a problem: tiles in the order in which they are dealt, what fits an SM, the bytes that move."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .code.estimate import SPILLED, STATISTICS, Spill
from .devices.device import Device
from .language.check import IllegalProgram, check
from .language.program import ACCESS_FIELDS, Program, trace
from .language.recorder import ONLY_LAST
from .language.view import TileView, element_bytes
from .problem import parts, sums
from .problem.order import splits_that_fill, work_items
from .problem.tile import Tile
from .problem.workload import Workload
from .replay.chip import recorded
from .replay.fit import occupancy
from .replay.l2 import ACCESS, KV, LAST, ON_EXIT, OWN, PAIR, ROW, STATIC, WALKED
from .replay.settle import Grid, Problem
from .replay.sums import Sums
from .replay.traffic import Launch, TensorLayout, replay_traffic
from .schedules import Kernel, Schedule

_MODE = {"K": KV, "V": KV, "dK": KV, "dV": KV, "S": PAIR, "P": PAIR, "dP": PAIR, "dS": PAIR}
OWN_BLOCKS = 12
"""Blocks of a user's own schedule that are checked, whose later blocks may differ; of ours the third is as any other."""


def _tensor_names(schedule: Schedule, workload: Workload) -> list[str]:
    if schedule.direction == "backward":
        inside = ["P", "dP", "dS"] if schedule.family.startswith("standard") else ["O", "LSE", "delta", "dQaccum"]
        return ["Q", "K", "V", "dO", *inside, "dQ", "dK", "dV"]
    if schedule.packs:
        return ["Q", "K", "V", "O", "LSE", *(["Opart", "LSEpart"] if len(schedule.kernels) > 1 else [])]
    names = ["Q", "K", "V", "O"]
    names += {"standard": ["S", "P"], "fa1": ["l", "m"]}.get(schedule.family, ["LSE"])
    return names + [SPILLED] * any(_spill(kernel, workload) is not None for kernel in schedule.kernels)


def _spill(kernel: Kernel, workload: Workload) -> Spill | None:
    """What the compiler of a forward's kernel had no registers for."""
    return None if workload.backward else kernel.code.spilled(workload.head_dim, workload.causal)


@functools.lru_cache(maxsize=4)
def lay_out(schedule: Schedule, workload: Workload, tile: Tile, device: Device) -> Problem:
    """The problem at a free clock; the same question at another clock moves the same bytes."""
    tensors = _tensor_names(schedule, workload)
    grids = [_grid(kernel, schedule, workload, tile, device, tensors) for kernel in schedule.kernels]
    seen = parts.packed(workload, tile) if schedule.packs else workload
    ring = next((grid.sums.ring for grid in grids if grid.sums is not None), 0)
    layouts = [TensorLayout(name, ring * (name == "dQaccum")) for name in tensors]
    return Problem(workload, tile, grids, *replay_traffic(seen, [g.launch for g in grids], layouts, device))


def dealt(kernel: Kernel, schedule: Schedule, workload: Workload, tile: Tile, device: Device) -> Kernel:
    """The kernel with the number of CTAs that share a head, if it is one that fills the SMs so."""
    if not kernel.fills:
        return kernel
    room = occupancy(schedule, workload, tile, device, trace(kernel, workload, tile, [(1, 0)]), kernel)
    q_blocks = -(-workload.seqlen_q // tile.block_m)
    splits = splits_that_fill(workload.batch * workload.heads, device.sms * room.ctas_per_sm, q_blocks)
    return replace(kernel, splits=splits)


def _grid(
    kernel: Kernel, schedule: Schedule, workload: Workload, tile: Tile, device: Device, tensors: Sequence[str]
) -> Grid:
    order = {"rows": "grid"}.get(kernel.grid, kernel.grid)
    dealing = ON_EXIT
    if kernel.persistent and kernel.finishers:
        dealing = ON_EXIT if workload.causal else STATIC
    elif kernel.persistent:
        order = "longest-first" if workload.causal else "persistent"
        dealing = STATIC if kernel.strides or not workload.causal else ON_EXIT
    if workload.lengths:
        order, dealing = "packed", ON_EXIT
    seen = workload if kernel.skips_masked else replace(workload, causal=False)
    kernel = dealt(kernel, schedule, workload, tile, device)
    if schedule.packs:
        return _parts_grid(kernel, schedule, workload, tile, device, tensors)
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
        accesses=_with_spills(_accesses(kernel, workload, tile, longest, tuple(tensors)), kernel, workload, room.threads, tensors),
        slots=device.sms * room.ctas_per_sm,
        block_m=tile.block_m,
        block_n=tile.block_n,
        cluster=tile.cluster,
        descending=kernel.descending,
        dealing=dealing,
        boxes=schedule.hopper and not kernel.plain,
    )
    return Grid(kernel, items, room, launch, masked, bool(workload.lengths), _sums(kernel, workload, tile, len(items), device))


def _sums(kernel: Kernel, workload: Workload, tile: Tile, items: int, device: Device) -> Sums | None:
    """How a backward of ours keeps dQ's sums, None of any other kernel."""
    if not kernel.finishers:
        return None
    warps, rounds = kernel.finishers
    heads, m_tiles = workload.batch * workload.heads, -(-workload.seqlen_q // tile.block_m)
    shares = max(1, tile.block_m * workload.head_dim // sums.SHARE)
    ctas = min(device.sms, items)
    parts, ring = sums.split_parts(workload, tile, ctas), sums.ring_heads(workload, tile, ctas)
    return Sums(ring, heads, workload.heads_per_kv, m_tiles, shares, warps, rounds, parts)


def _parts_grid(
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
    if kernel.finishers:  # what the roles of a CTA load, add and write out at a block comes together
        role = np.where(loads["step"] >= 0, 1, 2 * (loads["write"] > 0))
        loads = loads[np.lexsort((loads["write"] % ONLY_LAST, loads["step"], role))]
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
    out["mode"] += (WALKED * walked + LAST * (loads["write"] >= ONLY_LAST)).astype(np.int32)
    out["m_offset"] = np.where(rows, loads["block"], 0)
    out["block"] = np.where(rows, least, loads["block"])
    out["step"] = -1 if whole_head else loads["step"]
    out["elements"] = elements[out["tensor"]]
    out["element_bytes"] = size[out["tensor"]]
    out["write"] = loads["write"] % ONLY_LAST
    out["multicast"] = loads["multicast"]
    return out


def _with_spills(
    accesses: np.ndarray, kernel: Kernel, workload: Workload, threads: int, tensors: Sequence[str]
) -> np.ndarray:
    """The accesses with what spills: local memory, which L1 keeps for reading and lets through to L2 where it is written."""
    spill = _spill(kernel, workload)
    if spill is None:
        return accesses
    last = np.append(accesses["step"][1:] != accesses["step"][:-1], True)
    ends = np.flatnonzero(last & ((accesses["step"] >= 0) | (np.arange(len(accesses)) < len(accesses) - 1)))
    stored = np.zeros(len(ends), ACCESS)
    stored["tensor"], stored["mode"], stored["write"] = tensors.index(SPILLED), OWN, 1
    stored["step"] = accesses["step"][ends]
    stored["m_offset"] = stored["step"] < 0
    words = np.where(stored["step"] < 0, spill.each_tile, spill.each_block)
    stored["elements"], stored["element_bytes"] = words * threads, 4
    return np.insert(accesses, ends[words > 0] + 1, stored[words > 0])


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
