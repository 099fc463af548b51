"""Fit: does a tile fit an SM, with which registers and shared memory, and how many CTAs share the SM?"""

from __future__ import annotations

from dataclasses import dataclass

from ..devices.device import Device
from ..errors import UsageError
from ..language.ops import Op
from ..language.program import Program
from ..language.view import ADDRESSING_REGISTERS, TileView
from ..problem.tile import Tile
from ..problem.workload import Workload
from ..schedules import Kernel, Schedule

WARPGROUP = 128
PRODUCER_REGISTERS = 24
"""What setmaxnreg leaves the producer warpgroup (FlashAttention-3: 24 beside two consumers, 32 beside three)."""
RESERVED_SMEM = 1024
"""Shared memory the driver keeps per CTA (CUDA programming guide, compute capability 8.x and 9.0)."""


@dataclass(frozen=True)
class Occupancy:
    """How one CTA occupies an SM."""

    ctas_per_sm: int
    threads: int
    registers_per_thread: int  # of a consumer
    smem_bytes: int


def register_parts(schedule: Schedule, workload: Workload, tile: Tile, kernel: Kernel, program: Program) -> dict[str, int]:
    """Registers per consumer thread by what holds them: fp32 S and O accumulators, sets of P as operand, addressing."""
    if workload.backward:
        view = TileView(tile, workload, 1)
        choices = [{name: _registers(view, name) for name in names} for names in kernel.live]
        return max(choices, key=lambda parts: sum(parts.values()), default={}) | {"addressing": ADDRESSING_REGISTERS}
    rows = tile.block_m // tile.consumers
    scores = -(-rows * tile.block_n // WARPGROUP)
    sets = schedule.kernels[0].code.operand_sets
    parts = {
        "S": scores * schedule.scores_live,
        "P": scores * workload.element_bytes // 4 * sets,
        "O": -(-rows * workload.head_dim // WARPGROUP),
        "addressing": ADDRESSING_REGISTERS,
    }
    if not schedule.hopper or "P" in program.smem_parts:
        parts["P"] = 0  # mma.sync kernels convert a block's scores in place, others some of them at a time on their way out
    if schedule.family == "standard":
        parts["S"], parts["O"] = max(parts["S"], parts["O"]), 0  # never both in one kernel
    return parts


def _registers(view: TileView, name: str) -> int:
    """Registers of a thread for a tensor, or half of one ("dQ/2"): sums and scores in fp32, P and dS as 16-bit operands."""
    if name == "dQ^T":
        name = view.dq_name
    whole = name.removesuffix("/2")
    return view.per_thread(whole) // (2 if name.startswith(("P", "dS")) or name != whole else 1)


def occupancy(schedule: Schedule, workload: Workload, tile: Tile, device: Device, program: Program, kernel: Kernel) -> Occupancy:
    """Registers, shared memory and CTAs per SM; UsageError with the sum where the tile does not fit."""
    hopper = schedule.hopper and not kernel.plain
    groups = tile.consumers + int(hopper and not kernel.registers)
    threads = groups * WARPGROUP
    if hopper and workload.backward:
        _gemms_fit(program, tile)
    elif hopper and (tile.block_m // tile.consumers) % 64:
        raise UsageError(
            f"tile {tile}: WGMMA needs 64 query rows per consumer warpgroup, {tile.consumers} consumers make "
            f"{tile.block_m / tile.consumers:g}; use --tile {64 * tile.consumers}x{tile.block_n}"
        )
    if threads > min(1024, device.max_threads_per_sm):
        raise UsageError(f"tile {tile}: {tile.consumers} consumers need {threads} threads, a CTA has at most 1024")
    if hopper:
        width = max(tile.block_n, workload.head_dim)
        if width > 256:
            raise UsageError(f"tile {tile}: WGMMA is at most 256 wide, block_n={tile.block_n}, head_dim={workload.head_dim}")

    smem = sum(program.smem_parts.values())
    if tile.resident > 1:
        _share(tile, hopper, threads, smem, device)
    if smem > device.smem_bytes_per_cta:
        shown = " + ".join(f"{name} {size}" for name, size in program.smem_parts.items())
        raise UsageError(
            f"tile {tile} does not fit shared memory: {shown} = {smem} bytes, {device.name} has "
            f"{device.smem_bytes_per_cta} per CTA; use a narrower tile or fewer stages"
        )

    parts = register_parts(schedule, workload, tile, kernel, program)
    need = sum(parts.values())
    budget = device.max_registers_per_thread
    if hopper:
        left = device.registers_per_sm // WARPGROUP - (PRODUCER_REGISTERS if tile.consumers < 3 else 32)
        if tile.resident > 1:  # what a CTA is launched with is dealt out anew among its own warpgroups
            left = device.registers_per_sm // (threads * tile.resident) // 8 * 8 * groups - PRODUCER_REGISTERS
        budget = min(240 if tile.consumers > 1 else budget, left // tile.consumers // 8 * 8)
    if need > budget and schedule.tile is None:  # a compiled kernel fits, however it does it
        shown = " + ".join(f"{name} {count}" for name, count in parts.items() if count)
        raise UsageError(
            f"tile {tile} does not fit the registers: {shown} = {need} per thread, a consumer of '{schedule.name}' "
            f"has {budget}; use a narrower tile"
        )
    if hopper and not kernel.registers:
        return Occupancy(tile.resident, threads, budget, smem)
    allocated = min(device.max_registers_per_thread, -(-(kernel.registers or need + ADDRESSING_REGISTERS) // 8) * 8)
    fits = (
        device.smem_bytes_per_sm // (smem + RESERVED_SMEM),
        device.registers_per_sm // (allocated * threads),
        device.max_threads_per_sm // threads,
        device.max_ctas_per_sm,
    )
    if min(fits) < 1:
        raise UsageError(f"tile {tile}: {threads} threads of {allocated} registers do not fit {device.name}'s register file")
    return Occupancy(min(fits), threads, allocated, smem)


def _share(tile: Tile, hopper: bool, threads: int, smem: int, device: Device) -> None:
    """Raise UsageError where so many CTAs of a Hopper schedule do not share an SM."""
    if not hopper:
        raise UsageError(f"{tile.resident} CTAs an SM are asked of Hopper schedules; of others as many share one as fit")
    if threads * tile.resident > device.max_threads_per_sm:
        raise UsageError(f"{tile.resident} CTAs of {threads} threads are more than the {device.max_threads_per_sm} of an SM")
    if (smem + RESERVED_SMEM) * tile.resident > device.smem_bytes_per_sm:
        needed, there = tile.resident * (smem + RESERVED_SMEM), device.smem_bytes_per_sm
        raise UsageError(f"{tile.resident} CTAs need {needed:,} bytes of shared memory, an SM has {there:,}: give fewer stages")


def _gemms_fit(program: Program, tile: Tile) -> None:
    """Raise UsageError where a GEMM of a backward has not whole blocks of 64 rows."""
    rows, gemms = program.recorded(Op.WGMMA)
    for row, gemm in zip(rows, gemms, strict=True):
        if gemm["m"] % 64 or gemm["n"] % 8 or gemm["n"] > 256:
            raise UsageError(
                f"tile {tile}: WGMMA takes 64 rows and up to 256 columns, '{program.labels[row['label']]}' would have "
                f"{gemm['m']} x {gemm['n']} in each of {tile.consumers} consumers; use a tile with {64 * tile.consumers} keys"
            )
