"""Numbers as people read them: three digits and a unit."""

from __future__ import annotations

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"), (1e-12, "p"))


def scaled(value: float, unit: str) -> str:
    """A quantity with an SI prefix, three significant digits: 3.42e9 and "B" give "3.42 GB"."""
    for factor, prefix in _PREFIXES:
        if abs(value) >= factor * 0.9995:
            return f"{digits(value / factor)} {prefix}{unit}"
    return f"0 {unit}"


def digits(value: float) -> str:
    """Three significant digits without an exponent (for 1 <= value < 1000 and around)."""
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


def percent(fraction: float | None, signed: bool = False) -> str:
    """A fraction in percent; an empty text for None."""
    if fraction is None:
        return ""
    return f"{fraction * 100:+.1f} %" if signed else f"{fraction * 100:.1f} %"
