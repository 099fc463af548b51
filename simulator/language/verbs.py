"""Verbs: everything a warp of a schedule may say. They record instructions, they never simulate.

`K[j]` hides stage and phase: load j lives in stage `j % stages` and is that stage's generation `j // stages`.
"""

from __future__ import annotations

from dataclasses import replace

from ..code.estimate import STATISTICS
from ..code.phase import Phase
from ..errors import EndlessError
from .buffers import Baton, Meeting, Result, Slot
from .ops import BarrierKind, Copy, Gemm, Op
from .recorder import ONLY_LAST, Recorder
from .view import TileView

WARPGROUP_ROWS = 64
"""Rows of a WGMMA (PTX ISA, wgmma shapes)."""
_TURNS = (BarrierKind.NAMED, BarrierKind.MEETING)


class Warp:
    """One role of the CTA: the producer warp, a consumer warpgroup, or (mma.sync kernels) four warps, one per sub-partition."""

    def __init__(self, cta: Recorder, number: int, name: str, rank: int):
        self.cta, self.number, self.name, self.rank = cta, number, name, rank
        self.ops: list[tuple] = []
        self.pen = cta.code.pen(rank)
        self.products: dict[tuple, tuple[str, Gemm]] = {}  # by what is multiplied: whichever tile it is in
        self.copies: dict[tuple[int, int], Copy] = {}  # by the ring's number, and whether cp.async loads it
        self.groups = 0
        self.in_flight: dict[int, str] = {}  # groups not yet waited for -> what they write
        self.tile_number = -1  # the last that it began

    # -- loads and stores ------------------------------------------------------------------------------------------

    def tma(self, slot: Slot, block: int | None = None) -> None:
        """Wait until the stage is free, then copy a tile into it by TMA (multicast where the cluster shares it).

        `block` is the tensor's block to load when it differs from the slot's.
        """
        self._load(slot, slot.block if block is None else block, cp_async=0)

    def cp_async(self, slot: Slot, block: int | None = None) -> None:
        """The same by cp.async: the warp itself issues the 16-byte copies, nothing is shared with a cluster."""
        slot.ring.loaders.add(self.number)
        self._load(slot, slot.block if block is None else block, cp_async=1)

    def _load(self, slot: Slot, block: int, cp_async: int) -> None:
        ring = slot.ring
        ring.used = max(ring.used, slot.index + 1)
        if slot.generation > 0:
            self._emit(Op.WAIT, "free", slot, barrier=ring.empty[slot.stage], target=slot.generation)
        shared = 1 if cp_async else self.cta.tile.sharing(ring.tensor)
        if self.rank <= 0 and ring.part == 0:  # however many copy their part of a tile, the access is the CTA's
            self.cta.access(ring.tensor, block, slot.step, write=0, multicast=int(shared > 1))
        if not cp_async:
            self._run(self.pen.load(), f"load {ring.tensor}", slot.step)
        key = ring.number, cp_async
        if key not in self.copies:
            nbytes = ring.nbytes // (self.cta.tile.consumers if cp_async else 1)
            boxes = 1 if ring.tensor in STATISTICS else self.cta.tile.boxes_in
            self.copies[key] = Copy(nbytes, self.cta.tensor(ring.tensor), shared, cp_async, boxes)
        self._emit(Op.LOAD, f"load {ring.tensor}", slot, self.copies[key], barrier=ring.full[slot.stage])

    def reclaim(self, slot: Slot) -> None:
        """Before a stage is overwritten: wait until the previous tile's staged output `slot` has left shared memory."""
        if slot.ring.base > 0:
            self._emit(Op.WAIT, "free", slot, barrier=slot.ring.empty[0], target=slot.ring.base)

    def store(
        self, name: str, block: int = 0, slot: Slot | None = None, step: int = -1, alone: bool = False, rounds: int = 0
    ) -> None:
        """Convert this warp's share of a result, or all of it, stage it in shared memory and copy it out by TMA (or plain stores).

        A staging buffer of this warp's own (`cta.staging`) is written once the copies before have left it, in as many
        rounds as the result is larger, or in so many, and the warp runs on. Any other `slot` is released once the copy has left it.
        """
        tile = self._view(alone)
        if self.rank == 0 or alone:
            self.cta.access(name, block, step, write=1, multicast=0)
        tensor, nbytes = self.cta.tensor(name), tile.store_bytes(name)
        if slot is not None and not slot.ring.full:
            rounds = rounds or -(-nbytes // slot.ring.nbytes)
            (phase,) = self.pen.stage(tile, name)
            for number in range(rounds):
                self._emit(Op.STORE_WAIT, f"claim {name}", slot, step=step)
                part = replace(phase, chunks=-(-phase.chunks // rounds), fetched=phase.fetched if number == 0 else 0)
                self._run([part, *self.pen.send()], f"stage {name}", step, reads=(name,))
                self._emit(Op.STORE, f"store {name}", slot, Copy(nbytes // rounds, tensor, boxes=tile.boxes // rounds), step=step)
            return
        self._run(self.pen.stage(tile, name), f"stage {name}", step, reads=(name,))
        boxes = tile.boxes if self.pen.by_tma and name not in STATISTICS else 0
        if boxes:
            self._run(self.pen.send(), f"stage {name}", step, reads=(name,))
        self._emit(Op.STORE, f"store {name}", None, Copy(nbytes, tensor, by_warps=int(boxes == 0), boxes=boxes), step=step)
        if name not in STATISTICS:  # those leave from registers
            self._emit(Op.STORE_WAIT, f"store {name}", None, step=step)
        if slot is not None:
            slot.ring.used = max(slot.ring.used, slot.index + 1)
            slot.ring.readers.add(self.number)
            self._emit(Op.ARRIVE, "free", slot, barrier=slot.ring.empty[slot.stage])

    def put(self, name: str, slot: Slot, alone: bool = False, half: int | None = None) -> None:
        """Write this warp's share of a register tensor, or all of it, into a slot that warps fill for others, once that is free.

        The last of the writers fills it; whoever waits for it then reads what all of them have put. `half` is 0 or 1 where it is
        only that half of the share.
        """
        phases = self.pen.put(self._view(alone), name)
        if half is not None:
            phases = [replace(phase, chunks=-(-phase.chunks // 2)) for phase in phases]
        self._fill(slot, phases, f"put {name}", reads=(name,))

    def _view(self, alone: bool) -> TileView:
        return self.cta.tile.alone if alone else self.cta.tile

    def transpose(self, source: Slot, slot: Slot) -> None:
        """Write a loaded block into a slot that these warps fill for others, rows and columns exchanged, and hand it back."""
        self.wait(source)
        self._fill(slot, self.pen.transpose(self.cta.tile), f"transpose {source.ring.tensor}")
        self.free(source)

    def _fill(self, slot: Slot, phases: list[Phase], label: str, reads: tuple[str, ...] = ()) -> None:
        ring = slot.ring
        ring.loaders.add(self.number)
        ring.used = max(ring.used, slot.index + 1)
        if slot.generation > 0:
            self._emit(Op.WAIT, "free", slot, barrier=ring.empty[slot.stage], target=slot.generation)
        self._run(phases, label, slot.step, reads=reads)
        self._emit(Op.ARRIVE, "fill", slot, barrier=ring.full[slot.stage])

    def add(
        self, name: str, tensor: str, block: int = 0, slot: Slot | None = None, step: int = -1, half: int | None = None
    ) -> None:
        """Add a result, in fp32, to a tensor in memory: a slot's by a bulk copy that adds, which this warp waits for until it
        has been read, or, without a slot, this warp's share of the register tensor `name` from where it is, or that `half` of it.
        """
        cta = self.cta
        if half != 1 and (self.rank == 0 or (slot is not None and slot.ring.part == 0)):
            cta.access(tensor, block, step, write=2, multicast=0)
        if slot is None:
            parts = 1 if half is None else 2
            nbytes, lane = cta.tile.store_bytes(tensor) // parts, self.pen.added_bytes
            self._run(self.pen.add(cta.tile, name, parts), f"add {name}", step, reads=(name,))
            self._emit(Op.ADD, f"add {name}", None, Copy(nbytes, cta.tensor(tensor), by_warps=lane), step=step)
            return
        self._run(self.pen.load(), f"add {name}", step)
        self._emit(Op.ADD, f"add {name}", slot, Copy(slot.ring.nbytes, cta.tensor(tensor), boxes=1), step=step)
        self._emit(Op.STORE_WAIT, f"add {name}", slot, step=step)

    def write_out(self, sums: str, name: str, step: int = -1) -> None:
        """Make a block of sums in memory, once every CTA has added to it, the tensor `name`, and clear them for the head that has
        them next: by warps that wait for nothing else, so that it takes bytes and, at the kernel's end, time (replay/sums.py).
        Outside a loop: of a block that no CTA will add to."""
        for tensor, write in ((sums, 0), (sums, 1), (name, 1)):
            self.cta.access(tensor, max(0, step), step, write=ONLY_LAST + write, multicast=0)

    # -- waiting and handing over ----------------------------------------------------------------------------------

    def wait(self, what: Slot | Result) -> None:
        """Until a ring slot is loaded, or until a GEMM's result is in registers."""
        if isinstance(what, Slot):
            what.ring.readers.add(self.number)
            what.ring.used = max(what.ring.used, what.index + 1)
            self._emit(Op.WAIT, "wait", what, barrier=what.ring.full[what.stage], target=what.generation + 1)
        else:
            self._emit(Op.WGMMA_WAIT, f"wait {what.label}", None, target=self.groups - 1 - what.group)
            self.in_flight = {group: into for group, into in self.in_flight.items() if group > what.group}

    def read(self, slot: Slot, of: str, alone: bool = False) -> None:
        """Wait for a statistic of a backward's scores `of`, and read it out of shared memory before they are there."""
        self.wait(slot)
        self._run(self.pen.read(self._view(alone), of), f"read {slot.ring.tensor}", slot.step)

    def free(self, slot: Slot) -> None:
        """This warp no longer reads the slot; when every reader has said so the producer may refill its stage."""
        self._emit(Op.ARRIVE, "free", slot, barrier=slot.ring.empty[slot.stage])

    def take(self, baton: Baton) -> None:
        """Wait for the turn (bar.sync on this consumer's named barrier)."""
        baton.takes[self.rank] += 1
        self._emit(Op.WAIT, "take turn", None, barrier=baton.barriers[self.rank], target=baton.takes[self.rank])

    def give(self, baton: Baton) -> None:
        """Pass the turn to the next consumer (bar.arrive on its named barrier)."""
        after = (self.rank + 1) % len(baton.barriers)
        self._emit(Op.ARRIVE, "give turn", None, barrier=baton.barriers[after])

    def meet(self, meeting: Meeting) -> None:
        """Wait until every consumer has come here (bar.sync among the consumer warpgroups)."""
        meeting.times[self.rank] += 1
        self._emit(Op.ARRIVE, "meet", None, barrier=meeting.barrier)
        self._emit(Op.WAIT, "meet", None, barrier=meeting.barrier, target=meeting.times[self.rank])

    # -- arithmetic ------------------------------------------------------------------------------------------------

    def gemm(
        self, destination: str, a: Slot | str, b: Slot, add: bool = False, step: int = -1, loaded: bool = False,
        half: int | None = None, alone: bool = False, k_steps: int | None = None,
    ) -> Result:  # fmt: skip
        """Issue this warpgroup's WGMMAs of destination = a b of one block (or += with `add`), once b is loaded.

        `destination` names a register tensor, `a` another one or a slot, `b` is a slot in shared memory; `step` is the loop
        step where it is not b's. `loaded` says that this warp has waited for b before.
        `half` is 0 or 1 where only that half of the columns is formed; `alone` says that no other consumer forms a share of it;
        `k_steps` how many steps of 16 in k are issued, where it is not all.
        """
        label, gemm = self._product(destination, a, b, add, WARPGROUP_ROWS, alone)
        if k_steps is not None:
            gemm = replace(gemm, k_steps=k_steps)
        if half is not None:
            gemm = replace(gemm, n=gemm.n // 2)
        self._run(self.pen.gemm(scores=destination in ("S", "S^T")), "address", b.index if step < 0 else step)
        if not loaded:
            self.wait(b)
        registers = () if isinstance(a, Slot) else (a,)
        issues = self.pen.issues(gemm.k_steps, 2 - gemm.a_in_registers, destination in ("S", "S^T"), b.ring.stages)
        self._emit(Op.WGMMA, label, b, gemm, reads=registers, writes=(destination,), left=a, step=step, issues=issues)
        self.in_flight[self.groups] = destination
        self.groups += 1
        return Result(label, self.groups - 1)

    def mma(self, destination: str, a: Slot | str, b: Slot, step: int = -1, add: bool = False, loaded: bool = False) -> None:
        """The same by mma.sync: operands through registers by ldmatrix, the warp waits for the result.

        `step` is the loop step where it is not b's: K and V stay while FlashAttention-1's loop goes over Q.
        """
        label, gemm = self._product(destination, a, b, add)
        if not loaded:
            self.wait(b)
        self._emit(Op.MMA, label, b, gemm, step=step, left=a)

    def _product(
        self, destination: str, a: Slot | str, b: Slot, add: bool, least: int = 1, alone: bool = False
    ) -> tuple[str, Gemm]:
        """A GEMM as the papers write it, and its shape."""
        left, right = a.ring.tensor if isinstance(a, Slot) else a, b.ring.tensor
        key = (destination, left, right, isinstance(a, Slot), add, least, alone)
        if key in self.products:
            return self.products[key]
        shape = self._view(alone).gemm(destination, left, right, a_in_registers=not isinstance(a, Slot), least=least)
        first = "^T" if self.cta.tile.is_transposed_left(destination, left) else ""
        second = "^T" if self.cta.tile.is_transposed(destination, right) else ""
        if right.endswith("^T"):  # it lies so, and is read so
            right, second = right.removesuffix("^T"), ""
        self.products[key] = f"{destination}{'+' if add else ''}={left}{first}{right}{second}", shape
        return self.products[key]

    def softmax(self, j: int) -> None:
        """Weights of block j; what must wait for a product in flight is left for `rescale`."""
        for phase in self.pen.weights(self.cta.tile, j, self.in_flight.values()):
            self._run([phase], "softmax", j, reads=("S",), writes=("P",) if phase.convert else ())

    def probabilities(
        self, step: int, of: str, half: int | None = None, alone: bool = False, ready: bool = False
    ) -> None:
        """The backward's P, or P^T, once more from its scores `of` and from LSE: no maximum, no sum; converted to an operand.

        `half` is 0 or 1 where only that half of the exponentials is taken; LSE and the mask belong to the first, unless
        `exponents` has made the scores `ready`.
        """
        wrote = of.replace("S", "P")
        self._run(self.pen.probabilities(self._view(alone), of, step, half, ready), wrote, step, reads=(of,), writes=(wrote,))

    def exponents(self, step: int, of: str) -> None:
        """The scores `of` times the scale less LSE, and masked, where a kernel does not do that among the exponentials."""
        self._run(self.pen.exponents(self.cta.tile, of, step), of.replace("S", "P"), step, reads=(of,), writes=(of,))

    def gradient(self, step: int, of: str, alone: bool = False) -> None:
        """dS = P (dP - delta), or dS^T, from `of`: the softmax's derivative (FlashAttention-2 Algorithm 2), as an operand."""
        wrote, weights = of.replace("dP", "dS"), of.replace("dP", "P")
        self._run(self.pen.gradient(self._view(alone), of), wrote, step, reads=(of, weights), writes=(wrote,))

    def arithmetic(self, what: str, step: int = -1) -> None:
        """What else a kernel of a backward computes, by name: "row dot" (delta), "scale dQ"; see code/gradients.py."""
        self._run(self.pen.arithmetic(self.cta.tile, what), what, step)

    def rescale(self, j: int, of: str = "") -> None:
        """What the softmax of block j has left: P to the operand type, O times exp(m_old - m_new) (FlashAttention-2, 3.1).

        `of` names the register tensor, "P" or "O", where the other is left for later.
        """
        for left in self.pen.rescale(j, of):
            self._run([left.phase], left.label, j, writes=(left.writes,) if left.writes else ())

    def normalize(self, step: int = -1) -> None:
        """Reduce the row sums across the quad, O /= l, LSE = m + log l: the epilogue, or FlashAttention-1's every step."""
        self._run(self.pen.normalize(self.cta.tile), "normalize O", step, writes=("O",))

    def reading(self, of: str, j: int) -> None:
        """Read block j of S once, for the "row max", "row sum", "row max and sum" or "probabilities"."""
        self._run(self.pen.reading(self.cta.tile, of), of, j)

    def compute(self, label: str, phase: Phase, j: int = -1, reads: tuple[str, ...] = (), writes: tuple[str, ...] = ()) -> None:
        """Any other register arithmetic, counted by instruction class, and the register tensors that it touches."""
        self._run([phase], label, j, reads, writes)

    # -- recording -------------------------------------------------------------------------------------------------

    def _run(self, phases, label: str, step: int = -1, reads: tuple[str, ...] = (), writes: tuple[str, ...] = ()) -> None:
        for phase in phases:
            self._emit(Op.COMPUTE, label, None, phase, reads=reads, writes=writes, step=step)

    def _emit(self, op: Op, label: str, slot: Slot | None, record: Phase | Gemm | Copy | None = None, barrier: int = -1,
              target: int = 0, reads: tuple[str, ...] = (), writes: tuple[str, ...] = (), step: int = -1,
              left: Slot | str = "", issues: int = 0) -> None:  # fmt: skip
        ring, index = (slot.ring.number, slot.index) if slot is not None else (-1, -1)
        beside = (left.ring.number, left.index) if isinstance(left, Slot) else (-1, -1)
        cta = self.cta
        if len(self.ops) >= cta.most_ops:
            raise EndlessError(f"{len(self.ops):,} instructions of {self.name}, more than its loop can need")
        if slot is not None and step < 0:
            step = slot.step
        number = -1 if record is None else cta.record(record)
        touched = cta.registers(reads) if reads else 0, cta.registers(writes) if writes else 0
        if op is Op.WAIT or op is Op.ARRIVE:
            turn = cta.barriers[barrier].kind in _TURNS
            issues = self.pen.issues_of_barrier(waits=op is Op.WAIT, turn=turn)
        row = (int(op), cta.label(label), number, barrier, target, *touched, ring, index, step, cta.tile_number, *beside, issues)
        self.ops.append(row)
