"""CTA: what a schedule asks for: rings, batons and warps, over one tile or a sequence of them.

A schedule is a function `schedule(cta, tile)`. It asks the `Cta` for rings (shared-memory buffers with a full and an
empty mbarrier per stage), batons (named barriers that hand the tensor cores round), a producer and consumers, and
lets each of them speak verbs. Calling the schedule again on the same `Cta` appends the next tile of a persistent kernel:
rings and batons go on where they stopped, so the producer runs ahead into the next tile as the real one does.
"""

from __future__ import annotations

from ..code.estimate import Estimate
from .buffers import Baton, Meeting, Outbox, Private, Ring
from .ops import BarrierKind, Op
from .recorder import Recorder
from .verbs import Warp
from .view import TileView


class Cta(Recorder):
    """The recorder of one CTA: its rings, barriers, batons and warps, over one tile or (persistent) a sequence of tiles."""

    def __init__(self, tile: TileView, code: Estimate):
        super().__init__(tile, code)
        self.persistent = self.strides = False
        self.rings: dict[str, Ring] = {}
        self.batons: list[Baton] = []
        self.meetings: list[Meeting] = []
        self.warps: list[Warp] = []

    # -- what a schedule asks for ----------------------------------------------------------------------------------

    def ring(self, name: str, nbytes: int, stages: int, over: Ring | None = None) -> Ring:
        """A ring of `stages` buffers; `over` lays it over another ring's memory (staged output over V)."""
        if name not in self.rings:
            full = [self._barrier(f"full {name}.{s}", BarrierKind.MBARRIER, 1) for s in range(stages)]
            kind = BarrierKind.CLUSTER if self.tile.sharing(name) > 1 else BarrierKind.MBARRIER
            empty = [self._barrier(f"empty {name}.{s}", kind, 1) for s in range(stages)]
            self.rings[name] = Ring(self, name, nbytes, stages, len(self.rings), full, empty, over=over.name if over else "")
        return self.rings[name]

    def exchange(self, name: str, nbytes: int, stages: int = 1) -> Ring:
        """A ring that warps fill out of their registers and others read, with named barriers: each its share by `put`."""
        if name not in self.rings:
            self.rings[name] = self._exchanged(name, nbytes, stages)
        return self.rings[name]

    def outbox(self, name: str, nbytes: int) -> Outbox:
        """A buffer of `nbytes` in parts, each of which one consumer fills and another warp sends away."""
        for rank in range(self.tile.consumers):
            own = f"{name}{rank}"
            if own not in self.rings:
                self.rings[own] = self._exchanged(own, nbytes // self.tile.consumers, 1, rank)
        return Outbox([self.rings[f"{name}{rank}"] for rank in range(self.tile.consumers)])

    def _exchanged(self, name: str, nbytes: int, stages: int, part: int = 0) -> Ring:
        full, empty = (
            [self._barrier(f"{kind} {name}.{s}", BarrierKind.MEETING, 1) for s in range(stages)] for kind in ("full", "empty")
        )
        return Ring(self, name, nbytes, stages, len(self.rings), full, empty, part=part)

    def private(self, name: str, nbytes: int) -> Private:
        """A buffer of `nbytes` that is loaded in parts, one for each consumer, who waits for and frees its own."""
        return Private([self._part(name, nbytes, rank, loaded=True) for rank in range(self.tile.consumers)])

    def staging(self, name: str, nbytes: int) -> Private:
        """A buffer of `nbytes` that results leave through, each consumer's by its own part; no one loads into it."""
        return Private([self._part(name, nbytes, rank, loaded=False) for rank in range(self.tile.consumers)])

    def baton(self, first: int = 0) -> Baton:
        """A turn that starts with consumer `first` and passes on at every give."""
        if not self.batons:
            count = self.tile.consumers
            barriers = [
                self._barrier(f"turn of WG{r}", BarrierKind.NAMED, 1, initial=int(r == first)) for r in range(count)
            ]
            self.batons.append(Baton(barriers, [0] * count))
        return self.batons[0]

    def meeting(self) -> Meeting:
        """A place for all consumers to meet, as before an epilogue that overwrites what others may still read."""
        if not self.meetings:
            count = self.tile.consumers
            self.meetings.append(Meeting(self._barrier("meeting", BarrierKind.MEETING, count), [0] * count))
        return self.meetings[0]

    def producer(self) -> Warp:
        """The warp that issues TMA loads."""
        return self._begun(self._warp("producer", -1))

    def drain(self) -> Warp:
        """A warp beside the producer's that sends results away."""
        return self._warp("drain", -2)

    def transposers(self) -> Warp:
        """Warps beside the producer's that transpose what it has loaded, one on each sub-partition."""
        return self._warp("transposers", -3)

    def multiplier(self) -> Warp:
        """A warpgroup beside the consumers that multiplies what they have put."""
        return self._warp("multiplier", -4)

    def consumers(self) -> list[Warp]:
        """The consumer warpgroups, WG0 first."""
        return [self._begun(self._warp(f"WG{rank}", rank)) for rank in range(self.tile.consumers)]

    def _begun(self, warp: Warp) -> Warp:
        """Of a persistent CTA each warp finds its next tile first."""
        if self.persistent and warp.tile_number < self.tile_number:
            if warp.rank < 0 and not self.strides and (self.tile.workload.causal or self.tile.workload.lengths):
                warp._emit(Op.DRAW, "next tile", None)
            warp._run(warp.pen.next_tile(), "next tile")
            warp.tile_number = self.tile_number
        return warp

    # -- bookkeeping -----------------------------------------------------------------------------------------------

    def begin_tile(self, tile: TileView, persistent: bool, strides: bool = False) -> None:
        """Start recording the next tile: rings go on behind what the last tile used; a new CTA joins all warps first."""
        new_cta = self.tile_number >= 0 and not persistent
        if new_cta:
            self._exit()
        self.tile = tile
        self.persistent, self.strides = persistent, strides
        self.tile_number += 1
        if new_cta:
            self._launch()
        for ring in self.rings.values():
            ring.base += ring.used
            ring.used = 0

    def finish(self) -> None:
        """Close the recording: a stage is empty again when every warp that reads the ring has freed it."""
        for ring in self.rings.values():
            for full, empty in zip(ring.full, ring.empty, strict=True):
                self.barriers[full].expected = max(1, len(ring.loaders))
                self.barriers[empty].expected = max(1, len(ring.readers))

    def _part(self, name: str, nbytes: int, rank: int, loaded: bool) -> Ring:
        own = f"{name}{rank}"
        if own not in self.rings:
            full, empty = (
                [self._barrier(f"{kind} {own}", BarrierKind.MBARRIER, 1)] if loaded else [] for kind in ("full", "empty")
            )
            self.rings[own] = Ring(self, own, nbytes // self.tile.consumers, 1, len(self.rings), full, empty, part=rank)
        return self.rings[own]

    def _warp(self, name: str, rank: int) -> Warp:
        for warp in self.warps:
            if warp.name == name:
                return warp
        warp = Warp(self, len(self.warps), name, rank)
        self.warps.append(warp)
        self._set_up(warp)
        return warp

    def _set_up(self, warp: Warp) -> None:
        warp._emit(Op.SETUP, "setup", None)
        warp._run(warp.pen.prologue(self.tile), "setup")

    def _exit(self) -> None:
        """The CTA's warps leave; it ends with the last of them."""
        if not any(b.kind == BarrierKind.CTA for b in self.barriers):
            self._cta_barrier = self._barrier("CTA exit", BarrierKind.CTA, len(self.warps))
        for warp in self.warps:
            warp._emit(Op.ARRIVE, "exit", None, barrier=self._cta_barrier)

    def _launch(self) -> None:
        """The next CTA takes the place of the one before: its launch and prologue belong to its own tile."""
        for warp in self.warps:
            warp._emit(Op.WAIT, "launch", None, barrier=self._cta_barrier, target=self.tile_number)
            self._set_up(warp)
