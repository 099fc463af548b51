"""A schedule read from a compiled kernel: the order of its main loop, block by block, and the code between.

The loop runs ahead of itself, so a tile's first and last blocks are turns of which only a part is done. What a tile begins and
ends with, and the loads, are as in our own kernels for Hopper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..code.phase import Phase
from ..code.pipeline import Block, Pipeline, Step
from ..errors import UsageError
from ..problem.tile import Tile

LOOK = Phase(latencies=1, goes_on=True)
"""What an mbarrier that is tried takes longer than a named barrier: 51 cycles, not 22 (`chains`, `launch`)."""
ASSUMED_STAGES = 2
"""Of a ring where machine code does not say."""


def tile_of(pipeline: Pipeline, name: str) -> Tile:
    """The tile of a compiled kernel. Clusters of two are assumed where loads are multicast, and stages that cannot be read."""
    if not pipeline.consumers:
        raise UsageError(f"{name}: how many consumer warpgroups a CTA has cannot be read: give --tile")
    stages, cluster = pipeline.stages or ASSUMED_STAGES, 2 if pipeline.multicast else 1
    return Tile(pipeline.rows * pipeline.consumers, pipeline.block_n, stages, pipeline.consumers, cluster)


def body_of(pipeline: Pipeline) -> Callable:
    """The schedule function of a compiled kernel."""

    def compiled_order(cta, tile):
        _Order(pipeline, cta, tile).record()

    return compiled_order


class _Order:
    def __init__(self, pipeline: Pipeline, cta, tile):
        self.pipeline, self.cta, self.tile = pipeline, cta, tile
        self.last = tile.kv_blocks[-1]
        self.loaded = {"K": cta.ring("K", tile.k_bytes, tile.stages), "V": cta.ring("V", tile.v_bytes, tile.stages)}
        self.rings = dict(self.loaded)
        if pipeline.transposes:
            self.rings["V"] = cta.exchange("V^T", tile.v_bytes, tile.stages)
        if pipeline.loads != "producer":
            self.Q, self.O = cta.ring("Q", tile.q_bytes, stages=1), None
        elif pipeline.meets:  # O goes out over V, as in FlashAttention-3
            self.Q, self.O = cta.ring("Q", tile.q_bytes, stages=1), cta.ring("O", tile.o_bytes, stages=1, over=self.rings["V"])
        else:
            self.Q = cta.private("Q", tile.q_bytes)
            self.O = self.Q if pipeline.o_by_q else cta.staging("O", tile.stage_bytes)
        self.P = None if pipeline.weights_in_registers else cta.outbox("P", tile.nbytes("P"))
        self.turn = cta.baton(first=0) if pipeline.takes_turns else None
        self.meets = any(step.what == "meet" for step in pipeline.blocks[0].steps)

    def record(self) -> None:
        """All warps of a tile."""
        if self.pipeline.loads != "producer":
            self._record_alone()
            return
        self._load()
        for wg in self.cta.consumers():
            self._consume(wg)
            wg.normalize()
            if self.pipeline.meets:
                wg.store("LSE")
                wg.meet(self.cta.meeting())
                wg.store("O", slot=self.O[0])
            else:
                wg.store("O", slot=self.O[wg])
                wg.store("LSE")

    def _load(self) -> None:
        """The producer's loads, and what others make of them: K before Q where O goes out over V, as FlashAttention-3 has it, and
        there V before K where it is transposed on its way."""
        load, meets, transposes = self.cta.producer(), self.pipeline.meets, self.pipeline.transposes
        fills_v = self.cta.transposers() if transposes else load
        blocks = list(self._loads())
        if meets and transposes:
            blocks = [(ring, j) for j in range(self.last + 1) for ring in "VK"]
        before_q = 1 + transposes if meets else 0
        for ring, j in blocks[:before_q]:
            load.tma(self.loaded[ring][j])
        for slot in [self.Q[0]] if meets else [self.Q[wg] for wg in self.cta.consumers()]:
            load.tma(slot)
        if meets:
            fills_v.reclaim(self.O[0])
        for ring, j in blocks[before_q:]:
            load.tma(self.loaded[ring][j])
        for j in range(self.last + 1) if transposes else ():
            fills_v.transpose(self.loaded["V"][j], self.rings["V"][j])

    def _record_alone(self) -> None:
        """A tile of warps that load for themselves."""
        for wg in self.cta.consumers():
            if self.pipeline.before:
                Whole(self, wg).record()
            else:
                self.load(wg, self.Q[0])
                for ring, j in self.asked_first(0):
                    self.load(wg, self.rings[ring][j])
                self._consume(wg)
            wg.normalize()
            wg.store("LSE")
            wg.store("O")

    def asked_first(self, first: int) -> list[tuple[str, int]]:
        """The blocks that are asked for before the walk that begins with this one."""
        steps = self.pipeline.blocks[0].steps
        ahead = {ring: max([-step.lag for step in steps if (step.what, step.tensor) == ("load", ring)], default=0) for ring in "KV"}
        turns = range(first, first + max(ahead.values()))
        return [(ring, j) for j in turns for ring in "KV" if self.is_there(j) and j < first + ahead[ring]]

    def load(self, wg, slot) -> None:
        """One of the warps for all by TMA, each its part by cp.async."""
        if self.pipeline.loads == "cp_async":
            wg.cp_async(slot)
        elif wg.rank == 0:
            wg.tma(slot)

    def q(self, wg):
        """Where a consumer's part of Q lies."""
        return self.Q[0] if self.pipeline.meets or self.pipeline.loads != "producer" else self.Q[wg]

    def _turns(self):
        """(turn of the loop, its steps) of a tile, with the first and the last, of which only a part is done."""
        blocks = self.pipeline.blocks
        for turn in range(self.last + 1 + self.pipeline.lag):
            yield turn, blocks[(turn - 1) % len(blocks)]

    def _loads(self):
        """K and V in the order in which a consumer reads them."""
        for turn, block in self._turns():
            for step in block.steps:
                if step.what in ("scores", "values") and self.is_there(turn - step.lag):
                    yield step.tensor, turn - step.lag

    def is_there(self, j: int) -> bool:
        """Whether the tile has such a block."""
        return 0 <= j <= self.last

    def _consume(self, wg) -> None:
        turns = [step.what for step in self.pipeline.blocks[0].steps if step.what in ("take", "give")]
        holds = turns[:1] == ["give"]  # the turn goes with a warp from one block to the next
        wg.wait(self.q(wg))
        if holds:
            wg.take(self.turn)
        consumer = _Consumer(self, wg)
        for turn, block in self._turns():
            consumer.walk(turn, block)
        if holds:
            wg.give(self.turn)


class _Consumer:
    """One consumer in a tile: what its GEMMs will produce, what it has waited for, and whose softmax has begun."""

    def __init__(self, order: _Order, wg):
        self.order, self.wg = order, wg
        self.results, self.loaded, self.begun, self.put = {}, set(), set(), set()

    def walk(self, turn: int, block: Block) -> None:
        """One turn of the loop, or the part of it that is about blocks there are."""
        is_there, whole = self.order.is_there, self._is_whole(turn, block)
        for gap, step in zip(block.gaps, block.steps, strict=True):
            if step.what in ("take", "give", "meet"):
                if whole:
                    getattr(self.wg, step.what)(self.order.turn or self.order.cta.meeting())
                    if step.what == "take" and self.order.pipeline.turns_by_mbarrier:
                        self._run([LOOK], "take turn", turn)
            elif step.what in ("address", "descriptors"):
                if is_there(turn - step.lag) or is_there(turn):
                    self._run(step.phases, "address", turn)
            elif is_there(turn - step.lag):
                self._step(step, gap, turn - step.lag)
        if turn in self.begun:
            self._weights(turn)

    def _is_whole(self, turn: int, block: Block) -> bool:
        """Whether there is a softmax for all warps to put under products: not while a tile begins or ends."""
        return all(self.order.is_there(turn - step.lag) for step in block.steps if step.what in ("softmax", "values"))

    def _weights(self, j: int):
        """P of block j as an operand: in registers, or put into shared memory behind its softmax."""
        if self.order.P is None:
            return "P"
        slot = self.order.P[self.wg, j]
        if j not in self.put:
            self.put.add(j)
            self.wg.put("P", slot)
            self.wg.wait(slot)
        return slot

    def _step(self, step: Step, gap: int, j: int) -> None:
        wg, slot = self.wg, self.order.rings[step.tensor][j] if step.tensor in self.order.rings else None
        if step.what == "softmax":
            self._softmax(gap, j)
        elif step.what == "load":
            self._load(step.tensor, j)
        elif step.what == "wait":
            wg.wait(slot)
            self.loaded.add((step.tensor, j))
        elif step.what in ("scores", "values") and self.order.pipeline.synchronous:
            into, left = ("S", self.order.q(wg)) if step.what == "scores" else ("O", "P")
            wg.mma(into, left, slot, add=into == "O", loaded=(step.tensor, j) in self.loaded)
        elif step.what == "scores":
            self.results["K", j] = wg.gemm("S", self.order.q(wg), slot, loaded=("K", j) in self.loaded)
        elif step.what == "values":
            self.results["V", j] = wg.gemm("O", self._weights(j), slot, add=True, loaded=("V", j) in self.loaded)
        elif step.what == "finished":
            wg.wait(self.results[step.tensor, j])
            if step.tensor == "V" and self.order.P is not None:
                wg.free(self.order.P[wg, j])
        else:
            wg.free(slot)
            if step.tensor == "K" and j == self.order.last and not self.order.pipeline.o_by_q:
                wg.free(self.order.q(wg))

    def _load(self, ring: str, j: int) -> None:
        self.order.load(self.wg, self.order.rings[ring][j])

    def _softmax(self, gap: int, j: int) -> None:
        pen, tile, is_first = self.wg.pen, self.order.tile, j not in self.begun
        self.begun.add(j)
        if not pen.begins(tile, j):
            self._run(pen.softmax(tile, j, gap, is_first), "softmax", j)
        elif is_first:
            self._run(pen.first(tile, j), "softmax", j)

    def _run(self, phases, label: str, j: int) -> None:
        for phase in phases:
            self.wg.compute(label, phase, j)


class Whole(_Consumer):
    """A consumer that loads for itself, in a tile whose code before, between and behind its loops was read too.

    A loop over blocks with a mask is another walk: nothing of it is asked for in the walk before. Where products run a block late
    the last V is asked for when the loop is over. That such a loop begins with a product of zeros is left out.
    """

    def __init__(self, order: _Order, wg):
        super().__init__(order, wg)
        steps = order.pipeline.blocks[0].steps
        self.late = {"K": 0, "V": next(step.lag for step in steps if step.what == "values")}
        self.late["V"] -= next(step.lag for step in steps if step.what == "scores")
        self.turn, self.running, self.asked, self.done = 0, [], set(), set()
        self.two_walks = bool(order.pipeline.between)

    def record(self) -> None:
        """The tile."""
        order, pipeline = self.order, self.order.pipeline
        self._once(pipeline.before, [("Q", 0), *self._first(0)])
        for self.turn in range(order.last + 1):
            if self.turn and self._walk_of(self.turn) != self._walk_of(self.turn - 1):
                self._once(pipeline.between, self._first(self.turn))
            if self.turn == 0:
                self.wg.wait(order.Q[0])
            self.walk(self.turn, pipeline.blocks[(self.turn - 1) % len(pipeline.blocks)])
        self.turn += 1
        self._once(pipeline.after, [("V", order.last)] if self.late["V"] else [])
        self._finish()

    def _is_whole(self, turn: int, block: Block) -> bool:
        return True

    def _step(self, step: Step, gap: int, j: int) -> None:
        product = step.tensor, j
        if step.what in ("finished", "free") and product in self.done:
            return
        super()._step(step, gap, j)
        if step.what in ("scores", "values"):
            self.running.append(product)
        elif step.what == "finished":
            self.running.remove(product)

    def _first(self, turn: int) -> list[tuple[str, int]]:
        """What a walk that begins with this turn asks for at first: what its first turns need."""
        ahead = len({j for _, j in self.order.asked_first(turn)})
        turns = [at for at in range(turn, turn + ahead) if self._walk_of(at) == self._walk_of(turn)]
        wanted = [(ring, at - self.late[ring]) for at in turns for ring in "KV"]
        return [(ring, j) for ring, j in wanted if self.order.is_there(j)]

    def _walk_of(self, turn: int) -> int:
        """0 for the blocks with a mask, 1 for the rest, 2 behind the loops; 1 throughout where there is one walk."""
        if turn > self.order.last:
            return 2
        return int(not (self.two_walks and self.order.tile.is_masked(turn)))

    def _load(self, ring: str, j: int) -> None:
        if self._walk_of(j + self.late[ring]) == self._walk_of(self.turn) and (ring, j) not in self.asked:
            self.asked.add((ring, j))
            super()._load(ring, j)

    def _once(self, steps: Sequence[Step], wanted: list[tuple[str, int]]) -> None:
        """Code that runs once, with its loads in its order; what of them it has no place for comes last."""
        label = "begin" if self.turn == 0 else "next walk" if self.turn <= self.order.last else "end"
        for place, step in enumerate(steps):
            if step.what == "once":
                self._run(self.wg.pen.once(step, is_first=not any(each.code for each in steps[:place])), label, self.turn)
            elif step.what == "meet":
                self.wg.meet(self.order.cta.meeting())
            elif step.what == "load" and wanted:
                self._ask(*wanted.pop(0))
            elif step.what == "wait" and self.turn == 0 and ("Q", 0) not in wanted:
                self.wg.wait(self.order.Q[0])
            elif step.what == "values" and self.turn > self.order.last:
                while wanted:
                    self._ask(*wanted.pop(0))
                self._last_product()
            elif step.what == "finished":
                self._finish()
        for each in wanted:
            self._ask(*each)

    def _ask(self, ring: str, j: int) -> None:
        if ring == "Q":
            self.order.load(self.wg, self.order.Q[0])
        elif (ring, j) not in self.asked:
            self.asked.add((ring, j))
            super()._load(ring, j)

    def _last_product(self) -> None:
        slot = self.order.rings["V"][self.order.last]
        self.wg.wait(slot)
        self.results["V", self.order.last] = self.wg.gemm("O", self._weights(self.order.last), slot, add=True, loaded=True)
        self.running.append(("V", self.order.last))

    def _finish(self) -> None:
        """Wait for all products that run, and hand back what they read."""
        while self.running:
            ring, j = self.running.pop(0)
            self.wg.wait(self.results[ring, j])
            self.done.add((ring, j))
            self.wg.free(self.order.rings[ring][j])
