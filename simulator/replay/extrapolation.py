"""Extrapolation: where a prediction goes past what it was ever held against, and says so."""

from __future__ import annotations

from .l2 import STATIC
from .traffic import Launch

WALKED = {"one after another": 8_000, "from a queue": 16_000}
"""K/V blocks that an SM walks in the longest recorded runs whose HBM bytes the model met (traces/recorded/runs): 16 heads of 32k
keys, or one of 128k, dealt out beforehand (7,944), and 16 heads of 64k, causal, drawn from a queue (15,900). At 16 heads of 64k and
128k dealt out beforehand it reads 0.3 to 0.7 of the bytes that counters show."""


def beyond_recorded(launches: list[Launch], blocks: str = "K/V blocks") -> list[str]:
    """A sentence if an SM walks on for longer than in any run that the bytes were held against: SMs drift apart meanwhile."""
    for launch in launches:
        how = "one after another" if launch.dealing == STATIC else "from a queue"
        walked = int(launch.items["blocks"].sum()) // min(launch.slots, len(launch.items))
        if walked > WALKED[how]:
            return [
                f"extrapolated: each CTA slot walks {walked:,} {blocks}, and the model's HBM bytes were held against hardware"
                f" up to {WALKED[how]:,} where tiles come {how}; how far SMs drift apart beyond that is not known"
            ]
    return []
