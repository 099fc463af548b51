"""Verdict: which of several runs is faster, by how much, why, and at which shapes that turns, in a sentence.

Where two schedules differ by less than CLOSE the sentence says that the model cannot tell: of recorded pairs that differ by more,
it ranks almost all as the hardware does (`fasim compare`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ...simulator.errors import UsageError
from ...simulator.limits import cost
from ...simulator.problem.tile import HEAD_DIMS
from ...simulator.problem.workload import Workload
from ...simulator.results import metrics
from ...simulator.results.run import Run
from ...simulator.schedules import find_schedule, is_compiled
from ...simulator.units import scaled
from ..predictions import Advance, Question, predict_all

CLOSE = 0.02
"""Times within this of each other are one: predictions rank recorded pairs that differ by more."""
FACTORS = (0.25, 0.5, 2, 4)
"""Lengths beside the one asked about at which a verdict is tried, the number of tokens kept; and the other head dims."""
SHORTEST, MOST_ACCESSES = 64, 3_000_000
"""What is tried beside: no shorter, and nothing that takes longer than a second or so to predict."""
PARTS = {
    "useful": "useful GEMMs",
    "padding": "padding",
    "masked": "masked pairs",
    "slow_gemms": "slow GEMMs",
    "softmax": "exposed softmax",
    "memory": "waits for loads and stores",
    "latency": "gaps between GEMMs",
    "prologue": "prologues",
    "epilogue": "epilogues",
    "tail": "the last wave",
    "no_cta": "idle SMs",
    "launch": "launching",
}
"""Part of a breakdown -> what a sentence calls it."""


def best_two(runs: Sequence[Run]) -> tuple[Run, Run]:
    """The fastest and the next."""
    first, second, *_ = sorted(runs, key=metrics.time_s)
    return first, second


def of_schedules(runs: Sequence[Run], elsewhere: Mapping[Workload, tuple[Run, Run]] | None = None) -> str:
    """Which schedule of one workload is the fastest, by how much over the next, why, and where that turns.

    `elsewhere` has the same two at other shapes (`neighbours`).
    """
    first, second = best_two(runs)
    names = _names(first, second)
    gap = metrics.time_s(second) / metrics.time_s(first) - 1
    times = f"{scaled(metrics.time_s(first), 's')} against {scaled(metrics.time_s(second), 's')}"
    if gap < CLOSE:
        head = f"{names[0]} and {names[1]} are as fast as each other, {times}: {gap:.1%} is less than the model can tell"
        head += _balance(first, second, names)
    else:
        head = f"{names[0]} is {gap:.1%} faster than {names[1]}, {times}{_why(first, second)}"
    turned = _turns(first, names, elsewhere or {}, gap >= CLOSE)
    return head + turned + "."


def of_change(before: Run, after: Run, what: str) -> str:
    """What a changed device does to a run, and to its clock."""
    gap = 1 - metrics.time_s(after) / metrics.time_s(before)
    times = f"{scaled(metrics.time_s(before), 's')} to {scaled(metrics.time_s(after), 's')}"
    if abs(gap) < 0.0005:
        return f"{what} changes nothing for {before.schedule}: {scaled(metrics.time_s(after), 's')} as before."
    kind = "saves" if gap > 0 else "costs"
    clock = after.sm_clock_hz / before.sm_clock_hz - 1
    of_it = f": cycles {after.cycles / before.cycles - 1:+.1%}, clock {clock:+.1%}" if abs(clock) > 0.0005 else ", all of it cycles"
    return f"{what} {kind} {before.schedule} {abs(gap):.1%} of its time, {times}{of_it}{_moved(before, after, gap > 0)}."


def _moved(before: Run, after: Run, saves: bool) -> str:
    """The part of the tensor cores' time that a change moves most, in the direction of the whole; empty where none stands out."""
    if before.breakdown is None or after.breakdown is None:
        return ""
    parts = {name: seconds * (1 if saves else -1) for name, seconds in _lost_more(after, before).items()}
    most = max(parts, key=parts.get)
    if parts[most] < 0.2 * abs(metrics.time_s(before) - metrics.time_s(after)):
        return ""
    shares = [run.breakdown.to_dict()[most] for run in (before, after)]
    return f"; {PARTS[most]} {'are' if PARTS[most].endswith('s') else 'is'} {shares[0]:.0%} of it before, {shares[1]:.0%} after"


def neighbours(first: Question, second: Question, advance: Advance | None = None) -> dict[Workload, tuple[Run, Run]]:
    """The two questions at other lengths, under the other mask and at other head dims: as many tokens, as wide, nothing that takes
    long. Never raises.
    """
    asked = {}
    for workload in _beside(first.workload):
        pair = tuple(replace(each, workload=workload, tile=None) for each in (first, second))
        if all(_quick(each) for each in pair):
            asked[workload] = pair
    found = {}
    for workload, pair in asked.items():
        try:
            made = predict_all(pair, advance=advance)
        except UsageError:
            continue  # a shape that one of them does not take
        found[workload] = (made[pair[0]], made[pair[1]])
    return found


def why_faster(first: Run, second: Run) -> str:
    """The part of the tensor cores' time of which the slower run loses most more, in words; empty where none stands out."""
    if first.breakdown is None or second.breakdown is None:
        return ""
    parts = _lost_more(first, second)
    worst = max(parts, key=parts.get)
    if parts[worst] < 0.2 * (metrics.time_s(second) - metrics.time_s(first)):
        return ""
    shares = [run.breakdown.to_dict()[worst] for run in (first, second)]
    verb = "are" if PARTS[worst].endswith("s") else "is"
    return f"{PARTS[worst]} {verb} {shares[0]:.0%} of its time, {shares[1]:.0%} of the other's"


# -- the parts of the sentence --------------------------------------------------------------------------------------------


def _lost_more(first: Run, second: Run) -> dict[str, float]:
    """Part of the tensor cores' time -> the seconds that the second has more of it."""
    mine, others = (run.breakdown.to_dict() for run in (first, second))
    return {name: others[name] * metrics.time_s(second) - mine[name] * metrics.time_s(first) for name in mine}


def _balance(first: Run, second: Run, names: tuple[str, str]) -> str:
    """Of two that are level, what the one saves and pays again, where both are more than the model can tell."""
    if first.breakdown is None or second.breakdown is None:
        return ""
    parts = {name: seconds / metrics.time_s(first) for name, seconds in _lost_more(first, second).items()}
    saved, paid = max(parts, key=parts.get), min(parts, key=parts.get)
    if min(parts[saved], -parts[paid]) < CLOSE:
        return ""
    return f"; what {names[0]} saves in {PARTS[saved]} ({parts[saved]:.0%}) it pays in {PARTS[paid]} ({-parts[paid]:.0%})"


def _names(first: Run, second: Run) -> tuple[str, str]:
    """The schedules, told apart by tile or device where they are one."""
    if first.schedule != second.schedule:
        return first.schedule, second.schedule
    for of in (lambda run: f"{run.schedule} on {run.device}", lambda run: f"{run.schedule} of tile {run.tile}"):
        if of(first) != of(second):
            return of(first), of(second)
    return f"the first {first.schedule}", "the other"


def _why(first: Run, second: Run) -> str:
    clock = first.sm_clock_hz / second.sm_clock_hz - 1
    parts = [why_faster(first, second)]
    if abs(clock) > 0.01:
        parts.append(f"its clock is {abs(clock):.1%} {'higher' if clock > 0 else 'lower'}")
    said = ", and ".join(part for part in parts if part)
    return f"; {said}" if said else ""


def _beside(workload: Workload) -> list[Workload]:
    if workload.seqlen is None:
        return []
    tokens = workload.batch * workload.seqlen
    lengths = [int(workload.seqlen * factor) for factor in FACTORS]
    shapes = [(length, workload.causal) for length in lengths if length >= SHORTEST]
    shapes.append((workload.seqlen, not workload.causal))
    beside = [
        replace(workload, seqlen=length, seqlen_q=length, seqlen_k=length, batch=max(1, tokens // length), causal=causal)
        for length, causal in shapes
    ]
    return beside + [_as_wide(workload, head_dim) for head_dim in HEAD_DIMS if head_dim != workload.head_dim]


def _as_wide(workload: Workload, head_dim: int) -> Workload:
    """The workload at another head dim, with so many heads that all together are as wide, where that is possible."""
    heads, kv_heads = (count * workload.head_dim / head_dim for count in (workload.heads, workload.kv_heads))
    if not (heads.is_integer() and kv_heads.is_integer()):
        heads, kv_heads = workload.heads, workload.kv_heads
    return replace(workload, head_dim=head_dim, heads=int(heads), kv_heads=int(kv_heads))


def _quick(question: Question) -> bool:
    if is_compiled(question.schedule) or question.schedule.endswith(".py") or ":" in question.schedule:
        return False
    kernels = find_schedule(question.schedule, question.workload.direction).kernels
    from ...simulator.predict import default_tile

    try:
        tile = default_tile(question.workload, question.schedule, question.device)
        return cost(kernels, question.workload, tile, 2).accesses <= MOST_ACCESSES
    except UsageError:
        return False


def _shape(workload: Workload, asked: Workload) -> str:
    length = f"{workload.seqlen // 1024}k" if workload.seqlen % 1024 == 0 else f"{workload.seqlen}"
    if workload.head_dim != asked.head_dim:
        return f"d{workload.head_dim}"
    mask = "" if workload.causal == asked.causal else (" causal" if workload.causal else " full")
    return f"{length}{mask}"


def _turns(first: Run, names: tuple[str, str], elsewhere: Mapping[Workload, tuple[Run, Run]], decided: bool) -> str:
    """Where the other is the faster one, or that it is so nowhere of what was tried."""
    if not elsewhere:
        return ""
    gaps = {}
    for workload, (one, other) in elsewhere.items():
        gaps[workload] = metrics.time_s(other) / metrics.time_s(one) - 1
    asked = first.workload
    ahead = {work: gap for work, gap in gaps.items() if gap >= CLOSE}
    behind = {work: 1 / (1 + gap) - 1 for work, gap in gaps.items() if 1 / (1 + gap) - 1 >= CLOSE}
    if not decided:
        sides = [f"{name} is faster at {_listed(of, asked)}" for name, of in zip(names, (ahead, behind), strict=True) if of]
        return "; " + (", ".join(sides) or f"so they are at {_listed(gaps, asked, False)}")
    if behind:
        return f"; it turns at {_listed(behind, asked)}, where {names[1]} is faster"
    level = [work for work in gaps if work not in ahead]
    tried = _listed(gaps, asked, False)
    if level:
        return f"; at {_listed(level, asked, False)} they are level, of {tried} it turns nowhere"
    return f"; it stays ahead at {tried}"


def _listed(shapes: Iterable[Workload], asked: Workload, gaps: bool = True) -> str:
    return ", ".join(f"{_shape(work, asked)}" + (f" ({shapes[work]:.1%})" if gaps else "") for work in shapes)
