"""Alone: the main loop of a kernel without a producer, whose warps load K and V themselves: Triton's, Gluon's, FlashAttention-2's.

A copy is waited for where its product reads it, and its stage is free where that product is over: all warps then meet at a barrier.
GEMMs are WGMMA's, or mma.sync's, which a warp issues one by one among its other instructions; there S ends with the half of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import UsageError
from .pipeline import Block, Pipeline, Step
from .sass import Code, Instruction, Loop, Point, Segment, last_number, parts
from .way import usual

WARPGROUP, LANES = 128, 32
_FEW = [hex(number) for number in range(1, 8)]
COPIES = 2
"""Groups of copies a stage by cp.async: K and V."""


def by_mma(code: Code, loops: Sequence[Loop]) -> Pipeline:
    """A kernel of mma.sync m16n8k16. Raises UsageError where its tile cannot be read off its loop."""
    ways = attention_of(code, loops)
    if not ways:
        raise UsageError(f"{code.name}: no loop with exponentials between GEMMs is in it, so it is no attention that is read here")
    way = min(ways, key=len)
    products, made = _count(code, way, "HMMA"), _count(code, way, "MUFU")
    fits = [(head_dim, LANES * products // head_dim) for head_dim in (64, 128, 256)]
    rows_and_d = [(made - scores, head_dim, scores) for head_dim, scores in fits if made - scores in (2, 4, 8)]
    if len(rows_and_d) != 1:
        raise UsageError(
            f"{code.name}: no tile makes {products} mma.sync and {made} exponentials of a block; predict fa2 instead"
        )
    rows, head_dim, scores = rows_and_d[0]
    rows_of_warp = 8 * rows
    stages = _stages(code, way)
    hmma = [place for place, number in enumerate(way) if code.instructions[number].name == "HMMA"]
    before, between, after = way[: hmma[0]], way[hmma[0] : hmma[len(hmma) // 2]], way[hmma[len(hmma) // 2] :]
    softmax = _segments(code, [*between, *after])
    steps = [Step("address", "S", 0, _segments(code, before)), *_loads(stages, first=True), Step("wait", "K", 0)]
    steps += [Step("scores", "K", 0), Step("free", "K", 0), *_loads(stages, first=False), Step("softmax", "S", 0, softmax)]
    steps += [Step("wait", "V", 0), Step("values", "V", 0), Step("free", "V", 0)]
    return Pipeline(
        blocks=(Block(tuple(steps)),), masked=None, block_n=LANES * scores // rows_of_warp, head_dim=head_dim, element_bytes=2,
        looks_for_maximum=True, consumers=_threads(code) // WARPGROUP, persistent=False, multicast=False, weights_in_registers=True,
        meets=False, stages=stages, rows=4 * rows_of_warp, loads="cp_async", synchronous=True,
        registers=code.registers, spilled=spilled(code, way),
    )  # fmt: skip


def spilled(code: Code, way: Sequence[int]) -> tuple[int, int]:
    """4-byte words of a thread that go to local memory: stored on the way through a block, and at other addresses besides."""
    inside, stores = set(way), {n: _words(each) for n, each in enumerate(code.instructions) if each.name == "STL"}
    each_block = [words for number, words in stores.items() if number in inside]
    elsewhere = set().union(*stores.values()) - set().union(*each_block)
    return sum(map(len, each_block)), len(elsewhere)


def _words(store: Instruction) -> set[int]:
    """The words that a store to local memory writes, by their place in it."""
    found = re.search(r"\+(0x[0-9a-f]+)\]", store.operands)
    wide = {"64": 2, "128": 4}.get(store.opcode.rpartition(".")[2], 1)
    return {(int(found[1], 16) if found else 0) // 4 + word for word in range(wide)}


def _threads(code: Code) -> int:
    """Of a CTA; FlashAttention-2's kernels have no launch bounds, but warps in their name: head_dim, block_m, block_n, warps."""
    named = re.search(r"Flash_fwd_kernel_traitsILi\d+ELi\d+ELi\d+ELi(\d+)E", code.name)
    return code.threads or (LANES * int(named[1]) if named else 0)


def attention_of(code: Code, loops: Sequence[Loop]) -> list[list[int]]:
    """The usual ways of loops that make exponentials among GEMMs by mma.sync."""
    ways = [usual(code, loop) for loop in loops]
    return [way for way in ways if _count(code, way, "MUFU") >= LANES // 2 and _count(code, way, "HMMA") >= LANES]


def _count(code: Code, way: Sequence[int], name: str) -> int:
    return sum(code.instructions[number].name == name for number in way)


def _segments(code: Code, way: Sequence[int]) -> tuple[Segment, ...]:
    """Without the GEMMs, and the loads of their operands, that stand among it."""
    own = [number for number in way if code.instructions[number].name not in ("HMMA", "LDSM", "LDGSTS", "NOP")]
    return tuple(each for each in parts(code, own, finely=True) if isinstance(each, Segment)) if own else ()


def _loads(stages: int, first: bool) -> list[Step]:
    """Where a block's copies are issued: with one stage V under S and K under the softmax, else both, some blocks ahead."""
    if stages < 2:
        return [Step("load", "V", 0)] if first else [Step("load", "K", -1)]
    return [Step("load", ring, 1 - stages) for ring in ("K", "V")] if first else []


def _stages(code: Code, way: Sequence[int]) -> int:
    """From the groups of cp.async that may still be on their way where a block is waited for; 1 where all are awaited."""
    inside = [code.instructions[number] for number in way]
    waits = [last_number(each) for each in inside if each.name == "DEPBAR"]
    return 2 + max(waits) // COPIES if waits and max(waits) else 1


# -- WGMMA ------------------------------------------------------------------------------------------------------------------


def loads_of(code: Code) -> str:
    """Who loads: "producer" where registers are dealt between warpgroups, else the warps themselves, by "tma" or "cp_async"."""
    names = {each.name for each in code.instructions}
    return "producer" if "USETMAXREG" in names else "tma" if "UTMALDG" in names else "cp_async"


def stages_counted(code: Code, way: Sequence[int]) -> int:
    """Of a loop that counts its stages: where the counter is set to 0 again; 0 where none is."""
    inside = [code.instructions[number] for number in way]
    reset = {each.operands.split(",")[0].strip() for each in inside if each.name in ("SEL", "USEL") and "RZ" in each.operands}
    for each in inside:
        _, _, counter, last, *_ = [*each.operands.replace(" ", "").split(","), "", "", "", ""]
        if each.name in ("ISETP", "UISETP") and counter in reset and last in _FEW:
            return _FEW.index(last) + 1 + (".GT" in each.opcode)
    return 0


def stages_of(points: Sequence[Point]) -> int:
    """Stages of a ring: its empty barriers lie behind its full ones, eight bytes each; 0 where addresses do not say."""
    waits = sorted({point.place for point in points if point.what == "wait" and point.place})
    frees = sorted({point.place for point in points if point.what == "arrive" and point.place})
    below = [(max((wait for wait in waits if wait < free), default=0), free) for free in frees]
    return min(((free - wait) // 8 for wait, free in below if wait and 8 <= free - wait <= 64), default=0)


def stages_between(points: Sequence[Point]) -> int:
    """Stages of two rings handed back by named barriers: the one's full barriers lie beside the other's; 0 where not two do."""
    places = sorted({point.place for point in points if point.what == "wait" and point.place})
    return (places[1] - places[0]) // 8 if len(places) == 2 else 0
