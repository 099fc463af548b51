"""Window -> SVG text: the timeline as a figure, one lane per warp and unit, labels inside the spans."""

from __future__ import annotations

from xml.sax.saxutils import escape

from ..traces.window import Row, Span, Window
from .palette import HUES, WAIT, colour, ink, shades, ticks

_LANE, _GAP, _LEFT, _RIGHT, _TOP = 26, 6, 128, 24, 56
_FONT = "font-family='ui-sans-serif, Helvetica, Arial, sans-serif'"
_GRID, _TEXT, _MUTED, _PAPER, _BAND = "#e2e4e8", "#1b1d21", "#6b7078", "#ffffff", "#f6f7f9"


def svg(window: Window, width: int = 1280) -> str:
    """The window as a standalone SVG document, `width` pixels wide."""
    lanes = [_place(window, index) for index in range(len(window.rows))]
    bottom = lanes[-1] + _LANE if lanes else _TOP
    height = bottom + 86
    body = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' "
        f"viewBox='0 0 {width} {height}' {_FONT}>",
        f"<title>{escape(window.title)}</title>",
        f"<rect width='{width}' height='{height}' fill='{_PAPER}'/>",
        _text(_LEFT, 24, window.title, size=14, weight=600),
        *_axis(window, width, bottom),
    ]
    for row, y in zip(window.rows, lanes, strict=True):
        body += _lane(row, y, window, width)
    body += _legend(window, bottom + 58)
    return "\n".join([*body, "</svg>", ""])


def _place(window: Window, index: int) -> int:
    """Top of a lane; units stand apart from warps."""
    apart = any(row.kind != window.rows[0].kind for row in window.rows[: index + 1])
    return _TOP + index * (_LANE + _GAP) + (14 if apart else 0)


def _x(cycle: float, window: Window, width: int) -> float:
    return _LEFT + (cycle - window.start) * (width - _LEFT - _RIGHT) / (window.end - window.start)


def _text(
    x: float, y: float, text: str, size: int = 12, fill: str = _TEXT, anchor: str = "start", weight: int = 400
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' font-weight='{weight}' fill='{fill}' "
        f"text-anchor='{anchor}'>{escape(text)}</text>"
    )


def _lane(row: Row, y: int, window: Window, width: int) -> list[str]:
    parts = [
        _text(_LEFT - 10, y + _LANE / 2 + 4, row.name, anchor="end", weight=600 if row.kind == "warp" else 400),
        f"<rect x='{_LEFT}' y='{y}' width='{width - _LEFT - _RIGHT}' height='{_LANE}' fill='{_BAND}'/>",
    ]
    return parts + [_span(span, y, window, width) for span in row.spans]


def _span(span: Span, y: int, window: Window, width: int) -> str:
    left, right = _x(span.start, window, width), _x(span.end, window, width)
    hint = f"<title>{escape(span.label)}{f' [{span.step}]' if span.step >= 0 else ''}: {span.start}-{span.end}</title>"
    if span.wait:
        middle = y + _LANE / 2
        return (
            f"<line x1='{left:.2f}' y1='{middle}' x2='{right:.2f}' y2='{middle}' stroke='{WAIT}' stroke-width='1.2' "
            f"stroke-dasharray='2 3'>{hint}</line>"
        )
    box = (
        f"<rect x='{left:.2f}' y='{y}' width='{max(right - left, 0.3):.2f}' height='{_LANE}' "
        f"fill='{colour(span.step, span.group)}'>{hint}</rect>"
    )
    if right - left < 7 * len(span.short) + 3:
        return box
    return box + _text((left + right) / 2, y + _LANE / 2 + 4, span.short, 11, ink(span.step, span.group), "middle")


def _axis(window: Window, width: int, bottom: int) -> list[str]:
    parts = []
    for tick in ticks(window.start, window.end, 12):
        x = _x(tick, window, width)
        parts.append(f"<line x1='{x:.1f}' y1='{_TOP - 10}' x2='{x:.1f}' y2='{bottom + 6}' stroke='{_GRID}'/>")
        parts.append(_text(x, bottom + 20, f"{tick:,}", 11, _MUTED, "middle"))
    parts.append(_text(_LEFT - 10, bottom + 20, "SM cycles", 11, _MUTED, "end"))
    return parts


def _legend(window: Window, y: int) -> list[str]:
    x, parts = float(_LEFT), []
    entries = [("K/V block " if i == 0 else "") + str(step) for i, step in enumerate(window.steps[: len(HUES)])]
    pairs = [*zip(window.steps, entries, strict=False), (-1, "outside the loop, turns")]
    for step, name in pairs:
        for group in window.groups or (-1,):
            parts.append(f"<rect x='{x:.1f}' y='{y - 10}' width='13' height='13' fill='{colour(step, group)}'/>")
            x += 13
        parts.append(_text(x + 5, y, name, 11, _MUTED))
        x += 16 + 6.4 * len(name)
    if len(window.groups) > 1:
        parts.append(_text(x, y, shades(window.warpgroups), 11, _MUTED))
        x += 20 + 6.4 * len(shades(window.warpgroups))
    parts.append(f"<line x1='{x}' y1='{y - 4}' x2='{x + 26}' y2='{y - 4}' stroke='{WAIT}' stroke-dasharray='2 3'/>")
    parts.append(_text(x + 32, y, "waits", 11, _MUTED))
    return parts
