"""Floors: what each resource of an SM alone needs for one step of a CTA's loop, read off the program that the schedule records.

The roofline bounds a workload whatever the schedule; these belong to the schedule. Shared memory is the one that no roofline
shows: WGMMA reads B from it once for every 64 rows of A, and A too unless it is in registers, beside what warps store into it. What
TMA writes and reads there meanwhile takes nothing from WGMMA, even where the sum is beyond 128 bytes a cycle (reduce_add in
kernels/calibrate: operands of 115 and loads of 45): it is counted, but is no part of the floor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..devices.device import Device
from ..language.ops import Op
from ..language.program import Program

STORE_BYTES = 4 * 512
"""One store of 16 bytes a lane by the four warps of a warpgroup."""


@dataclass(frozen=True)
class Floors:
    """One step of a loop. Cycles are of one SM; bytes are of its shared memory, by what moves them."""

    tensor: float
    mufu: float
    smem_bytes: dict[str, float]
    loads: float  # at the SM's port to L2
    adds: float  # at the share of one SM in what L2 adds, all SMs adding
    smem_bytes_per_cycle: int

    @property
    def smem(self) -> float:
        """Cycles of shared memory, for operands and the warps' own stores."""
        return sum(self.smem_bytes[name] for name in ("A operands", "B operands", "stores")) / self.smem_bytes_per_cycle

    @property
    def at_full_rate(self) -> float:
        """Bytes a cycle of all that passes shared memory, TMA's too, did the tensor cores never wait."""
        return sum(self.smem_bytes.values()) / self.tensor if self.tensor else 0.0

    @property
    def cycles(self) -> dict[str, float]:
        """Resource -> cycles, the largest first."""
        found = {"tensor cores": self.tensor, "MUFU": self.mufu, "shared memory": self.smem}
        found |= {"loads": self.loads, "reduce-adds": self.adds}
        return dict(sorted(found.items(), key=lambda each: -each[1]))

    def to_dict(self) -> dict:
        """The floors as plain JSON values."""
        return {"cycles": self.cycles, "smem_bytes": self.smem_bytes, "smem_bytes_per_tensor_cycle": self.at_full_rate}


def floors(program: Program, device: Device, steps: int, element_bytes: int) -> Floors:
    """The floors of a step, mean over the `steps` of the loop that was recorded; what lies outside the loop does not count."""
    inside = program.code["step"] >= 0
    sums = dict.fromkeys(("A operands", "B operands", "loads", "stores", "copies out"), 0.0)
    tensor = mufu = adds = 0.0
    for each, gemm in _of(program, (Op.WGMMA, Op.MMA), inside):
        m, n, k_steps = int(gemm["m"]), int(gemm["n"]), int(gemm["k_steps"])
        tensor += 2 * m * n * int(gemm["k_per_step"]) * k_steps / device.tensor_rate(element_bytes)
        a = 0 if gemm["a_in_registers"] else 32 * m
        sums["A operands"] += a * k_steps
        of_b = 32 * max(1, m // 64) * n if each["op"] == Op.WGMMA else int(gemm["smem_bytes"]) - a
        sums["B operands"] += of_b * k_steps
    for _, phase in _of(program, (Op.COMPUTE,), inside):
        mufu += int(phase["mufu"]) * int(phase["chunks"]) * device.mufu_cycles
        sums["stores"] += (int(phase["stsm"]) + int(phase["matrices"])) * int(phase["chunks"]) * STORE_BYTES
    for each, copy in _of(program, (Op.LOAD, Op.STORE, Op.ADD), inside):
        nbytes = int(copy["nbytes"])
        if each["op"] == Op.ADD:
            adds += nbytes
        if each["op"] == Op.LOAD:
            sums["loads"] += nbytes
        elif not (each["op"] == Op.ADD and copy["by_warps"]):
            sums["copies out"] += nbytes
    share = min(device.add_bytes_per_cycle_per_sm, device.l2_add_bytes_per_cycle / device.sms)
    return Floors(
        tensor / steps, mufu / steps, {name: nbytes / steps for name, nbytes in sums.items()},
        sums["loads"] / steps / device.l2_bytes_per_cycle_per_sm, adds / steps / share, device.smem_bytes_per_cycle,
    )  # fmt: skip


def _of(program: Program, ops: tuple[Op, ...], inside: np.ndarray) -> Iterable[tuple[np.void, np.void]]:
    """The loop's instructions of some ops, each with its record."""
    rows, records = program.recorded(ops)
    kept = inside[np.isin(program.code["op"], ops)]
    return zip(rows[kept], records[kept], strict=True)
