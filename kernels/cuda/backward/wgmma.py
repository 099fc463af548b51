"""The text of `wgmma.cuh` for the backward: the forward's wrappers, and those of operands that lie the other way."""

from __future__ import annotations

from .. import wgmma

WIDTHS = (64, 80, 128)
"""N: the queries of a block for S^T = K Q^T and dP^T = V dO^T; the head dim, or half of it, for dV and dK; 64 for dQ."""


def header() -> str:
    """`Wgmma<N>` as the forward has it, and `WgmmaQ<N>` with all in shared memory: `::ss` with A K-major, `::ts` MN-major,
    `::tn` MN-major beside B K-major.
    """
    return wgmma.header(WIDTHS) + "template <int N> struct WgmmaQ;\n" + "".join(map(_wrapper, WIDTHS))


def _wrapper(n: int) -> str:
    count = n // 2
    kinds = {"ss": "1, 1, 0, 1", "ts": "1, 1, 1, 1", "tn": "1, 1, 1, 0"}
    functions = "".join(
        f"""  static __device__ __forceinline__ void {name}(float (&d)[{count}], u64 a, u64 b, int accumulate) {{
{wgmma._instruction(n, f"%{count}", 1, '"l"(a)', tail)}
  }}
"""
        for name, tail in kinds.items()
    )
    return f"template <> struct WgmmaQ<{n}> {{\n{functions}}};\n"
