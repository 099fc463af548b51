"""Ops: the instruction set. One op of a warp is one row; what it works on is a record of the program's tables, by number."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum

import numpy as np


class Op(IntEnum):
    """What a warp does; the interpreter is its living definition."""

    SETUP = 0  # kernel prologue: barrier initialisation, descriptor prefetch
    LOAD = 1  # asynchronous copy into a ring stage, completes `barrier`; its record is a Copy
    STORE = 2  # asynchronous copy out, a Copy; the next STORE_WAIT waits for it
    STORE_WAIT = 3  # until the stores of this warp have left shared memory
    WAIT = 4  # until `barrier` has completed `target` generations
    ARRIVE = 5  # one arrival on `barrier`
    WGMMA = 6  # asynchronous warpgroup GEMM, committed as one group; a Gemm
    WGMMA_WAIT = 7  # until at most `target` groups of this warp are outstanding
    MMA = 8  # synchronous mma.sync GEMM, a Gemm
    COMPUTE = 9  # instructions on registers, a Phase (code/phase.py)
    DRAW = 10  # the next number of a queue in memory
    ADD = 11  # as STORE, but what is there is added to, in fp32 (cp.reduce.async.bulk, red.global)


class BarrierKind(IntEnum):
    """How an arrival travels to a waiter."""

    MBARRIER = 0
    NAMED = 1
    CTA = 2  # all warps of a CTA have left; the next CTA starts
    CLUSTER = 3  # an mbarrier of every CTA in the cluster: arrivals travel between SMs
    MEETING = 4  # bar.sync: all consumers arrive and wait; of a ring that warps fill, some arrive and others wait


@dataclass
class Barrier:
    """One barrier: `expected` arrivals complete a generation; `initial` generations are complete at the start."""

    name: str
    kind: BarrierKind
    expected: int
    initial: int = 0


@dataclass(frozen=True)
class Gemm:
    """One consumer's share of a block GEMM: m x n, `k_steps` instructions deep."""

    m: int
    n: int
    k_steps: int
    k_per_step: int
    a_in_registers: int
    smem_bytes: int  # per k step, read by ldmatrix in the mma.sync form, all four warps together


@dataclass(frozen=True)
class Copy:
    """One warp's copy between global and shared memory."""

    nbytes: int
    tensor: int  # number in the program's table
    sharing: int = 1  # CTAs of the cluster that a multicast load serves
    by_warps: int = 0  # by cp.async, or plain stores: the warps issue 16 bytes a lane themselves; of an ADD, so many
    boxes: int = 0  # by TMA: so many instructions


def table_of(record: type) -> np.dtype:
    """A record as one row of numbers, field by field."""
    return np.dtype([(each.name, "i4") for each in fields(record)])


GEMM, COPY = table_of(Gemm), table_of(Copy)
_FIELDS = "op label record barrier target reads writes ring index step tile left left_index issues"
INSTRUCTION = np.dtype([(name, "i4") for name in _FIELDS.split()])
"""One op: `record` is a row of its op's table; `reads` and `writes` are bits of the program's register tensors; `ring` and
`index` name the slot it concerns, `step` the loop step, -1 outside the loop; `left` and `left_index` the slot of a GEMM's other
operand, if it has one; `issues` the instructions that a barrier or a WGMMA takes with all around it (code/around.py)."""
