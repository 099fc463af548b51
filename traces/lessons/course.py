"""The course's ground: one workload, one device, and everything a lesson asks of the model and of the recordings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path

from ...simulator.devices.device import Device
from ...simulator.predict import default_tile, predict
from ...simulator.problem.tile import Tile
from ...simulator.problem.workload import Workload
from ...simulator.results.run import Run
from ...simulator.schedules import find_schedule
from .. import store
from ..overlay import Pair, pair
from ..predictions import Advance, Question, predict_all
from ..walk import Walk, of_sizes
from .parts import Listing

WORKLOAD = Workload(batch=4, heads=16, seqlen=4096, head_dim=128)
"""Of all lessons: large enough that every effect of a long sequence is there, and recorded on the H200 in most schedules."""
HOPPER, EIGHT_BIT = "TMA and WGMMA", "FP8 on TMA and WGMMA"
"""What a lesson can be about that not every device has."""
WALKED = 1024
"""Tokens of a walk over S: few enough for the whole of it to be shown."""
DEVICE = "h200"
"""The one the recordings are of."""


class Course:
    """What lessons compute with: predictions for one device, kept between calls, and recordings of the same workload."""

    def __init__(self, device: Device, advance: Advance | None = None):
        self.device, self.advance = device, advance
        self.workload = WORKLOAD

    def runs(self, *schedules: str, workload: Workload | None = None) -> tuple[Run, ...]:
        """Predictions of several schedules, without spans, at the course's workload or another."""
        questions = [Question(workload or self.workload, name, self.device) for name in schedules]
        found = predict_all(questions, advance=self.advance)
        return tuple(found[question] for question in questions)

    def has(self, machines: str) -> bool:
        """Whether the device has HOPPER's machines or EIGHT_BIT's."""
        return bool(self.device.tma and self.device.wgmma and (machines == HOPPER or self.device.fp8_ratio))

    @property
    def best(self) -> str:
        """The fastest schedule that the device can run."""
        return "fa3" if self.has(HOPPER) else "fa2"

    def able(self, *schedules: str) -> tuple[str, ...]:
        """Those of some schedules that the device can run."""
        return tuple(name for name in schedules if self.has(HOPPER) or not find_schedule(name).hopper)

    def run(self, schedule: str, workload: Workload | None = None) -> Run:
        """One of them."""
        return self.runs(schedule, workload=workload)[0]

    def timeline(self, schedule: str, workload: Workload | None = None) -> Run:
        """A prediction with its spans."""
        if self.advance:
            self.advance(0, 1, schedule)
        return _with_spans(workload or self.workload, schedule, self.device)

    def walks(self, schedule: str, causal: bool = False) -> tuple[Walk, ...]:
        """The walks of a schedule over one head of few tokens, with smaller and larger blocks."""
        if self.advance:
            self.advance(0, 1, f"the walk of {schedule}")
        return _walks(self._walked(causal), schedule, self.device)

    def usual_tile(self, schedule: str, causal: bool = False) -> Tile:
        """The tile that a schedule takes for such a walk unless asked."""
        return default_tile(self._walked(causal), schedule, self.device)

    def _walked(self, causal: bool) -> Workload:
        return Workload(batch=1, heads=1, seqlen=WALKED, head_dim=self.workload.head_dim, causal=causal)

    def recorded_timeline(self, kernel: str) -> Pair:
        """The in-kernel timeline of one of our kernels at the course's workload, with its prediction; it is of an H200."""
        work = self.workload
        shape = f"b{work.batch}h{work.heads}s{work.seqlen_q}d{work.head_dim}-{work.dtype}"
        path = store.TIMELINES / f"{kernel}-cuda-{shape}-burst.run.json.gz"
        if self.advance:
            self.advance(0, 1, f"{kernel} as recorded")
        return pair(path.name, store.load(path))

    @cached_property
    def standard_bytes(self) -> int:
        """Bytes of S, which P has too: one for every query and key of every head."""
        work = self.workload
        return work.batch * work.heads * work.seqlen_q * work.seqlen_k * work.element_bytes

    def measured(self, kernel: str) -> Run | None:
        """The recorded run of one of our kernels at the course's workload, on this very device; None where there is none."""
        work = self.workload
        shape = f"b{work.batch}h{work.heads}s{work.seqlen}d{work.head_dim}-{work.dtype}"
        path = store.RECORDED / f"{kernel}-cuda-{shape}-sustained.run.json"
        if not path.is_file():
            return None
        found = store.load(path)
        return found if found.device == self.device.name else None


@lru_cache(maxsize=32)
def _with_spans(workload: Workload, schedule: str, device: Device) -> Run:
    return predict(workload, schedule, device)


@lru_cache(maxsize=32)
def _walks(workload: Workload, schedule: str, device: Device) -> tuple[Walk, ...]:
    return of_sizes(workload, schedule, device)


def hbm_bytes(run: Run, *names: str) -> int:
    """Bytes of some tensors, or of all, over HBM in both directions."""
    moved = run.traffic.by_tensor
    return sum(moved[name].hbm_read + moved[name].hbm_write for name in names or moved)


def source(body: Callable) -> Listing:
    """A schedule's function as it stands in its file."""
    path = Path(inspect.getsourcefile(body)).relative_to(Path(store.__file__).parents[1])
    return Listing(inspect.getsource(body), path.as_posix())
