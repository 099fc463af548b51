"""Colours and letters of the timeline: a hue per loop iteration, as in the papers' figures; a shade per warpgroup."""

from __future__ import annotations

HUES = (
    ("#f9b978", "#a9560f"),  # orange
    ("#8cc8f0", "#1f6395"),  # blue
    ("#a5dc88", "#3d7522"),  # green
    ("#efa6c8", "#953a67"),  # pink
    ("#d0b9f3", "#6a47a3"),  # violet
    ("#f5e07a", "#8a750a"),  # yellow
)
"""From light, the first warpgroup's (and of what belongs to none), to dark, the last one's."""

OUTSIDE = ("#d4d7db", "#7d838c")
"""Prologue and epilogue: outside the loop."""

WAIT, TURN = "#6b7078", "#c2410c"
"""A wait for a copy or a GEMM; a wait for a turn."""

UNDER_OTHERS, UNDER_OWN, BARE = "#2f9e6e", "#7cc7b2", "#e5484d"
"""What a warpgroup's softmax runs under: another's GEMM, its own, none."""

ALPHABETS = ("0123456789", "abcdefghij", "ABCDEFGHIJ", "klmnopqrst", "KLMNOPQRST", "αβγδεζηθικ", "ΑΒΓΔΕΖΗΘΙΚ")
"""Without colour: the last digit of a loop step, by warpgroup."""
MARKS = "#%@&$!?"
"""Without colour: outside the loop, by warpgroup."""


def colour(step: int, group: int, groups: int) -> str:
    """Hex colour of a span by loop step and warpgroup, one of `groups`."""
    light, dark = HUES[step % len(HUES)] if step >= 0 else OUTSIDE
    share = max(0, group) / (groups - 1) if groups > 1 else 0.0
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(_rgb(light), _rgb(dark), strict=True))


def cover_colour(by: int, group: int) -> str:
    """Hex colour of a stretch of `group`'s softmax under the GEMM of warpgroup `by`; of a negative one, under none."""
    return BARE if by < 0 else UNDER_OWN if by == group else UNDER_OTHERS


def ink(background: str) -> str:
    """Hex colour of text on a colour."""
    red, green, blue = _rgb(background)
    return "#ffffff" if 0.3 * red + 0.59 * green + 0.11 * blue < 140 else "#1b1d21"


def letter(step: int, group: int) -> str:
    """One character for a loop step of a warpgroup."""
    known = min(max(0, group), len(ALPHABETS) - 1)
    return ALPHABETS[known][step % 10] if step >= 0 else MARKS[known]


def _rgb(text: str) -> tuple[int, ...]:
    return tuple(int(text[i : i + 2], 16) for i in (1, 3, 5))


def ticks(start: int, end: int, most: int) -> list[int]:
    """At most `most` round cycles (1, 2 or 5 times a power of ten apart) between two cycles, for an axis."""
    step, factors = 1, (2, 2.5, 2)
    turn = 0
    while (end - start) / step > max(1, most):
        step = int(step * factors[turn % 3])
        turn += 1
    first = -(-start // step) * step
    return list(range(first, end + 1, step))
