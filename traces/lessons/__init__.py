"""The course: why attention is slow, and what FlashAttention-1, -2 and -3 do about it, lesson by lesson.

A lesson is a file here: a title, a line on what it is about, and a function that builds its sections for a `Course`. All
that it shows is data (`parts`); the terminal and any other renderer draw the same lesson.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from ...simulator.errors import UsageError, did_you_mean
from . import (
    clock,
    fp8,
    hardware,
    loop_order,
    machines,
    overlap,
    own_schedule,
    pingpong,
    recomputation,
    roofline,
    softmax,
    tiling,
    warp_specialization,
    why_slow,
)  # fmt: skip
from .course import DEVICE, Course
from .parts import Lesson


@dataclass(frozen=True)
class Entry:
    """A lesson's place in the course, without what it computes. `name` stays when lessons are put in another order."""

    number: int
    name: str
    title: str
    about: str
    module: ModuleType

    def build(self, course: Course) -> Lesson:
        """The lesson for the course's device. Raises UsageError, one sentence, where that device has not what it is about."""
        needs = getattr(self.module, "NEEDS", "")
        if needs and not course.has(needs):
            raise UsageError(f"lesson {self.title!r} is about {needs}, which {course.device.name} does not have; use --device {DEVICE}")
        sections = self.module.sections(course)
        return Lesson(self.number, self.name, self.title, self.about, course.device.name, sections, self.module.READING)


__all__ = ("DEVICE", "LESSONS", "Course", "Entry", "find_lesson")
_MODULES = (
    why_slow, softmax, tiling, loop_order, recomputation, roofline, machines, warp_specialization, pingpong, overlap, fp8, clock,
    hardware, own_schedule,
)  # fmt: skip
LESSONS = tuple(
    Entry(number, module.__name__.rpartition(".")[2].replace("_", "-"), module.TITLE, module.ABOUT, module)
    for number, module in enumerate(_MODULES, start=1)
)
"""In the order of the course."""


def find_lesson(asked: str) -> Entry:
    """A lesson by its number or name; UsageError saying which there are."""
    wanted = asked.strip().lower()
    for entry in LESSONS:
        if wanted in (str(entry.number), entry.name):
            return entry
    near = did_you_mean(asked, [entry.name for entry in LESSONS])
    raise UsageError(
        f"lesson {asked[:40]!r} is not there: give a number from 1 to {len(LESSONS)}{near}; `fasim learn --list` names them"
    )
