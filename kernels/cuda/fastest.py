"""Which kernel is fastest, by shape, as recorded in `traces/recorded/kernels`, `schedules_h200.json` and, for short rows,
`pairs_h200.json`, which tests hold this to."""

from __future__ import annotations

MOSTLY = "fa3"
BY_KEYS: dict[tuple[int, bool], tuple[tuple[int, str], ...]] = {
    (64, False): ((1024, "pairs-overlap-2stage"), (4096, "overlap-2stage")),
    (64, True): ((4096, "pairs-overlap-2stage"),),
}
"""(head_dim, causal) -> up to so many keys, the kernel that was more than 1 % faster there; MOSTLY beyond and elsewhere."""


def by_shape(head_dim: int, causal: bool, seqlen_k: int) -> str:
    """The kernel that "auto" takes on Hopper for many queries against so many keys."""
    return next((name for most, name in BY_KEYS.get((head_dim, causal), ()) if seqlen_k <= most), MOSTLY)
