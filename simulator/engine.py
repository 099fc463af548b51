"""Engine: replays recorded programs on a model of an SM (or several), cycle by cycle, deterministically.

Every warp role is an actor with a program counter and a time; every SM's tensor core is one more. The loop always
advances whoever is earliest (ties: lower actor first, tensor cores last), so units are reserved in time order. One
sub-partition stands for the four of an SM: each warpgroup has one warp on each, and they do the same.

The units, in the order of the code below:
- issue: one warp instruction per cycle; FMA, ALU, MUFU and convert pipes hold an instruction for their own cycles.
- tensor cores: each warpgroup has a queue of k steps; an arbiter serves them in order of issue (`arbitration` 0) or
  round robin, `arbitration` k steps at a time; a warp blocks at issue while its queue is full. A group is complete
  `latency` after its last k step. While WGMMA executes, the other pipes lose `interference` of their rate: both
  need the register file.
- copies: a per-SM port, the chip's L2 and HBM are servers passed in turn; latency follows. Barriers complete then.

Everything the jitted loop calls lives in this file, because Numba's on-disk cache does not see changes elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np

from .device import Device
from .program import INSTRUCTION, Program
from .run import SPAN, Lane
from .verbs import BarrierKind, Op

# -- the machine as the jitted loop reads it: one int64 vector ----------------------------------------------------------
MACHINE = (
    "fma alu mufu mufu_spacing convert dependent shuffle_latency mufu_latency "
    "tensor_flops tensor_flops_8bit mma_flops_q10 wgmma_start wgmma_contended wgmma_issue wgmma_latency queue arbitration interference_q10 dilation_q10 mma_latency "
    "smem_bytes smem_latency port_q20 l2_q20 hbm_q20 l2_latency tma_latency hbm_latency tma_issue "
    "mbarrier_arrive mbarrier_wait named_arrive named_wait cluster_arrive cta_launch setup"
).split()
(
    M_FMA, M_ALU, M_MUFU, M_MUFU_SPACING, M_CONVERT, M_DEPENDENT, M_SHUFFLE_LATENCY, M_MUFU_LATENCY,
    M_TENSOR_FLOPS, M_TENSOR_FLOPS_8BIT, M_MMA_FLOPS_Q10, M_WGMMA_START, M_WGMMA_CONTENDED, M_WGMMA_ISSUE, M_WGMMA_LATENCY, M_QUEUE,
    M_ARBITRATION, M_INTERFERENCE_Q10, M_DILATION_Q10, M_MMA_LATENCY, M_SMEM_BYTES, M_SMEM_LATENCY, M_PORT_Q20, M_L2_Q20, M_HBM_Q20, M_L2_LATENCY,
    M_TMA_LATENCY, M_HBM_LATENCY, M_TMA_ISSUE, M_MBARRIER_ARRIVE, M_MBARRIER_WAIT, M_NAMED_ARRIVE, M_NAMED_WAIT,
    M_CLUSTER_ARRIVE, M_CTA_LAUNCH, M_SETUP,
) = range(len(MACHINE))  # fmt: skip

# columns of an instruction
_COLUMNS = {name: i for i, name in enumerate(INSTRUCTION.names)}
I_OP, I_LABEL, I_BARRIER, I_TARGET = (_COLUMNS[n] for n in ("op", "label", "barrier", "target"))
I_A, I_B, I_C, I_D, I_E, I_F = (_COLUMNS[n] for n in "abcdef")
I_STEP, I_TILE = _COLUMNS["step"], _COLUMNS["tile"]

OP_SETUP, OP_LOAD, OP_STORE, OP_STORE_WAIT, OP_WAIT, OP_ARRIVE, OP_WGMMA, OP_WGMMA_WAIT, OP_MMA, OP_COMPUTE = (
    int(op) for op in Op
)
KIND_MBARRIER, KIND_NAMED, KIND_CTA, KIND_CLUSTER = (int(kind) for kind in BarrierKind)

# units of an SM, in the order of their lanes and of the busy counters
UNITS = ("TMA", "tensor cores", "MUFU", "FMA", "ALU", "barriers", "issue", "smem bytes")
U_TMA, U_TENSOR, U_MUFU, U_FMA, U_ALU, U_BARRIERS, U_ISSUE, U_SMEM = range(len(UNITS))
DRAWN_UNITS = 6

READY, ON_BARRIER, ON_QUEUE, ON_GROUP, DONE = range(5)
NEVER = np.int64(1) << 62
MAX_QUEUE = 64


class Deadlock(RuntimeError):
    """Warps wait for what will never come; the message names warp, verb and buffer."""


@dataclass(frozen=True)
class Memory:
    """What one SM sees of the chip's memory system while the kernel runs.

    Rates are bytes per cycle: `l2` and `hbm` are shared by all SMs of the replay; `read_miss` and `write_through` give
    per tensor name the fraction of bytes that HBM has to move.
    """

    l2: float
    hbm: float
    read_miss: dict[str, float]
    write_through: dict[str, float]


@dataclass(frozen=True)
class Replay:
    """What the replay of some programs gave, in cycles from the start of the first CTA."""

    cycles: int
    tile_ends: np.ndarray  # (CTA slot, tile): when the last warp finished the tile
    busy: np.ndarray  # (SM, unit) busy cycles; SMEM in bytes
    lanes: tuple[Lane, ...]
    labels: tuple[str, ...]
    spans: np.ndarray  # SPAN, of the first SM


def _q20(bytes_per_cycle: float) -> int:
    return max(1, round((1 << 20) / bytes_per_cycle))


def machine_of(device: Device, memory: Memory) -> np.ndarray:
    """The device's cycle parameters as the vector that MACHINE names."""
    values = {
        "fma": device.fma_cycles,
        "alu": device.alu_cycles,
        "mufu": device.mufu_cycles,
        "mufu_spacing": device.mufu_spacing_cycles,
        "convert": device.convert_cycles,
        "dependent": device.dependent_latency_cycles,
        "shuffle_latency": device.shuffle_latency_cycles,
        "mufu_latency": device.mufu_latency_cycles,
        "tensor_flops": device.tensor_flops_per_cycle,
        "tensor_flops_8bit": int(device.tensor_flops_per_cycle * (device.fp8_ratio or 1)),
        "mma_flops_q10": round(device.tensor_flops_per_cycle * device.mma_sync_efficiency * 1024),
        "wgmma_start": device.wgmma_issue_cycles,
        "wgmma_contended": device.wgmma_contended_cycles,
        "wgmma_issue": device.wgmma_step_issue_cycles,
        "wgmma_latency": device.wgmma_latency_cycles,
        "queue": device.wgmma_queue_ksteps,
        "arbitration": device.wgmma_arbitration_ksteps,
        "interference_q10": round(1024 * device.tensor_interference),
        "dilation_q10": round(1024 * device.wgmma_dilation),
        "mma_latency": device.mma_latency_cycles,
        "smem_bytes": device.smem_bytes_per_cycle,
        "smem_latency": device.smem_latency_cycles,
        "port_q20": _q20(device.l2_bytes_per_cycle_per_sm),
        "l2_q20": _q20(memory.l2),
        "hbm_q20": _q20(memory.hbm),
        "l2_latency": device.l2_hit_latency_cycles,
        "tma_latency": device.tma_latency_cycles,
        "hbm_latency": device.hbm_latency_cycles,
        "tma_issue": device.tma_issue_cycles,
        "mbarrier_arrive": device.mbarrier_arrive_cycles,
        "mbarrier_wait": device.mbarrier_wait_cycles,
        "named_arrive": device.named_barrier_cycles,
        "named_wait": device.named_barrier_cycles,
        "cluster_arrive": device.cluster_arrive_cycles,
        "cta_launch": device.cta_launch_cycles,
        "setup": device.setup_cycles,
    }
    return np.array([values[name] for name in MACHINE], np.int64)


@numba.njit(cache=True)
def _service(nbytes, q20):
    """Cycles a server of 2^20 / q20 bytes per cycle needs, at least one."""
    return max(1, (nbytes * q20 + (1 << 20) - 1) >> 20)


@numba.njit(cache=True)
def _dilated(work, start, horizon, rate):
    """Cycles that `work` takes from `start` when it proceeds at rate / 1024 until `horizon` and in full after."""
    if start >= horizon or work == 0:
        return work
    slow = (work * 1024 + rate - 1) // rate
    if start + slow <= horizon:
        return slow
    return (horizon - start) + work - (horizon - start) * rate // 1024


@numba.njit(cache=True)
def _span(spans, count, lane, label, warp, step, tile, wait, start, end):
    """Record a span, or lengthen the last one of its lane where it goes on without a gap; return the new count."""
    if end <= start or count >= spans.shape[0]:
        return count
    for back in range(1, 5):
        k = count - back
        if k < 0:
            break
        if spans[k]["lane"] == lane:
            if (
                spans[k]["end"] == start
                and spans[k]["label"] == label
                and spans[k]["warp"] == warp
                and spans[k]["step"] == step
                and spans[k]["tile"] == tile
                and spans[k]["wait"] == wait
            ):
                spans[k]["end"] = end
                return count
            break
    spans[count]["lane"] = lane
    spans[count]["label"] = label
    spans[count]["warp"] = warp
    spans[count]["step"] = step
    spans[count]["tile"] = tile
    spans[count]["wait"] = wait
    spans[count]["start"] = start
    spans[count]["end"] = end
    return count + 1


@numba.njit(cache=True)
def _wake(b, generation, state, target_bar, target_gen, time, since):
    """Warps that wait for the generation barrier `b` has just completed read the barrier again, from when they came."""
    for i in range(state.shape[0]):
        if state[i] == ON_BARRIER and target_bar[i] == b and generation >= target_gen[i]:
            state[i] = READY
            time[i] = since[i]


@numba.njit(cache=True)
def _replay(
    machine, code, first, last, actor_sm, actor_lane, tensor_offset, read_miss, write_through,
    barrier_kind, barrier_expected, barrier_initial, when_offset, when, group_offset, group_time,
    tile_ends, actor_slot, busy, unit_lane, spans, sms, eight_bit,
):  # fmt: skip
    """The loop. Returns (status, spans recorded, last cycle, state, what each actor waits for)."""
    actors = first.shape[0]
    pc = first.copy()
    time = np.zeros(actors, np.int64)
    state = np.zeros(actors, np.int64)
    inner = np.zeros(actors, np.int64)
    since = np.zeros(actors, np.int64)  # when the actor began to wait
    target_bar = np.zeros(actors, np.int64)
    target_gen = np.zeros(actors, np.int64)
    committed = np.zeros(actors, np.int64)  # WGMMA groups
    finished = np.zeros(actors, np.int64)
    store_done = np.zeros(actors, np.int64)
    turn_since = np.zeros(actors, np.int64)
    queue_len = np.zeros(actors, np.int64)
    queue_head = np.zeros(actors, np.int64)
    queue = np.zeros((actors, MAX_QUEUE, 6), np.int64)  # cycles, last of its group, ready, label, step, tile
    arrivals = np.zeros(barrier_kind.shape[0], np.int64)
    latest = np.zeros(barrier_kind.shape[0], np.int64)
    generation = barrier_initial.copy()
    tensor_free = np.zeros(sms, np.int64)
    tensor_owner = np.full(sms, -1, np.int64)
    tensor_run = np.zeros(sms, np.int64)
    wgmma_until = np.zeros(sms, np.int64)
    queued = np.zeros(sms, np.int64)  # cycles of the k steps in all queues of the SM
    issue_free = np.zeros(sms, np.int64)
    pipe_free = np.zeros((sms, 4), np.int64)  # FMA, ALU, MUFU, convert
    smem_free = np.zeros(sms, np.int64)
    port_free = np.zeros(sms, np.int64)
    out_free = np.zeros(sms, np.int64)
    l2_free = np.int64(0)
    hbm_free = np.int64(0)
    depth = min(machine[M_QUEUE], MAX_QUEUE)
    latest_event = np.int64(0)
    count = 0

    while True:
        # who is earliest?
        best, who = NEVER, -1
        for i in range(actors):
            if state[i] == READY and time[i] < best:
                best, who = time[i], i
        for s in range(sms):
            head = NEVER
            for i in range(actors):
                if actor_sm[i] == s and queue_len[i] > 0:
                    head = min(head, queue[i, queue_head[i], 2])
            if head < NEVER and max(head, tensor_free[s]) < best:
                best, who = max(head, tensor_free[s]), actors + s
        if who < 0:
            break
        now = best

        # -- a tensor core serves one k step ------------------------------------------------------------------------
        if who >= actors:
            s = who - actors
            chosen = -1
            owner = tensor_owner[s]
            if machine[M_ARBITRATION] == 0:  # in order of issue
                for i in range(actors):
                    if actor_sm[i] == s and queue_len[i] > 0:
                        if chosen < 0 or queue[i, queue_head[i], 2] < queue[chosen, queue_head[chosen], 2]:
                            chosen = i
            elif owner >= 0 and queue_len[owner] > 0 and tensor_run[s] < machine[M_ARBITRATION]:
                if queue[owner, queue_head[owner], 2] <= now:
                    chosen = owner
            if chosen < 0:
                for k in range(1, actors + 1):  # round robin from the warp behind the owner
                    i = (owner + k) % actors if owner >= 0 else k - 1
                    if actor_sm[i] == s and queue_len[i] > 0 and queue[i, queue_head[i], 2] <= now:
                        chosen = i
                        break
                tensor_run[s] = 0
            tensor_owner[s] = chosen
            tensor_run[s] += 1
            h = queue_head[chosen]
            cycles, ends_group = queue[chosen, h, 0], queue[chosen, h, 1]
            queue_head[chosen] = (h + 1) % MAX_QUEUE
            queue_len[chosen] -= 1
            end = now + cycles
            if pipe_free[s].max() > now:
                end += cycles * machine[M_DILATION_Q10] >> 10
            tensor_free[s] = end
            queued[s] -= cycles
            wgmma_until[s] = end
            busy[s, U_TENSOR] += cycles
            if s == 0:
                count = _span(
                    spans, count, unit_lane + U_TENSOR, queue[chosen, h, 3], actor_lane[chosen], queue[chosen, h, 4],
                    queue[chosen, h, 5], 0, now, end,
                )  # fmt: skip
            if state[chosen] == ON_QUEUE:
                state[chosen] = READY
                time[chosen] = now
            if ends_group == 1:
                done = end + machine[M_WGMMA_LATENCY]
                group_time[group_offset[chosen] + finished[chosen]] = done
                finished[chosen] += 1
                latest_event = max(latest_event, done)
                if state[chosen] == ON_GROUP and finished[chosen] >= target_gen[chosen]:
                    state[chosen] = READY
                    time[chosen] = max(since[chosen], done)
                    if s == 0:
                        row = code[pc[chosen]]
                        count = _span(
                            spans, count, actor_lane[chosen], row[I_LABEL], actor_lane[chosen], row[I_STEP], row[I_TILE],
                            1, since[chosen], time[chosen],
                        )  # fmt: skip
                    pc[chosen] += 1
                    if pc[chosen] == last[chosen]:
                        state[chosen] = DONE
            continue

        # -- a warp executes ------------------------------------------------------------------------------------------
        i, s = who, actor_sm[who]
        row = code[pc[i]]
        op = row[I_OP]
        lane = actor_lane[i]
        advance = True

        if op == OP_COMPUTE:
            fma, alu, mufu, conv, other = row[I_A], row[I_B], row[I_C], row[I_D], row[I_E]
            instructions = fma + alu + mufu + conv + other
            start = max(now, issue_free[s])
            horizon = max(now, wgmma_until[s]) + queued[s]  # WGMMA already issued executes until then
            rate = 1024 - machine[M_INTERFERENCE_Q10]
            issue_free[s] = start + _dilated(instructions, start, horizon, rate)
            busy[s, U_ISSUE] += instructions
            end = issue_free[s]
            for pipe in range(4):
                if pipe == 0:
                    work, unit, label = fma * machine[M_FMA], U_FMA, fma
                elif pipe == 1:
                    work, unit, label = alu * machine[M_ALU], U_ALU, alu
                elif pipe == 2:
                    work, unit, label = mufu * machine[M_MUFU_SPACING], U_MUFU, mufu
                else:
                    work, unit, label = conv * machine[M_CONVERT], U_ALU, conv
                if label > 0:
                    begin = max(start, pipe_free[s, pipe])
                    pipe_free[s, pipe] = begin + _dilated(work, begin, horizon, rate)
                    end = max(end, pipe_free[s, pipe])
                    busy[s, unit] += mufu * machine[M_MUFU] if pipe == 2 else work
                    if s == 0 and pipe < 3:
                        count = _span(
                            spans, count, unit_lane + unit, row[I_LABEL], lane, row[I_STEP], row[I_TILE], 0,
                            begin, pipe_free[s, pipe],
                        )  # fmt: skip
            inner[i] += 1
            if inner[i] == row[I_F]:
                inner[i] = 0
                end += row[I_TARGET] * machine[M_SHUFFLE_LATENCY]
                end += machine[M_MUFU_LATENCY] if mufu > 0 else machine[M_DEPENDENT]
            else:
                advance = False
            if s == 0:
                count = _span(spans, count, lane, row[I_LABEL], lane, row[I_STEP], row[I_TILE], 0, now, end)
            time[i] = end

        elif op == OP_WGMMA:
            if inner[i] == 0:
                inner[i] = 1
                advance = False
                time[i] = now + machine[M_WGMMA_START]
                if pipe_free[s].max() > now:  # beside a warp in its softmax
                    time[i] += machine[M_WGMMA_CONTENDED]
            elif queue_len[i] >= depth:
                advance = False
                state[i] = ON_QUEUE
            else:
                steps, m, n, in_registers, k = row[I_A], row[I_B], row[I_C], row[I_D], row[I_E]
                rate = machine[M_TENSOR_FLOPS_8BIT] if eight_bit else machine[M_TENSOR_FLOPS]
                cycles = -(-2 * m * n * k // rate)
                operand_bytes = 32 * (n + (0 if in_registers == 1 else m))
                cycles = max(cycles, -(-operand_bytes // machine[M_SMEM_BYTES]))
                busy[s, U_SMEM] += operand_bytes
                busy[s, U_ISSUE] += 1
                tail = (queue_head[i] + queue_len[i]) % MAX_QUEUE
                queue[i, tail, 0] = cycles
                queue[i, tail, 1] = 1 if inner[i] == steps else 0
                queue[i, tail, 2] = now
                queue[i, tail, 3] = row[I_LABEL]
                queue[i, tail, 4] = row[I_STEP]
                queue[i, tail, 5] = row[I_TILE]
                queue_len[i] += 1
                queued[s] += cycles
                time[i] = now + machine[M_WGMMA_ISSUE]
                if inner[i] == steps:
                    inner[i] = 0
                    committed[i] += 1
                else:
                    inner[i] += 1
                    advance = False

        elif op == OP_WGMMA_WAIT:
            needed = committed[i] - row[I_A]
            if needed <= 0:
                pass
            elif finished[i] >= needed:
                done = max(now, group_time[group_offset[i] + needed - 1])
                if s == 0:
                    count = _span(spans, count, lane, row[I_LABEL], lane, row[I_STEP], row[I_TILE], 1, now, done)
                time[i] = done
            else:
                advance = False
                state[i] = ON_GROUP
                since[i] = now
                target_gen[i] = needed

        elif op == OP_WAIT:
            b, g = row[I_BARRIER], row[I_TARGET]
            kind = barrier_kind[b]
            cost = machine[M_NAMED_WAIT] if kind == KIND_NAMED else machine[M_MBARRIER_WAIT]
            if kind == KIND_CTA:
                cost = machine[M_CTA_LAUNCH]
            if generation[b] >= g:
                done = max(now, when[when_offset[b] + g - 1] if g > barrier_initial[b] else 0)
                if s == 0 and done > now:
                    count = _span(spans, count, lane, row[I_LABEL], lane, row[I_STEP], row[I_TILE], 1, now, done)
                time[i] = done + cost
                if kind == KIND_NAMED:
                    turn_since[i] = done + cost
            else:
                advance = False
                state[i] = ON_BARRIER
                since[i] = now
                target_bar[i] = b
                target_gen[i] = g

        elif op == OP_ARRIVE:
            b = row[I_BARRIER]
            kind = barrier_kind[b]
            if kind == KIND_NAMED:
                at = now + machine[M_NAMED_ARRIVE]
                if s == 0:
                    count = _span(
                        spans, count, unit_lane + U_BARRIERS, row[I_LABEL], lane, row[I_STEP], row[I_TILE], 0,
                        turn_since[i], now,
                    )  # fmt: skip
            elif kind == KIND_CLUSTER:
                at = now + machine[M_CLUSTER_ARRIVE]
            elif kind == KIND_CTA:
                at = max(now, store_done[i])
                tile_ends[actor_slot[i], row[I_TILE]] = max(tile_ends[actor_slot[i], row[I_TILE]], at)
            else:
                at = now + machine[M_MBARRIER_ARRIVE]
            time[i] = now + 1
            busy[s, U_ISSUE] += 1
            latest[b] = max(latest[b], at)
            arrivals[b] += 1
            if arrivals[b] == barrier_expected[b]:
                arrivals[b] = 0
                when[when_offset[b] + generation[b]] = latest[b]
                generation[b] += 1
                _wake(b, generation[b], state, target_bar, target_gen, time, since)

        elif op == OP_LOAD:
            b, nbytes, shared = row[I_BARRIER], row[I_A], max(1, row[I_C])
            t = tensor_offset[i] + row[I_B]
            if row[I_D] == 1:  # cp.async: 16 bytes per lane, the copy instructions pass the issue port of each warp
                instructions = max(1, nbytes // (512 * 4))
                start = max(now, issue_free[s])
                issue_free[s] = start + instructions
                busy[s, U_ISSUE] += instructions
                time[i] = start + instructions
                latency = machine[M_L2_LATENCY]
            else:
                time[i] = now + machine[M_TMA_ISSUE]
                busy[s, U_ISSUE] += 1
                latency = machine[M_L2_LATENCY] + machine[M_TMA_LATENCY]
            start = max(time[i], port_free[s])
            port_free[s] = start + _service(nbytes, machine[M_PORT_Q20])
            l2_free = max(l2_free, start) + _service(nbytes // shared, machine[M_L2_Q20])
            done = max(port_free[s], l2_free)
            missed = nbytes * read_miss[t] >> 10
            if missed > 0:
                hbm_free = max(hbm_free, start) + _service(missed // shared, machine[M_HBM_Q20])
                done = max(done, hbm_free)
                latency += (machine[M_HBM_LATENCY] - machine[M_L2_LATENCY]) * read_miss[t] >> 10
            busy[s, U_TMA] += port_free[s] - start
            busy[s, U_SMEM] += nbytes
            if s == 0:
                count = _span(
                    spans, count, unit_lane + U_TMA, row[I_LABEL], lane, row[I_STEP], row[I_TILE], 0, start, port_free[s]
                )
            latest[b] = max(latest[b], done + latency)
            arrivals[b] += 1
            if arrivals[b] == barrier_expected[b]:
                arrivals[b] = 0
                when[when_offset[b] + generation[b]] = latest[b]
                generation[b] += 1
                _wake(b, generation[b], state, target_bar, target_gen, time, since)

        elif op == OP_STORE:
            nbytes = row[I_A]
            t = tensor_offset[i] + row[I_B]
            start = max(now, out_free[s])
            out_free[s] = start + _service(nbytes, machine[M_PORT_Q20])
            l2_free = max(l2_free, start) + _service(nbytes, machine[M_L2_Q20])
            done = max(out_free[s], l2_free)
            missed = nbytes * write_through[t] >> 10
            if missed > 0:
                hbm_free = max(hbm_free, start) + _service(missed, machine[M_HBM_Q20])
                done = max(done, hbm_free)
            busy[s, U_SMEM] += nbytes
            busy[s, U_ISSUE] += 1
            store_done[i] = max(store_done[i], done + machine[M_SMEM_LATENCY])
            latest_event = max(latest_event, store_done[i])
            time[i] = now + 1

        elif op == OP_STORE_WAIT:
            done = max(now, store_done[i])
            if s == 0:
                count = _span(spans, count, lane, row[I_LABEL], lane, row[I_STEP], row[I_TILE], 1, now, done)
            time[i] = done

        elif op == OP_MMA:
            steps, m, n, k, nbytes = row[I_A], row[I_B], row[I_C], row[I_E], row[I_F]
            cycles = -(-2 * m * n * k * 1024 // machine[M_MMA_FLOPS_Q10])
            copied = max(now, smem_free[s]) + -(-nbytes // machine[M_SMEM_BYTES])
            smem_free[s] = copied
            begin = max(copied, tensor_free[s])
            if inner[i] == 0:
                begin = max(begin, copied + machine[M_SMEM_LATENCY])
            tensor_free[s] = begin + cycles
            busy[s, U_TENSOR] += cycles
            busy[s, U_SMEM] += nbytes
            busy[s, U_ISSUE] += max(1, m // 64) * (n // 8) + nbytes // 2048
            if s == 0:
                count = _span(
                    spans, count, unit_lane + U_TENSOR, row[I_LABEL], lane, row[I_STEP], row[I_TILE], 0, begin,
                    begin + cycles,
                )  # fmt: skip
            inner[i] += 1
            if inner[i] == steps:
                inner[i] = 0
                time[i] = begin + cycles + machine[M_MMA_LATENCY]
            else:
                advance = False
                time[i] = begin
            if s == 0:
                count = _span(spans, count, lane, row[I_LABEL], lane, row[I_STEP], row[I_TILE], 0, now, time[i])

        else:  # OP_SETUP
            time[i] = now + machine[M_SETUP]
            if s == 0:
                count = _span(spans, count, lane, row[I_LABEL], lane, row[I_STEP], row[I_TILE], 0, now, time[i])

        latest_event = max(latest_event, time[i])
        if advance:
            slot, tile = actor_slot[i], row[I_TILE]
            tile_ends[slot, tile] = max(tile_ends[slot, tile], time[i])
            pc[i] += 1
            if pc[i] == last[i]:
                state[i] = DONE
                tile_ends[slot, tile] = max(tile_ends[slot, tile], store_done[i])

    status = 0
    for i in range(actors):
        if state[i] != DONE:
            status = 1
    return status, count, latest_event, state, pc


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
    placement = [0] * len(programs) if placement is None else list(placement)
    tables = _Tables(programs, placement, memory)
    spans = np.zeros(max_spans, SPAN)
    sms = max(placement) + 1
    busy = np.zeros((sms, len(UNITS)), np.int64)
    status, count, cycles, state, pc = _replay(
        machine_of(device, memory), tables.code, tables.first, tables.last, tables.sm, tables.lane, tables.tensor_offset,
        tables.read_miss, tables.write_through, tables.kind, tables.expected, tables.initial, tables.when_offset,
        tables.when, tables.group_offset, tables.group_time, tables.tile_ends, tables.slot, busy, tables.unit_lane,
        spans, sms, eight_bit,
    )  # fmt: skip
    if status:
        raise Deadlock("; ".join(tables.stuck(state, pc)))
    return Replay(int(cycles), tables.tile_ends, busy, tables.lanes, tables.labels, spans[:count])


class _Tables:
    """Several programs laid out as the flat arrays of the jitted loop."""

    def __init__(self, programs: Sequence[Program], placement: Sequence[int], memory: Memory):
        labels: dict[str, int] = {}
        code, first, last, sm, slot, tensor_offset, names = [], [], [], [], [], [], []
        barriers, barrier_base, tensors = [], 0, []
        position = 0
        for number, program in enumerate(programs):
            remap = np.array([labels.setdefault(text, len(labels)) for text in program.labels], np.int64)
            rows = program.code.view(np.int32).reshape(len(program.code), len(INSTRUCTION.names)).astype(np.int64)
            rows[:, I_LABEL] = remap[rows[:, I_LABEL]]
            rows[rows[:, I_BARRIER] >= 0, I_BARRIER] += barrier_base
            code.append(rows)
            for warp, name in enumerate(program.warps):
                first.append(position + program.starts[warp])
                last.append(position + program.starts[warp + 1])
                sm.append(placement[number])
                slot.append(number)
                tensor_offset.append(len(tensors))
                names.append((number, warp, name))
            tensors += program.tensors
            barriers += program.barriers
            barrier_base += len(program.barriers)
            position += len(rows)
        self.programs, self.names = programs, names
        self.code = np.concatenate(code)
        self.first, self.last = np.array(first, np.int64), np.array(last, np.int64)
        self.sm, self.slot = np.array(sm, np.int64), np.array(slot, np.int64)
        self.tensor_offset = np.array(tensor_offset, np.int64)
        self.read_miss = np.array([round(1024 * memory.read_miss.get(t, 0.0)) for t in tensors] or [0], np.int64)
        self.write_through = np.array([round(1024 * memory.write_through.get(t, 1.0)) for t in tensors] or [0], np.int64)
        self.kind = np.array([int(b.kind) for b in barriers] or [0], np.int64)
        self.expected = np.array([b.expected for b in barriers] or [1], np.int64)
        self.initial = np.array([b.initial for b in barriers] or [0], np.int64)
        uses = np.bincount(self.code[self.code[:, I_BARRIER] >= 0, I_BARRIER], minlength=len(self.kind))
        room = uses + self.initial + 1
        self.when_offset = np.concatenate([[0], np.cumsum(room)[:-1]]).astype(np.int64)
        self.when = np.zeros(int(room.sum()), np.int64)
        groups = [int((self.code[a:b, I_OP] == OP_WGMMA).sum()) + 1 for a, b in zip(first, last, strict=True)]
        self.group_offset = np.concatenate([[0], np.cumsum(groups)[:-1]]).astype(np.int64)
        self.group_time = np.zeros(sum(groups), np.int64)
        self.tile_ends = np.zeros((len(programs), max(p.tiles for p in programs)), np.int64)
        on_first = [n for n, where in zip(names, self.sm, strict=True) if where == 0]
        many = len({number for number, _, _ in on_first}) > 1
        lane_names = [f"CTA{number} {name}" if many else name for number, _, name in on_first]
        index = {entry: k for k, entry in enumerate(on_first)}
        self.lane = np.array([index.get(entry, 0) for entry in names], np.int64)
        self.unit_lane = len(lane_names)
        self.lanes = tuple(Lane(n, "warp") for n in lane_names) + tuple(Lane(n, "unit") for n in UNITS[:DRAWN_UNITS])
        self.labels = tuple(labels)

    def stuck(self, state: np.ndarray, pc: np.ndarray) -> list[str]:
        """One phrase per warp that could not finish."""
        phrases = []
        for i, (number, warp, name) in enumerate(self.names):
            if state[i] != DONE:
                program = self.programs[number]
                at = int(pc[i] - self.first[i])
                phrases.append(f"{name} is stuck at '{program.describe(program.stream(warp)[at])}'")
        return phrases
