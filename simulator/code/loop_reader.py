"""Loop reader: the main loop of a compiled consumer, from machine code.

A compiled loop runs ahead of itself: it issues S of one block, does the softmax of the one before, waits for P V of a third. How
far, is found by walking the loop a few times and keeping account of what its waits complete. Only points and segments of the
usual way are looked at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import replace

from ..errors import UsageError
from . import alone, once
from .pipeline import Block, Pipeline, Step
from .sass import Code, Instruction, Loop, Point, Segment, loops
from .way import usual, walked

ROUNDS = 6
"""Walks of the loop; the one before the last is in its steady state, for pipelines of four blocks at most."""
WARP = 32
WARPGROUP = 128
ROWS = 64
"""Of one WGMMA."""
_WRITES = ("STG", "RED", "REDG", "ATOMG", "UTMASTG", "UTMAREDG")
GRID = "c[0x0][0xc]"
"""Where a kernel finds how many CTAs there are."""
BARRIER = 21
"""Cycles of a barrier of a warpgroup's own warps (`chains`, H200: 20.8)."""
MBARRIER = 8
"""Bytes."""
ADDS = ("UBLKRED", "UTMAREDG", "REDG.E.ADD.F32")
"""Adds in memory: bulk copies, by tensor map, out of registers."""


def read(code: Code) -> Pipeline:
    """The main loop of a kernel's consumers. Raises UsageError, one sentence, where it cannot be understood."""
    there = loops(code)
    if adds := next((each.name for each in code.instructions if each.opcode.startswith(ADDS)), ""):
        raise UsageError(
            f"{code.name}: it adds to a sum in memory ({adds}), as a backward does with dQ, and --kernel reads forwards; predict "
            "the schedule nearest to it instead: --pass backward --schedule fa3, or lagged, cudnn, fa2"
        )
    found = [loop for loop in there if loop.scores]
    if not found and any(each.name == "HMMA" for each in code.instructions):
        return alone.by_mma(code, there)
    if not found:
        raise UsageError(
            f"{code.name}: no loop with S = Q K^T by WGMMA is in it, so its order cannot be read; "
            "predict the schedule nearest to it instead, of an attention in several kernels standard"
        )
    loads = alone.loads_of(code)
    if loads != "producer":
        found = [loop for loop in found if not any(_is_a_second_look(loop, other) for other in found)]
    ways = [_blocks(code, loop, walked(code, loop)) for loop in found]
    main = min(range(len(ways)), key=lambda each: ways[each][0].instructions)
    masked = [way[0] for way in ways if way is not ways[main] and way[0].order == ways[main][0].order]
    if any(code.instructions[number].name in _WRITES for number in usual(code, found[main])):
        raise UsageError(
            f"{code.name}: its loop writes to memory at every block, as FlashAttention-1's and a backward's do: "
            "predict fa1, or --pass backward, instead"
        )
    points = [point for point in walked(code, found[main]) if isinstance(point, Point)]
    gemms = [point for point in points if point.what == "gemm"]
    scores, values = (next(point for point in gemms if point.makes_scores == which) for which in (True, False))
    width = scores.k * scores.steps
    behind = code.instructions[found[main].end].address
    meets = loads == "producer" and any(each.address >= behind for each in _meetings(code))
    draws = any(each.name in ("ATOM", "ATOMG") for each in code.instructions)
    turns = _turns_by_mbarrier(points) if loads == "producer" else set()
    rings = [point for point in points if point.place not in turns]
    rows = ROWS if loads == "producer" else ROWS * max(1, width // values.n)
    if values.n * rows != width * ROWS or {point.m for point in gemms} != {ROWS}:
        raise UsageError(f"{code.name}: S sums over {width} values and P V makes {values.n}, which no schedule here does")
    return Pipeline(
        blocks=ways[main],
        masked=max(masked, key=lambda each: each.instructions, default=None),
        block_n=scores.n,
        head_dim=values.n,
        element_bytes=32 // scores.k,
        looks_for_maximum=_maxima(code, found[main]) >= found[main].scores // 2,
        consumers=_consumers(code),
        persistent=_is_inside(code, found[main]) and (draws or _asks_for_the_grid(code)),
        draws=draws,
        registers=code.registers if loads != "producer" else 0,
        o_by_q=loads == "producer" and not meets and _hands_back_behind_a_store(code, found[main].end),
        multicast=any("MULTICAST" in each.opcode for each in code.instructions),
        weights_in_registers=values.a_in_registers,
        meets=meets,
        stages=_stages(code, found[main], rings, loads),
        rows=rows,
        loads=loads,
        before=once.before(code, found[0]) if loads == "tma" else (),
        between=once.between(code, *found) if loads == "tma" and len(found) == 2 else (),
        after=once.after(code, found[-1]) if loads == "tma" else (),
        turns_by_mbarrier=bool(turns),
        transposes=scores.k > 16 and loads == "producer" and any(each.name == "LDSM" for each in code.instructions),
    )


def is_attention(code: Code) -> bool:
    """Whether a loop is in it that makes scores by WGMMA, or exponentials between GEMMs by mma.sync."""
    there = loops(code)
    return any(loop.scores for loop in there) or bool(alone.attention_of(code, there))


def _is_a_second_look(loop: Loop, other: Loop) -> bool:
    """Whether a "loop" is a barrier's second try, which stands behind the code of another loop and branches back into that."""
    return other.start < loop.start <= other.end < loop.end


def _stages(code: Code, loop: Loop, rings: Sequence[Point], loads: str) -> int:
    """Of a ring. Where warps load for themselves they arrive at the barriers that they wait for, so addresses say nothing."""
    counted = alone.stages_counted(code, usual(code, loop))
    if loads != "producer":
        return counted
    return alone.stages_of(rings) or counted or (alone.stages_between(rings) if any(map(_frees, rings)) else 0)


def _consumers(code: Code) -> int:
    """Warpgroups without the producer, which is there where registers are dealt between them."""
    return max(0, code.threads // WARPGROUP - any(each.name == "USETMAXREG" for each in code.instructions))


def _frees(point: Point) -> bool:
    """Whether consumers hand a place back by a named barrier: a producer's one warp is among those that meet there."""
    return point.what == "hand over" and point.threads % WARPGROUP == WARP


def _meetings(code: Code) -> list[Instruction]:
    """Where all consumers wait for one another: at one barrier of all their threads, where a turn's is another for each of them,
    by a register or one at which others only arrive."""
    barriers = [(each, *each.operands.replace(" ", "").partition(",")[::2]) for each in code.instructions if each.name == "BAR"]
    handed = {barrier for each, barrier, _ in barriers if ".ARV" in each.opcode}
    met = [(each, barrier) for each, barrier, threads in barriers if threads == hex(WARPGROUP * _consumers(code))]
    return [each for each, barrier in met if ".SYNC" in each.opcode and barrier[:2] == "0x" and barrier not in handed]


def _hands_back_behind_a_store(code: Code, end: int) -> bool:
    """Whether, behind a loop, a buffer is handed back once the tile that left it by TMA has been read."""
    names = ("UTMASTG", "DEPBAR", "SYNCS", "HGMMA", "QGMMA")
    behind = [each for each in code.instructions[end + 1 :] if each.name in names]
    at = next((place for place, each in enumerate(behind) if each.name == "UTMASTG"), len(behind))
    waited = [each.name == "DEPBAR" for each in behind[at + 1 : at + 2]]
    return any(waited) and any(".ARRIVE" in each.opcode for each in behind[at + 2 : at + 3])


def _asks_for_the_grid(code: Code) -> bool:
    return any(GRID in each.operands for each in code.instructions)


def _is_inside(code: Code, loop: Loop) -> bool:
    edges = ((code.target(at), at) for at in range(loop.end + 1, len(code.instructions)))
    return any(target is not None and target < loop.start for target, _ in edges)


def _maxima(code: Code, loop: Loop) -> int:
    return sum(code.instructions[number].name == "FMNMX" for number in usual(code, loop))


# -- which block a step is about --------------------------------------------------------------------------------------------


def _blocks(code: Code, loop: Loop, parts: Sequence[Point | Segment]) -> tuple[Block, ...]:
    """One turn of the loop, block by block."""
    own = alone.loads_of(code) != "producer"
    walker = _Alone(parts, alone.stages_counted(code, usual(code, loop))) if own else _Walker(parts)
    gemms = [part for part in parts if isinstance(part, Point) and part.what == "gemm"]
    if not own:
        walker = _Walker(parts, _turns_by_mbarrier(parts))
    if len(gemms) > 3 and all(gemm.steps == 1 for gemm in gemms):
        raise UsageError(f"{code.name}: its WGMMAs are serialised, each is waited for before the next: no schedule here does that")
    if not {"K", "V"} <= set(walker.products):
        raise UsageError(f"{code.name}: its loop does not hold both S = Q K^T and O += P V, so it cannot be read")
    rounds = [walker.walk() for _ in range(ROUNDS)]
    rounds = rounds if own else _with_waits(rounds)
    turn = rounds[-2]
    first = [number for number, step in enumerate(turn) if step.what == "scores"]
    points = [number for number, step in enumerate(turn) if not step.code]
    before = points.index(first[0])
    starts = [points[points.index(number) - before] for number in first]
    turn = turn[starts[0] :] + turn[: starts[0]]  # what comes before the first point ends the block before
    cuts = [start - starts[0] for start in starts] + [len(turn)]
    blocks = []
    for number, begin, end in zip(first, cuts, cuts[1:], strict=False):
        base = rounds[-2][number].lag
        late = len(rounds[-2]) - starts[0]  # places in `turn` of what stood before the loop's first point
        block = [
            replace(step, lag=base - step.lag - (len(first) if place >= late else 0))
            for place, step in enumerate(turn)
            if begin <= place < end
        ]
        blocks.append(_joined([replace(step, lag=0) if step.what in ("take", "give", "meet") else step for step in block]))
    if len({block.order for block in blocks}) > 1:
        raise UsageError(f"{code.name}: the blocks in its loop do not stand in one order, so it cannot be read")
    freed = {step.tensor for step in blocks[0].steps if step.what == "free"}
    if freed != {"K", "V"}:
        raise UsageError(f"{code.name}: where its loop hands K and V back cannot be read")
    return tuple(blocks)


def _joined(steps: list[Step]) -> Block:
    """Code between two points as one step, softmax where any of it is."""
    joined: list[Step] = []
    for step in steps:
        if step.what in ("scores", "values") and joined and joined[-1].what == "address":
            joined[-1] = replace(joined[-1], what="descriptors")
        if step.code and joined and joined[-1].code:
            kind = max(joined[-1], step, key=lambda each: each.what == "softmax")
            joined[-1] = replace(kind, code=joined[-1].code + step.code)
        else:
            joined.append(step)
    return Block(tuple(joined))


def _with_waits(rounds: list[list[Step]]) -> list[list[Step]]:
    """The rounds with each wait for a load named by the GEMM that reads it, the first wait by the first; others are left out."""
    waits: deque[tuple[int, int]] = deque()
    named: dict[tuple[int, int], Step] = {}
    for number, steps in enumerate(rounds):
        for place, step in enumerate(steps):
            if step.what == "wait":
                waits.append((number, place))
            elif step.what in ("scores", "values") and waits:
                named[waits.popleft()] = step
    return [
        [
            replace(step, tensor=named[number, place].tensor, lag=named[number, place].lag) if step.what == "wait" else step
            for place, step in enumerate(steps)
            if step.what != "wait" or (number, place) in named
        ]
        for number, steps in enumerate(rounds)
    ]


def _turns_by_mbarrier(parts: Sequence[Point | Segment]) -> set[int]:
    """Places of mbarriers by which consumers hand the tensor cores round: one is arrived at when there is nothing to hand back,
    the one beside it is waited for, and there are more waits than GEMMs that could read what they wait for."""
    points = [part for part in parts if isinstance(part, Point)]
    waits = [point.place for point in points if point.what == "wait"]
    if len(waits) <= sum(point.what == "gemm" for point in points):
        return set()
    walker = _Walker(parts)
    for _ in range(ROUNDS):
        walker.walk()
    pairs = [(given, taken) for given in walker.unheld for taken in waits if given and 0 < abs(given - taken) <= MBARRIER]
    return {place for pair in pairs for place in pair}


class _Walker:
    """What has been issued, completed and handed back as a warp goes round and round; a step's `lag` is its block's number."""

    def __init__(self, parts: Sequence[Point | Segment], turns: Collection[int] = ()):
        self.parts, self.by_mbarrier = parts, turns
        points = [part for part in parts if isinstance(part, Point)]
        self.products = ["K" if point.makes_scores else "V" for point in points if point.what == "gemm"]
        self.exponentials = next((point.n // 2 for point in points if point.makes_scores), 0)  # of a thread for one block
        self.turns = {"sync", "hand over"} <= {point.what for point in points}
        self.issued = self.completed = self.weights = 0  # S issued and completed, P made
        self.worked = 0  # exponentials since the last S was completed
        self.running: deque[tuple[str, int]] = deque()
        self.held: deque[tuple[str, int]] = deque()  # completed and not handed back
        self.unheld: set[int] = set()  # places of arrivals when nothing was to be handed back

    def walk(self) -> list[Step]:
        """One round."""
        steps: list[Step] = []
        for part in self.parts:
            steps += self._code(part) if isinstance(part, Segment) else self._point(part)
        return steps

    def _code(self, part: Segment) -> list[Step]:
        count = part.pipes.get
        self.worked += count("mufu", 0)
        if 2 * self.worked >= self.exponentials:
            self.weights = self.completed
        weighty = count("mufu", 0) or 2 * (count("fma", 0) + count("convert", 0)) >= part.instructions
        return [Step("softmax" if weighty else "address", "S", self.completed - 1, (part,))]

    def _point(self, point: Point) -> list[Step]:
        if point.what == "gemm":
            ring, block = ("K", self.issued) if point.makes_scores else ("V", self.weights - 1)
            self.issued += point.makes_scores
            self.running.append((ring, block))
            return [Step("scores" if point.makes_scores else "values", ring, block)]
        if point.what == "gemm wait":
            return [self._finished() for _ in range(len(self.running) - point.outstanding)]
        if point.place in self.by_mbarrier and point.what in ("wait", "arrive"):
            return [Step("take" if point.what == "wait" else "give")]
        if point.what == "arrive" or _frees(point):
            if not self.held:
                self.unheld.add(point.place)
            return [Step("free", *self.held.popleft())] if self.held else []
        if point.what == "sync" and 0 < point.threads <= WARPGROUP:
            return [Step("address", "S", self.completed - 1, (Segment(point.at, 1, {"other": 1}, BARRIER),))]
        if point.what == "sync":
            return [Step("take" if self.turns else "meet")]
        return [Step({"hand over": "give", "wait": "wait"}[point.what])] if point.what in ("hand over", "wait") else []

    def _finished(self) -> Step:
        ring, block = self.running.popleft()
        self.held.append((ring, block))
        if ring == "K":
            self.completed, self.worked = block + 1, 0
        return Step("finished", ring, block)


class _Alone(_Walker):
    """The same of warps that load K and V themselves, as far ahead as stages allow; barriers of all threads are meetings."""

    def __init__(self, parts: Sequence[Point | Segment], stages: int):
        super().__init__(parts)
        self.ahead = max(1, stages - 1)
        self.loads, self.last = 0, {}  # blocks that a GEMM of each ring was issued for last

    def _point(self, point: Point) -> list[Step]:
        if point.what == "gemm":
            (step,) = super()._point(point)
            self.last[step.tensor] = step.lag
            return [replace(step, what="wait"), step]
        if point.what == "gemm wait":
            return [each for step in super()._point(point) for each in (step, replace(step, what="free"))]
        if point.what == "load":
            ring = "KV"[self.loads % 2]
            self.loads += 1
            return [Step("load", ring, self.last.get(ring, -1) + self.ahead)]
        return [Step("meet")] if point.what == "sync" else []
