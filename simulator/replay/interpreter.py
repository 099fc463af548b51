"""Interpreter: the instruction set in plain Python, slow and readable; engine.py must give the same spans, bit for bit.

An instruction is a method of Warp that returns the cycle at which it is done. Where time passes within, it is a
generator: it yields the cycle at which it goes on, or a condition that has to hold first. Whoever is earliest moves
next; in a tie the first warp, then the first tensor core.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import numpy as np

from ..devices.device import Device
from ..language.ops import BarrierKind, Op
from ..language.program import Program
from ..results.run import SPAN, Lane
from .machine import UNITS, Deadlock, Memory, Replay, unit_lanes
from .sm import PIPES, Asker, Barrier, Chip, Instruction, Sm, ceil, paced

Step = int | Callable[[], bool]


class Warp(Asker):
    """One warp role, executing its stream: a method per instruction, a `yield` wherever time passes."""

    def __init__(self, sm: Sm, number: int, program: Program, stream: int, barriers: list[Barrier], ends: np.ndarray):
        self.sm, self.chip, self.order = sm, sm.chip, (0, number)
        self.program, self.name = program, program.warps[stream]
        self.code = [Instruction(*row) for row in program.stream(stream).tolist()]
        self.phases, self.gemms, self.copies = (
            [SimpleNamespace(**dict(zip(table.dtype.names, row, strict=True))) for row in table.tolist()]
            for table in (program.phases, program.gemms, program.copies)
        )
        self.stream, self.barriers, self.tile_ends = stream, barriers, ends
        self.lane = 0
        self.at = self.time = 0
        self.condition: Callable[[], bool] | None = None
        self.queue: deque[SimpleNamespace] = deque()
        self.groups = 0
        self.groups_done: list[int] = []
        self.store_done = self.turn_since = 0
        self.steps = self._run()
        sm.warps.append(self)

    def ready_at(self) -> int | None:
        """When the warp goes on; None while it is blocked or has finished."""
        blocked = self.condition is not None and not self.condition()
        return None if blocked or self.at == len(self.code) else self.time

    def advance(self) -> None:
        """On to the next point where time passes."""
        self.condition = None
        step = next(self.steps)
        if callable(step):
            self.condition = step
        else:
            self.time = step
            self.chip.note(step)

    def describe(self) -> str:
        """The instruction it is at, as a schedule would say it."""
        return self.program.describe(self.program.stream(self.stream)[self.at])

    def _run(self) -> Iterator[Step]:
        now = 0
        while self.at < len(self.code):
            ins = self.code[self.at]
            done = getattr(self, Op(ins.op).name.lower())(ins, now)
            now = done if isinstance(done, int) else (yield from done)
            self.at += 1
            self._tile_goes_on(ins, max(now, self.store_done) if self.at == len(self.code) else now)
            yield now

    def _tile_goes_on(self, ins: Instruction, until: int) -> None:
        self.tile_ends[ins.tile] = max(self.tile_ends[ins.tile], until)

    def setup(self, ins: Instruction, now: int) -> int:
        """The prologue of a CTA."""
        self.chip.draw("", self, ins, now, now + self.chip.cycles.setup)
        return now + self.chip.cycles.setup

    def draw(self, ins: Instruction, now: int) -> int:
        """The next number of a queue in memory: there and back."""
        return now + self.chip.cycles.draw_latency

    def compute(self, ins: Instruction, now: int) -> Iterator[Step]:
        """Chunk by chunk: all instructions pass the issue port; each pipe works through its own."""
        cycles, sm, phase = self.chip.cycles, self.sm, self.phases[ins.record]
        moved = phase.stsm + phase.loads + phase.matrices
        counts = dict(zip(PIPES, (phase.fma, phase.alu, phase.mufu, phase.convert, moved), strict=True))
        instructions = sum(counts.values()) + phase.other
        mufu = cycles.mufu if phase.interleaved else cycles.mufu_spacing
        held = {"FMA": cycles.fma, "ALU": cycles.alu, "MUFU": mufu, "convert": cycles.convert, "STSM": cycles.stsm}
        issue_q10 = instructions * cycles.issue_beside_q10  # which a slow pipe beside WGMMA does not hide
        beside_q10 = {
            "FMA": counts["FMA"] * cycles.fma_beside_q10,
            "ALU": counts["ALU"] * cycles.alu_beside_q10 + issue_q10,
            "MUFU": counts["MUFU"] * cycles.mufu_beside_q10 + issue_q10,
            "convert": counts["convert"] * cycles.alu_beside_q10 + issue_q10,
        }
        row_q10 = cycles.stsm * cycles.smem_bytes << 10
        fma_run = phase.fma > 0 == phase.alu + phase.mufu + phase.convert + phase.interleaved
        began = now
        for chunk in range(phase.chunks):
            beside_q10["STSM"] = phase.stsm * row_q10 // sm.left_for_stores_q10() + phase.loads * cycles.load_beside << 10
            if phase.matrices:
                beside_q10["STSM"] += (phase.matrices * row_q10 // sm.left_for_matrices_q10() << 10) + issue_q10
            begin = end = max(now, sm.issue.free) if instructions else now  # a chain of latencies alone passes no port
            until, beside = sm.tensor_busy_until(now), sm.in_arithmetic(now)
            if instructions:
                slow = (instructions * cycles.fma_beside_q10 if fma_run else issue_q10) >> 10
                sm.issue.take(begin, paced(ceil(instructions, cycles.issue_rate), slow, begin, until))
                sm.busy["issue"] += instructions
                end = sm.issue.free
            for name, pipe in sm.pipes.items():
                if not counts[name]:
                    continue
                start = max(begin, pipe.free)
                pipe.take(start, paced(counts[name] * held[name], beside_q10[name] >> 10, start, until))
                if not (phase.loads and phase.goes_on):  # loads that nothing waits for yet come meanwhile
                    end = max(end, pipe.free)
                if name == "STSM" and phase.matrices:
                    sm.moving_until = pipe.free
                if name == "STSM" and phase.loads:
                    sm.loading_until = pipe.free
                held_for = {"MUFU": cycles.mufu, "STSM": cycles.stsm * cycles.smem_bytes}.get(name, held[name])
                sm.busy[{"convert": "ALU", "STSM": "smem bytes"}.get(name, name)] += counts[name] * held_for
                if name in UNITS:
                    self.chip.draw(name, self, ins, start, pipe.free)
            reading = instructions - phase.other - moved
            if reading and begin < until and (phase.mufu or not phase.interleaved):
                sm.crowd(begin, end, reading)
            if chunk + 1 == phase.chunks and not phase.goes_on:
                end += cycles.mufu_latency if counts["MUFU"] else cycles.dependent
            end = max(end, begin + phase.stalls)
            if chunk + 1 == phase.chunks:
                chain = phase.latencies * cycles.shuffle_latency + phase.votes * cycles.vote + phase.divisions * cycles.divide
                end += chain + (chain * cycles.chain_q10 >> 10 if beside else 0)
                end += phase.branches * (cycles.branch_beside if beside else cycles.branch)
                end = self._fetched(ins, phase, began, end)
            self.chip.draw("", self, ins, now, end)
            if chunk + 1 < phase.chunks:
                yield end
            now = end
        return now

    def _fetched(self, ins: Instruction, phase: SimpleNamespace, began: int, end: int) -> int:
        """When a phase that has its results at `end` has had its code too; who comes first fetches it for all."""
        cycles, chip = self.chip.cycles, self.chip
        code, cta = (ins.tile, ins.step), id(self.barriers)
        lost, copy = (cta, self.program.labels[ins.label]), (cta, ins.record)
        home = (self.sm.number, id(self.program), "phase", ins.record)
        is_lost = phase.fetched > 0 and chip.fetched.get(lost, (-1, 0)) < code
        if is_lost:
            chip.fetched[lost] = code
        is_own = phase.own and chip.copied.get(copy, (-1, 0)) < code and ins.tile == 0
        if home not in chip.brought or is_own:  # out of L2
            chip.copied[copy] = code
            each = phase.fma + phase.alu + phase.mufu + phase.convert + phase.other + phase.stsm + phase.loads + phase.matrices
            came = began + (each * phase.chunks * cycles.cold_q10 >> 10)
            chip.brought[home] = came + (cycles.cold_latency if is_lost else 0)
        elif is_lost:
            end += cycles.fetch_latency + (phase.fetched * cycles.fetch_q10 >> 10)
        return max(end, chip.brought[home])

    def wgmma(self, ins: Instruction, now: int) -> Iterator[Step]:
        """Asynchronous: the k steps go into the SM's queue one by one, while it has room; together they are one group."""
        cycles, sm, began, gemm = self.chip.cycles, self.sm, now, self.gemms[ins.record]
        operand_bytes = 32 * (max(1, gemm.m // 64) * gemm.n + (0 if gemm.a_in_registers else gemm.m))
        products = ceil(2 * gemm.m * gemm.n * gemm.k_per_step, self.chip.tensor_rate)
        work = max(products, ceil(operand_bytes, cycles.smem_bytes))
        sm.pending += gemm.k_steps * work
        sm.pending_bytes += gemm.k_steps * operand_bytes
        sm.busy["issue"] += ins.issues
        now += cycles.wgmma_start + (cycles.wgmma_beside if sm.in_arithmetic(now) or sm.moving_until > now else 0)
        home = (sm.number, id(self.program), "gemm", ins.record)
        if home not in self.chip.brought:
            self.chip.brought[home] = now
            now += ins.issues * cycles.cold_q10 >> 10
        yield now
        for step in range(gemm.k_steps):
            if not sm.room:
                sm.waiting.append(self)
                yield lambda: sm.admits(self)
                sm.waiting.remove(self)
                now = sm.last_served
            sm.issuer = self
            last = step + 1 == gemm.k_steps
            sizes = {"cycles": work, "products": products, "nbytes": operand_bytes}
            self.queue.append(SimpleNamespace(**sizes, issued=now, ends_group=last, instruction=ins))
            sm.busy["smem bytes"] += operand_bytes
            now += max(cycles.wgmma_issue, work * cycles.wgmma_issue_q10 >> 10)
            if not last:
                yield now
        sm.issuer = None
        self.groups += 1
        self.chip.draw("", self, ins, began, now)
        return now

    def wgmma_wait(self, ins: Instruction, now: int) -> Iterator[Step]:
        """Until at most `target` groups of this warp are outstanding."""
        wanted = self.groups - ins.target
        if wanted <= 0:
            return now
        if len(self.groups_done) < wanted:
            yield lambda: len(self.groups_done) >= wanted
        return self._waited(ins, now, self.groups_done[wanted - 1])

    def mma(self, ins: Instruction, now: int) -> Iterator[Step]:
        """Synchronous: each k step's operands are read under the one before, the last one is waited for."""
        cycles, sm, gemm = self.chip.cycles, self.sm, self.gemms[ins.record]
        m, n, operand_bytes = gemm.m, gemm.n, gemm.smem_bytes
        work = ceil(2 * m * n * gemm.k_per_step * 1024, cycles.mma_flops_q10)
        for step in range(gemm.k_steps):
            sm.smem.take(now, ceil(operand_bytes, cycles.smem_bytes))
            ready = sm.smem.free + (cycles.smem_latency if step == 0 else 0)
            begin = sm.tensor.take(max(ready, sm.issue.free), work)
            sm.issue.take(begin, work + (operand_bytes // 2048 * cycles.ldmatrix_q10 >> 10))  # nothing else is issued
            sm.busy["tensor cores"] += work
            sm.busy["smem bytes"] += operand_bytes
            sm.busy["issue"] += max(1, m // 64) * (n // 8) + operand_bytes // 2048
            self.chip.draw("tensor cores", self, ins, begin, begin + work)
            end = begin if step + 1 < gemm.k_steps else begin + work + cycles.mma_latency
            self.chip.draw("", self, ins, now, end)
            now = end
            if step + 1 < gemm.k_steps:
                yield now
        return now

    def wait(self, ins: Instruction, now: int) -> Iterator[Step]:
        """Until the barrier has completed `target` generations, then what the wait itself costs."""
        cycles, barrier, target = self.chip.cycles, self.barriers[ins.barrier], ins.target
        if len(barrier.completions) < target:
            yield lambda: len(barrier.completions) >= target
        now = self._waited(ins, now, barrier.completions[target - 1] if target else 0)
        self.sm.busy["issue"] += ins.issues
        if barrier.kind == BarrierKind.NAMED:
            self.turn_since = now + cycles.named_wait
            return self.turn_since
        if barrier.kind == BarrierKind.MEETING:
            return now + cycles.named_wait
        return now + (cycles.cta_launch if barrier.kind == BarrierKind.CTA else cycles.mbarrier_wait)

    def arrive(self, ins: Instruction, now: int) -> int:
        """One arrival, on its way for as long as its kind of barrier takes; leaving a CTA waits for its stores."""
        cycles, barrier = self.chip.cycles, self.barriers[ins.barrier]
        on_the_way = {
            BarrierKind.MBARRIER: cycles.mbarrier_arrive,
            BarrierKind.NAMED: cycles.named_arrive,
            BarrierKind.MEETING: cycles.named_arrive,
            BarrierKind.CLUSTER: cycles.cluster_arrive,
            BarrierKind.CTA: max(0, self.store_done - now),
        }
        if barrier.kind == BarrierKind.NAMED:
            self.chip.draw("barriers", self, ins, self.turn_since, now)
        if barrier.kind == BarrierKind.CTA:
            self._tile_goes_on(ins, now + on_the_way[barrier.kind])
        self.sm.busy["issue"] += ins.issues
        barrier.arrive(now + on_the_way[barrier.kind])
        return now + (cycles.mbarrier_issue if barrier.kind == BarrierKind.MBARRIER else 1)

    def load(self, ins: Instruction, now: int) -> int:
        """An asynchronous copy in; it arrives on its barrier when the last byte has."""
        cycles, chip, sm, copy = self.chip.cycles, self.chip, self.sm, self.copies[ins.record]
        nbytes, shared, latency = copy.nbytes, max(1, copy.sharing), cycles.l2_latency
        if copy.by_warps:  # cp.async: each of four warps issues 16 bytes per lane, instruction after instruction
            instructions = max(1, nbytes // (4 * 32 * 16))
            sm.issue.take(now, ceil(instructions, cycles.issue_rate))
            issued = sm.issue.free
        else:
            instructions, issued = 1, now + copy.boxes * cycles.tma_issue
            latency += cycles.tma_latency
        start = max(issued, sm.load_port.free)
        missed = chip.memory.read_miss.get(tensor := self.program.tensors[copy.tensor], 0.0)
        missed_q10, late_q10 = round(1024 * missed), round(1024 * chip.memory.read_late.get(tensor, missed))
        latency += (cycles.hbm_latency - cycles.l2_latency) * late_q10 >> 10
        ends = [sm.load_port.pass_bytes(start, nbytes, cycles.port_q20)]
        ends.append(chip.l2.pass_bytes(start, nbytes // shared, cycles.l2_q20))
        if missed := nbytes * missed_q10 >> 10:
            ends.append(chip.hbm.pass_bytes(start, missed // shared, cycles.hbm_q20))
        sm.busy["issue"] += instructions
        sm.busy["TMA"] += sm.load_port.free - start
        sm.busy["smem bytes"] += nbytes
        chip.draw("TMA", self, ins, start, sm.load_port.free)
        self.barriers[ins.barrier].arrive(max(ends) + latency)
        return issued

    def store(self, ins: Instruction, now: int) -> int:
        """An asynchronous copy out."""
        cycles, chip, sm, copy = self.chip.cycles, self.chip, self.sm, self.copies[ins.record]
        start, nbytes = max(now, sm.store_port.free), copy.nbytes
        rate, latency = (cycles.store_q20, cycles.store_latency) if copy.boxes else (cycles.port_q20, cycles.smem_latency)
        through_q10 = round(1024 * chip.memory.write_through.get(self.program.tensors[copy.tensor], 1.0))
        ends = [sm.store_port.pass_bytes(start, nbytes, rate)]
        ends.append(chip.l2.pass_bytes(start, nbytes, cycles.l2_q20))
        if written := nbytes * through_q10 >> 10:
            ends.append(chip.hbm.pass_bytes(start, written, cycles.hbm_q20))
        sm.busy["smem bytes"] += nbytes
        sm.busy["issue"] += 1
        self.store_done = max(self.store_done, max(ends) + latency)
        chip.note(self.store_done)
        return now + max(1, copy.boxes * cycles.tma_issue)

    def add(self, ins: Instruction, now: int) -> int:
        """An asynchronous copy out that adds, by one bulk copy or by the warps' own instructions."""
        cycles, sm, copy = self.chip.cycles, self.sm, self.copies[ins.record]
        start, nbytes, instructions, issued = max(now, sm.store_port.free), copy.nbytes, 1, now + cycles.tma_issue
        if copy.by_warps:
            instructions = max(1, nbytes // (4 * 32 * copy.by_warps))
            sm.issue.take(now, ceil(instructions, cycles.issue_rate))
            issued = max(sm.issue.free, start)
        else:
            sm.busy["smem bytes"] += nbytes
        sm.store_port.pass_bytes(start, nbytes, max(cycles.add_q20, cycles.add_chip_q20))
        if copy.by_warps:
            sm.adding_until = sm.store_port.free
        through_l2 = self.chip.l2.pass_bytes(start, nbytes, cycles.l2_q20)
        self.store_done = max(self.store_done, max(sm.store_port.free, through_l2) + cycles.store_latency)
        sm.busy["issue"] += instructions
        self.chip.note(self.store_done)
        return issued

    def store_wait(self, ins: Instruction, now: int) -> int:
        """Until the warp's stores have left shared memory."""
        return self._waited(ins, now, self.store_done)

    def _waited(self, ins: Instruction, since: int, until: int) -> int:
        end = max(since, until)
        self.chip.draw("", self, ins, since, end, wait=1)
        return end


def interpret(
    programs: Sequence[Program],
    device: Device,
    memory: Memory,
    placement: Sequence[int] | None = None,
    eight_bit: bool = False,
) -> Replay:
    """What `engine.replay` gives with room for every span; Deadlock names every warp that is stuck, verb and buffer."""
    placement = placement or [0] * len(programs)
    chip = Chip(device, memory, eight_bit)
    sms = [Sm(chip, number) for number in range(max(placement) + 1)]
    tile_ends = np.zeros((len(programs), max(program.tiles for program in programs)), np.int64)
    warps: list[Warp] = []
    several = placement.count(0) > 1
    for slot, (program, where) in enumerate(zip(programs, placement, strict=True)):
        barriers = [Barrier(b.kind, b.expected, b.initial) for b in program.barriers]
        for text in program.labels:
            chip.labels.setdefault(text, len(chip.labels))
        for stream in range(len(program.warps)):
            warps.append(Warp(sms[where], len(warps), program, stream, barriers, tile_ends[slot]))
            if where == 0:
                warps[-1].lane = len(chip.lanes)
                chip.lanes.append(Lane(f"CTA{slot} {warps[-1].name}" if several else warps[-1].name, "warp"))
    chip.lanes += unit_lanes(programs)

    actors = [*warps, *sms]
    while ready := [(at, actor.order, actor) for actor in actors if (at := actor.ready_at()) is not None]:
        min(ready, key=lambda entry: entry[:2])[2].advance()

    stuck = [warp for warp in warps if warp.at < len(warp.code)]
    if stuck:
        raise Deadlock("; ".join(f"{w.name} is stuck at '{w.describe()}'" for w in stuck))
    busy = np.array([[sm.busy[unit] for unit in UNITS] for sm in sms], np.int64)
    spans = np.array([tuple(span) for span in chip.spans], SPAN)
    return Replay(chip.last_event, tile_ends, busy, tuple(chip.lanes), tuple(chip.labels), spans)
