"""Random schedules, machines and memories: what the engine, the interpreter and the checker are compared on."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from fasim.simulator.code.estimate import Estimate
from fasim.simulator.code.phase import Phase
from fasim.simulator.code.softmax import ONLINE, RUNNING
from fasim.simulator.devices.device import Device, load_device
from fasim.simulator.language.check import IllegalProgram, check
from fasim.simulator.language.program import Program, trace
from fasim.simulator.problem.tile import Tile
from fasim.simulator.problem.workload import Workload
from fasim.simulator.replay.engine import Memory
from fasim.simulator.schedules import Kernel

H200 = load_device("h200")
TENSORS = ("Q", "K", "V", "O", "S", "LSE")


@dataclass(frozen=True)
class Shape:
    """What a random schedule is made of; `seed` decides the order in which its warps speak the verbs."""

    consumers: int
    stages: int
    producer: bool  # a producer warp loads by TMA; else the consumers load by cp.async
    asynchronous: bool  # GEMMs by WGMMA, else by mma.sync
    baton: bool
    persistent: bool
    staged_output: bool  # O is staged over V, and the producer waits for it
    cluster: int
    loops: tuple[int, ...]  # K/V blocks of each tile
    seed: int
    forget: float = 0.0  # chance that a verb that keeps the schedule legal is left out


class RandomSchedule:
    """A schedule function: the same Shape always says the same verbs."""

    __name__ = "random"

    def __init__(self, shape: Shape):
        self.shape = shape
        self.turns = random.Random(shape.seed)

    def __call__(self, cta, tile) -> None:
        shape = self.shape
        rings = {name: cta.ring(name, getattr(tile, f"{name.lower()}_bytes"), tile.stages) for name in ("K", "V")}
        rings["Q"] = cta.ring("Q", tile.q_bytes, stages=1)
        staged = cta.ring("O", tile.o_bytes, 1, over=rings["V"]) if shape.producer and shape.staged_output else None
        turn = cta.baton() if shape.baton else None
        meeting = cta.meeting() if staged is not None else None
        order = self._order(tile)
        turns = [self.turns.randint(0, tile.stages) for _ in range(self.turns.randint(0, 4))] if turn else []
        if shape.producer:
            self._produce(cta.producer(), rings, staged, order)
        for warps in cta.consumers():
            self._consume(warps, rings, staged, turn, turns, order, tile, meeting)

    def _order(self, tile) -> list[tuple[str, int]]:
        """The order in which K and V blocks are loaded and read: each ring's own, one at most its stages ahead."""
        order, done = [], {"K": 0, "V": 0}
        while left := [name for name in done if done[name] < tile.loop]:
            name = self.turns.choice(left)
            order.append((name, done[name]))
            done[name] += 1
        return order

    def _says(self) -> bool:
        return self.turns.random() >= self.shape.forget

    def _produce(self, load, rings, staged, order) -> None:
        load.tma(rings["Q"][0])
        if staged is not None and self._says():
            load.reclaim(staged[0])
        for name, j in order:
            load.tma(rings[name][j])

    def _consume(self, warps, rings, staged, turn, turns, order, tile, meeting) -> None:
        consumer = Consumer(self, warps, rings, order, tile)
        for gemms in turns:
            consumer.work(self.turns.randint(0, 3), reads=False)
            if self._says():
                consumer.let_go()
            warps.take(turn)
            for _ in range(gemms):
                consumer.gemm()
                consumer.work(self.turns.randint(0, 2), reads=False)
            if self._says():
                warps.give(turn)
        consumer.finish()
        if meeting is not None and self._says():
            warps.meet(meeting)
        own = consumer.own if self.turns.random() < 0.5 else None
        over = staged[0] if staged is not None and self._says() else None
        for name in ("S", "LSE", "O")[self.turns.randint(0, 2) :]:
            warps.store(name, slot=None if name != "O" else over or (own and own[warps]))


class Consumer:
    """One consumer's way through the blocks: which GEMM, wait, free or arithmetic comes next is drawn."""

    def __init__(self, schedule: RandomSchedule, warps, rings, order, tile):
        self.shape, self.turns, self.says = schedule.shape, schedule.turns, schedule._says
        self.warps, self.rings, self.tile = warps, rings, tile
        self.order = deque(order)  # blocks not yet read
        self.asked = {"K": 0, "V": 0}  # blocks loaded, where the consumers load themselves
        self.begun = {"K": 0, "V": 0}  # blocks whose GEMM has been issued
        self.pending: deque = deque()  # (ring, j, result) in order of issue
        self.read: deque = deque()  # (ring, j) waited for, not yet freed
        self.own = warps.cta.staging("O", tile.stage_bytes)
        if not self.shape.producer:
            warps.cp_async(rings["Q"][0])
        warps.wait(rings["Q"][0])

    def work(self, count: int, reads: bool = True) -> None:
        """Some verbs in any order."""
        for _ in range(count):
            self.turns.choice(([self.gemm] * 2 if reads else []) + [self._wait, self._free, self._arithmetic])()

    def finish(self) -> None:
        """The blocks that are left, and everything given back."""
        while self.order:
            self.work(1)
        self.let_go()
        self.warps.free(self.rings["Q"][0])
        if self.turns.random() < 0.5:
            self.warps.normalize()

    def let_go(self) -> None:
        """Wait for every GEMM and free every block."""
        while self.pending and self.says():
            self._wait()
        while self.read:
            self._free()

    def gemm(self) -> None:
        """The next block's GEMM, once this warp holds fewer blocks of the ring than it has stages."""
        if not self.order:
            return
        name, j = self.order.popleft()
        while self._held(name) >= self.tile.stages and self.says():
            self._give_back(name)
        if not self.shape.producer:
            while self.asked[name] <= j:
                self._load(name)
            ahead = self.asked[name] < self.tile.loop and self._held(name) + 1 < self.tile.stages
            if ahead and self.turns.random() < 0.5:
                self._load(name)
        product = ("S", self.rings["Q"][0]) if name == "K" else ("O", "P")
        if self.shape.asynchronous:
            self.pending.append((name, j, self.warps.gemm(*product, self.rings[name][j], add=name == "V")))
        else:
            self.warps.mma(*product, self.rings[name][j], add=name == "V")
            self.read.append((name, j))
        self.begun[name] += 1

    def _load(self, name: str) -> None:
        self.warps.cp_async(self.rings[name][self.asked[name]])
        self.asked[name] += 1

    def _held(self, name: str) -> int:
        """Blocks of a ring that are asked for and not freed."""
        ahead = max(0, self.asked[name] - self.begun[name])
        return ahead + sum(entry[0] == name for entry in (*self.pending, *self.read))

    def _give_back(self, name: str) -> None:
        while not any(entry[0] == name for entry in self.read):
            self._wait()
        while any(entry[0] == name for entry in self.read):
            self._free()

    def _wait(self) -> None:
        """For some pending GEMM, and so for all before it."""
        if self.pending:
            last = self.turns.randrange(len(self.pending))
            self.warps.wait(self.pending[last][2])
            for _ in range(last + 1):
                self.read.append(self.pending.popleft()[:2])

    def _free(self) -> None:
        if self.read:
            name, j = self.read.popleft()
            if self.says():
                self.warps.free(self.rings[name][j])

    def _arithmetic(self) -> None:
        """Softmax of a block whose scores are there, and whose P no PV in flight reads; what it has left under no PV."""
        j = self.turns.randrange(max(1, self.begun["K"]))
        verbs = ["compute"]
        products = [entry[1] for entry in self.pending if entry[0] == "V"]
        sets = self.warps.cta.code.operand_sets
        if not self.says() or not any(entry[:2] == ("K", j) for entry in self.pending):
            if not self.says() or sets == 1 or all((j - other) % sets for other in products):
                verbs.append("softmax")
            if not self.says() or not products:
                verbs.append("rescale")
        verb = self.turns.choice(verbs)
        if verb != "compute":
            getattr(self.warps, verb)(j)
            return
        pipes = ("fma", "alu", "mufu", "convert", "other", "stsm", "matrices")
        chain = ("latencies", "fetched", "votes", "divisions", "stalls")
        counts = {name: self.turns.randint(0, 6) for name in pipes + chain}
        counts |= {name: self.turns.random() < 0.5 for name in ("interleaved", "goes_on", "own")}
        self.warps.compute("anything", Phase(**counts, chunks=self.turns.randint(1, 5)), j)


@st.composite
def shapes(draw, forget: float = 0.0) -> Shape:
    producer = draw(st.booleans())
    return Shape(
        consumers=draw(st.integers(1, 3)),
        stages=draw(st.integers(1, 3)),
        producer=producer,
        asynchronous=draw(st.booleans()) or draw(st.booleans()),
        baton=draw(st.booleans()),
        persistent=draw(st.booleans()),
        staged_output=draw(st.booleans()),
        cluster=draw(st.sampled_from((1, 1, 2))) if producer else 1,
        loops=tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))),
        seed=draw(st.integers(0, 2**32)),
        forget=forget,
    )


def record(shape: Shape) -> Program:
    """The program of a random schedule, over all of its tiles."""
    dtype, causal = ("fp16", "e4m3")[shape.seed // 2 % 2], shape.seed // 8 % 2 == 1
    workload = Workload(1, 1, 256, (64, 128)[shape.seed % 2], dtype, causal)
    tile = Tile(64 * shape.consumers, (32, 48, 80)[shape.seed % 3], shape.stages, shape.consumers, shape.cluster)
    softmax = (ONLINE, RUNNING)[shape.seed // 4 % 2]
    kernel = Kernel(RandomSchedule(shape), "rows", persistent=shape.persistent, code=Estimate(softmax, shape.persistent))
    return trace(kernel, workload, tile, [(loop, loop // 2) for loop in shape.loops])


@st.composite
def devices(draw) -> Device:
    """An H200 whose arbitration, queue, interference, latencies and rates are anything within reason."""
    cycles = st.integers(0, 200)
    return replace(
        H200,
        wgmma_queue_ksteps=draw(st.integers(1, 8)),
        wgmma_arbitration_ksteps=draw(st.integers(0, 4)),
        issue_beside_wgmma_cycles=draw(st.sampled_from((0.0, 1.97, 4.0))),
        fma_beside_wgmma_cycles=draw(st.sampled_from((0.0, 1.63, 5.0))),
        alu_beside_wgmma_cycles=draw(st.sampled_from((0.0, 4.54, 9.0))),
        mufu_beside_wgmma_cycles=draw(st.sampled_from((0.0, 8.83, 20.0))),
        store_beside_most=draw(st.sampled_from((20.0, 41.0, 128.0))),
        store_beside_least=draw(st.sampled_from((5.0, 21.0, 128.0))),
        matrix_beside_most=draw(st.sampled_from((20.0, 67.0, 128.0))),
        matrix_beside_more=draw(st.sampled_from((0.0, 15.0, 90.0))),
        load_beside_cycles=draw(st.integers(0, 60)),
        load_interference_least=draw(st.sampled_from((0.0, 0.17, 0.5))),
        load_interference_most=draw(st.sampled_from((0.0, 0.39, 0.8))),
        store_interference=draw(st.sampled_from((0.0, 0.2, 0.7))),
        matrix_interference=draw(st.sampled_from((0.0, 0.1, 0.5))),
        red_interference=draw(st.sampled_from((0.0, 0.33, 0.8))),
        wgmma_register_share=draw(st.sampled_from((0.0, 0.77, 1.0))),
        wgmma_issue_cycles=draw(cycles),
        wgmma_step_issue_cycles=draw(st.integers(0, 100)),
        wgmma_step_issue_share=draw(st.sampled_from((0.0, 0.2, 1.0))),
        branch_cycles=draw(st.integers(0, 60)),
        branch_beside_cycles=draw(st.integers(0, 60)),
        chain_dilation=draw(st.sampled_from((0.0, 0.23, 1.0))),
        mbarrier_issue_cycles=draw(st.integers(0, 60)),
        wgmma_beside_cycles=draw(cycles),
        wgmma_latency_cycles=draw(cycles),
        named_barrier_cycles=draw(st.integers(1, 60)),
        mbarrier_arrive_cycles=draw(st.integers(1, 60)),
        mbarrier_wait_cycles=draw(st.integers(1, 60)),
        cluster_arrive_cycles=draw(cycles),
        tma_issue_cycles=draw(cycles),
        tma_store_latency_cycles=draw(cycles),
        tma_store_bytes_per_cycle=draw(st.sampled_from((8.0, 32.0))),
        l2_hit_latency_cycles=draw(st.integers(1, 500)),
        mufu_spacing_cycles=draw(st.integers(4, 12)),
        setup_cycles=draw(cycles),
        issue_per_cycle=draw(st.integers(1, 2)),
    )


@st.composite
def memories(draw) -> Memory:
    """Bandwidths and the share of each tensor's bytes that HBM moves."""
    share = st.sampled_from((0.0, 0.1, 0.5, 1.0))
    return Memory(
        l2=draw(st.sampled_from((5.0, 37.3, 500.0))),
        hbm=draw(st.sampled_from((2.0, 18.0, 100.0))),
        read_miss={name: draw(share) for name in TENSORS},
        write_through={name: draw(share) for name in TENSORS},
        read_late={name: draw(share) for name in TENSORS if draw(st.booleans())},
    )


@st.composite
def placements(draw) -> tuple[int, ...]:
    """SMs of one to four CTA slots; SM 0 always has one."""
    return (0, *draw(st.lists(st.integers(0, 2), max_size=3)))


def is_legal(program: Program) -> bool:
    """Whether check() lets it pass."""
    try:
        check(program)
    except IllegalProgram:
        return False
    return True


@dataclass(frozen=True)
class Scene:
    """Everything a replay needs."""

    shapes: tuple[Shape, ...]
    device: Device
    memory: Memory
    placement: tuple[int, ...]
    eight_bit: bool

    @property
    def programs(self) -> list[Program]:
        """One per CTA slot, the shapes in turn."""
        recorded = [record(shape) for shape in self.shapes]
        return [recorded[slot % len(recorded)] for slot in range(len(self.placement))]


@st.composite
def scenes(draw) -> Scene:
    """Legal programs on one to four CTA slots of up to three SMs."""
    return Scene(
        shapes=tuple(draw(st.lists(shapes().filter(lambda s: is_legal(record(s))), min_size=1, max_size=2))),
        device=draw(devices()),
        memory=draw(memories()),
        placement=draw(placements()),
        eight_bit=draw(st.booleans()),
    )
