"""Window -> SVG text: the timeline as a figure, one lane per warp and unit, labels inside the spans."""

from __future__ import annotations

from collections.abc import Iterable
from xml.sax.saxutils import escape

from ..traces.figure import Figure, figure
from ..traces.window import GEMM, ON_COPY, ON_GEMM, ON_TURN, WORK, Row, Span, Window
from .legend import entries
from .palette import HUES, TURN, WAIT, colour, ink, ticks

LANE, GAP, RIGHT, _LINE = 26, 6, 40, 20
_FONT = "font-family='Helvetica, Arial, sans-serif'"
GRID, TEXT, MUTED, _PAPER, _BAND = "#e2e4e8", "#1b1d21", "#6b7078", "#ffffff", "#f6f7f9"
_DASHES = {ON_COPY: "2 3", ON_GEMM: "", ON_TURN: "7 4"}


class Sheet:
    """Where things are on a sheet of so many pixels: the measured widths of labels decide.

    Beside others a figure has their `left` edge and their scale, `until` the cycle that is the right edge, and `strips` of
    pixels below the rows of some names.
    """

    def __init__(
        self, drawn: Figure, width: int, top: float, left: float = 0.0, until: int = 0, strips: dict[str, int] | None = None
    ):
        self.drawn, self.window, self.width, self.top = drawn, drawn.window, width, top
        self.left = max([left] + [20 + text_width(name, 12) for name in ("SM cycles", *(row.name for row in drawn.rows))])
        self.until = max(until, self.window.end)
        self.lanes: list[float] = []
        y, before = float(top), None
        for row in drawn.rows:
            y += 14 if before and before.kind != row.kind else 0  # units stand apart from warps
            self.lanes.append(y)
            y += LANE + (1 if row.name.endswith(" GEMM") else GAP) + (strips or {}).get(row.name, 0)
            before = row
        self.bottom = y - GAP

    def x(self, cycle: float) -> float:
        """Where a cycle stands."""
        return self.left + (cycle - self.window.start) * (self.width - self.left - RIGHT) / (self.until - self.window.start)


def svg(window: Window, width: int = 1280) -> str:
    """The window as a standalone SVG document, `width` pixels wide."""
    title, top = titled(window.title, width)
    sheet = Sheet(figure(window), width, top)
    legend, height = legend_of(sheet, sheet.bottom + 52)
    body = [*title, *axis(sheet, sheet.top - 10)]
    for row, y in zip(sheet.drawn.rows, sheet.lanes, strict=True):
        body += lane(row, y, sheet)
    return document(window.title, [*body, *legend], width, height)


def document(title: str, body: Iterable[str], width: int, height: int) -> str:
    """A standalone SVG document of so many pixels."""
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' viewBox='0 0 {width} {height}' {_FONT}>",
            f"<title>{escape(title)}</title>",
            f"<rect width='{width}' height='{height}' fill='{_PAPER}'/>",
            *body,
            "</svg>",
            "",
        ]
    )


def titled(title: str, width: int) -> tuple[list[str], float]:
    """A title over the whole width, and where what it stands over begins."""
    lines = wrapped(title.split(" "), width - 2 * 10, 14, " ")
    return [text(10, 24 + _LINE * n, line, size=14, weight=600) for n, line in enumerate(lines)], 32 + _LINE * len(lines)


def text_width(words: str, size: float) -> float:
    """Pixels that words take in the widest of usual fonts, DejaVu Sans Bold (widths of its characters, in ems)."""
    return size * sum(0.42 if char in _NARROW else 1.06 if char in _WIDE else 0.78 if char.isupper() else 0.7 for char in words)


_NARROW, _WIDE = set("ijl.,:;'()[]|! tf/-"), set("mwMW%@+=<>~")


def wrapped(words: Iterable[str], width: float, size: float, between: str) -> list[str]:
    """Words in lines of at most so many pixels; a word that is longer stands alone."""
    lines: list[str] = []
    for word in words:
        longer = f"{lines[-1]}{between}{word}" if lines else word
        if lines and text_width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def text(x: float, y: float, words: str, size: int = 12, fill: str = TEXT, anchor: str = "start", weight: int = 400) -> str:
    """Words at a point."""
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' font-weight='{weight}' fill='{fill}' "
        f"text-anchor='{anchor}'>{escape(words)}</text>"
    )


def lane(row: Row, y: float, sheet: Sheet) -> list[str]:
    """A row's name, its band and its spans."""
    length = sheet.x(sheet.window.end) - sheet.left
    parts = [
        text(sheet.left - 10, y + LANE / 2 + 4, row.name, anchor="end", weight=600 if row.kind == "warp" else 400),
        f"<rect x='{sheet.left:.1f}' y='{y:.1f}' width='{length:.1f}' height='{LANE}' fill='{_BAND}'/>",
    ]
    return parts + [_span(span, y, row, sheet) for span in row.spans]


def _span(span: Span, y: float, row: Row, sheet: Sheet) -> str:
    left, right = sheet.x(span.start), sheet.x(span.end)
    hint = f"<title>{escape(span.label)}{f' [{span.step}]' if span.step >= 0 else ''}: {span.start}-{span.end}</title>"
    if span.wait:
        return _wait(span.kind, left, right, y + LANE / 2, hint)
    fill = colour(span.step, span.group, len(sheet.window.warpgroups))
    gemm = row.kind == "warp" and span.kind == GEMM
    edge = f" stroke='{TEXT}' stroke-width='1.4'" if gemm else ""
    inset = 0.7 if gemm else 0
    box = (
        f"<rect x='{left + inset:.2f}' y='{y + inset:.1f}' width='{max(right - left - 2 * inset, 0.3):.2f}' "
        f"height='{LANE - 2 * inset:.1f}' fill='{fill}'{edge}>{hint}</rect>"
    )
    if right - left < 0.85 * text_width(span.short, 11) + 2:  # in a usual font
        return box
    return box + text((left + right) / 2, y + LANE / 2 + 4, span.short, 11, ink(fill), "middle", 700 if gemm else 400)


def _wait(kind: str, left: float, right: float, y: float, hint: str = "") -> str:
    dashes = f" stroke-dasharray='{_DASHES[kind]}'" if _DASHES[kind] else ""
    return (
        f"<line x1='{left:.2f}' y1='{y:.1f}' x2='{right:.2f}' y2='{y:.1f}' stroke='{TURN if kind == ON_TURN else WAIT}' "
        f"stroke-width='{2 if kind == ON_TURN else 1.2}'{dashes}>{hint}</line>"
    )


def axis(sheet: Sheet, top: float) -> list[str]:
    """Lines from `top` down to below a sheet's last row, a round number of cycles apart, with the cycles."""
    parts = []
    for tick in ticks(sheet.window.start, sheet.until, max(2, int(sheet.width - sheet.left) // 90)):
        x = sheet.x(tick)
        parts.append(f"<line x1='{x:.1f}' y1='{top}' x2='{x:.1f}' y2='{sheet.bottom + 6:.1f}' stroke='{GRID}'/>")
        parts.append(text(x, sheet.bottom + 20, f"{tick:,}", 11, MUTED, "middle"))
    parts.append(text(sheet.left - 10, sheet.bottom + 20, "SM cycles", 11, MUTED, "end"))
    return parts


def legend_of(sheet: Sheet, y: float) -> tuple[list[str], int]:
    """The legend's parts, in as many lines as it takes, and where the sheet ends."""
    drawn, groups = sheet.drawn, len(sheet.window.warpgroups)
    items: list[tuple[list[str], str]] = []  # fills, or a wait's kind; what it says
    for n, step in enumerate(drawn.steps[: len(HUES)]):
        fills = [colour(step, group, groups) for group in drawn.groups or (0,)]
        items.append((fills, str(step) if n else f"{drawn.window.step} {step}"))
    if groups > 1 and drawn.steps:
        items += [([colour(drawn.steps[0], group, groups)], drawn.window.warpgroups[group]) for group in drawn.groups]
    if any(span.step < 0 and not span.wait for row in drawn.rows for span in row.spans):
        items.append(([colour(-1, group, groups) for group in drawn.groups or (0,)], "outside the loop, turns"))
    kinds = {kind: name for kind, name in entries(drawn).items() if kind != WORK}
    items += [([kind], f"S, O framed: {name}" if kind == GEMM else name) for kind, name in kinds.items()]
    parts, x = [], 20.0
    for fills, name in items:
        swatch = 26 if fills[0] in _DASHES else 13 * sum(fill.startswith("#") for fill in fills)
        length = swatch + 5 + text_width(name, 11) + 14
        if x > 20 and x + length > sheet.width - 10:
            x, y = 20.0, y + _LINE
        for n, fill in enumerate(fills):
            if fill in _DASHES:
                parts.append(_wait(fill, x, x + 26, y - 4))
            elif fill.startswith("#"):
                parts.append(f"<rect x='{x + 13 * n:.1f}' y='{y - 10:.1f}' width='13' height='13' fill='{fill}'/>")
        parts.append(text(x + swatch + (5 if swatch else 0), y, name, 11, MUTED))
        x += length
    return parts, int(y + 20)
