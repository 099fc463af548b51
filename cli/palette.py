"""Colours of the timeline: a hue per loop iteration, as in the papers' figures; a shade per warpgroup."""

from __future__ import annotations

HUES = (
    ("#f4a259", "#b8641a"),  # orange
    ("#6fb7e9", "#2c74a8"),  # blue
    ("#8fcf6f", "#4c8a2f"),  # green
    ("#e58fb8", "#a84a78"),  # pink
    ("#c3a6ee", "#7d59b5"),  # violet
    ("#f2d95c", "#a68d10"),  # yellow
)
"""Light for WG0 (and what belongs to no warpgroup), dark for WG1; a third warpgroup takes the middle."""

OUTSIDE = ("#c9ccd1", "#8b9099")
"""Prologue and epilogue: outside the loop."""

WAIT = "#6b7078"


def colour(step: int, group: int) -> str:
    """Hex colour of a span by loop step and warpgroup."""
    light, dark = HUES[step % len(HUES)] if step >= 0 else OUTSIDE
    return (light, dark, _mix(light, dark))[max(0, group) % 3]


def ink(step: int, group: int) -> str:
    """Hex colour of text on a span."""
    return "#ffffff" if max(0, group) % 3 == 1 else "#1b1d21"


def shades(warpgroups: tuple[str, ...]) -> str:
    """Which shade is whose, for a legend."""
    return ", ".join(f"{shade} {name}" for shade, name in zip(("light", "dark", "middle"), warpgroups, strict=False))


def _mix(a: str, b: str) -> str:
    return "#" + "".join(f"{(int(a[i : i + 2], 16) + int(b[i : i + 2], 16)) // 2:02x}" for i in (1, 3, 5))


def ticks(start: int, end: int, most: int) -> list[int]:
    """At most `most` round cycles (1, 2 or 5 times a power of ten apart) between two cycles, for an axis."""
    step, factors = 1, (2, 2.5, 2)
    turn = 0
    while (end - start) / step > max(1, most):
        step = int(step * factors[turn % 3])
        turn += 1
    first = -(-start // step) * step
    return list(range(first, end + 1, step))
