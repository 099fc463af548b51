"""Engine: replays recorded programs on a model of an SM (or several), cycle by cycle, deterministically.

Every warp role advances at its own time, and so does every SM's tensor core. The loop always advances whoever is
earliest (ties: the first warp, tensor cores last), so units are reserved in time order. One sub-partition stands for
the four of an SM: each warpgroup has one warp on each, and they do the same.

The units, one function each, in the order of the code below:
- arithmetic: `issue_rate` warp instructions issued per cycle; FMA, ALU, MUFU, convert and STSM pipes hold an instruction
  for their own cycles, and for more while WGMMA executes, since both need the register file. Then MUFU and the other pipes
  no longer work side by side, and instructions that come faster than WGMMA leaves room for slow it down.
- tensor cores: the SM has one queue of k steps; an arbiter serves them in order of issue (`arbitration` 0) or round
  robin, `arbitration` k steps at a time; a warp blocks at issue while the queue is full, and a k step's issue takes a
  share of its execution, at least some cycles. A group is complete `latency` after its last k step.
  Beside arithmetic a GEMM's issue begins a little later.
- copies: a port per SM, then the chip's L2 and HBM, are servers passed in turn; latency follows. Barriers complete then.

interpreter.py says the same in plain Python; the tests hold the two together, bit for bit.

Numba's on-disk cache does not see changes in other files. So everything jitted lives in this file and reads constants
written in this file only; tables from elsewhere come as arguments, whose dtypes are part of the cache's key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..devices.device import Device
from ..jit import SLICE, compiled, inlined
from ..language.ops import BarrierKind, Op
from ..language.program import Program
from ..results.run import SPAN
from .machine import K_STEP, UNITS, Deadlock, Memory, Replay, Tables, machine_of

__all__ = [
    "MAX_QUEUE", "UNITS", "U_ALU", "U_BARRIERS", "U_FMA", "U_ISSUE", "U_MUFU", "U_SMEM", "U_TENSOR", "U_TMA",
    "Deadlock", "Memory", "Replay", "replay",
]  # fmt: skip

SETUP, LOAD, STORE, STORE_WAIT, WAIT, ARRIVE, WGMMA, WGMMA_WAIT, MMA, COMPUTE, DRAW, ADD = range(12)
MBARRIER, NAMED, CTA, CLUSTER, MEETING = range(5)
FMA, ALU, MUFU, CONVERT, STSM = range(5)
PIPES = 5
U_TMA, U_TENSOR, U_MUFU, U_FMA, U_ALU, U_BARRIERS, U_ISSUE, U_SMEM = range(8)
READY, ON_BARRIER, ON_QUEUE, ON_GROUP, DONE = range(5)
NEVER = 1 << 62
UNDER_WAY, FINISHED, STUCK = range(3)
MAX_QUEUE = 64
"""Room of a warpgroup's WGMMA queue in k steps; a device's `wgmma_queue_ksteps` beyond it (or below 1) is cut to fit."""

# A number that moves in ops.py or machine.py is an error here, not a stale cache.
for _member in (*Op, *BarrierKind):
    if globals().get(_member.name) != _member:
        raise ImportError(f"{_member!r} of ops.py has another number in engine.py; change both together")
if UNITS != ("TMA", "tensor cores", "MUFU", "FMA", "ALU", "barriers", "issue", "smem bytes"):
    raise ImportError("UNITS of machine.py are numbered otherwise in engine.py; change both together")


class State(NamedTuple):
    """Everything that moves during a replay; machine.py says what the records hold."""

    machine: np.ndarray  # MACHINE, one
    code: np.ndarray  # INSTRUCTION
    phases: np.ndarray  # PHASE, records of COMPUTE
    gemms: np.ndarray  # GEMM, of WGMMA and MMA
    copies: np.ndarray  # COPY, of LOAD and STORE
    warps: np.ndarray  # WARP
    queues: np.ndarray  # K_STEP (warp, MAX_QUEUE), a ring per warp
    barriers: np.ndarray  # BARRIER
    completions: np.ndarray  # when each barrier completed each generation
    group_ends: np.ndarray  # when each warp's WGMMA groups were complete
    tensors: np.ndarray  # TENSOR
    fetched: np.ndarray  # (CTA slot, label): tile and step up to which the code is in the instruction caches
    copied: np.ndarray  # of each phase, the step up to which copies of its code of their own have come
    homes: np.ndarray  # of each phase, and behind them of each GEMM: the number of its code; CTAs of one program share it
    brought: np.ndarray  # (SM, code): when it had come to the SM for the first time, 0: it has not
    sms: np.ndarray  # SM
    pipe_free: np.ndarray  # (SM, FMA ALU MUFU convert STSM)
    busy: np.ndarray  # (SM, unit)
    chip: np.ndarray  # CHIP, one
    tile_ends: np.ndarray  # (CTA slot, tile)
    spans: np.ndarray  # SPAN, of SM 0
    last_span: np.ndarray  # the last one of each lane, -1 before the first
    unit_lane: int  # the first unit's lane


# -- recording ----------------------------------------------------------------------------------------------------------


@inlined
def _draw(state, lane, warp, row, wait, start, end):
    """Record a span of SM 0, or lengthen the last one of its lane where it goes on without a gap."""
    spans, count = state.spans, state.chip[0]["spans"]
    if warp["sm"] != 0 or end <= start or count >= spans.shape[0]:
        return
    last = state.last_span[lane]
    if last >= 0:
        span = spans[last]
        if (
            span["end"] == start
            and span["label"] == row["label"]
            and span["warp"] == warp["lane"]
            and span["step"] == row["step"]
            and span["tile"] == row["tile"]
            and span["wait"] == wait
        ):
            span["end"] = end
            return
    span = spans[count]
    span["lane"], span["label"], span["warp"] = lane, row["label"], warp["lane"]
    span["step"], span["tile"], span["wait"] = row["step"], row["tile"], wait
    span["start"], span["end"] = start, end
    state.last_span[lane] = count
    state.chip[0]["spans"] = count + 1


# -- the loop -----------------------------------------------------------------------------------------------------------


@compiled()
def _replay(state, eight_bit, events):
    """Advance whoever is earliest, so many times or until no one can; whether every warp has finished.

    All that it knows is in `state`, so that it can be called again to go on.
    """
    warps = state.warps.shape[0]
    who = 0
    for _ in range(events):
        who, now = _earliest(state)
        if who < 0:
            break
        if who >= warps:
            _serve_k_step(state, who - warps, now)
        else:
            _execute(state, who, now, eight_bit)
    if who >= 0:
        return UNDER_WAY
    finished = True
    for i in range(warps):
        finished = finished and state.warps[i]["state"] == DONE
    return FINISHED if finished else STUCK


@inlined
def _earliest(state):
    """The warp, or behind the warps the SM's tensor core, that can go on first, and when; (-1, 0) if there is none."""
    who, when = -1, NEVER
    for i in range(state.warps.shape[0]):
        warp = state.warps[i]
        if warp["state"] == READY and warp["time"] < when:
            who, when = i, warp["time"]
    for i in range(state.warps.shape[0]):
        warp = state.warps[i]
        if warp["queue_length"] > 0:
            core = state.warps.shape[0] + warp["sm"]
            start = max(state.queues[i, warp["queue_head"]]["issued"], state.sms[warp["sm"]]["tensor_free"])
            if start < when or (start == when and core < who):
                who, when = core, start
    return (who, when) if who >= 0 else (-1, 0)


@inlined
def _execute(state, i, now, eight_bit):
    """One instruction of warp i, or the part of it that comes next."""
    warp = state.warps[i]
    row = state.code[warp["pc"]]
    op = row["op"]
    if op == COMPUTE:
        finished = _compute(state, warp, row, now)
    elif op == WGMMA:
        finished = _issue_wgmma(state, i, row, now, eight_bit)
    elif op == WGMMA_WAIT:
        finished = _wait_for_group(state, warp, row, now)
    elif op == MMA:
        finished = _mma(state, warp, row, now)
    elif op == WAIT:
        finished = _wait(state, warp, row, now)
    elif op == ARRIVE:
        finished = _arrive(state, warp, row, now)
    elif op == LOAD:
        finished = _load(state, warp, row, now)
    elif op == STORE:
        finished = _store(state, warp, row, now)
    elif op == ADD:
        finished = _add(state, warp, row, now)
    elif op == STORE_WAIT:
        finished = _wait_for_stores(state, warp, row, now)
    elif op == DRAW:
        finished = True
        warp["time"] = now + state.machine[0]["draw_latency"]
    else:
        finished = _setup(state, warp, row, now)
    _note(state, warp["time"])
    if finished:
        _finish(state, warp, row)


@inlined
def _finish(state, warp, row):
    """On to the next instruction; a tile ends with the last instruction, and the last store, of any of its warps."""
    end = warp["time"]
    warp["pc"] += 1
    if warp["pc"] == warp["end"]:
        warp["state"] = DONE
        end = max(end, warp["store_done"])
    slot, tile = warp["slot"], row["tile"]
    state.tile_ends[slot, tile] = max(state.tile_ends[slot, tile], end)


@inlined
def _note(state, time):
    state.chip[0]["last_event"] = max(state.chip[0]["last_event"], time)


# -- arithmetic: issue port, FMA, ALU, MUFU and convert pipes -----------------------------------------------------------


@inlined
def _compute(state, warp, row, now):
    """One chunk: its instructions pass the issue port while each pipe it needs works; the last one waits for results."""
    machine, sm, s = state.machine[0], state.sms[warp["sm"]], warp["sm"]
    phase = state.phases[row["record"]]
    moved = phase["stsm"] + phase["loads"] + phase["matrices"]
    instructions = phase["fma"] + phase["alu"] + phase["mufu"] + phase["convert"] + phase["other"] + moved
    start = max(now, sm["issue_free"]) if instructions > 0 else now  # a chain of latencies alone passes no port
    horizon = max(now, sm["wgmma_until"]) + sm["pending"]  # WGMMA already begun executes until then
    if warp["part"] == 0:
        warp["since"] = now

    others = _pipes_free(state, s) > now  # their arithmetic is under way
    fma_run = phase["fma"] > 0 and phase["alu"] + phase["mufu"] + phase["convert"] + phase["interleaved"] == 0
    end = start
    if instructions > 0:
        each = machine["fma_beside_q10"] if fma_run else machine["issue_beside_q10"]
        end += _beside(-(-instructions // machine["issue_rate"]), instructions * each >> 10, start, horizon)
        sm["issue_free"] = end
    state.busy[s, U_ISSUE] += instructions
    for pipe in range(PIPES):
        held = _hold_pipe(state, warp, row, phase, pipe, start, horizon, instructions)
        if phase["loads"] == 0 or phase["goes_on"] == 0:  # loads that nothing waits for yet come meanwhile
            end = max(end, held)
    reading = phase["fma"] + phase["alu"] + phase["mufu"] + phase["convert"]
    if reading > 0 and start < horizon and (phase["interleaved"] == 0 or phase["mufu"] > 0):
        _crowd(state, s, start, end, reading)

    warp["part"] += 1
    finished = warp["part"] == phase["chunks"]
    if finished and phase["goes_on"] == 0:
        end += machine["mufu_latency"] if phase["mufu"] > 0 else machine["dependent"]
    end = max(end, start + phase["stalls"])
    if finished:
        warp["part"] = 0
        chain = phase["latencies"] * machine["shuffle_latency"] + phase["votes"] * machine["vote"]
        chain += phase["divisions"] * machine["divide"]
        branch = machine["branch"]
        if others:
            chain += chain * machine["chain_q10"] >> 10
            branch = machine["branch_beside"]
        end += chain + phase["branches"] * branch
        end = max(end, _fetch(state, warp, row, phase, end))
    _draw(state, warp["lane"], warp, row, 0, now, end)
    warp["time"] = end
    return finished


@inlined
def _fetch(state, warp, row, phase, end):
    """When a phase that has its results at `end` has had its code too. Who comes first fetches it for all.

    The first time on an SM it comes out of L2, slower than anything is done with it; later what is lost between is added.
    """
    machine = state.machine[0]
    home = state.homes[row["record"]]
    first = state.brought[warp["sm"], home]
    code = (row["tile"] << 20) + row["step"] + 2
    is_lost = phase["fetched"] > 0 and state.fetched[warp["slot"], row["label"]] < code
    if is_lost:
        state.fetched[warp["slot"], row["label"]] = code
    if first == 0 or (phase["own"] == 1 and state.copied[row["record"]] < code and row["tile"] == 0):
        state.copied[row["record"]] = code
        first = warp["since"] + (_instructions(phase) * machine["cold_q10"] >> 10)
        if is_lost:
            first += machine["cold_latency"]
        state.brought[warp["sm"], home] = max(first, 1)
    elif is_lost:
        end += machine["fetch_latency"] + (phase["fetched"] * machine["fetch_q10"] >> 10)
    return max(end, first)


@inlined
def _instructions(phase):
    """All of a phase."""
    moved = phase["stsm"] + phase["loads"] + phase["matrices"]
    once = phase["fma"] + phase["alu"] + phase["mufu"] + phase["convert"] + phase["other"] + moved
    return once * phase["chunks"]


@inlined
def _crowd(state, s, start, end, instructions):
    """Arithmetic that needs more of the register file than WGMMA leaves it takes it from WGMMA, until it is done."""
    sm, port = state.sms[s], state.machine[0]["port_q10"]
    left = 1024 - min(1024 * instructions // (end - start), 960)
    longer = port * 1024 // left - 1024
    if longer > 0 and (sm["crowded_until"] <= start or longer > sm["crowded_q10"]):
        sm["crowded_until"], sm["crowded_q10"] = end, longer


@inlined
def _hold_pipe(state, warp, row, phase, pipe, start, horizon, instructions):
    """Hold one pipe, once it is free, for its instructions of the chunk; when it has done them (0 without any)."""
    machine, s = state.machine[0], warp["sm"]
    issue = instructions * machine["issue_beside_q10"]  # of all, which a slow pipe beside WGMMA does not hide
    if pipe == FMA:
        unit, count, cycles, busy = U_FMA, phase["fma"], machine["fma"], machine["fma"]
        slow = count * machine["fma_beside_q10"] >> 10
    elif pipe == ALU:
        unit, count, cycles, busy = U_ALU, phase["alu"], machine["alu"], machine["alu"]
        slow = count * machine["alu_beside_q10"] + issue >> 10
    elif pipe == MUFU:
        unit, count, cycles, busy = U_MUFU, phase["mufu"], machine["mufu_spacing"], machine["mufu"]
        if phase["interleaved"] == 1:
            cycles = busy
        slow = count * machine["mufu_beside_q10"] + issue >> 10
    elif pipe == CONVERT:
        unit, count, cycles, busy = U_ALU, phase["convert"], machine["convert"], machine["convert"]
        slow = count * machine["alu_beside_q10"] + issue >> 10
    else:  # STSM: the tensor cores read their operands through the same port
        unit, count, cycles = U_SMEM, phase["stsm"] + phase["loads"] + phase["matrices"], machine["stsm"]
        busy = cycles * machine["smem_bytes"]
        slow = phase["stsm"] * busy * 1024 // _left_for_stores(state, s) + phase["loads"] * machine["load_beside"]
        if phase["matrices"] > 0:
            slow += (phase["matrices"] * busy * 1024 // _left_for_matrices(state, s)) + (issue >> 10)
    if count == 0:
        return 0
    begin = max(start, state.pipe_free[s, pipe])
    end = begin + _beside(count * cycles, slow, begin, horizon)
    state.pipe_free[s, pipe] = end
    state.busy[s, unit] += count * busy
    if pipe == STSM and phase["matrices"] > 0:
        state.sms[s]["moving_until"] = end
    if pipe == STSM and phase["loads"] > 0:
        state.sms[s]["loading_until"] = end
    if pipe < CONVERT:
        _draw(state, state.unit_lane + unit, warp, row, 0, begin, end)
    return end


@inlined
def _left_for_stores(state, s):
    """Bytes a cycle, times 2^10, for stores to shared memory beside GEMMs under way: what their operands leave, within limits."""
    machine = state.machine[0]
    return max(1, machine["store_least_q10"], min(machine["store_most_q10"], _unread(state, s)))


@inlined
def _left_for_matrices(state, s):
    """The same for a stream of LDSM and STSM, which takes some of what operands would."""
    machine = state.machine[0]
    return max(1, min(machine["matrix_most_q10"], _unread(state, s) + machine["matrix_more_q10"]))


@inlined
def _unread(state, s):
    """What the operands of the GEMMs under way leave of shared memory, in the same unit."""
    machine, sm = state.machine[0], state.sms[s]
    if sm["pending"] <= 0:
        return machine["smem_bytes"] << 10
    return ((machine["smem_bytes"] * sm["pending"] - sm["pending_bytes"]) << 10) // sm["pending"]


@inlined
def _pipes_free(state, s):
    """When all arithmetic pipes of an SM are free."""
    free = state.pipe_free
    return max(free[s, FMA], free[s, ALU], free[s, MUFU], free[s, CONVERT])


@inlined
def _beside(work, slow, start, horizon):
    """Cycles from `start` of what takes `work` alone and `slow` beside WGMMA, which executes until `horizon`."""
    if start >= horizon or slow <= work:
        return work
    if start + slow <= horizon:
        return slow
    return (horizon - start) + work - (horizon - start) * work // slow


# -- tensor cores -------------------------------------------------------------------------------------------------------


@inlined
def _issue_wgmma(state, i, row, now, eight_bit):
    """First the start of the group, then one k step at a time into the SM's queue, while it has room."""
    machine, warp = state.machine[0], state.warps[i]
    sm, s = state.sms[warp["sm"]], warp["sm"]
    gemm = state.gemms[row["record"]]
    if warp["part"] == 0:
        warp["part"] = 1
        warp["since"] = now
        sm["pending"] += gemm["k_steps"] * _k_step_cycles(machine, gemm, eight_bit)
        sm["pending_bytes"] += gemm["k_steps"] * _operand_bytes(gemm)
        state.busy[s, U_ISSUE] += row["issues"]
        warp["time"] = now + machine["wgmma_start"]
        home = state.homes[state.phases.shape[0] + row["record"]]
        if state.brought[warp["sm"], home] == 0:
            state.brought[warp["sm"], home] = 1
            warp["time"] += row["issues"] * machine["cold_q10"] >> 10
        if max(_pipes_free(state, s), sm["moving_until"]) > now:
            warp["time"] += machine["wgmma_beside"]
        return False
    if warp["admitted"] == 0:
        if sm["steps"] >= min(max(1, machine["queue"]), MAX_QUEUE):
            warp["state"], warp["target"] = ON_QUEUE, sm["tickets"]
            sm["tickets"] += 1
            return False
        sm["steps"] += 1
    else:
        warp["admitted"], now = 0, sm["served"]
    sm["issuer"] = i + 1

    step = state.queues[i, (warp["queue_head"] + warp["queue_length"]) % MAX_QUEUE]
    step["cycles"], step["issued"], step["instruction"] = _k_step_cycles(machine, gemm, eight_bit), now, warp["pc"]
    step["ends_group"], step["nbytes"] = warp["part"] == gemm["k_steps"], _operand_bytes(gemm)
    step["products"] = _products(machine, gemm, eight_bit)
    warp["queue_length"] += 1
    state.busy[s, U_SMEM] += step["nbytes"]

    warp["time"] = now + max(machine["wgmma_issue"], step["cycles"] * machine["wgmma_issue_q10"] >> 10)
    warp["part"] += 1
    if warp["part"] <= gemm["k_steps"]:
        return False
    warp["part"] = 0
    sm["issuer"] = 0
    warp["committed"] += 1
    _draw(state, warp["lane"], warp, row, 0, warp["since"], warp["time"])
    return True


@inlined
def _operand_bytes(gemm):
    """What one k step reads from shared memory: 32 bytes of K per row of A, if it is there, and of B once for 64 rows of A."""
    of_b = max(1, gemm["m"] >> 6) * gemm["n"]
    return 32 * (of_b if gemm["a_in_registers"] == 1 else gemm["m"] + of_b)


@inlined
def _k_step_cycles(machine, gemm, eight_bit):
    """Cycles of the tensor cores for one k step: its products, or the reading of its operands."""
    return max(_products(machine, gemm, eight_bit), -(-_operand_bytes(gemm) // machine["smem_bytes"]))


@inlined
def _products(machine, gemm, eight_bit):
    """Cycles that they multiply for one k step; waiting for operands they are not busy, as counters have it."""
    rate = machine["tensor_flops_8bit"] if eight_bit else machine["tensor_flops"]
    return -(-2 * gemm["m"] * gemm["n"] * gemm["k_per_step"] // rate)


@inlined
def _serve_k_step(state, s, now):
    """The tensor cores of SM s execute the k step that the arbiter chooses."""
    machine, sm = state.machine[0], state.sms[s]
    i = _oldest(state, s) if machine["arbitration"] == 0 else _next_in_turn(state, s, now)
    sm["tensor_run"] = sm["tensor_run"] + 1 if i == sm["tensor_owner"] else 1
    sm["tensor_owner"] = i
    warp = state.warps[i]
    step = state.queues[i, warp["queue_head"]]
    warp["queue_head"] = (warp["queue_head"] + 1) % MAX_QUEUE
    warp["queue_length"] -= 1
    sm["steps"] -= 1

    end = now + step["cycles"]
    if sm["crowded_until"] > now:
        end += step["cycles"] * sm["crowded_q10"] >> 10
    if sm["adding_until"] > now:
        end += step["cycles"] * machine["adding_q10"] >> 10
    if sm["loading_until"] > now:
        half = step["cycles"] * machine["smem_bytes"] >> 1
        wide = min(half, max(0, step["nbytes"] - half))  # operands beyond half of shared memory's rate
        longer = machine["loading_least_q10"] + (machine["loading_most_q10"] - machine["loading_least_q10"]) * wide // half
        end += step["cycles"] * longer >> 10
    elif state.pipe_free[s, STSM] > now:  # stores have their least even where operands leave none
        both = (step["nbytes"] << 10) + step["cycles"] * machine["store_least_q10"]
        if both > step["cycles"] * machine["smem_bytes"] << 10:
            end += step["cycles"] * machine["storing_q10"] >> 10
        elif sm["moving_until"] > now:
            end += step["cycles"] * machine["moving_q10"] >> 10
    sm["tensor_free"] = sm["wgmma_until"] = end
    sm["pending"] -= step["cycles"]
    sm["pending_bytes"] -= step["nbytes"]
    state.busy[s, U_TENSOR] += step["products"]
    _draw(state, state.unit_lane + U_TENSOR, warp, state.code[step["instruction"]], 0, now, end)
    sm["served"] = now
    _admit(state, s)
    if step["ends_group"] == 1:
        done = end + machine["wgmma_latency"]
        state.group_ends[warp["first_group"] + warp["finished"]] = done
        warp["finished"] += 1
        _note(state, done)
        if warp["state"] == ON_GROUP and warp["finished"] >= warp["target"]:
            warp["state"] = READY
            warp["time"] = warp["since"]


@inlined
def _admit(state, s):
    """Who waits for room in the SM's queue has it now: the warp that issued last, if it is amid a GEMM, or the longest waiting."""
    chosen, issuer = -1, state.sms[s]["issuer"] - 1
    for i in range(state.warps.shape[0]):
        warp = state.warps[i]
        if warp["sm"] == s and warp["state"] == ON_QUEUE and (chosen < 0 or warp["target"] < state.warps[chosen]["target"]):
            chosen = i
    if issuer >= 0 and state.warps[issuer]["state"] == ON_QUEUE:
        chosen = issuer
    if chosen >= 0:
        warp = state.warps[chosen]
        warp["state"], warp["admitted"] = READY, 1
        state.sms[s]["steps"] += 1


@inlined
def _oldest(state, s):
    """The warp whose first k step in its queue was issued first."""
    chosen = -1
    issued = NEVER
    for i in range(state.warps.shape[0]):
        warp = state.warps[i]
        if warp["sm"] == s and warp["queue_length"] > 0 and state.queues[i, warp["queue_head"]]["issued"] < issued:
            chosen, issued = i, state.queues[i, warp["queue_head"]]["issued"]
    return chosen


@inlined
def _next_in_turn(state, s, now):
    """The warp served last, until its `arbitration` k steps are over; then the next one round the SM."""
    owner, warps = state.sms[s]["tensor_owner"], state.warps.shape[0]
    if owner >= 0 and state.sms[s]["tensor_run"] < state.machine[0]["arbitration"] and _offers(state, owner, s, now):
        return owner
    state.sms[s]["tensor_run"] = 0
    for k in range(1, warps + 1):
        i = (owner + k) % warps
        if _offers(state, i, s, now):
            return i
    return -1


@inlined
def _offers(state, i, s, now):
    warp = state.warps[i]
    return warp["sm"] == s and warp["queue_length"] > 0 and state.queues[i, warp["queue_head"]]["issued"] <= now


@inlined
def _wait_for_group(state, warp, row, now):
    """Until at most row["target"] groups of the warp are outstanding; with none to wait for it takes no time."""
    target = warp["committed"] - row["target"]
    if target <= 0:
        return True
    if warp["finished"] < target:
        warp["state"], warp["since"], warp["target"] = ON_GROUP, now, target
        return False
    done = max(now, state.group_ends[warp["first_group"] + target - 1])
    _draw(state, warp["lane"], warp, row, 1, now, done)
    warp["time"] = done
    return True


@inlined
def _mma(state, warp, row, now):
    """mma.sync, one k step: operands from shared memory by ldmatrix, then the tensor cores; the warp waits for the last.

    The sub-partition's issue port serves nothing else meanwhile: mma.sync and arithmetic exclude each other.
    """
    machine, sm, s = state.machine[0], state.sms[warp["sm"]], warp["sm"]
    gemm = state.gemms[row["record"]]
    m, n, k, operand_bytes = gemm["m"], gemm["n"], gemm["k_per_step"], gemm["smem_bytes"]
    cycles = -(-2 * m * n * k * 1024 // machine["mma_flops_q10"])
    copied = max(now, sm["smem_free"]) + -(-operand_bytes // machine["smem_bytes"])
    sm["smem_free"] = copied
    if warp["part"] == 0:  # later k steps load their operands under the one before
        copied += machine["smem_latency"]
    begin = max(copied, sm["tensor_free"], sm["issue_free"])
    sm["tensor_free"] = begin + cycles
    sm["issue_free"] = begin + cycles + (operand_bytes // 2048 * machine["ldmatrix_q10"] >> 10)
    state.busy[s, U_TENSOR] += cycles
    state.busy[s, U_SMEM] += operand_bytes
    state.busy[s, U_ISSUE] += max(1, m // 64) * (n // 8) + operand_bytes // 2048
    _draw(state, state.unit_lane + U_TENSOR, warp, row, 0, begin, begin + cycles)

    warp["part"] += 1
    finished = warp["part"] == gemm["k_steps"]
    warp["time"] = begin
    if finished:
        warp["part"] = 0
        warp["time"] = begin + cycles + machine["mma_latency"]
    _draw(state, warp["lane"], warp, row, 0, now, warp["time"])
    return finished


# -- barriers -----------------------------------------------------------------------------------------------------------


@inlined
def _wait(state, warp, row, now):
    """Until the barrier has completed row["target"] generations, then what the wait itself costs."""
    machine, barrier, target = state.machine[0], state.barriers[row["barrier"]], row["target"]
    if barrier["generation"] < target:
        warp["state"], warp["since"], warp["awaits"], warp["target"] = ON_BARRIER, now, row["barrier"], target
        return False
    done = now
    if target > barrier["initial"]:
        done = max(now, state.completions[barrier["first_completion"] + target - 1])
    _draw(state, warp["lane"], warp, row, 1, now, done)
    state.busy[warp["sm"], U_ISSUE] += row["issues"]
    if barrier["kind"] == NAMED:
        warp["time"] = done + machine["named_wait"]
        warp["turn_since"] = warp["time"]
    elif barrier["kind"] == MEETING:
        warp["time"] = done + machine["named_wait"]
    elif barrier["kind"] == CTA:
        warp["time"] = done + machine["cta_launch"]
    else:
        warp["time"] = done + machine["mbarrier_wait"]
    return True


@inlined
def _arrive(state, warp, row, now):
    """One arrival, on its way for as long as its kind of barrier takes; the last warp out of a CTA waits for its stores."""
    machine, kind = state.machine[0], state.barriers[row["barrier"]]["kind"]
    if kind == NAMED:
        at = now + machine["named_arrive"]
        _draw(state, state.unit_lane + U_BARRIERS, warp, row, 0, warp["turn_since"], now)
    elif kind == MEETING:
        at = now + machine["named_arrive"]
    elif kind == CLUSTER:
        at = now + machine["cluster_arrive"]
    elif kind == CTA:
        at = max(now, warp["store_done"])
        slot, tile = warp["slot"], row["tile"]
        state.tile_ends[slot, tile] = max(state.tile_ends[slot, tile], at)
    else:
        at = now + machine["mbarrier_arrive"]
    warp["time"] = now + (machine["mbarrier_issue"] if kind == MBARRIER else 1)
    state.busy[warp["sm"], U_ISSUE] += row["issues"]
    _arrival(state, row["barrier"], at)
    return True


@inlined
def _arrival(state, number, at):
    """Count an arrival at time `at`; the last one expected completes a generation and wakes who waits for it."""
    barrier = state.barriers[number]
    barrier["latest"] = max(barrier["latest"], at)
    barrier["arrivals"] += 1
    if barrier["arrivals"] < barrier["expected"]:
        return
    barrier["arrivals"] = 0
    state.completions[barrier["first_completion"] + barrier["generation"]] = barrier["latest"]
    barrier["generation"] += 1
    for i in range(state.warps.shape[0]):
        warp = state.warps[i]
        if warp["state"] == ON_BARRIER and warp["awaits"] == number and barrier["generation"] >= warp["target"]:
            warp["state"] = READY  # it reads the barrier again, from when it came
            warp["time"] = warp["since"]


# -- copies: the SM's ports, L2, HBM --------------------------------------------------------------------------------------


@inlined
def _service(nbytes, q20):
    """Cycles a server of 2^20 / q20 bytes per cycle needs, at least one."""
    return max(1, (nbytes * q20 + (1 << 20) - 1) >> 20)


@inlined
def _load(state, warp, row, now):
    """A copy into shared memory. By TMA one instruction does it; by cp.async the warp issues 16 bytes per lane itself."""
    machine, sm, s, chip = state.machine[0], state.sms[warp["sm"]], warp["sm"], state.chip[0]
    copy = state.copies[row["record"]]
    nbytes, shared, tensor = copy["nbytes"], max(1, copy["sharing"]), state.tensors[warp["first_tensor"] + copy["tensor"]]
    latency = machine["l2_latency"]
    if copy["by_warps"] == 1:
        instructions = max(1, nbytes // (512 * 4))  # four warps, 32 lanes each
        warp["time"] = max(now, sm["issue_free"]) - (-instructions // machine["issue_rate"])
        sm["issue_free"] = warp["time"]
    else:
        instructions = 1
        warp["time"] = now + copy["boxes"] * machine["tma_issue"]
        latency += machine["tma_latency"]

    start = max(warp["time"], sm["load_free"])
    sm["load_free"] = start + _service(nbytes, machine["port_q20"])
    chip["l2_free"] = max(chip["l2_free"], start) + _service(nbytes // shared, machine["l2_q20"])
    done = max(sm["load_free"], chip["l2_free"])
    missed = nbytes * tensor["read_miss_q10"] >> 10
    if missed > 0:
        chip["hbm_free"] = max(chip["hbm_free"], start) + _service(missed // shared, machine["hbm_q20"])
        done = max(done, chip["hbm_free"])
    latency += (machine["hbm_latency"] - machine["l2_latency"]) * tensor["read_late_q10"] >> 10
    state.busy[s, U_ISSUE] += instructions
    state.busy[s, U_TMA] += sm["load_free"] - start
    state.busy[s, U_SMEM] += nbytes
    _draw(state, state.unit_lane + U_TMA, warp, row, 0, start, sm["load_free"])
    _arrival(state, row["barrier"], done + latency)
    return True


@inlined
def _store(state, warp, row, now):
    """A copy out of shared memory, asynchronous: the warp runs on. By TMA, or by the warp's own stores."""
    machine, sm, s, chip = state.machine[0], state.sms[warp["sm"]], warp["sm"], state.chip[0]
    copy = state.copies[row["record"]]
    nbytes, by_tma = copy["nbytes"], copy["boxes"] > 0
    start = max(now, sm["store_free"])
    sm["store_free"] = start + _service(nbytes, machine["store_q20"] if by_tma else machine["port_q20"])
    chip["l2_free"] = max(chip["l2_free"], start) + _service(nbytes, machine["l2_q20"])
    done = max(sm["store_free"], chip["l2_free"])
    written = nbytes * state.tensors[warp["first_tensor"] + copy["tensor"]]["write_through_q10"] >> 10
    if written > 0:
        chip["hbm_free"] = max(chip["hbm_free"], start) + _service(written, machine["hbm_q20"])
        done = max(done, chip["hbm_free"])
    warp["store_done"] = max(warp["store_done"], done + (machine["store_latency"] if by_tma else machine["smem_latency"]))
    state.busy[s, U_SMEM] += nbytes
    state.busy[s, U_ISSUE] += 1
    _note(state, warp["store_done"])
    warp["time"] = now + max(1, copy["boxes"] * machine["tma_issue"])
    return True


@inlined
def _add(state, warp, row, now):
    """A copy out that adds to what is there, asynchronous. By one bulk copy, or by instructions that pass the issue port."""
    machine, sm, s, chip = state.machine[0], state.sms[warp["sm"]], warp["sm"], state.chip[0]
    copy = state.copies[row["record"]]
    nbytes, instructions = copy["nbytes"], 1
    warp["time"] = now + machine["tma_issue"]
    if copy["by_warps"] > 0:
        instructions = max(1, nbytes // (4 * 32 * copy["by_warps"]))
        warp["time"] = max(now, sm["issue_free"]) - (-instructions // machine["issue_rate"])
        sm["issue_free"] = warp["time"]
    start = max(now, sm["store_free"])
    sm["store_free"] = start + max(_service(nbytes, machine["add_q20"]), _service(nbytes, machine["add_chip_q20"]))
    chip["l2_free"] = max(chip["l2_free"], start) + _service(nbytes, machine["l2_q20"])
    done = max(sm["store_free"], chip["l2_free"])
    if copy["by_warps"] > 0:
        warp["time"] = max(warp["time"], start)  # its instructions wait for those before
        sm["adding_until"] = sm["store_free"]
    else:
        state.busy[s, U_SMEM] += nbytes
    warp["store_done"] = max(warp["store_done"], done + machine["store_latency"])
    state.busy[s, U_ISSUE] += instructions
    _note(state, warp["store_done"])
    return True


@inlined
def _wait_for_stores(state, warp, row, now):
    """Until every store of the warp has been read from shared memory."""
    warp["time"] = max(now, warp["store_done"])
    _draw(state, warp["lane"], warp, row, 1, now, warp["time"])
    return True


@inlined
def _setup(state, warp, row, now):
    """The prologue of a CTA."""
    warp["time"] = now + state.machine[0]["setup"]
    _draw(state, warp["lane"], warp, row, 0, now, warp["time"])
    return True


# -- the door -----------------------------------------------------------------------------------------------------------


def replay(
    programs: Sequence[Program],
    device: Device,
    memory: Memory,
    placement: Sequence[int] | None = None,
    max_spans: int = 0,
    eight_bit: bool = False,
) -> Replay:
    """Replay one program per CTA slot; `placement` gives each slot's SM (default: all on SM 0).

    `max_spans` bounds the spans recorded on SM 0 (0: none). `eight_bit` runs WGMMA at the e4m3 rate. Raises Deadlock
    naming every warp that is stuck, its verb and its buffer.
    """
    tables = Tables(programs, placement or [0] * len(programs), memory)
    state = State(
        machine=machine_of(device, memory),
        code=tables.code,
        phases=tables.phases,
        gemms=tables.gemms,
        copies=tables.copies,
        warps=tables.warps,
        queues=np.zeros((len(tables.warps), MAX_QUEUE), K_STEP),
        barriers=tables.barriers,
        completions=tables.completions,
        group_ends=tables.group_ends,
        tensors=tables.tensors,
        fetched=np.zeros((len(programs), len(tables.labels)), np.int64),
        copied=np.zeros(len(tables.phases), np.int64),
        homes=tables.homes,
        brought=np.zeros((len(tables.sms), len(tables.homes)), np.int64),
        sms=tables.sms,
        pipe_free=tables.pipe_free,
        busy=tables.busy,
        chip=tables.chip,
        tile_ends=tables.tile_ends,
        spans=np.zeros(max_spans, SPAN),
        last_span=np.full(len(tables.lanes), -1),
        unit_lane=tables.unit_lane,
    )
    ended = UNDER_WAY
    while ended == UNDER_WAY:
        ended = _replay(state, eight_bit, SLICE)
    if ended == STUCK:
        raise Deadlock("; ".join(tables.stuck()))
    chip = tables.chip[0]
    spans = state.spans[: chip["spans"]]
    return Replay(int(chip["last_event"]), tables.tile_ends, tables.busy, tables.lanes, tables.labels, spans)
