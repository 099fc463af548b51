"""The text of `wgmma.cuh` for the backward: the forward's wrappers, and those of its GEMMs with other transposed operands."""

from __future__ import annotations

from .. import wgmma

SCORES = (64, 80, 128)
"""N of S^T = K Q^T, dP^T = V dO^T and dQ^T = K^T dS^T: the queries of a block."""
GRADIENTS = (64, 128)
"""N of dV, dK and dQ: the head dim."""


def header() -> str:
    """`Wgmma<N>` as the forward has it, and `WgmmaQ<N>`: both operands in shared memory, one of them transposed.

    `::ta` takes A MN-major and B K-major (dQ^T = K^T dS^T), `::tb` A K-major and B MN-major (dQ = dS K).
    """
    widths = sorted({*SCORES, *GRADIENTS})
    return wgmma.header(tuple(widths)) + "template <int N> struct WgmmaQ;\n" + "".join(map(_wrapper, widths))


def _wrapper(n: int) -> str:
    count = n // 2
    ways = "".join(
        f"""  static __device__ __forceinline__ void {name}(float (&d)[{count}], u64 a, u64 b, int accumulate) {{
{wgmma._instruction(n, f"%{count}", 1, '"l"(a)', f"1, 1, {tail}")}
  }}
"""
        for name, tail in (("ta", "1, 0"), ("tb", "0, 1"))
    )
    return f"template <> struct WgmmaQ<{n}> {{\n{ways}}};\n"
