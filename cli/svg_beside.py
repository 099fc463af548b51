"""Several schedules as one SVG figure: the same blocks on one axis and scale, softmax underlined by what it runs under."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..traces.beside import Cover, Panel, longest
from ..traces.window import SOFTMAX
from .beside import SHARES, headline
from .palette import cover_colour
from .side_by_side import letter
from .svg import LANE, MUTED, RIGHT, Sheet, axis, document, lane, legend_of, text, text_width, titled

_STRIP, _HEAD, _BETWEEN = 9, 26, 26


def svg_beside(panels: Sequence[Panel], width: int = 1280) -> str:
    """The panels below each other as a standalone SVG document, `width` pixels wide."""
    run = panels[0].run
    heading = f"{', '.join(panel.run.schedule for panel in panels)} on {run.device}, {run.workload}"
    title, y = titled(heading, width)
    first_top, body = y, list[str]()
    left = max(Sheet(panel.figure, width, y).left for panel in panels)
    for index, panel in enumerate(panels):
        strips = dict.fromkeys(_softmax_rows(panel).values(), _STRIP)
        head, top = _head(index, panel, y, width)
        sheet = Sheet(panel.figure, width, top, left, longest(panels), strips)
        body += [*head, *_panel(panel, sheet)]
        y = sheet.bottom + _BETWEEN
    said, y = _explained(sheet.bottom + 52, width)
    legend, height = legend_of(sheet, y)
    grid = axis(sheet, first_top + _HEAD - 4)
    return document(heading, [*title, *grid, *body, *said, *legend], width, height)


def _softmax_rows(panel: Panel) -> dict[int, str]:
    """By warpgroup the row in which its softmax stands."""
    rows = [row for row in panel.figure.rows if row.kind == "warp"]
    return {span.group: row.name for row in rows for span in row.spans if span.kind == SOFTMAX}


def _head(index: int, panel: Panel, y: float, width: int) -> tuple[list[str], float]:
    """A panel's name and numbers, on one line or two, and where its rows begin."""
    name, said = f"{letter(index)}  {panel.run.schedule}", headline(panel)
    x = 20 + text_width(name, 13)
    parts = [text(10, y + 14, name, 13, weight=700), text(width - 4, y + 14, "idle", 11, MUTED, "end")]
    if x + text_width(said, 12) > width - RIGHT:
        x, y = 10, y + 17
    return [*parts, text(x, y + 14, said, 12, MUTED)], y + _HEAD


def _panel(panel: Panel, sheet: Sheet) -> Iterator[str]:
    under = {row: group for group, row in _softmax_rows(panel).items()}
    for row, top in zip(panel.figure.rows, sheet.lanes, strict=True):
        yield from lane(row, top, sheet)
        if row.name in panel.idle:
            yield text(sheet.width - 4, top + LANE / 2 + 4, f"{panel.idle[row.name]:.0%}", 11, MUTED, "end")
        for cover in panel.covers:
            if cover.group == under.get(row.name, -1):
                yield _strip(cover, top + LANE + 1, sheet, panel.window.warpgroups)
    if panel.window.end < sheet.until:
        x = sheet.x(panel.window.end)
        yield f"<line x1='{x:.1f}' y1='{sheet.top:.1f}' x2='{x:.1f}' y2='{sheet.bottom:.1f}' stroke='{MUTED}' stroke-width='2'/>"
        done = f"done: {panel.window.end:,} cycles"
        if x + 8 + text_width(done, 11) < sheet.width - RIGHT:
            yield text(x + 8, sheet.top + LANE / 2 + 4, done, 11, MUTED)


def _strip(cover: Cover, y: float, sheet: Sheet, warpgroups: Sequence[str]) -> str:
    left, right = sheet.x(cover.start), sheet.x(cover.end)
    what = "exposed: the tensor cores idle" if cover.by < 0 else f"under {warpgroups[cover.by]}'s GEMM"
    return (
        f"<rect x='{left:.2f}' y='{y:.1f}' width='{max(right - left, 0.3):.2f}' height='{_STRIP - 2}' "
        f"fill='{cover_colour(cover.by, cover.group)}'><title>softmax {what}: {cover.start}-{cover.end}</title></rect>"
    )


def _explained(y: float, width: int) -> tuple[list[str], float]:
    """What the strips below the warpgroups' rows say, in as many lines as it takes; and where to go on."""
    parts, x = list[str](), 20.0
    for words, fill in (("below a warpgroup: its softmax", None), *SHARES.values()):
        swatch = 31 if fill else 0
        if x > 20 and x + swatch + text_width(words, 11) > width - 10:
            x, y = 20.0, y + 20
        if fill:
            parts.append(f"<rect x='{x:.1f}' y='{y - 8:.1f}' width='26' height='{_STRIP - 2}' fill='{fill}'/>")
        parts.append(text(x + swatch, y, words, 11, MUTED))
        x += swatch + text_width(words, 11) + 14
    return parts, y + 24
