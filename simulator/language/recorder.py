"""Recorder: the tables of a program as they fill while a schedule speaks: barriers, labels, tensors, records, accesses."""

from __future__ import annotations

import math

from ..code.estimate import Estimate
from ..code.phase import Phase
from .ops import Barrier, BarrierKind, Copy, Gemm
from .view import TileView

ONLY_LAST = 4
"""Added to an access's `write` where only the last CTA that walks a block does it."""


class Recorder:
    """What has been recorded of a CTA beside its warps' streams; `tile` is a view of the one it is in.

    A warp that records more than `most_ops` instructions raises EndlessError.
    """

    def __init__(self, tile: TileView, code: Estimate):
        self.tile, self.code = tile, code
        self.tile_number = -1
        self.most_ops: float = math.inf
        self.barriers: list[Barrier] = []
        self.labels: dict[str, int] = {}
        self.tensors: dict[str, int] = {}
        self.accesses: list[tuple] = []
        self.records: dict[type, dict[Phase | Gemm | Copy, int]] = {Phase: {}, Gemm: {}, Copy: {}}
        self._known: dict[int, tuple[int, Phase | Gemm | Copy]] = {}
        self._register_bits: dict[str, int] = {}

    def _barrier(self, name: str, kind: BarrierKind, expected: int, initial: int = 0) -> int:
        self.barriers.append(Barrier(name, kind, expected, initial))
        return len(self.barriers) - 1

    def access(self, name: str, block: int, step: int, write: int, multicast: int) -> None:
        """Note one global-memory access of the CTA for the traffic replay (first tile only)."""
        if self.tile_number == 0:
            self.accesses.append((self.tensor(name), block, step, write, multicast))

    def tensor(self, name: str) -> int:
        """Number of a tensor in this program's table."""
        return self.tensors.setdefault(name, len(self.tensors))

    def record(self, what: Phase | Gemm | Copy) -> int:
        """Number of a record in this program's table of its kind."""
        known = self._known.get(id(what))
        if known is None:
            table = self.records[type(what)]
            known = self._known[id(what)] = table.setdefault(what, len(table)), what  # kept, so that no other has its id
        return known[0]

    def registers(self, names: tuple[str, ...]) -> int:
        """Register tensors as bits."""
        bits = 0
        for name in names:
            bits |= 1 << self._register_bits.setdefault(name, len(self._register_bits))
        return bits

    @property
    def register_tensors(self) -> tuple[str, ...]:
        """Their names, in the order of their bits."""
        return tuple(self._register_bits)

    def label(self, text: str) -> int:
        """Number of a label in this program's table."""
        return self.labels.setdefault(text, len(self.labels))
