"""The first look at a subject: which head dims it takes, and whether it has a backward, each said once.

The plainest problem there is, random and contiguous, a tile long. What fails or is refused here would fail or be refused in
every check that follows, so those are not asked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .check import FAIL, SKIP, Case, Check, Fault, Skipped
from .differentiate import backward
from .report import SURVEY as GROUP

if TYPE_CHECKING:
    from .bench import Bench


def survey(bench: Bench) -> list[Check]:
    """Narrow `bench` to the head dims that answer, mark those without a backward; a Check for each that does not."""
    bench.group = GROUP
    found, answering = [], []
    for head_dim in bench.subject.head_dims:
        if answering and bench.quick:
            break
        case = Case(name=f"plain, d{head_dim}", seqlen_q=bench.tile, seqlen_k=bench.tile, head_dim=head_dim)
        trouble = _forward(bench, case)
        if trouble:
            found.append(trouble)
            continue
        answering.append(head_dim)
        trouble = _backward(bench, case)
        if trouble:
            found.append(trouble)
            forward_only = trouble.verdict == SKIP
            bench.forward_only[head_dim] = "forward only" if forward_only else f"backward fails at once at d{head_dim}"
    bench.subject = replace(bench.subject, head_dims=tuple(answering))
    return _once(found, "backward")


def _forward(bench: Bench, case: Case) -> Check | None:
    q, k, v = bench.tensors(case)
    try:
        bench.call(q, k, v, case)
    except Skipped as reason:
        return Check(GROUP, f"head dim {case.head_dim}", SKIP, bench.seed, str(reason))
    except Fault as fault:
        hint = "" if bench.subject.strict else "; if this head dim is not promised, give those that are with --head-dim"
        return Check(GROUP, f"head dim {case.head_dim}", FAIL, bench.seed, f"{fault}; inputs: {case}{hint}")
    return None


def _backward(bench: Bench, case: Case) -> Check | None:
    q, k, v = bench.tensors(case)
    name = f"backward, head dim {case.head_dim}"
    try:
        backward(bench, case, q, k, v, bench.dout(case))
    except Skipped as reason:
        return Check(GROUP, name, SKIP, bench.seed, str(reason))
    except Fault as fault:
        return Check(GROUP, name, FAIL, bench.seed, f"{fault}; inputs: {case}")
    return None


def _once(found: list[Check], what: str) -> list[Check]:
    """The same verdict with the same message at every head dim is one check, named `what`."""
    alike: dict[tuple, list[Check]] = {}
    for check in found:
        about = what if check.case.startswith(what) else "forward"
        alike.setdefault((about, check.verdict, check.message.partition("; inputs:")[0]), []).append(check)
    return [
        each[0]
        if len(each) == 1
        else replace(each[0], case=f"{about} at head dims {', '.join(c.case.rpartition(' ')[2] for c in each)}")
        for (about, *_), each in alike.items()
    ]
