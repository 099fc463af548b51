"""Which subjects a dtype and a kind of call have: e4m3, packed sequences and few queries in parts are each called otherwise."""

from __future__ import annotations

from types import ModuleType

from ...simulator.errors import UsageError, did_you_mean
from . import subjects
from .decode import subjects as decode
from .fp8 import subjects as fp8
from .varlen import subjects as varlen

FP8 = "e4m3"
KINDS = {"dense": subjects, "varlen": varlen, "decode": decode}
"""--kind: one batch of one length, packed sequences, few queries whose keys are walked in parts."""
DENSE = "dense"


def subjects_of(dtype: str, kind: str = DENSE) -> ModuleType:
    """The room with `OURS`, `look_up` and `resolve` for a dtype and kind; needs no torch. Raises UsageError for what is none."""
    if kind not in KINDS:
        raise UsageError(f"--kind {kind!r} is not possible: give one of {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
    if dtype == FP8 and kind != DENSE:
        raise UsageError(f"--kind {kind} is for fp16, bf16, fp32 and fp64: leave it out for e4m3")
    return fp8 if dtype == FP8 else KINDS[kind]
