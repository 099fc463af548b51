"""Explanation: what the largest disagreement of a comparison is, and what of the two runs it goes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..simulator.results.run import Run
from .comparison import Comparison, Row


def explain(found: Comparison) -> str:
    """What the largest disagreement is, and what of the two runs it goes with. Says so where the numbers do not tell."""
    if found.predicted is None:
        return "nothing to explain: no schedule stands for this kernel"
    row = found.largest
    if row is None:
        return "nothing to explain: no counter was read"
    head = f"{row.quantity.name} {_signed(row)}"
    return f"{head}: {_REASONS[row.quantity.name](found)}. {_of_time(found)}"


def _signed(row: Row) -> str:
    return f"{row.error * 100:+.1f} points" if row.quantity.is_share else f"{row.error:+.1%}"


def _of_time(found: Comparison) -> str:
    """How cycles and clock share the error in time."""
    time, clock = found.row("time").error, found.row("SM clock").error
    of_cycles = (1 + time) * (1 + clock) - 1
    return f"Time is {time:+.1%} off: cycles {of_cycles:+.1%}, clock {clock:+.1%} (which counts the other way)."


def _per_sm(run: Run, busy: float | None) -> float | None:
    return None if busy is None else busy / run.activity.sms


def _cycles(found: Comparison) -> str:
    predicted, measured = found.predicted, found.measured
    ours, theirs = _per_sm(predicted, predicted.activity.tensor), _per_sm(measured, measured.activity.tensor)
    if ours is None or theirs is None:
        return f"without a counter of the tensor cores nothing says where they go{_issued(found)}"
    gap = predicted.cycles - measured.cycles
    work = ours - theirs
    if abs(work) > abs(gap) / 2:
        return (
            f"most of it is tensor-core work, {ours:,.0f} busy cycles per SM predicted and {theirs:,.0f} measured, so the kernel"
            " executes other GEMMs than its tile would (padding, masked blocks)"
        )
    idle_p, idle_m = predicted.cycles - ours, measured.cycles - theirs
    return (
        f"the tensor cores have the same work ({ours:,.0f} and {theirs:,.0f} busy cycles per SM), but wait {idle_p:,.0f} cycles in"
        f" the model and {idle_m:,.0f} on the hardware{_issued(found)}"
    )


def _issued(found: Comparison) -> str:
    """Where the kernel issues other than the model's number of instructions."""
    ours, theirs = found.predicted.activity.issue, found.measured.activity.issue
    if ours is None or not theirs or abs(ours / theirs - 1) < 0.05:
        return ""
    return f"; the kernel issues {theirs / ours - 1:+.0%} instructions against the model's count"


def _clock(found: Comparison) -> str:
    predicted, measured = found.predicted, found.measured
    tensor = found.row("tensor cores")
    shares = "" if tensor.error is None else f", with the tensor cores at {tensor.predicted:.0%} and {tensor.measured:.0%}"
    if measured.power_w is None:
        return f"power was not read{shares}"
    return f"the model draws {predicted.power_w:.0f} W there, the board {measured.power_w:.0f} W{shares}"


def _hbm_read(found: Comparison) -> str:
    compulsory = found.measured.workload.compulsory_read_bytes
    row = found.row("HBM read")
    return (
        f"{row.predicted / compulsory:.2f} times the compulsory bytes predicted, {row.measured / compulsory:.2f} times measured:"
        " what of K and V survives in L2 between the CTAs that share it is judged differently"
    )


def _l2(found: Comparison) -> str:
    row, work = found.row("L2 read"), found.measured.workload
    size = work.tensor_bytes
    share = (size["K"] + size["V"]) * work.heads_per_kv * work.pairs / (work.seqlen_q * work.seqlen_k)
    over = row.measured - size["Q"]
    if over <= 0:
        return "fewer bytes than Q, K and V were asked for"
    tile = found.predicted.tile
    return (
        f"K and V were read once for {share * work.seqlen_q / over:,.0f} queries, in the model once for"
        f" {tile.block_m * tile.cluster:,} ({tile}, cluster {tile.cluster})"
    )


def _share(name: str, unit: str) -> Callable[[Comparison], str]:
    def reason(found: Comparison) -> str:
        ours, theirs = (getattr(run.activity, unit) for run in (found.predicted, found.measured))
        cycles = found.row("cycles").error
        return (
            f"the {name} is busy for {ours / theirs - 1:+.1%} cycles and the kernel lasts {cycles:+.1%} cycles in the model,"
            f" so {'the work' if abs(ours / theirs - 1) > abs(cycles) else 'the duration'} is what differs more"
        )

    return reason


_REASONS: Mapping[str, Callable[[Comparison], str]] = {
    "cycles": _cycles,
    "SM clock": _clock,
    "HBM read": _hbm_read,
    "L2 read": _l2,
    "L2 hit rate": _hbm_read,
    "tensor cores": _share("tensor pipe", "tensor"),
    "MUFU": _share("MUFU", "mufu"),
    "issue slots": _share("scheduler", "issue"),
}
