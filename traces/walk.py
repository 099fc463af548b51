"""Walk: a schedule's tiles of S one after another, and for each what moves between HBM, L2, shared memory and registers.

The order is the one in which the kernel's CTAs are handed out, one CTA at a time; the loads and stores are those its program
recorded, and every one of them is put to the model of L2 on its own. So the bytes of all steps add up to what a prediction
says of each tensor. With all CTAs in flight at once HBM delivers the same as long as L2 loses nothing, and a walk that is
short enough to be looked at never fills it (`walk` refuses others).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np

from ..simulator.code.estimate import SPILLED
from ..simulator.devices.device import Device, load_device
from ..simulator.errors import UsageError
from ..simulator.language.ops import Op
from ..simulator.language.view import K_PER_STEP_BYTES
from ..simulator.predict import default_tile, laid_out
from ..simulator.problem.tile import Tile
from ..simulator.problem.workload import Workload
from ..simulator.replay.chip import recorded
from ..simulator.replay.l2 import KV, OWN, PAIR, ROW
from ..simulator.replay.settle import Grid, Problem
from ..simulator.replay.traffic import Launch, TensorLayout, replay_traffic, stripe_bytes
from ..simulator.results.html import table
from ..simulator.results.run import Traffic
from ..simulator.units import scaled

MOST_STEPS = 2000
"""Of a walk; each takes a millisecond to count, and nobody looks at more."""
LEVELS = ("HBM to L2", "L2 to SRAM", "SRAM to registers", "SRAM to L2", "L2 to HBM")
"""What is counted. SRAM is shared memory."""
_COUNTED = ("hbm_read", "l2_read", "", "l2_write", "hbm_write")
"""The same in a prediction's bytes of each tensor, where they are among them."""


@dataclass(frozen=True)
class Move:
    """One tensor's bytes in one step, level by level. In a cluster `l2` is 0 where another CTA's load serves this one too."""

    tensor: str
    written: bool
    hbm: int  # delivered by HBM to L2; of what is written, from L2 to HBM
    l2: int  # between L2 and shared memory
    sram: int  # that arrive in shared memory, or leave it

    def to_dict(self) -> dict:
        """As plain JSON values."""
        return {"tensor": self.tensor, "way": "written" if self.written else "read", **_sizes(self)}


def _sizes(move: Move) -> dict[str, int]:
    return {"hbm_bytes": move.hbm, "l2_bytes": move.l2, "sram_bytes": move.sram}


@dataclass(frozen=True)
class Step:
    """What one CTA does for one tile of S, or for none: what it loads and does not use, and at the end what leaves L2."""

    kernel: str
    head: int  # of queries, over the batch: batch index times heads and head
    row: int | None  # tile of queries
    column: int | None  # block of keys
    moves: tuple[Move, ...]
    registers: int  # bytes that tensor cores and warps read from shared memory

    @property
    def levels(self) -> tuple[int, ...]:
        """Bytes by level, as in LEVELS."""
        read, written = ([move for move in self.moves if move.written is way] for way in (False, True))
        inward = (sum(m.hbm for m in read), sum(m.l2 for m in read), self.registers)
        return (*inward, sum(m.l2 for m in written), sum(m.hbm for m in written))

    def to_dict(self) -> dict:
        """As plain JSON values."""
        place = {"kernel": self.kernel, "head": self.head, "row": self.row, "column": self.column}
        return {**place, "moves": [move.to_dict() for move in self.moves], "register_bytes": self.registers}


@dataclass(frozen=True)
class Walk:
    """All steps of a schedule, in order. `traffic` is the model's own count of the same, tensor by tensor."""

    schedule: str
    workload: Workload
    tile: Tile
    device: str
    rows: int  # tiles of queries
    columns: int  # blocks of keys
    steps: tuple[Step, ...]
    traffic: Traffic

    @cached_property
    def so_far(self) -> tuple[tuple[int, ...], ...]:
        """Bytes by level of all steps up to each, itself too."""
        return tuple(accumulate((step.levels for step in self.steps), lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))))

    @property
    def totals(self) -> dict[str, int]:
        """Bytes of the whole walk by level."""
        return dict(zip(LEVELS, self.so_far[-1], strict=True))

    def cells(self, number: int) -> tuple[str, ...]:
        """S during a step, one string for each row of tiles: # now, + done, . to come, and a space where the kernel never goes."""
        now = self.steps[number] if self.steps[number].kernel else self.steps[-2]  # behind the last tile all are done
        letters = [[" "] * self.columns for _ in range(self.rows)]
        for n, step in enumerate(self.steps):
            if (step.kernel, step.head) == (now.kernel, now.head) and step.row is not None:
                letters[step.row][step.column] = "#" if n == number else "+" if n < number else "."
        return tuple("".join(row) for row in letters)

    def _repr_html_(self) -> str:
        """As a notebook shows it: the bytes of the whole walk, level by level, and which tensors they are of."""
        rows = []
        for level, (name, total) in enumerate(self.totals.items()):
            counted = _COUNTED[level]
            parts = {tensor: getattr(moved, counted) for tensor, moved in self.traffic.by_tensor.items()} if counted else {}
            of = ", ".join(f"{tensor} {scaled(size, 'B')}" for tensor, size in parts.items() if size)
            rows.append((name, scaled(total, "B"), of))
        title = f"{self.schedule} on {self.device}: {self.workload}, tile {self.tile}, {len(self.steps)} steps"
        return table(title, ("", "bytes", "of"), rows)

    def to_dict(self) -> dict:
        """As plain JSON values: the steps, and their sums."""
        told = {"schedule": self.schedule, "workload": self.workload.to_dict(), "tile": self.tile.to_dict(), "device": self.device}
        return {
            **told, "rows": self.rows, "columns": self.columns, "total_bytes": self.totals,
            "by_tensor": {name: dict(vars(moved)) for name, moved in self.traffic.by_tensor.items()},
            "steps": [step.to_dict() for step in self.steps],
        }  # fmt: skip


def walk(workload: Workload, schedule: str, device: str | Device, tile: Tile | None = None) -> Walk:
    """The walk of a schedule over all heads of a workload.

    Raises UsageError, one sentence, where the schedule cannot do it, the walk is too long to be looked at, or L2 would overflow.
    """
    if workload.backward:
        raise UsageError("a walk goes over the tiles of the forward alone; fasim.predict has the bytes of the backward")
    gpu = load_device(device) if isinstance(device, str) else device
    problem = _of_the_algorithm(laid_out(workload, schedule, gpu, tile))
    _short_enough(problem, gpu)
    names = tuple(problem.traffic.by_tensor)
    visits = [visit for grid in problem.grids for visit in _visits(problem, grid)]
    launches = [launch for visit in visits for launch in visit.launches]
    traffic, _, _, moved = replay_traffic(workload, launches, [TensorLayout(name) for name in names], gpu)
    delivered = iter(each.hbm for each in moved)
    steps = [visit.step(problem, names, delivered) for visit in visits]
    left = [Move(name, True, each.hbm_write, 0, 0) for name, each in traffic.by_tensor.items() if each.hbm_write]
    steps.append(Step("", steps[-1].head, None, None, tuple(left), 0))
    launch = problem.grids[0].launch
    rows, columns = -(-workload.seqlen_q // launch.block_m), -(-workload.seqlen_k // launch.block_n)
    return Walk(schedule, workload, problem.tile, gpu.name, rows, columns, tuple(steps), problem.traffic)


def _of_the_algorithm(problem: Problem) -> Problem:
    """Without what a compiler spills, which belongs to no tile."""
    if SPILLED not in problem.traffic.by_tensor:
        return problem
    each = [(grid, grid.launch.accesses) for grid in problem.grids]
    grids = [replace(grid, launch=replace(grid.launch, accesses=rows[rows["mode"] != OWN])) for grid, rows in each]
    by_tensor = {name: moved for name, moved in problem.traffic.by_tensor.items() if name != SPILLED}
    return replace(problem, grids=grids, traffic=replace(problem.traffic, by_tensor=by_tensor))


HEIGHTS, KEYS = (64, 128, 192, 256), (32, 64, 96, 128, 160, 192, 256)
"""Queries in a tile and keys in a block that `of_sizes` tries: a warpgroup's GEMM has 64 rows or a multiple."""


def sized_by_keys(schedule: str) -> bool:
    """Whether the bytes of a schedule hang on the keys in a block (FlashAttention-1), not on the queries in a tile."""
    return schedule.startswith("fa1")


def of_sizes(workload: Workload, schedule: str, device: Device) -> tuple[Walk, ...]:
    """The walks of a schedule with smaller and larger blocks, those that fit an SM, from small to large; the schedule's own tile
    is among them."""
    usual, found = default_tile(workload, schedule, device), []
    by_keys = sized_by_keys(schedule)
    for size in sorted({usual.block_n, *KEYS} if by_keys else {usual.block_m, *HEIGHTS}):
        if by_keys:
            tiles = [replace(usual, block_n=size)]
        else:  # a tile that is taller may have to be narrower
            tall = replace(usual, block_m=size, consumers=usual.consumers_for(size))
            tiles = [tall, *(replace(tall, block_n=keys) for keys in reversed(KEYS) if keys < usual.block_n)]
        for tile in tiles:
            with suppress(UsageError):
                found.append(walk(workload, schedule, device, tile))
                break
    return tuple(found)


def _short_enough(problem: Problem, device: Device) -> None:
    work, tile = problem.workload, problem.tile
    tiles = sum(int(grid.items["blocks"].sum()) * (-(-work.seqlen_q // tile.block_m) if grid.kernel.grid == "heads" else 1)
                for grid in problem.grids)  # fmt: skip
    if tiles > MOST_STEPS:
        raise UsageError(
            f"{work} is walked in some {tiles:,} steps, more than the {MOST_STEPS:,} that are played; give a shorter --seqlen, "
            "fewer heads or a taller tile"
        )
    held = sum(max(each.hbm_read, each.hbm_write) for each in problem.traffic.by_tensor.values())
    if held > stripe_bytes(device).min():
        raise UsageError(
            f"{work} has {held / 1e6:,.0f} MB, more than surely stays in L2 of {device.name}, where a walk would count other bytes "
            "than all CTAs at once; give a shorter --seqlen or fewer heads"
        )


# -- the steps of one kernel ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Visit:
    """One step before its bytes are known: the loads and stores of one CTA, each with whether another CTA's load serves it."""

    grid: Grid
    item: np.ndarray  # ITEM, one
    accesses: np.ndarray  # ACCESS
    shared: np.ndarray
    row: int | None
    column: int | None
    registers: int

    @property
    def launches(self) -> list[Launch]:
        """Each access as a kernel of its own, so that the model of L2 says what it moved."""
        each = self.grid.launch
        return [
            Launch(self.item, self.accesses[k : k + 1], 1, each.block_m, each.block_n, descending=each.descending, boxes=each.boxes)
            for k in np.flatnonzero(~self.shared)
        ]

    def step(self, problem: Problem, names: Sequence[str], delivered: Iterator[int]) -> Step:
        """The step with its bytes; `delivered` says what HBM moved for each launch."""
        found: dict[tuple[str, bool], list[int]] = {}
        for access, shared in zip(self.accesses, self.shared, strict=True):
            size, written = self._size(access, problem.workload), bool(access["write"])
            hbm = 0 if shared else next(delivered)  # what is written stays in L2 until the end
            parts = found.setdefault((names[access["tensor"]], written), [0, 0, 0])
            boxed = size if written else self._size(access, problem.workload, self.grid.launch.boxes)
            for n, part in enumerate((0 if written else hbm, 0 if shared else boxed, size)):
                parts[n] += part
        moves = tuple(Move(*key, *parts) for key, parts in found.items() if any(parts))
        loaded = sum(move.sram for move in moves if not move.written)
        registers = self.registers or (loaded if self.row is not None else 0)
        return Step(self.grid.kernel.name, int(self.item["q_head"][0]), self.row, self.column, moves, registers)

    def _size(self, access: np.void, work: Workload, whole: bool = False) -> int:
        """Bytes of an access, ragged tiles as they are, or as the whole ones that TMA delivers."""
        launch, item = self.grid.launch, self.item[0]
        rows = min(launch.block_m, work.seqlen_q - (item["m"] + access["m_offset"]) * launch.block_m)
        keys = min(launch.block_n, work.seqlen_k - _block(launch, item, access) * launch.block_n)
        if whole:
            rows, keys = launch.block_m, launch.block_n
        each = {ROW: rows * access["elements"], KV: keys * access["elements"], PAIR: rows * keys}[int(access["mode"])]
        return int(each * access["element_bytes"])


def _block(launch: Launch, item: np.void, access: np.void) -> int:
    """The block of keys that an access is of."""
    step = access["block"]
    return int(item["n"] + (item["blocks"] - 1 - step if launch.descending else step))


def _visits(problem: Problem, grid: Grid) -> Iterator[_Visit]:
    """The steps of one kernel, CTA after CTA as they are handed out."""
    for number in range(len(grid.items)):
        yield from (_under_keys if grid.kernel.grid == "heads" else _along_keys)(problem, grid, number)


def _along_keys(problem: Problem, grid: Grid, number: int) -> Iterator[_Visit]:
    """A CTA that walks over the keys of one tile of queries, or has one tile of S: what is loaded before the loop counts for
    its first step, what is stored behind it for the last; where no key is seen there is one step, without a tile."""
    launch, item = grid.launch, grid.items[number : number + 1]
    row, blocks = int(item["m"][0]), int(item["blocks"][0])
    operands = _operands(grid, problem, blocks)
    steps = launch.accesses["step"]
    where = np.where(steps >= 0, steps, np.where(launch.accesses["write"] == 1, max(0, blocks - 1), 0))
    served = _served(grid, number)
    for step in range(max(1, blocks)):
        mine = launch.accesses[(where == step) & (steps < blocks)]
        block = np.zeros(1, launch.accesses.dtype)
        block["block"] = step
        column = _block(launch, item[0], block[0]) if blocks else None
        shared = (mine["multicast"] == 1) & served
        yield _Visit(grid, item, mine, shared, row if blocks else None, column, operands.get(step, 0))


def _under_keys(problem: Problem, grid: Grid, number: int) -> Iterator[_Visit]:
    """A CTA that walks over queries under each block of keys: a step ends with its stores. Blocks of keys that none of its
    queries sees are loaded all the same."""
    launch, item = grid.launch, grid.items[number : number + 1]
    accesses, first = launch.accesses, int(item["m"][0])
    operands = max(_operands(grid, problem, 1).values())
    rows, tiles = accesses["mode"] == ROW, -(-problem.workload.seqlen_q // launch.block_m)
    m = first + accesses["m_offset"]
    done = ~rows | ((m >= accesses["block"]) & (m < tiles))
    ends = np.flatnonzero((accesses["write"][:-1] == 1) & (accesses["write"][1:] == 0)) + 1
    column = 0
    for part in np.split(np.arange(len(accesses)), ends):
        keys = accesses["block"][part][~rows[part]]
        column = int(keys[0]) if len(keys) else column
        mine, seen = part[done[part]], part[done[part] & rows[part]]
        if len(mine):
            place = (int(m[seen[0]]), column) if len(seen) else (None, None)
            yield _Visit(grid, item, accesses[mine], np.zeros(len(mine), bool), *place, operands if len(seen) else 0)


def _served(grid: Grid, number: int) -> bool:
    """Whether the first CTA of the cluster loads for this one."""
    leader = number - number % grid.launch.cluster
    alike = all(grid.items[leader][name] == grid.items[number][name] for name in ("kv_head", "blocks"))
    return leader != number and alike


def _operands(grid: Grid, problem: Problem, blocks: int) -> dict[int, int]:
    """By loop step, the bytes that a CTA's GEMMs read from shared memory."""
    if not blocks:
        return {}
    masked = int(grid.masked[min(blocks, len(grid.masked) - 1)])
    program = recorded(grid.kernel, problem.workload, problem.tile, blocks, masked, 1)
    rows, gemms = program.recorded((Op.WGMMA, Op.MMA))
    wgmma = K_PER_STEP_BYTES * (gemms["n"] + np.where(gemms["a_in_registers"] == 1, 0, gemms["m"]))
    each = gemms["k_steps"] * np.where(rows["op"] == Op.WGMMA, wgmma, gemms["smem_bytes"])
    return {int(step): int(each[rows["step"] == step].sum()) for step in np.unique(rows["step"])}

