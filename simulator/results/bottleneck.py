"""Bottleneck: the cause that costs a run most, in one sentence, with what would help.

The rule. Each loss of the breakdown would save its share if it were gone, but no more than HBM and L2 leave: a kernel
that moves its bytes at full bandwidth gains nothing from better tiles alone. HBM and L2 themselves, where they are busy enough
to matter, are asked: they save what a prediction with twice their bandwidth says. The largest saving is the cause. Between
GEMMs a warpgroup goes through its softmax and back: if faster exponentials shorten the run, that is what GEMMs wait for. Where
none is notable, either bandwidth and a loss hide each other, or the tensor cores do useful work nearly all the time, and
their rate or the power limit decides, whichever saves more twice as high. No unit is a cause for being busy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..devices.device import Device
from ..devices.doubling import saving
from ..problem.parts import MOST_ROWS
from ..schedules import find_schedule
from . import metrics
from .roofline import roofline
from .run import Bottleneck, Run

TimeWith = Callable[[Device], float]
"""Predicts the seconds of the same call on another device."""
UNKNOWN = Bottleneck("unknown", "not examined")
NOTABLE = 0.05
"""A saving below this is not named: the cycles of a prediction are no more certain than a few percent."""
SHORT = 8
"""Loops of fewer blocks hardly overlap: the first softmax and the last GEMM of a tile stand alone."""


@dataclass(frozen=True)
class Facts:
    """What the sentences speak of, beyond the run: the grid and loops of the kernel that a part is lost in most."""

    kernel: str | None  # its name, where the schedule has several
    ctas: int
    slots: int  # CTAs that fit the device at a time
    blocks: float  # K/V blocks of a CTA, on average
    whole_heads: bool  # whether a CTA walks all queries of a head


def explain(run: Run, device: Device, facts_of: Callable[[str], Facts], time_with: TimeWith) -> Bottleneck:
    """Name the cause of a predicted run's time; `facts_of` has the facts of the kernel that loses most of a part."""
    busy = {"HBM": _hbm_busy(run, device), "L2": _l2_busy(run, device)}
    fullest = max(busy, key=busy.get)
    room = 1.0 - min(1.0, busy[fullest])
    savings = {name: min(share, room) for name, share in run.breakdown.losses.items()}
    savings["no_cta"] *= _divisible(device, facts_of("no_cta"))
    for name, share in busy.items():
        asked = share if name == "HBM" else max(share, _lookups(run, device))
        if asked / 2 >= NOTABLE:  # twice as fast it saves about half of that time, at most
            savings[name] = saving(name, device, time_with).saved
    cause = max(savings, key=savings.get)
    if cause == "latency" and savings["softmax"] >= NOTABLE and saving("MUFU", device, time_with).saved >= NOTABLE:
        cause = "softmax"
    if savings[cause] < NOTABLE:
        lost, share = next(iter(run.breakdown.losses.items()))
        if share < NOTABLE:
            return _at_the_roof(run, device, time_with)
        return _together(fullest, busy[fullest], _SENTENCES[lost][0], share)
    if cause in busy:
        return _bandwidth(cause, run, busy[cause], savings[cause])
    name, sentence = _SENTENCES[cause]
    facts = facts_of(cause)
    why = sentence(run, device, facts, time_with)
    if facts.kernel:
        why = f"above all in its kernel '{facts.kernel}': {why}"
    bound = roofline(run.workload, device, run.sm_clock_hz, standard=run.goes_through_hbm)
    if bound.binding == "hbm" and bound.hbm_cycles >= NOTABLE * run.cycles:
        why += f"; HBM, which bounds this workload, needs {bound.hbm_cycles / run.cycles:.0%} of the time"
    return Bottleneck(name, why)


def _hbm_busy(run: Run, device: Device) -> float:
    """Share of the time in which HBM moves bytes, at the bandwidth that a copy reaches."""
    moved = run.traffic.total("hbm_read") + run.traffic.total("hbm_write")
    return moved / metrics.time_s(run) / device.hbm_achieved_bytes_per_s


def _l2_busy(run: Run, device: Device) -> float:
    """The same of L2, at the rate at which it delivers what many SMs read together."""
    return (run.traffic.total("l2_read") + run.traffic.total("l2_write")) / device.l2_bytes_per_cycle / run.cycles


def _lookups(run: Run, device: Device) -> float:
    """Bytes that L2 looks up, of those it can; loads queue for that, but it bounds nothing: a miss counts twice."""
    looked_up = run.traffic.l2_lookup_bytes + run.traffic.total("l2_write")
    return looked_up / device.l2_lookup_bytes_per_cycle / run.cycles


def _divisible(device: Device, facts: Facts) -> float:
    """Share of a CTA's time that idle SMs could take over, were its K/V blocks split among them; one block stays whole."""
    if facts.whole_heads:
        return 1.0
    return 1.0 - min(facts.blocks, max(1.0, facts.ctas * facts.blocks / device.sms)) / facts.blocks if facts.blocks else 0.0


# -- no loss is notable ---------------------------------------------------------------------------------------------------


def _at_the_roof(run: Run, device: Device, time_with: TimeWith) -> Bottleneck:
    useful = f"the tensor cores do useful work {run.breakdown.useful:.0%} of the time"
    found = {name: saving(name, device, time_with).saved for name in ("tensor cores", "power limit")}
    if found["power limit"] > max(found["tensor cores"], NOTABLE):
        mhz, highest = run.sm_clock_hz / 1e6, device.max_clock_hz / 1e6
        return Bottleneck(
            "power limit",
            f"{useful}, and {device.power_limit_w:.0f} W hold their clock at {mhz:.0f} of {highest:.0f} MHz; "
            f"twice the limit would save {found['power limit']:.0%}, no schedule can",
        )
    return Bottleneck("tensor cores", f"{useful}: no schedule can save much; fewer FLOPs would, as by a mask, or a narrower dtype")


def _together(server: str, busy: float, lost: str, share: float) -> Bottleneck:
    return Bottleneck(
        f"{server} and {lost}",
        f"{server} moves bytes {busy:.0%} of the time and the tensor cores lose {share:.0%} of theirs to {lost}: "
        "each hides behind the other, so only less of both would save much",
    )


# -- bandwidth ------------------------------------------------------------------------------------------------------------


def _bandwidth(name: str, run: Run, busy: float, saved: float) -> Bottleneck:
    helps = {
        "HBM": "only fewer bytes help, as by GQA or a narrower dtype",
        "L2": "larger Q tiles, or clusters that share K and V, would read less",
    }[name]
    if name == "HBM" and run.goes_through_hbm:
        crossing = "P, dP and dS" if run.workload.backward else "S and P"
        helps = f"{crossing} cross it; keeping them on chip is the cure (IO-awareness)"
    return Bottleneck(name, f"bytes move {busy:.0%} of the time, twice the bandwidth would save {saved:.0%}; {helps}")


# -- what the tensor cores lose -------------------------------------------------------------------------------------------


def _padding(run: Run, device: Device, facts: Facts, time_with: TimeWith) -> str:
    work, tile = run.workload, run.tile
    if work.lengths:
        rows = sum(-(-queries // tile.block_m) for queries, _ in work.sequences) * tile.block_m
        return (
            f"{rows - work.total_q:,} of {rows:,} query rows are padding, at the ends of {work.batch} sequences, "
            f"{run.breakdown.useful:.1%} of the tensor cores' time is useful work; a tile with fewer rows would waste less"
        )
    rows, keys = (-(-n // block) * block for n, block in ((work.seqlen_q, tile.block_m), (work.seqlen_k, tile.block_n)))
    if (rows - work.seqlen_q) / rows < (keys - work.seqlen_k) / keys:
        what, helps = f"{keys - work.seqlen_k} of {keys} keys", "a tile with fewer keys would waste less"
    else:
        what, helps = f"{rows - work.seqlen_q} of {rows} query rows", "a tile with fewer rows would waste less"
        if work.seqlen_q * 2 <= tile.block_m:
            packed = min(work.heads_per_kv, tile.block_m // work.seqlen_q)
            helps = "split-KV and a narrower tile would help"
            if packed > 1:
                helps = f"packing the {packed} query heads of a K/V head into its rows would do the same in 1/{packed}; " + helps
            helps += _few_queries(run)
    return f"{what} are padding, {run.breakdown.useful:.1%} of the tensor cores' time is useful work; {helps}"


def _masked(run: Run, device: Device, facts: Facts, time_with: TimeWith) -> str:
    if run.schedule.startswith("standard"):
        return f"{run.breakdown.masked:.0%} of the time goes into masked pairs; a fused kernel leaves out masked tiles"
    return f"{run.breakdown.masked:.0%} of the time goes into masked pairs of tiles on the diagonal; smaller tiles hug it"


def _slow_gemms(run: Run, device: Device, facts: Facts, time_with: TimeWith) -> str:
    if run.breakdown.slow_gemms and not find_schedule(run.schedule, run.workload.direction).hopper:
        return (
            f"mma.sync reaches {device.mma_sync_efficiency:.0%} of the tensor cores' peak, which costs "
            f"{run.breakdown.slow_gemms:.0%} of the time; WGMMA reaches it"
        )
    return f"shared memory delivers operands too late, {run.breakdown.slow_gemms:.0%} of the time; wider tiles read less"


def _softmax(run: Run, device: Device, facts: Facts, time_with: TimeWith) -> str:
    text = f"tensor cores wait for softmax {run.breakdown.softmax:.0%} of the time"
    if run.breakdown.latency > run.breakdown.softmax:
        text += f", and on the way from a GEMM to it and back {run.breakdown.latency:.0%}"
    if facts.blocks < SHORT:
        return f"{text}: with {facts.blocks:.2g} K/V blocks a tile, its first softmax and last GEMM overlap little"
    saved = saving("MUFU", device, time_with).saved
    if saved > NOTABLE:
        return f"{text}; MUFU twice as fast would save {saved:.0%}, more overlap or fewer exponentials would help"
    return f"{text}; more overlap would hide it, within a warpgroup or between two"


def _memory(run: Run, device: Device, facts: Facts, time_with: TimeWith) -> str:
    return (
        f"tensor cores wait for loads and stores {run.breakdown.memory:.0%} of the time, not for bandwidth; "
        "more stages would hide the latency"
    )


def _latency(run: Run, device: Device, facts: Facts, time_with: TimeWith) -> str:
    return (
        f"{run.breakdown.latency:.0%} of the time goes from GEMM to GEMM: results, barriers and turns that are waited for; "
        "a GEMM in flight meanwhile would fill it, as by overlap within a warpgroup"
    )


def _prologue(run: Run, device: Device, facts: Facts, time_with: TimeWith) -> str:
    return (
        f"tensor cores wait {run.breakdown.prologue:.0%} of the time for a tile's first GEMM, {facts.blocks:.2g} K/V blocks each; "
        "a persistent kernel loads the next tile under this one"
    )


def _epilogue(run: Run, device: Device, facts: Facts, time_with: TimeWith) -> str:
    return (
        f"tensor cores wait {run.breakdown.epilogue:.0%} of the time for a tile's last results to leave, "
        f"{facts.blocks:.2g} K/V blocks a tile; another warpgroup's next tile could run meanwhile"
    )


def _tail(run: Run, device: Device, facts: Facts, time_with: TimeWith) -> str:
    waves, over = facts.ctas / facts.slots, facts.ctas % facts.slots
    if run.workload.causal or waves > 100:
        share = f"{run.breakdown.tail:.0%} of the SMs' time is over before the last of {facts.ctas:,} CTAs ends"
        return f"{share}; the longest first, or split finer, would end together"
    return (
        f"{facts.ctas:,} CTAs are {waves:.2f} waves: SMs idle {run.breakdown.tail:.0%} of the time while the last {over} run; "
        f"{over} fewer, or smaller ones (split-KV, a smaller tile), would save the wave"
    )


def _no_cta(run: Run, device: Device, facts: Facts, time_with: TimeWith) -> str:
    text = f"{_ctas(facts.ctas)} {device.sms - facts.ctas} of {device.sms} SMs idle"
    if facts.whole_heads:
        return f"{text}: a CTA walks a whole head; rows in parallel, as later FlashAttention-1 kernels have them, would fill them"
    return f"{text}; split the work finer: split-KV, a smaller tile{_few_queries(run)}"


def _few_queries(run: Run) -> str:
    """Which schedule does so, where the query rows of a K/V head fit one of its tiles."""
    work = run.workload
    few = not work.backward and work.seqlen_q * work.heads_per_kv <= MOST_ROWS and run.tile.block_m > MOST_ROWS
    return ": --schedule decode does" if few else ""


def _ctas(count: int) -> str:
    return "1 CTA leaves" if count == 1 else f"{count} CTAs leave"


def _launch(run: Run, device: Device, facts: Facts, time_with: TimeWith) -> str:
    return f"launching takes {run.breakdown.launch:.0%} of the time; a CUDA graph, or more work in one call, would hide it"


_SENTENCES = {
    "padding": ("padding", _padding),
    "masked": ("masked work", _masked),
    "slow_gemms": ("slow GEMMs", _slow_gemms),
    "softmax": ("exposed softmax", _softmax),
    "memory": ("load latency", _memory),
    "latency": ("latency between GEMMs", _latency),
    "prologue": ("prologue", _prologue),
    "epilogue": ("epilogue", _epilogue),
    "tail": ("last wave", _tail),
    "no_cta": ("idle SMs", _no_cta),
    "launch": ("launch", _launch),
}
