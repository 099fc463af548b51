"""SM: what a warp of the interpreter asks of an SM and of the chip, in plain Python: pipes, ports, barriers, tensor cores."""

from __future__ import annotations

from collections import deque, namedtuple
from types import SimpleNamespace

from ..devices.device import Device
from ..language.ops import INSTRUCTION, BarrierKind
from ..language.program import Program
from ..results.run import Lane
from .engine import MAX_QUEUE
from .machine import DRAWN_UNITS, MACHINE, UNITS, Memory, machine_of

Instruction = namedtuple("Instruction", INSTRUCTION.names)
ARITHMETIC = ("FMA", "ALU", "MUFU", "convert")
PIPES = (*ARITHMETIC, "STSM")


def ceil(numerator: int, denominator: int) -> int:
    """A quotient, rounded up."""
    return -(-numerator // denominator)


def paced(work: int, slow: int, start: int, until: int) -> int:
    """Cycles from `start` of what takes `work` alone and `slow` beside WGMMA, which executes `until` then."""
    if start >= until or slow <= work:
        return work
    if start + slow <= until:
        return slow
    return until - start + work - (until - start) * work // slow


class Server:
    """Serves one after the other."""

    def __init__(self) -> None:
        self.free = 0

    def take(self, start: int, cycles: int) -> int:
        """Hold it for some cycles from `start`, or from when it is free; when they begin."""
        begin = max(start, self.free)
        self.free = begin + cycles
        return begin

    def pass_bytes(self, start: int, nbytes: int, q20: int) -> int:
        """Move bytes through it at 2^20 / q20 per cycle, at least a cycle; when the last has passed."""
        self.take(start, max(1, ceil(nbytes * q20, 1 << 20)))
        return self.free


class Barrier:
    """Completes a generation at every `expected` arrivals, at the time of the latest arrival so far."""

    def __init__(self, kind: BarrierKind, expected: int, initial: int):
        self.kind, self.expected = kind, expected
        self.completions = [0] * initial
        self.arrivals = self.latest = 0

    def arrive(self, at: int) -> None:
        """One arrival."""
        self.latest = max(self.latest, at)
        self.arrivals += 1
        if self.arrivals == self.expected:
            self.arrivals = 0
            self.completions.append(self.latest)


class Asker:
    """What the units know of a warp that asks them."""

    sm: Sm
    order: tuple[int, int]  # ties go to the lower
    program: Program
    lane: int
    queue: deque[SimpleNamespace]  # its k steps that have not begun
    groups_done: list[int]  # when each of its groups of WGMMAs was over


class Chip:
    """What all SMs share: parameters, L2, HBM; and the record of what happened."""

    def __init__(self, device: Device, memory: Memory, eight_bit: bool):
        parameters = machine_of(device, memory)[0].tolist()
        self.cycles = SimpleNamespace(**dict(zip(MACHINE.names, parameters, strict=True)))
        self.memory = memory
        self.tensor_rate = self.cycles.tensor_flops_8bit if eight_bit else self.cycles.tensor_flops
        self.queue_room = min(max(1, self.cycles.queue), MAX_QUEUE)
        self.l2, self.hbm = Server(), Server()
        self.last_event = 0
        self.fetched: dict[tuple, tuple[int, int]] = {}  # (CTA, label) -> tile and step of the code in the instruction caches
        self.copied: dict[tuple, tuple[int, int]] = {}  # (CTA, phase) -> the last step of which a copy of its own has come
        self.brought: dict[tuple, int] = {}  # (SM, program, phase or GEMM) -> when its code had come to the SM for the first time
        self.labels: dict[str, int] = {}
        self.lanes: list[Lane] = []
        self.spans: list[list[int]] = []
        self.last_span: dict[int, list[int]] = {}

    def note(self, time: int) -> None:
        """Something ended at `time`."""
        self.last_event = max(self.last_event, time)

    def draw(self, lane: str, warp: Asker, ins: Instruction, start: int, end: int, wait: int = 0) -> None:
        """A span of SM 0; it joins the last one of its lane where that goes on without a gap."""
        if warp.sm.number > 0 or end <= start:
            return
        number = len(self.lanes) - DRAWN_UNITS + UNITS.index(lane) if lane in UNITS else warp.lane
        label = self.labels[warp.program.labels[ins.label]]
        what = [number, label, warp.lane, ins.step, ins.tile, wait]
        last = self.last_span.get(number)
        if last and last[:6] == what and last[7] == start:
            last[7] = end
        else:
            self.last_span[number] = [*what, start, end]
            self.spans.append(self.last_span[number])


class Sm:
    """The units of one SM, and its tensor cores as an actor that serves k steps out of the warps' queues."""

    def __init__(self, chip: Chip, number: int):
        self.chip, self.number, self.order = chip, number, (1, number)
        self.warps: list[Asker] = []
        self.busy = dict.fromkeys(UNITS, 0)
        self.issue, self.smem, self.load_port, self.store_port, self.tensor = (Server() for _ in range(5))
        self.pipes = {name: Server() for name in PIPES}
        self.wgmma_until = self.last_served = 0
        self.crowded_until = self.crowded_q10 = self.adding_until = self.moving_until = self.loading_until = 0
        self.owner: Asker | None = None
        self.pending = self.pending_bytes = 0  # cycles, and bytes of operands, of all k steps of the GEMMs under way
        self.waiting: list[Asker] = []  # for room in the queue
        self.issuer: Asker | None = None  # the last to issue a k step, while its GEMM has more
        self.turn = 0  # k steps the owner has had in a row

    def in_arithmetic(self, now: int) -> bool:
        """Whether any warp's arithmetic is under way."""
        return any(self.pipes[name].free > now for name in ARITHMETIC)

    def tensor_busy_until(self, now: int) -> int:
        """Until when WGMMA executes that has begun, or whose issue has, by `now`."""
        return max(now, self.wgmma_until) + self.pending

    def left_for_stores_q10(self) -> int:
        """Bytes a cycle of shared memory for stores: what the operands of the GEMMs under way leave, within limits."""
        return max(1, self.chip.cycles.store_least_q10, min(self.chip.cycles.store_most_q10, self.unread_q10))

    def left_for_matrices_q10(self) -> int:
        """The same for a stream of LDSM and STSM, which takes some of what operands would."""
        return max(1, min(self.chip.cycles.matrix_most_q10, self.unread_q10 + self.chip.cycles.matrix_more_q10))

    @property
    def unread_q10(self) -> int:
        """What the operands of the GEMMs under way leave of shared memory."""
        rate = self.chip.cycles.smem_bytes
        return ((rate * self.pending - self.pending_bytes) << 10) // self.pending if self.pending else rate << 10

    def crowd(self, start: int, end: int, instructions: int) -> None:
        """Arithmetic takes from WGMMA what it needs of the register file beyond what that leaves it."""
        left_q10 = 1024 - min(1024 * instructions // (end - start), 960)
        longer_q10 = self.chip.cycles.port_q10 * 1024 // left_q10 - 1024
        if longer_q10 > 0 and (self.crowded_until <= start or longer_q10 > self.crowded_q10):
            self.crowded_until, self.crowded_q10 = end, longer_q10

    @property
    def room(self) -> bool:
        """Whether the queue takes one more k step."""
        return sum(len(warp.queue) for warp in self.warps) < self.chip.queue_room

    def admits(self, warp: Asker) -> bool:
        """Whether a waiting warp has the room: who is amid a GEMM goes first, then who has waited longest."""
        return self.room and warp is (self.issuer if self.issuer in self.waiting else self.waiting[0])

    def ready_at(self) -> int | None:
        """When the tensor cores can serve the next k step; None while all queues are empty."""
        issued = [warp.queue[0].issued for warp in self.warps if warp.queue]
        return max(min(issued), self.tensor.free) if issued else None

    def advance(self) -> None:
        """Serve one k step."""
        now = self.ready_at()
        warp = self._arbitrate(now)
        self.owner = warp
        step = warp.queue.popleft()
        longer = step.cycles * self.crowded_q10 >> 10 if self.crowded_until > now else 0
        if self.adding_until > now:
            longer += step.cycles * self.chip.cycles.adding_q10 >> 10
        cycles = self.chip.cycles
        both_q10 = (step.nbytes << 10) + step.cycles * cycles.store_least_q10
        crowded = both_q10 > step.cycles * cycles.smem_bytes << 10
        if self.loading_until > now:
            half = step.cycles * cycles.smem_bytes >> 1
            wide = min(half, max(0, step.nbytes - half))  # operands beyond half of shared memory's rate
            more = cycles.loading_most_q10 - cycles.loading_least_q10
            longer += step.cycles * (cycles.loading_least_q10 + more * wide // half) >> 10
        elif self.pipes["STSM"].free > now and crowded:
            longer += step.cycles * cycles.storing_q10 >> 10
        elif self.moving_until > now:
            longer += step.cycles * cycles.moving_q10 >> 10
        self.tensor.take(now, step.cycles + longer)
        self.wgmma_until, self.last_served = self.tensor.free, now
        self.pending -= step.cycles
        self.pending_bytes -= step.nbytes
        self.busy["tensor cores"] += step.products
        self.chip.draw("tensor cores", warp, step.instruction, now, self.tensor.free)
        if step.ends_group:
            warp.groups_done.append(self.tensor.free + self.chip.cycles.wgmma_latency)
            self.chip.note(warp.groups_done[-1])

    def _arbitrate(self, now: int) -> Asker:
        """In order of issue, or round robin: `arbitration` k steps, then the next warp that has one to offer."""
        if self.chip.cycles.arbitration == 0:
            return min((w for w in self.warps if w.queue), key=lambda w: w.queue[0].issued)
        offering = [w for w in self.warps if w.queue and w.queue[0].issued <= now]
        self.turn += 1
        if self.owner in offering and self.turn <= self.chip.cycles.arbitration:
            return self.owner
        self.turn = 1
        behind = self.owner.order if self.owner else (0, -1)
        return min(offering, key=lambda w: (w.order <= behind, w.order))
