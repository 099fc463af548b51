"""View: what a schedule sees of its tile: the loop, the bytes of its buffers, the shapes of its GEMMs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..errors import UsageError
from ..problem.tile import Tile
from ..problem.workload import LSE_BYTES, Workload
from .ops import Gemm

CONSUMER_REGISTERS = (240, 160)
"""Of a thread of one of two, or of three, consumer warpgroups beside a producer (setmaxnreg in FlashAttention-3's source)."""
ADDRESSING_REGISTERS = 20
"""Row statistics, loop counters, descriptors and addresses, per thread; spills begin beyond."""
K_PER_STEP_BYTES = 32
"""One WGMMA or mma.sync k step reads 32 bytes of K per row: 16 fp16 or 32 e4m3 values (PTX ISA, wgmma shapes)."""


@dataclass(frozen=True)
class TileView:
    """What a schedule sees of its tile: the loop, the bytes of its buffers, the shapes of its GEMMs."""

    tile: Tile
    workload: Workload
    loop: int  # K/V blocks this CTA walks
    masked: int = 0  # how many of them, from the first walked, cross the diagonal or the ragged end
    looped: frozenset[str] = field(default=frozenset({"K", "V"}))  # rings that advance once per loop step
    splits: int = 1  # CTAs that the Q blocks of a head are dealt to (FlashAttention-1)

    @property
    def stages(self) -> int:
        """Buffers per K/V ring."""
        return self.tile.stages

    @property
    def parts(self) -> int:
        """Into how many the keys are divided, each walked by a CTA of its own."""
        return self.tile.parts

    @property
    def consumers(self) -> int:
        """Consumer warpgroups."""
        return self.tile.consumers

    @property
    def block_n(self) -> int:
        """Keys per block."""
        return self.tile.block_n

    @property
    def head_dim(self) -> int:
        """Head dimension."""
        return self.workload.head_dim

    @property
    def element_bytes(self) -> int:
        """Bytes per element of Q, K, V and P."""
        return self.workload.element_bytes

    @property
    def rows(self) -> int:
        """Query rows of one consumer."""
        return self.tile.block_m // self.tile.consumers

    @property
    def steps(self) -> range:
        """The steps of the loop: the Q blocks that a backward's CTA walks, of all query heads that share its K and V."""
        return range(self.loop)

    @property
    def kv_blocks(self) -> range:
        """The K/V blocks in the order they are walked."""
        return range(self.loop)

    def q_blocks(self, j: int) -> range:
        """Q blocks under K/V block j (FlashAttention-1's inner loop): those that see some of it.

        Where `splits` CTAs deal them among themselves, as many as any of them has, by the numbers of the first.
        """
        end = -(-self.workload.seqlen_q // self.tile.block_m)
        first = self.first_q_block(j)
        return range(first // self.splits * self.splits if first < end else end, end, self.splits)

    def first_q_block(self, j: int) -> int:
        """The first Q block that sees any key of K/V block j; all are walked under the first, which leaves O, l and m of each."""
        work = self.workload
        unseen = j * self.block_n - (work.seqlen_k - work.seqlen_q) if work.causal and j > 0 else 0
        return max(0, unseen) // self.tile.block_m

    @property
    def q_bytes(self) -> int:
        """Shared memory of a Q tile."""
        return self.tile.block_m * self.head_dim * self.element_bytes

    @property
    def k_bytes(self) -> int:
        """Shared memory of a K tile."""
        return self.tile.block_n * self.head_dim * self.element_bytes

    v_bytes = k_bytes

    @property
    def o_bytes(self) -> int:
        """Shared memory of a staged O tile."""
        return self.tile.block_m * self.head_dim * self.workload.output_bytes

    @property
    def stage_bytes(self) -> int:
        """Shared memory through which O leaves in rounds, 128 columns at a time."""
        return self.o_bytes * min(128, self.head_dim) // self.head_dim

    @property
    def boxes(self) -> int:
        """TMA copies by which one warp's rows of O leave: a swizzled row of a box is 128 bytes."""
        return max(1, self.head_dim * self.workload.output_bytes // 128)

    @property
    def boxes_in(self) -> int:
        """TMA copies of one load of Q, K or V."""
        return max(1, self.head_dim * self.element_bytes // 128)

    @property
    def s_bytes(self) -> int:
        """Shared memory of an S or P tile."""
        return self.tile.block_m * self.tile.block_n * self.element_bytes

    @property
    def row_bytes(self) -> int:
        """One fp32 statistic per query row (LSE, l, m)."""
        return self.tile.block_m * LSE_BYTES

    def nbytes(self, name: str) -> int:
        """Bytes of a tile of a tensor, whoever holds it; of a statistic, one fp32 number per query row."""
        if name not in _AXES:
            return self.row_bytes
        rows, columns = (self._size[axis] for axis in _AXES[name])
        return rows * columns * element_bytes(name, self.workload)

    def store_bytes(self, name: str) -> int:
        """Bytes one consumer stores of a result tile."""
        return self.nbytes(name) // self.tile.consumers

    def is_masked(self, j: int) -> bool:
        """Whether the block walked at step j needs masking; where a loop walks the heads of a group, of each its first ones."""
        return j % max(1, self.loop // self.workload.heads_per_kv) < self.masked if self.workload.backward else j < self.masked

    def hidden(self, rank: int) -> int:
        """Of the walked blocks, how many from the first on consumer `rank` sees nothing of: they lie above its diagonal."""
        above = (self.tile.block_m - (rank + 1) * self.rows) // self.block_n
        return min(above, self.masked - 1) if self.workload.causal and self.masked else 0

    def sharing(self, ring: str) -> int:
        """CTAs of the cluster that receive the same multicast load of a ring (K and V; Q is each CTA's own)."""
        return self.tile.cluster if ring in ("K", "V") else 1

    def step(self, ring: str, index: int) -> int:
        """The loop step of a ring's load, -1 for what is loaded outside the loop."""
        return index if ring in self.looped else -1

    @property
    def alone(self) -> TileView:
        """As one consumer sees it that does for itself what others otherwise share."""
        return replace(self, tile=replace(self.tile, consumers=1))

    def gemm(self, destination: str, a: str, b: str, a_in_registers: bool, least: int = 1) -> Gemm:
        """One consumer's share of destination = a b: what a and b have in common is summed over, the rest is rows and columns.

        Consumers share the rows; in a backward whose tile has not `least` of them for each, the columns.
        """
        unknown = {destination, a, b} - _AXES.keys()
        if unknown:
            raise UsageError(f"gemm: no tensor {min(unknown)!r} is known ({', '.join(_AXES)})")
        (rows, columns), depth = _AXES[destination], set(_AXES[a]) & set(_AXES[b])
        if len(depth) != 1 or set(_AXES[a]) ^ set(_AXES[b]) != {rows, columns}:
            raise UsageError(f"gemm: {destination} is no product of {a} and {b}")
        m, n = self.share(destination)
        if self.workload.backward and m < least:
            m, n = m * self.tile.consumers, n // self.tile.consumers
        per_step = K_PER_STEP_BYTES // self.element_bytes
        down = min(4, max(1, m // 16))  # of the four warps: each reads its rows of A, and all of B; the others lie side by side
        b_bytes = down * n * K_PER_STEP_BYTES
        a_bytes = 0 if a_in_registers else 4 // down * m * K_PER_STEP_BYTES
        return Gemm(m, n, -(-self._size[depth.pop()] // per_step), per_step, int(a_in_registers), a_bytes + b_bytes)

    def share(self, name: str) -> tuple[int, int]:
        """Rows and columns of a register tensor that one consumer holds: the consumers share its rows."""
        rows, columns = _AXES[name]
        return self._size[rows] // self.tile.consumers, self._size[columns]

    @property
    def holds_weights(self) -> bool:
        """Whether a consumer's registers hold S, P as an operand and O beside each other."""
        needed = self.per_thread("S") + self.per_thread("P") * self.element_bytes // 4 + self.per_thread("O")
        return needed + ADDRESSING_REGISTERS <= CONSUMER_REGISTERS[self.consumers > 2]

    @property
    def dq_name(self) -> str:
        """dQ, or dQ^T where the queries of a tile are not 64 for each consumer: then these share the head dimension."""
        return "dQ" if self.tile.block_m % (64 * self.tile.consumers) == 0 else "dQ^T"

    def dq(self, K, dS) -> tuple:
        """That GEMM as `gemm` takes it: destination and operands."""
        return ("dQ", dS, K) if self.dq_name == "dQ" else ("dQ^T", K, dS)

    def per_thread(self, name: str) -> int:
        """Elements of a register tensor that one thread of a consumer holds."""
        rows, columns = self.share(name)
        return -(-rows * columns // 128)

    @property
    def _size(self) -> dict[str, int]:
        return {"rows": self.tile.block_m, "keys": self.block_n, "dims": self.head_dim}

    def is_transposed(self, destination: str, b: str) -> bool:
        """Whether b stands transposed in destination = a b."""
        return _AXES[b][1] != _AXES[destination][1]

    def is_transposed_left(self, destination: str, a: str) -> bool:
        """Whether a does."""
        return _AXES[a][0] != _AXES[destination][0]


_AXES = dict.fromkeys(("Q", "O", "dO", "dQ", "dQaccum", "Opart"), ("rows", "dims"))
_AXES |= dict.fromkeys(("K", "V", "dK", "dV"), ("keys", "dims"))
_AXES |= dict.fromkeys(("S", "P", "dP", "dS"), ("rows", "keys"))
_AXES |= {f"{name}^T": (axes[1], axes[0]) for name, axes in _AXES.items()}
"""What a tile of a tensor extends over."""
_FLOATS = ("dQaccum", "Opart")


def element_bytes(name: str, workload: Workload) -> int:
    """Bytes of an element in memory: statistics and sums in fp32, results of e4m3 inputs in bf16."""
    if name in _FLOATS or name not in _AXES:
        return LSE_BYTES
    return workload.output_bytes if name.lstrip("d") == "O" or name.startswith("d") else workload.element_bytes
