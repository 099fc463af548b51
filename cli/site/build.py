"""The whole site: a menu, a page for each lesson, timelines beside each other, and walks over S."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from ...simulator.errors import UsageError
from ...traces.beside import whole_blocks
from ...traces.lessons import LESSONS, parts
from ...traces.window import by_iterations
from . import drawn
from .lesson import LessonPage
from .page import ASSETS, asset, page

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...simulator.results.run import Run
    from ...traces.beside import Panel
    from ...traces.lessons import Course, Entry
    from ...traces.window import Window

IDEAS = ("warp-specialized", "pingpong", "overlap-2stage", "fa3")
"""FlashAttention-3's Figures 1 and 2."""
ELSEWHERE = ("standard", "fa2")
"""Drawn on a device without TMA and WGMMA."""
WALKED = ("standard", "fa1", "fa2", "fa3")
RECORDED = ("fa3", "pingpong")
"""Timelines of the hardware that are drawn under the predicted ones."""
_LINKS = (("course", "index.html"), ("timelines", "timelines.html"), ("walk over S", "walk.html"))


def site(course: Course) -> dict[str, str]:
    """Every file of the site by its name. Needs no network, no server, and keeps what is answered in the browser alone."""
    lessons = {entry: _lesson(course, entry) for entry in LESSONS}
    pages = {
        "index.html": _index(course, lessons),
        "timelines.html": _timelines(course),
        "walk.html": _walks(course),
        **{_name(entry): _lesson_page(course, entry, found) for entry, found in lessons.items()},
    }
    return pages | {name: asset(name) for name in ASSETS}


def timeline_page(run: Run, seen: Window) -> str:
    """One file with everything in it: all that a run recorded of its timeline, with a part of it in view."""
    return _alone(seen.title, drawn.timeline(run, seen), run.device)


def several_page(panels: Sequence[Panel]) -> str:
    """The same for several schedules below each other on one axis."""
    run = panels[0].run
    title = f"{', '.join(panel.run.schedule for panel in panels)} on {run.device}, {run.workload}"
    return _alone(title, drawn.timelines(panels), run.device)


def _alone(title: str, data: dict, device: str) -> str:
    body = f"<h1>{escape(title)}</h1>{_HOW}{_place('timelines')}"
    return page(title, body, {"timelines": {"t": data}}, alone=True, foot=_foot(device))


_HOW = (
    "<p class='about'>Point at a span for its label, cycles and bytes. Drag to move, Shift or Ctrl with the wheel to zoom, or "
    "the buttons; the slider reads every row at one cycle.</p>"
)


def _place(kind: str) -> str:
    css = {"timelines": "timeline", "walks": "walk"}[kind]
    return f'<div class="{css}" data-key="{kind[0]}"><noscript>This needs JavaScript.</noscript></div>'


def _foot(device: str) -> str:
    where = escape(device)
    return f"Every number on this page was computed by fasim's model of {where}, or recorded on hardware, when the page was made."


def _name(entry: Entry) -> str:
    return f"{entry.number:02}-{entry.name}.html"


def _lesson(course: Course, entry: Entry) -> parts.Lesson | str:
    """The lesson, or why this device cannot have it."""
    try:
        return entry.build(course)
    except UsageError as error:
        return str(error)


def _lesson_page(course: Course, entry: Entry, found: parts.Lesson | str) -> str:
    others = {other.number: other for other in LESSONS}
    before, after = others.get(entry.number - 1), others.get(entry.number + 1)
    turn = "".join(
        f'<a href="{_name(other)}">{text} {other.number}, {escape(other.title)}</a>' if other else "<span></span>"
        for text, other in (("←", before), ("→", after))
    )
    if isinstance(found, str):
        body, data = f"<h1>{escape(entry.title)}</h1><p>{escape(found)}.</p>", {}
    else:
        made = LessonPage(found)
        body, data = made.body(), made.data
    return page(f"{entry.title} · fasim", f'{body}<nav class="turn">{turn}</nav>', data, _LINKS, foot=_foot(course.device.name))


def _index(course: Course, lessons: dict[Entry, parts.Lesson | str]) -> str:
    items = []
    for entry, found in lessons.items():
        missing = isinstance(found, str)
        kept = "" if missing else f'<span class="kept" data-kept="{entry.name}" data-of="{len(found.questions)}"></span>'
        items.append(
            f'<li><span class="number">{entry.number}</span><span><a href="{_name(entry)}">{escape(entry.title)}</a> {kept}'
            f'<span class="about">{escape(found if missing else entry.about)}</span></span></li>'
        )
    body = f"""<h1>Why attention is slow, and what FlashAttention does about it</h1>
<p class="about">A course for who knows Python and matrix products, and nothing of GPUs: {len(LESSONS)} lessons of five to
ten minutes, on {escape(course.device.name)}. Every figure is computed by a model of the chip, or was recorded on one.</p>
<ol class="lessons">{"".join(items)}</ol>
<p>Beside the lessons: <a href="timelines.html">timelines of several schedules</a> on one axis, and
<a href="walk.html">the walk over S</a> with the bytes between the levels of memory.</p>"""
    return page("fasim: why attention is slow", body, {}, _LINKS, foot=_foot(course.device.name))


def _timelines(course: Course) -> str:
    data: dict[str, dict] = {}
    out = [f"<h1>Timelines</h1>{_HOW}"]

    def shown(title: str, said: str, found: dict) -> None:
        key = f"t{len(data)}"
        data[key] = found
        out.append(f'<h2>{escape(title)}</h2><p>{said}</p><div class="timeline" data-key="{key}"></div>')

    if course.device.wgmma and course.device.tma:
        said = (
            "The same K/V blocks of four schedules on one axis of SM cycles. The strip under a warpgroup says whose GEMM runs "
            "during its softmax; at the right how much of the time a row is idle."
        )
        shown("What hides under what", said, drawn.timelines(whole_blocks([course.timeline(name) for name in IDEAS])))
        for name in RECORDED:
            both = course.recorded_timeline(name).both
            said = "Each warp as predicted and, below it, as the kernel wrote it down on an H200, aligned at the first GEMM."
            shown(f"{name}, predicted and measured", said, drawn.timeline(both, by_iterations(both, 2, 4)))
    else:
        for name in ELSEWHERE:
            run = course.timeline(name)
            shown(name, "", drawn.timeline(run, by_iterations(run)))
    return page("timelines · fasim", "\n".join(out), {"timelines": data}, _LINKS, foot=_foot(course.device.name))


def _walks(course: Course) -> str:
    found, usual = [], []
    for name in WALKED:
        for causal in (False, True):
            try:
                walks = course.walks(name, causal)
            except UsageError:  # not on this device
                continue
            found += walks
            usual += [walk for walk in walks if walk.tile == course.usual_tile(name, causal)]
    data = {"walks": {"w": drawn.walks(found, usual)}}
    body = f"""<h1>The walk over S</h1>
<p class="about">One head of {found[0].workload.seqlen_q:,} tokens, tile by tile in the order of the schedule, one CTA at a time.
What moves between the levels of memory is counted by the model; the sums are those of its prediction.</p>
{_place("walks")}
<p>Try the block: a taller tile of queries asks L2 for fewer bytes in fa2 and fa3; in fa1 it is the keys in a block that decide how
often O travels; standard attention stores S and P whatever the block is.</p>"""
    return page("the walk over S · fasim", body, data, _LINKS, foot=_foot(course.device.name))
