"""Tune: every tile, number of stages and of consumers that a schedule takes on a device, predicted and ranked.

The choice is the fastest, or the table's own tile where that is within CLOSE of it: predictions rank tiles no finer. Nor do they
rank a cluster: the model has it up to 3 % ahead, by its clock alone, where 90 pairs timed on an H200 lose 1 % by it in the mean
(traces/recorded/kernels/tiles_h200.json), so one is chosen only where nothing without it comes within CLOSE.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from ...simulator.devices.device import Device
from ...simulator.errors import UsageError
from ...simulator.predict import default_tile, fits
from ...simulator.problem.parts import height
from ...simulator.problem.tile import Tile
from ...simulator.problem.workload import Workload
from ...simulator.results import metrics
from ...simulator.results.run import Run
from ...simulator.schedules import Schedule, find_schedule
from ...simulator.units import scaled
from ..predictions import Advance, Elsewhere, Question, processes, stream
from .verdict import CLOSE, why_faster

STAGES, CLUSTERS, CONSUMERS = (1, 2, 3, 4), (1, 2), (1, 2, 3)
MIN_KEYS, MAX_KEYS, STEP = 16, 256, 16
"""Keys of a tile: the k step of the second GEMM, up to the widest WGMMA."""
PARTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Of the keys of few queries."""
QUERIES_OF_A_BACKWARD = (64, 80, 96, 112, 128)
SAME = 0.005
"""Two times within this of each other: the simpler tile comes first, with fewer stages and no cluster."""


@dataclass(frozen=True)
class Tuned:
    """The tiles of one workload, the fastest first, and the table's own."""

    runs: tuple[Run, ...]
    usual: Run
    illegal: int
    """Tiles that were tried and do not fit."""

    @property
    def choice(self) -> Run:
        """The tile to take: the table's, or one without a cluster, unless another is faster by more than the model can tell."""
        alone = next((run for run in self.runs if run.tile.cluster == 1), self.runs[0])
        best = alone if self.ahead_of(alone) < CLOSE else self.runs[0]
        return self.usual if metrics.time_s(self.usual) / metrics.time_s(best) - 1 < CLOSE else best

    def ahead_of(self, run: Run) -> float:
        """By how much the fastest is faster than another tile."""
        return metrics.time_s(run) / metrics.time_s(self.runs[0]) - 1

    @property
    def sentence(self) -> str:
        """Which tile, by how much over the next and over the table's, and why."""
        first, best = self.choice, self.runs[0]
        count = f"{len(self.runs):,} legal tiles"
        if first is best:
            second = self.second
            head = f"{spoken(best.tile)} is the fastest of {count}, {scaled(metrics.time_s(best), 's')}"
            if best is self.usual:
                head += ", and is the table's"
            elif self.usual is not second:
                head += f", {self.ahead_of(self.usual):.1%} faster than the table's {spoken(self.usual.tile)}"
            return head + (f"; {_reason(best, second, second is self.usual)}." if second else ".")
        whose = "the table's" if first is self.usual else "without a cluster"
        return (
            f"{spoken(first.tile)}, {whose}, is within {self.ahead_of(first):.1%} of the fastest of {count}, "
            f"{scaled(metrics.time_s(first), 's')} against {scaled(metrics.time_s(best), 's')} of {spoken(best.tile)}: "
            f"less than the model can tell{' of a cluster' if self.ahead_of(first) >= CLOSE else ''}."
        )

    @property
    def second(self) -> Run | None:
        """The fastest that is no variant of the best in stages or cluster alone."""
        of = [(run.tile.block_m, run.tile.block_n, run.tile.consumers) for run in self.runs]
        return next((run for run, shape in zip(self.runs, of, strict=True) if shape != of[0]), None)


def spoken(tile: Tile) -> str:
    """A tile with all that was chosen: 128x128, 2 stages, 2 consumers."""
    cluster = f", cluster {tile.cluster}" if tile.cluster > 1 else ""
    split = f", {tile.parts} parts" if tile.parts > 1 else ""
    return f"{tile}, {_count(tile.stages, 'stage')}, {_count(tile.consumers, 'consumer')}{cluster}{split}"


def tune(
    workload: Workload,
    schedule: str = "fa3",
    device: str | Device = "h100-sxm",
    clock_hz: float | None = None,
    regime: str = "sustained",
    advance: Advance | None = None,
    workers: int | None = None,
    elsewhere: Elsewhere | None = None,
) -> Tuned:
    """Predict a workload with every tile that the schedule takes, and rank them.

    Raises UsageError, one sentence, where the schedule does not take the workload at all.
    """
    usual = default_tile(workload, schedule, device)
    tell = advance or (lambda done, total, what: None)
    possible, tried = _which_fit(workload, schedule, device, tell)
    questions = [Question(workload, schedule, device, tile, clock_hz, regime) for tile in dict.fromkeys([usual, *possible])]
    found = {}
    for done, (question, answer) in enumerate(stream(questions, workers or processes(), elsewhere), 1):
        tell(done, len(questions), f"{schedule}, {question.tile}")
        if isinstance(answer, Run):
            found[question.tile] = answer
        elif question.tile == usual:
            raise answer
    ranked = tuple(sorted(found.values(), key=lambda run: (metrics.time_s(run), run.tile.cluster, run.tile.stages)))
    return Tuned(_simplest_first(ranked), found[usual], tried - len(found))


def candidates(workload: Workload, schedule: Schedule) -> Iterator[Tile]:
    """Every tile that could be one of this schedule's, of one stage and without a cluster; most do not fit."""
    keys = range(MIN_KEYS, MAX_KEYS + 1, STEP)
    if schedule.packs:
        rows = height(workload.seqlen_q * workload.heads_per_kv)
        yield from (Tile(rows, n, 1, 1, parts=count) for n in (32, 64, 128) for count in PARTS if count * n <= workload.seqlen_k)
        return
    for consumers in CONSUMERS:
        if workload.backward:
            shapes = [(m, n) for m in QUERIES_OF_A_BACKWARD for n in (keys if not schedule.hopper else (64 * consumers, 128))]
        elif schedule.hopper:
            shapes = [(64 * consumers, n) for n in keys]
        else:
            shapes = [(rows * consumers, n) for rows in (64, 128) for n in keys]
        for m, n in dict.fromkeys(shapes):
            with suppress(UsageError):
                yield Tile(m, n, 1, consumers)


def legal_tiles(workload: Workload, schedule: str, device: str | Device) -> list[Tile]:
    """The tiles that fit, without a prediction."""
    return _which_fit(workload, schedule, device, lambda done, total, what: None)[0]


def _which_fit(workload: Workload, schedule: str, device: str | Device, tell: Advance) -> tuple[list[Tile], int]:
    """The tiles that fit, and how many were tried. More stages take more room, and a cluster none."""
    shapes = list(candidates(workload, find_schedule(schedule, workload.direction)))
    possible, tried = [], 0
    for number, shape in enumerate(shapes):
        tell(number, len(shapes), f"which tiles fit, {shape}")
        clusters = [1, *(each for each in CLUSTERS if each > 1 and _pairs_up(workload, shape, schedule, each))]
        tried += len(STAGES) * len(clusters)
        for stages in STAGES:
            tile = replace(shape, stages=stages)
            try:
                fits(workload, schedule, device, tile)
            except UsageError:
                break
            possible += [replace(tile, cluster=cluster) for cluster in clusters]
    return possible, tried


def _pairs_up(workload: Workload, tile: Tile, schedule: str, cluster: int) -> bool:
    """Whether CTAs of a cluster walk the same keys: of a forward without a mask whose Q tiles pair up."""
    alike = find_schedule(schedule).hopper and not workload.causal if not workload.backward else False
    return alike and -(-workload.seqlen_q // tile.block_m) % cluster == 0


def _simplest_first(ranked: Sequence[Run]) -> tuple[Run, ...]:
    """Of tiles that are the best within SAME and differ in stages or cluster alone, the simplest first."""
    best = metrics.time_s(ranked[0])
    shape = replace(ranked[0].tile, stages=1, cluster=1)
    alike = [
        run for run in ranked if metrics.time_s(run) <= best * (1 + SAME) and replace(run.tile, stages=1, cluster=1) == shape
    ]
    first = min(alike, key=lambda run: (run.tile.cluster, run.tile.stages))
    return (first, *(run for run in ranked if run is not first))


def _reason(first: Run, second: Run, usual: bool) -> str:
    gap = metrics.time_s(second) / metrics.time_s(first) - 1
    name = f"{spoken(second.tile)}, the table's," if usual else spoken(second.tile)
    why = why_faster(first, second)
    behind = f"{name} is {max(gap, 0.0):.1%} slower" if gap >= 0.0005 else f"{name} is as fast"
    return behind + (f": there {_turned(why)}" if why and gap >= 0.0005 else "")


def _turned(why: str) -> str:
    return why.replace("of its time", "of the best's time").replace("of the other's", "of its own")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number > 1 else "")
