"""Which kernel is fastest, by shape, as recorded: `traces/recorded/kernels/forward_h200.json`, which a test holds this to."""

from __future__ import annotations

MOSTLY = "fa3"
BY_KEYS: dict[tuple[int, bool], tuple[tuple[int, str], ...]] = {
    (64, False): ((1024, "pairs-overlap-2stage"),),
    (64, True): ((2048, "pairs-overlap-2stage"),),
}
"""(head_dim, causal) -> up to so many keys, the kernel that is taken there; MOSTLY beyond and elsewhere."""


def by_shape(head_dim: int, causal: bool, seqlen_k: int) -> str:
    """The kernel that "auto" takes on Hopper for many queries against so many keys."""
    return next((name for most, name in BY_KEYS.get((head_dim, causal), ()) if seqlen_k <= most), MOSTLY)
