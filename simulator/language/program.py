"""Program: the instruction streams that a schedule recorded, as frozen arrays, and how to read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from ..code.phase import PHASE, Phase
from ..problem.tile import Tile
from ..problem.workload import Workload
from .cta import Cta
from .ops import COPY, GEMM, INSTRUCTION, Barrier, BarrierKind, Copy, Gemm, Op
from .view import TileView

ACCESS_FIELDS = ("tensor", "block", "step", "write", "multicast")


@dataclass(frozen=True)
class RingInfo:
    """A ring of shared-memory buffers as the program uses it."""

    name: str
    tensor: str  # what it holds: its name, but for rings that hold a consumer's part
    nbytes: int
    stages: int
    alias: str  # the ring over whose memory it is laid, if any
    full: tuple[int, ...]
    empty: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """What one CTA (or a persistent CTA over several tiles) executes: one instruction stream per warp role. Each is equal to itself
    alone."""

    name: str
    code: np.ndarray  # INSTRUCTION, all streams one after another; read-only
    starts: np.ndarray  # first instruction of each stream, and the end of the last
    phases: np.ndarray  # PHASE: the records of COMPUTE
    gemms: np.ndarray  # GEMM: those of WGMMA and MMA
    copies: np.ndarray  # COPY: those of LOAD, STORE and ADD
    warps: tuple[str, ...]
    barriers: tuple[Barrier, ...]
    rings: tuple[RingInfo, ...]
    labels: tuple[str, ...]
    tensors: tuple[str, ...]
    accesses: tuple[tuple, ...]  # ACCESS_FIELDS of the first tile's loads and stores, in program order
    tiles: int
    registers: tuple[str, ...] = ()  # register tensors, by their bits in `reads` and `writes`
    operand_sets: int = 1  # register sets that P alternates between from block to block

    @property
    def smem_parts(self) -> dict[str, int]:
        """Shared memory in bytes, buffer by buffer (aliases take none), with the barriers."""
        parts: dict[str, int] = {}
        for ring in self.rings:
            if not ring.alias:
                parts[ring.tensor] = parts.get(ring.tensor, 0) + ring.nbytes * ring.stages
        return parts | {"barriers": 1024}

    def stream(self, warp: int) -> np.ndarray:
        """The instructions of one warp role."""
        return self.code[self.starts[warp] : self.starts[warp + 1]]

    @property
    def tables(self) -> tuple[tuple[tuple[Op, ...], np.ndarray], ...]:
        """(ops, the table of their records), for each table."""
        return ((Op.COMPUTE,), self.phases), ((Op.WGMMA, Op.MMA), self.gemms), ((Op.LOAD, Op.STORE, Op.ADD), self.copies)

    def recorded(self, ops: Op | Sequence[Op]) -> tuple[np.ndarray, np.ndarray]:
        """The instructions of these ops, which share a table, and beside each its record."""
        wanted = np.isin(self.code["op"], ops)
        table = next(table for owners, table in self.tables if np.ravel(ops)[0] in owners)
        rows = self.code[wanted]
        return rows, table[rows["record"]]

    @cached_property
    def gemm_flops(self) -> float:
        """FLOPs of all GEMMs, per tile."""
        _, gemms = self.recorded((Op.WGMMA, Op.MMA))
        wide = gemms.astype([(name, "i8") for name in gemms.dtype.names])
        return float((2 * wide["k_steps"] * wide["m"] * wide["n"] * wide["k_per_step"]).sum()) / self.tiles

    @cached_property
    def most_spans(self) -> int:
        """Spans that a replay of it has at most: one per k step, per chunk and pipe, and per instruction."""
        _, gemms = self.recorded((Op.WGMMA, Op.MMA))
        _, phases = self.recorded(Op.COMPUTE)
        return int(2 * len(self.code) + 2 * gemms["k_steps"].sum() + 4 * phases["chunks"].sum())

    def slot_name(self, instruction: np.void) -> str:
        """K[3] for an instruction that concerns load 3 of ring K, else an empty string."""
        ring = int(instruction["ring"])
        return "" if ring < 0 else f"{self.rings[ring].name}[{int(instruction['index'])}]"

    def describe(self, instruction: np.void) -> str:
        """One instruction as a schedule would say it: "wait K[3]", "take turn"."""
        label, slot = self.labels[int(instruction["label"])], self.slot_name(instruction)
        if Op(int(instruction["op"])) == Op.LOAD:
            return f"load {slot}"
        return f"{label} {slot}".strip()


def record(cta: Cta, name: str) -> Program:
    """Freeze what a Cta recorded."""
    cta.finish()
    numbers = chain.from_iterable(op for warp in cta.warps for op in warp.ops)
    code = np.fromiter(numbers, "i4").view(INSTRUCTION)  # each op is as many, and all of that size
    code.flags.writeable = False
    starts = np.cumsum([0] + [len(warp.ops) for warp in cta.warps]).astype(np.int64)
    starts.flags.writeable = False
    return Program(
        name=name,
        code=code,
        starts=starts,
        phases=_table(PHASE, cta.records[Phase]),
        gemms=_table(GEMM, cta.records[Gemm]),
        copies=_table(COPY, cta.records[Copy]),
        warps=tuple(warp.name for warp in cta.warps),
        barriers=tuple(cta.barriers),
        rings=tuple(
            RingInfo(r.name, r.tensor, r.nbytes, r.stages, r.over, tuple(r.full), tuple(r.empty)) for r in cta.rings.values()
        ),
        labels=tuple(cta.labels),
        tensors=tuple(cta.tensors),
        accesses=tuple(cta.accesses),
        tiles=cta.tile_number + 1,
        registers=cta.register_tensors,
        operand_sets=cta.code.operand_sets,
    )


def _table(row: np.dtype, records: Iterable) -> np.ndarray:
    """Records as rows, read-only."""
    table = np.array([tuple(vars(each).values()) for each in records], row)
    table.flags.writeable = False
    return table


def trace(kernel, workload: Workload, tile: Tile, loops: Sequence[tuple[int, int]]) -> Program:
    """Record a kernel's schedule over the tiles of one CTA slot.

    `kernel` is a `schedules.Kernel`; `loops` has (loop length in K/V blocks, masked blocks) per tile. A persistent
    kernel runs on from tile to tile; any other ends its CTA and starts the next. A loop of 0 (a fully masked row of
    tiles) stores zeros only.
    """
    views = [
        TileView(tile, workload, loop, masked, looped=kernel.walk, splits=kernel.splits)
        for loop, masked in loops
    ]
    cta = Cta(views[0], kernel.code)
    for view in views:
        cta.begin_tile(view, kernel.persistent, kernel.strides)
        (kernel.body if view.loop else _store_zeros)(cta, view)
    return record(cta, kernel.name)


def _store_zeros(cta: Cta, tile: TileView) -> None:
    """O = 0 and LSE = -inf of a row of tiles that sees no key."""
    for warps in cta.consumers():
        warps.store("LSE")
        warps.store("O")


def disassemble(program: Program) -> str:
    """The streams as text, one instruction a line: step, operation, what it concerns, operands that are not zero."""
    lines = [f"; {program.name}: {len(program.code)} instructions, {program.tiles} tile(s)"]
    shared = " + ".join(f"{name} {size}" for name, size in program.smem_parts.items())
    lines.append(f"; shared memory {sum(program.smem_parts.values())} bytes = {shared}")
    for number, barrier in enumerate(program.barriers):
        lines.append(f"; b{number}: {barrier.name}, {BarrierKind(barrier.kind).name.lower()}, {barrier.expected} arrival(s)")
    for warp, name in enumerate(program.warps):
        lines.append(f"\n{name}:")
        for instruction in program.stream(warp):
            op = Op(int(instruction["op"]))
            step = f"{int(instruction['step']):4d}" if instruction["step"] >= 0 else "    "
            lines.append(f"  {step}  {op.name:<10} {program.describe(instruction):<18} {_operands(program, instruction)}".rstrip())
    return "\n".join(lines)


def _operands(program: Program, instruction: np.void) -> str:
    op = Op(int(instruction["op"]))
    if op in (Op.WAIT, Op.ARRIVE):
        target = f" generation {int(instruction['target'])}" if op == Op.WAIT else ""
        return f"b{int(instruction['barrier'])}{target}"
    if op == Op.WGMMA_WAIT:
        return f"{int(instruction['target'])} groups may be outstanding"
    number = int(instruction["record"])
    if number < 0:
        return ""
    if op in (Op.WGMMA, Op.MMA):
        gemm = program.gemms[number]
        source = "registers" if gemm["a_in_registers"] else "shared memory"
        return f"{gemm['k_steps']} k steps of m{gemm['m']}n{gemm['n']}k{gemm['k_per_step']}, A in {source}"
    if op in (Op.LOAD, Op.STORE, Op.ADD):
        copy = program.copies[number]
        shared = f", {copy['sharing']} CTAs share" if copy["sharing"] > 1 else ""
        how = "by the warps" if copy["by_warps"] else f"{copy['boxes']} boxes"
        return f"{copy['nbytes']} bytes, {how}{shared}"
    phase = program.phases[number]
    return ", ".join(f"{int(phase[name])} {name}" for name in _SHOWN if phase[name])


_SHOWN = ("chunks", *(name for name in PHASE.names if name != "chunks"))
