"""The text of `wgmma.cuh` for the backward: the forward's wrappers, and that of dQ = dS K."""

from __future__ import annotations

from .. import wgmma

WIDTHS = (64, 128)
"""N: the queries of a block for S^T = K Q^T and dP^T = V dO^T, the head dim for dV and dK."""
SHARE_COLUMNS = 64
"""N of a warpgroup's share of dQ."""


def header() -> str:
    """`Wgmma<N>` as the forward has it, and `WgmmaQ<N>::ss`: A K-major and B MN-major, both in shared memory."""
    count = SHARE_COLUMNS // 2
    instruction = wgmma._instruction(SHARE_COLUMNS, f"%{count}", 1, '"l"(a)', "1, 1, 0, 1")
    return f"""{wgmma.header(WIDTHS)}template <int N> struct WgmmaQ;
template <> struct WgmmaQ<{SHARE_COLUMNS}> {{
  static __device__ __forceinline__ void ss(float (&d)[{count}], u64 a, u64 b, int accumulate) {{
{instruction}
  }}
}};
"""
