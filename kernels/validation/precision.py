"""Which subjects a dtype has: e4m3 has its own, called with descales."""

from __future__ import annotations

from types import ModuleType

from . import subjects
from .fp8 import subjects as fp8

FP8 = "e4m3"


def subjects_of(dtype: str) -> ModuleType:
    """The room with `OURS`, `look_up` and `resolve` for a dtype; needs no torch."""
    return fp8 if dtype == FP8 else subjects
