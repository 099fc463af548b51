"""Static conformance: does a compiled kernel's main loop stand in the order that its schedule says? No GPU is needed."""

from __future__ import annotations

from collections.abc import Sequence

from ..simulator.code import sass
from ..simulator.code.sass import Loop, Point, last_number
from ..simulator.code.way import usual, walked
from ..simulator.language.ops import BarrierKind, Op
from ..simulator.language.program import Program, trace
from ..simulator.problem.tile import Tile
from ..simulator.problem.workload import Workload
from ..simulator.schedules import find_schedule

BLOCKS = 12
"""K/V blocks of the tile that is recorded; the block amid them has both its neighbours."""


def block_of(schedule: str, workload: Workload, tile: Tile) -> list[str]:
    """One block of a consumer in the steady state, from an S to before the next, in the words of `sass.order`, frees by ring."""
    program = trace(find_schedule(schedule).kernels[0], workload, tile, [(BLOCKS, 0)])
    words = _words(program)
    scores = [number for number, word in enumerate(words) if word == "S = Q K^T"]
    first, after = scores[len(scores) // 2], scores[len(scores) // 2 + 1]
    return words[first:after]


def _words(program: Program) -> list[str]:
    words: list[str] = []
    for row in program.stream(program.warps.index("WG0")):
        op, named = Op(int(row["op"])), row["barrier"] >= 0 and program.barriers[row["barrier"]].kind == BarrierKind.NAMED
        if op == Op.WGMMA:
            word = "S = Q K^T" if program.registers[int(row["writes"]).bit_length() - 1] == "S" else "O += P V"
        elif op == Op.WGMMA_WAIT:
            word = f"gemms but {int(row['target'])}"
        elif op == Op.WAIT:
            word = "sync" if named else "wait"
        elif op == Op.ARRIVE:
            word = "hand over" if named else f"free {program.rings[row['ring']].tensor.removesuffix('^T')}"
        else:
            continue
        if word != "wait" or words[-1:] != [word]:
            words.append(word)
    return words


def order_of(points: Sequence[Point]) -> list[str]:
    """Points of a loop in the same words. A ring of ours has its empty barriers behind its full ones, so what is handed back is the
    ring whose wait lies next below; what lies below both, Q, is left out, since only a tile's last block hands it back."""
    full = {}
    for number, point in enumerate(points):
        before = [*points[number::-1], *points[:number:-1]]
        if point.what == "gemm":
            full["K" if point.makes_scores else "V"] = next((each.place for each in before if each.what == "wait"), 0)
    words = []
    for point in points:
        below = [(place, ring) for ring, place in full.items() if place <= point.place]
        if point.what != "arrive":
            words += [word for word in sass.order([point]) if word != "wait" or words[-1:] != [word]]
        elif below:
            words.append(f"free {max(below)[1]}")
    return words


def differs(code: sass.Code, schedule: str, workload: Workload, tile: Tile) -> str:
    """One sentence where the main loop is not the schedule's, else nothing."""
    block = block_of(schedule, workload, tile)
    found = [order_of(Loop(loop.start, loop.end, walked(code, loop)).points) for loop in sass.loops(code) if loop.scores]
    if any(sass.turns(each, block) for each in found):
        return ""
    loop = ", ".join(found[0]) if found else "nothing with WGMMA"
    return f"{code.name}: the main loop is {loop}, where {schedule} says {', '.join(block)}, again and again"


# -- kernels whose warps load for themselves, by cp.async -------------------------------------------------------------------


def copied_order(code: sass.Code, loop: Loop) -> list[str]:
    """A block of a main loop whose warps copy K and V: waits with how many groups of copies may run on, S, softmax, P V, copies.

    A product begins where its first instruction stands, and S has the first half of a block's. A stage is free where all warps meet
    between the last that its product reads and the copies into it; `_settled` puts that before the copies.
    """
    way = [code.instructions[number] for number in usual(code, loop)]
    at = {name: [place for place, each in enumerate(way) if each.name in names] for name, names in _OF_COPIES.items()}
    exponentials = [place for place, each in enumerate(way) if each.opcode == "MUFU.EX2"]
    half = len(at["product"]) // 2
    if not half or len(at["issued"]) != 2 or not any(place > at["product"][half - 1] for place in exponentials):
        return []
    found = [(place, f"copies but {last_number(way[place])}") for place in at["awaited"]]
    found += [(at["product"][0], "S = Q K^T"), (at["product"][half], "O += P V")]
    found += [(min(place for place in exponentials if place > at["product"][half - 1]), "softmax")]
    for ring, read, begun, end in (("K", at["product"][half - 1], 0, at["issued"][0]), ("V", max(at["read"]), *at["issued"])):
        first = min(place for place in at["copy"] if begun < place < end)
        found += [(end, f"load {ring}"), *((place, f"free {ring}") for place in at["meeting"] if read < place < first)][:2]
    return _settled([word for _, word in sorted(found)])


_OF_COPIES = {
    "product": ("HMMA", "HGMMA"),
    "read": ("LDSM", "HGMMA"),
    "copy": ("LDGSTS",),
    "issued": ("LDGDEPBAR",),
    "awaited": ("DEPBAR",),
    "meeting": ("BAR",),
}


def copied_block(schedule: str, workload: Workload, tile: Tile) -> list[str]:
    """One block in the steady state, from the wait for it to before the next, in the same words."""
    program = trace(find_schedule(schedule).kernels[0], workload, tile, [(BLOCKS, 0)])
    words, under_way = [], 0
    for row in program.stream(program.warps.index("WG0")):
        op, ring = Op(int(row["op"])), program.rings[row["ring"]].tensor if row["ring"] >= 0 else ""
        if op == Op.LOAD and ring in ("K", "V"):
            under_way += 1
            words.append(f"load {ring}")
        elif op == Op.WAIT and ring == "K" and program.barriers[row["barrier"]].name.startswith("full"):
            under_way -= 2  # a block's V is waited for with its K
            words.append(f"copies but {under_way}")
        elif op == Op.MMA:
            words.append("S = Q K^T" if ring == "K" else "O += P V")
        elif op == Op.COMPUTE and words[-1:] != ["softmax"]:
            words.append("softmax")
        elif op == Op.ARRIVE and ring in ("K", "V"):
            words.append(f"free {ring}")
    waits = [number for number, word in enumerate(words) if word.startswith("copies")]
    return _settled(words[waits[BLOCKS // 3] : waits[BLOCKS // 3 + 1]])


def _settled(words: list[str]) -> list[str]:
    """What is handed back, right before it is loaded again: between the two nothing depends on it."""
    free = {f"load {word[-1]}": word for word in words if word.startswith("free")}
    kept = [word for word in words if not word.startswith("free")]
    return [each for word in kept for each in ([free[word], word] if word in free else [word])]


def differs_in_copies(code: sass.Code, schedule: str, workload: Workload, tile: Tile) -> str:
    """As `differs`, of a kernel whose warps load for themselves."""
    block = copied_block(schedule, workload, tile)
    found = [copied_order(code, loop) for loop in sass.loops(code)]
    if block in found:
        return ""
    loop = ", ".join(found[0] if found else ()) or "none with copies, products and exponentials"
    return f"{code.name}: the main loop is {loop}, where {schedule} says {', '.join(block)}"
