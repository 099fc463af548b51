"""What a formula makes of a recording."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Found:
    """What a recording says of a field: the value, the lowest and highest that were seen, and how it was found."""

    value: float
    low: float
    high: float
    how: str


@dataclass(frozen=True)
class Derivation:
    """A field of the device file, the recordings it takes, its formula and the digits it is given with."""

    field: str
    recordings: tuple[str, ...]
    formula: Callable[..., Found]
    digits: int = 0


def one(sample: Mapping, how: str) -> Found:
    """The median of a sample with its 5th and 95th percentile."""
    return Found(sample["median"], sample["p05"], sample["p95"], how)
