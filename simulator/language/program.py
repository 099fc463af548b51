"""Program: the instruction streams that a schedule recorded, as frozen arrays, and how to read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..problem.tile import Tile
from ..problem.workload import Workload
from .verbs import Barrier, BarrierKind, Cta, Op
from .view import TileView

INSTRUCTION = np.dtype(
    [(name, "i4") for name in "op label barrier target a b c d e f g h i j k l ring index step tile".split()],
)
"""One instruction; what `a` to `l` mean is said at each Op in verbs.py."""

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


@dataclass(frozen=True)
class Program:
    """What one CTA (or a persistent CTA over several tiles) executes: one instruction stream per warp role."""

    name: str
    code: np.ndarray  # INSTRUCTION, all streams one after another; read-only
    starts: np.ndarray  # first instruction of each stream, and the end of the last
    warps: tuple[str, ...]
    barriers: tuple[Barrier, ...]
    rings: tuple[RingInfo, ...]
    labels: tuple[str, ...]
    tensors: tuple[str, ...]
    accesses: tuple[tuple, ...]  # ACCESS_FIELDS of the first tile's loads and stores, in program order
    tiles: int
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
    flat = [instruction for warp in cta.warps for instruction in warp.code]
    code = np.array(flat, dtype=INSTRUCTION) if flat else np.zeros(0, INSTRUCTION)
    code.flags.writeable = False
    starts = np.cumsum([0] + [len(warp.code) for warp in cta.warps]).astype(np.int64)
    starts.flags.writeable = False
    return Program(
        name=name,
        code=code,
        starts=starts,
        warps=tuple(warp.name for warp in cta.warps),
        barriers=tuple(cta.barriers),
        rings=tuple(
            RingInfo(r.name, r.tensor, r.nbytes, r.stages, r.over, tuple(r.full), tuple(r.empty)) for r in cta.rings.values()
        ),
        labels=tuple(cta.labels),
        tensors=tuple(cta.tensors),
        accesses=tuple(cta.accesses),
        tiles=cta.tile_number + 1,
        operand_sets=cta.tile.softmax.operand_sets,
    )


def trace(kernel, workload: Workload, tile: Tile, loops: Sequence[tuple[int, int]]) -> Program:
    """Record a kernel's schedule over the tiles of one CTA slot.

    `kernel` is a `schedules.Kernel`; `loops` has (loop length in K/V blocks, masked blocks) per tile. A persistent
    kernel runs on from tile to tile; any other ends its CTA and starts the next. A loop of 0 (a fully masked row of
    tiles) stores zeros only.
    """
    views = [
        TileView(tile, workload, loop, masked, looped=kernel.walk, softmax=kernel.softmax, splits=kernel.splits)
        for loop, masked in loops
    ]
    cta = Cta(views[0])
    for view in views:
        cta.begin_tile(view, kernel.persistent)
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
            lines.append(f"  {step}  {op.name:<10} {program.describe(instruction):<18} {_operands(op, instruction)}".rstrip())
    return "\n".join(lines)


_OPERANDS = {
    Op.LOAD: ("a bytes", "c CTAs share", "d cp.async"),
    Op.STORE: ("a bytes",),
    Op.WGMMA: ("a k steps", "b m", "c n", "d A in registers"),
    Op.MMA: ("a k steps", "b m", "c n", "f SMEM bytes per step"),
    Op.WGMMA_WAIT: ("a groups may be outstanding",),
    Op.COMPUTE: (
        *("f chunks of", "a FMA", "b ALU", "c MUFU", "d convert", "e other", "g STSM", "h sparse"),
        *("target latencies", "i fetched", "j votes", "k divisions", "l branches"),
    ),
}


def _operands(op: Op, instruction: np.void) -> str:
    if op in (Op.WAIT, Op.ARRIVE):
        target = f" generation {int(instruction['target'])}" if op == Op.WAIT else ""
        return f"b{int(instruction['barrier'])}{target}"
    parts = []
    for operand in _OPERANDS.get(op, ()):
        name, words = operand.split(" ", 1)
        value = int(instruction[name])
        if value or op == Op.WGMMA_WAIT:
            parts.append(f"{value} {words}")
    return ", ".join(parts)
