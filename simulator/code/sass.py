"""SASS: a disassembler's text of a kernel, read as instructions, points of order, and the segments between them.

`nvdisasm -hex` prints each instruction with its 128 bits. Since Volta bits 105 to 125 are the compiler's control: the cycles
that the warp stalls, whether it yields, the scoreboards that the instruction sets and those it waits for. Nothing here runs the
kernel, and nothing is read but text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

_TEXT = re.compile(r"^//-+ \.text\.(\S+)", re.MULTILINE)
_INFO = re.compile(r"^//-+ \.nv\.info\.(\S+)", re.MULTILINE)
_REGISTERS = re.compile(r"EIATTR_REGCOUNT\n(?:(?!//).*\n){0,6}?.*index@\((\S+)\)\n.*\.word\s+0x([0-9a-f]{8})")
_WORD = re.compile(r"\.word\s+0x([0-9a-f]{8})")
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
_SECOND_HALF = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/\s*$")
_LABEL = re.compile(r"\s*(\.L_\w+):")
_PARTS = re.compile(r"(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*)")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_SHAPE = re.compile(r"\.64x(\d+)x(\d+)")

_PIPES = {
    "fma": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 FSWZADD HFMA2 HADD2 HMUL2 IMAD",
    "alu": "FMNMX FSEL FSETP ISETP SEL LOP3 LEA IADD3 SHF PRMT IMNMX VIMNMX IADD PLOP3 MOV FSET P2R R2P SGXT BMSK IABS VIADD",
    "mufu": "MUFU I2F F2I POPC FLO BREV",
    "convert": "F2FP F2F I2FP F2IP",
    "shared": "LDS STS LDSM STSM ATOMS",
    "local": "LDL STL",
    "global": "LDG STG LD ST LDGSTS ATOM ATOMG RED",
}
_PIPE_OF = {opcode: pipe for pipe, opcodes in _PIPES.items() for opcode in opcodes.split()}
PIPES = (*_PIPES, "other")
"""What an instruction holds beside its issue slot; "other": nothing that counts here, as on the uniform datapath."""
_ARITHMETIC = ("fma", "alu", "mufu", "convert")
AMID_A_GEMM = 24
"""Arithmetic instructions between the first WGMMA of a group and the last that are more than addresses: O rescaled under S, say."""
PIECE, PIECE_MUFU = 16, 4
"""Instructions without an exponential between them, and exponentials, of a piece of a segment: as finely as warps share pipes."""
LATENCY = {"MUFU": 18, **dict.fromkeys(("SHFL", "LDS", "LDSM", "LDC", "S2R"), 24)}
"""Cycles to a result that a scoreboard tells: MUFU.EX2 17.5, SHFL 24.3 (`pipes`, H200), a load of shared memory 23.2 (`chains`);
constants and special registers are taken as about as far. Others, as a load of memory, are not waited for in a main loop."""
MUFU_CYCLES = 8
"""Of a sub-partition for one warp's exponential (16 a cycle per SM, CUDA programming guide, compute capability 9.0)."""


@dataclass(frozen=True)
class Instruction:
    """One instruction, with the control bits that the compiler chose."""

    address: int
    predicate: str
    opcode: str  # with its modifiers
    operands: str
    stall: int  # cycles until the warp's next instruction, at least
    sets: tuple[int, int]  # scoreboards for its result and for its operands, 7 for none
    waits: int  # bits of the scoreboards that it waits for

    @cached_property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def pipe(self) -> str:
        """One of PIPES."""
        return _PIPE_OF.get(self.name, "other")


@dataclass(frozen=True)
class Code:
    """One kernel's instructions, and where its labels stand."""

    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    threads: int = 0  # of a CTA, where the kernel's launch bounds say so
    registers: int = 0  # of a thread at its start

    def target(self, at: int) -> int | None:
        """Where the branch at this instruction goes, by number; None if it is none."""
        each = self.instructions[at]
        found = _TARGET.search(each.operands) if each.name == "BRA" else None
        return self.labels.get(found[1]) if found else None


@dataclass(frozen=True)
class Segment:
    """What a warp executes between two points: instructions by pipe, and the stalls that the compiler gave them."""

    start: int  # number of the first instruction
    instructions: int
    pipes: dict[str, int]
    stalls: int  # cycles that one warp alone needs for it, at least, without votes and branches
    branches: int = 0  # that are taken, without those behind a vote
    votes: int = 0  # of the warp, with the branch behind


@dataclass(frozen=True)
class Point:
    """A point of order: `what` is wait, arrive, sync, hand over, gemm, gemm wait, load, store or draw."""

    what: str
    at: int  # number of its first instruction
    instructions: int = 1
    m: int = 0
    n: int = 0
    k: int = 0  # of one step
    steps: int = 0
    a_in_registers: bool = False
    b_transposed: bool = False
    is_new: bool = False  # nothing is added to
    outstanding: int = 0  # of a gemm wait: groups that may still run
    place: int = 0  # of an mbarrier's wait or arrival: its offset in shared memory, less the stage's; 0 where no instruction says
    threads: int = 0  # of a barrier; 0: of the CTA, or not a constant

    @property
    def makes_scores(self) -> bool:
        """Whether it is S = Q K^T. In 16 bits K is taken as it lies and V transposed; in 8 bits Q is in shared memory, P is not."""
        return self.what == "gemm" and not (self.a_in_registers if self.k > 16 else self.b_transposed)

    def __str__(self) -> str:
        if self.what == "gemm":
            source = "registers" if self.a_in_registers else "shared memory"
            return f"gemm {self.steps} x m{self.m}n{self.n}k{self.k}, A in {source}"
        return f"{self.what} ({self.outstanding} may run)" if self.what == "gemm wait" else self.what


@dataclass(frozen=True)
class Loop:
    """A loop: its first and last instruction by number, and what stands in it, in order."""

    start: int
    end: int
    parts: tuple[Point | Segment, ...] = field(default=())

    @property
    def points(self) -> tuple[Point, ...]:
        """The points alone."""
        return tuple(part for part in self.parts if isinstance(part, Point))

    @property
    def pipes(self) -> Counter[str]:
        """Instructions by pipe, of all segments."""
        return sum((Counter(part.pipes) for part in self.parts if isinstance(part, Segment)), Counter())

    @property
    def scores(self) -> int:
        """Scores that one thread makes in a turn of the loop: n / 2 of each S, be it one group of WGMMAs or several."""
        made = [point for point in self.points if point.makes_scores]
        return sum(point.n // 2 for point in [each for each in made if each.is_new] or made)


def read(text: str) -> list[Code]:
    """Every kernel in the text of `nvdisasm -hex`."""
    pieces, threads, registers = _TEXT.split(text), _threads(text), dict(_REGISTERS.findall(text))
    kernels = zip(pieces[1::2], pieces[2::2], strict=True)
    return [_code(name, body, threads.get(name, 0), int(registers.get(name, "0"), 16)) for name, body in kernels]


def _threads(text: str) -> dict[str, int]:
    """Threads of a CTA by kernel, from its launch bounds."""
    pieces, found = _INFO.split(text), {}
    for name, body in zip(pieces[1::2], pieces[2::2], strict=True):
        _, *bounds = re.split("EIATTR_MAX_THREADS|EIATTR_REQNTID", body.split("\n//---", 1)[0], maxsplit=1)
        if bounds and (word := _WORD.search(bounds[0])):
            found[name] = int(word[1], 16)
    return found


def last_number(each: Instruction) -> int:
    """The hexadecimal number that ends an instruction's operands; 0 where there is none."""
    found = re.search(r"0x([0-9a-f]+)\s*$", each.operands)
    return int(found[1], 16) if found else 0


def _code(name: str, body: str, threads: int, registers: int) -> Code:
    rows, labels = [], {}
    for line in body.splitlines():
        if line.startswith("//---"):
            break
        if found := _LABEL.match(line):
            labels[found[1]] = len(rows)
        elif found := _INSTRUCTION.match(line):
            rows.append([int(found[1], 16), found[2], int(found[3], 16), 0])
        elif rows and (found := _SECOND_HALF.match(line)):
            rows[-1][3] = int(found[1], 16)
    return Code(name, tuple(_instruction(*row) for row in rows), labels, threads, registers)


def _instruction(address: int, text: str, low: int, high: int) -> Instruction:
    predicate, opcode, operands = _PARTS.match(text).groups() if _PARTS.match(text) else ("", text.split()[0], "")
    bits = (high << 64 | low) >> 105
    return Instruction(address, predicate or "", opcode, operands, bits & 15, (bits >> 5 & 7, bits >> 8 & 7), bits >> 11 & 63)


# -- loops --------------------------------------------------------------------------------------------------------------


def loops(code: Code) -> list[Loop]:
    """The innermost loops with a GEMM in them, from the first to the last; polling a barrier is no loop."""
    edges = [(target, at) for at in range(len(code.instructions)) if (target := code.target(at)) is not None and target <= at]
    edges = [(start, end) for start, end in edges if not _polls(code, start)]
    found = [(start, end) for start, end in edges if any(_is_gemm(each) for each in code.instructions[start : end + 1])]
    inner = [a for a in found if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in found)]
    return [Loop(start, end, tuple(parts(code, range(start, end + 1)))) for start, end in sorted(set(inner))]


def _polls(code: Code, start: int) -> bool:
    """Whether a branch to `start` goes back behind a try_wait whose first try failed."""
    before = code.instructions[max(0, start - 3) : start]
    return bool(before) and before[-1].name == "BRA" and any("TRYWAIT" in each.opcode for each in before)


def _is_gemm(each: Instruction) -> bool:
    return each.name in ("HGMMA", "QGMMA", "HMMA", "QMMA")


# -- points and segments --------------------------------------------------------------------------------------------------


def parts(code: Code, way: Sequence[int], finely: bool = False) -> Iterator[Point | Segment]:
    """Points of order and the segments between them, along a way: instructions by number, in the order they are executed.

    `finely` cuts segments into pieces, each with the instructions that stand there, and has results waited for; else a segment's
    stalls are the stall counts alone.
    """
    at = begun = 0
    spent = alone(code, way) if finely else [code.instructions[number].stall for number in way]
    while at < len(way):
        point, after = _point(code, way, at)
        if point is None:
            at += 1
            continue
        yield from _segments(code, [*way[begun:at], way[at]], spent[begun:at], finely)
        yield point
        inside = [number for number in way[at:after] if code.instructions[number].pipe in _ARITHMETIC]
        if len(inside) >= AMID_A_GEMM:
            yield segment(code, [*inside, -1], [0] * len(inside))  # they fill the time that the issue takes
        at = begun = after
    yield from _segments(code, [*way[begun:], -1], spent[begun:], finely)


def _segments(code: Code, way: Sequence[int], spent: Sequence[int], finely: bool) -> Iterator[Segment]:
    """A way without its last as one segment, or where exponentials are made as three: what is before them, them, and the rest."""
    mufu = [place for place, number in enumerate(way[:-1]) if code.instructions[number].name == "MUFU"]
    cuts = _pieces(len(way) - 1, mufu) if finely else sorted({0, *([mufu[0], mufu[-1] + 1] if mufu else []), len(way) - 1})
    for begin, end in pairwise(cuts):
        yield segment(code, way[begin : end + 1], spent[begin:end])


def _pieces(length: int, mufu: Sequence[int]) -> list[int]:
    """Where pieces begin, and the end: each has four exponentials at most, and less than sixteen instructions without one."""
    cuts, made, last, exponentials = [0], 0, 0, set(mufu)
    for place in range(length):
        if (place in exponentials and made == PIECE_MUFU) or place - last >= PIECE:
            cuts, made, last = [*cuts, place], 0, place
        if place in exponentials:
            made, last = made + 1, place
    return [*cuts, length] if length else [0]


def segment(code: Code, way: Sequence[int], spent: Sequence[int]) -> Segment:
    """The instructions of a way, all but its last, which says where the warp goes on; `spent`: what `alone` says of them."""
    inside = [code.instructions[number] for number in way[:-1]]
    pipes = Counter(each.pipe for each in inside)
    taken = {place for place, each in enumerate(inside) if each.name == "BRA" and way[place + 1] != way[place] + 1}
    votes = [place for place, each in enumerate(inside) if each.name == "VOTE" and ".ALL" in each.opcode]
    behind = {min((place for place in taken if place > vote), default=vote) for vote in votes}
    compared = {max((place for place in range(vote) if inside[place].name in ("FSETP", "ISETP")), default=vote) for vote in votes}
    apart = taken | behind | compared | set(votes)  # what a vote and a branch cost has been measured as a whole
    return Segment(
        way[0], len(inside), {pipe: pipes[pipe] for pipe in PIPES if pipes[pipe]},
        sum(cycles for place, cycles in enumerate(spent) if place not in apart), len(taken - behind), len(votes),
    )  # fmt: skip


def alone(code: Code, way: Sequence[int]) -> list[int]:
    """Cycles that one warp alone spends at each instruction of a way: until the results that it waits for are there, by the
    scoreboards, and until the next may be issued, by its stall count."""
    now, ready, spent = 0, [0] * 6, []
    for each in (code.instructions[number] for number in way):
        begins = max([now, *(ready[bit] for bit in range(6) if each.waits >> bit & 1)])
        if each.sets[0] < len(ready):
            ready[each.sets[0]] = max(ready[each.sets[0]], begins + LATENCY.get(each.name, 0))
        spent.append(begins + each.stall - now)
        now = begins + each.stall
    return spent


def _point(code: Code, way: Sequence[int], at: int) -> tuple[Point | None, int]:
    """The point that stands at this place of a way, if any, and the place behind it."""
    number = way[at]
    each = code.instructions[number]
    opcode, what = each.opcode, None
    if each.name in ("HGMMA", "QGMMA") and _SHAPE.search(opcode):
        return _warpgroup_gemm(code, way, at)
    if each.name == "WARPGROUP" and "DEPBAR" in opcode:
        return Point("gemm wait", number, outstanding=last_number(each)), at + 1
    if each.name == "SYNCS" and ("TRYWAIT" in opcode or ".ARRIVE" in opcode):
        return Point("wait" if "TRYWAIT" in opcode else "arrive", number, place=_place(code, way, at)), at + 1
    if each.name == "BAR":
        return Point("hand over" if ".ARV" in opcode else "sync", number, threads=_threads_of(each)), at + 1
    if each.name == "UTMALDG":
        what = "load"
    elif each.name in ("UTMASTG", "UTMAREDG"):
        what = "store"
    elif each.name == "DEPBAR":
        what = "copies wait"
    return (Point(what, number), at + 1) if what else (None, at)


def _threads_of(barrier: Instruction) -> int:
    _, _, threads = barrier.operands.partition(",")
    return last_number(barrier) if threads.strip().startswith("0x") else 0


def _place(code: Code, way: Sequence[int], at: int) -> int:
    """The constant in a barrier's address, from its operand or from where its register was last written, round the loop."""
    operand = code.instructions[way[at]].operands.partition("[")[2].partition("]")[0]
    register = operand.partition("+")[0].strip()
    before = (code.instructions[number] for number in (*reversed(way[:at]), *reversed(way[at:])))
    written = next((each.operands for each in before if each.operands.partition(",")[0].strip() == register), "")
    return max((int(found, 16) for found in re.findall(r"0x[0-9a-f]+", f"{operand} {written}") if len(found) < 8), default=0)


def _warpgroup_gemm(code: Code, way: Sequence[int], at: int) -> tuple[Point, int]:
    """One group: HGMMAs up to the one that commits (gsb0), with the addresses made between them."""
    first, steps, last = code.instructions[way[at]], 0, at
    for place in range(at, len(way)):
        each = code.instructions[way[place]]
        if each.name in ("HGMMA", "QGMMA"):
            steps, last = steps + 1, place
            if "gsb0" in each.operands:
                break
    n, k = map(int, _SHAPE.search(first.opcode).groups())
    sources = [part.strip() for part in first.operands.split(",")]
    gemm = Point(
        "gemm", way[at], last - at + 1, 64, n, k, steps,
        a_in_registers=not any(source.startswith("gdesc") for source in sources[1:2]), b_transposed="tnspB" in first.operands,
        is_new="RZ" in sources[2:],
    )  # fmt: skip
    return gemm, last + 1


# -- the order, in the words of a schedule ----------------------------------------------------------------------------------


def order(points: Iterable[Point]) -> list[str]:
    """Points as words that a schedule has too; arrivals one behind the other are one, since some are by predicate, and so are
    waits, since a barrier is tried before it is waited for."""
    words: list[str] = []
    for point in points:
        if point.what == "gemm":
            word = "S = Q K^T" if point.makes_scores else "O += P V"
        elif point.what == "gemm wait":
            word = f"gemms but {point.outstanding}"
        elif point.what in ("load", "store"):
            continue
        else:
            word = point.what
        if word not in ("arrive", "wait") or words[-1:] != [word]:
            words.append(word)
    return words


def turns(found: Sequence[str], block: Sequence[str]) -> int:
    """How many blocks a loop's order is, wherever in the block it begins; 0 if it is no whole number of them."""
    times, rest = divmod(len(found), len(block) or 1)
    if rest or not times:
        return 0
    rotations = (list(block[k:]) + list(block[:k]) for k in range(len(block)))
    return times if any(list(found) == rotation * times for rotation in rotations) else 0
