"""Figure: the rows of a window arranged as the papers draw them, every GEMM in the row of its warpgroup.

A warp's own row says when it issues a GEMM and how long it waits for it; when the tensor cores execute it stands in theirs.
FlashAttention-3's Figure 1 has both in one row, the GEMM where the warpgroup waits for it, and so has a figure of a schedule
whose warpgroups do nothing else meanwhile. Where softmax runs under a GEMM (Figure 2), GEMMs have a row above their
warpgroup's. Of recorded warps only the issue and the wait are known, so they and the predicted ones beside them show those.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .window import GEMM, ON_GEMM, SOFTMAX, TENSOR_CORES, Row, Span, Window

UNDER = 0.1
"""Share of the GEMMs' time beside other work of their warpgroup from which on they have a row of their own."""


@dataclass(frozen=True)
class Figure:
    """The rows to draw, and whether a GEMM in a warpgroup's row is its issue (recorded warps), not its execution."""

    window: Window
    rows: tuple[Row, ...]
    issued: bool

    @property
    def steps(self) -> tuple[int, ...]:
        """Loop steps that appear, in order."""
        return tuple(sorted({s.step for row in self.rows for s in row.spans if s.step >= 0 and not s.wait}))

    @property
    def groups(self) -> tuple[int, ...]:
        """Warpgroups that appear, in order."""
        return tuple(sorted({s.group for row in self.rows for s in row.spans if s.group >= 0}))

    @property
    def softmax(self) -> dict[str, str]:
        """Letter -> label of what softmax consists of here, in order of appearance."""
        spans = [s for row in self.rows if row.kind == "warp" for s in row.spans if s.kind == SOFTMAX]
        first: dict[str, str] = {}
        for span in sorted(spans, key=lambda s: s.start):
            first.setdefault(span.short.rstrip("0123456789"), span.label)
        return first

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds of spans that appear in the rows of warps."""
        return frozenset(s.kind for row in self.rows if row.kind == "warp" for s in row.spans)


def figure(window: Window) -> Figure:
    """Arrange a window's rows; units stay as they are."""
    executed = _executed(window)
    if window.recorded or not executed:
        return Figure(window, window.rows, issued=True)
    own = {row.spans[0].group: row for row in window.rows if row.kind == "warp" and row.spans and row.spans[0].group >= 0}
    apart = any(
        _length(_common(boxes, _others(own[group]))) > UNDER * _length(boxes) for group, boxes in executed.items() if group in own
    )
    rows: list[Row] = []
    for row in window.rows:
        group = row.spans[0].group if row.kind == "warp" and row.spans else -1
        if group not in executed:
            rows.append(row)
        elif apart:
            rows.append(Row(f"{row.name} GEMM", row.kind, tuple(executed[group])))
            rows.append(replace(row, spans=tuple(_waiting(span) for span in row.spans)))
        else:
            rows.append(replace(row, spans=_merged(row, executed[group])))
    return Figure(window, tuple(rows), issued=False)


def _executed(window: Window) -> dict[int, list[Span]]:
    """GEMMs of each warpgroup from their first k step on the tensor cores to their last."""
    boxes: dict[tuple, Span] = {}
    for row in window.rows:
        for span in row.spans if row.name.partition(" (")[0] == TENSOR_CORES else ():
            key = (span.group, span.label, span.step, span.tile)
            known = boxes.get(key, span)
            boxes[key] = replace(span, start=min(span.start, known.start), end=max(span.end, known.end))
    found: dict[int, list[Span]] = {}
    for box in sorted(boxes.values(), key=lambda b: (b.start, b.end)):
        before = found.setdefault(box.group, [])
        if before and box.start < before[-1].end:  # k steps of two GEMMs in turns: the later one stands behind
            box = replace(box, start=min(before[-1].end, box.end))
        if box.group >= 0 and box.end > box.start:
            before.append(box)
    return {group: spans for group, spans in found.items() if group >= 0}


def _others(row: Row) -> list[Span]:
    """What a warp does besides issuing GEMMs and waiting."""
    return [span for span in row.spans if not span.wait and span.kind != GEMM]


def _waiting(span: Span) -> Span:
    """The issue of a GEMM as part of the wait for it: while its queue is full a warp issues no sooner than it is served."""
    return replace(span, wait=True) if span.kind == GEMM else span


def _merged(row: Row, boxes: Sequence[Span]) -> tuple[Span, ...]:
    """One row: the warp's own work, its GEMMs where it waits for them, and what is left of its waits."""
    work = _others(row)
    gemms = [part for box in boxes for part in _without(box, work)]
    waits = [part for span in row.spans if span.wait or span.kind == GEMM for part in _without(_waiting(span), [*work, *gemms])]
    return tuple(_joined(sorted([*work, *gemms, *waits], key=lambda s: (s.start, s.end))))


def _joined(spans: Iterable[Span]) -> list[Span]:
    """Spans of a row, those that touch and wait for the same put together."""
    out: list[Span] = []
    for span in spans:
        if out and out[-1].end == span.start and out[-1].kind == span.kind == ON_GEMM:
            out[-1] = replace(out[-1], end=span.end)
        else:
            out.append(span)
    return out


def _without(span: Span, taken: Iterable[Span]) -> list[Span]:
    """What is left of a span outside others."""
    parts = [span]
    for other in taken:
        if other.end <= span.start or other.start >= span.end:
            continue
        cut: list[Span] = []
        for part in parts:
            for start, end in ((part.start, min(part.end, other.start)), (max(part.start, other.end), part.end)):
                if end > start:
                    cut.append(replace(part, start=start, end=end))
        parts = cut
    return parts


def _common(some: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """The parts of some spans that lie in others (which do not overlap)."""
    return [
        replace(one, start=max(one.start, other.start), end=min(one.end, other.end))
        for one in some for other in others if one.start < other.end and other.start < one.end
    ]  # fmt: skip


def _length(spans: Iterable[Span]) -> int:
    return sum(span.end - span.start for span in spans)
