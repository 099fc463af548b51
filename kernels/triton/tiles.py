"""Tile sizes of each Triton kernel, with the reason and what was rejected. A table, never an autotuner at call time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TritonTile:
    """How one kernel is compiled: rows of Q and of K/V per step, warps per program, pipeline stages.

    `tensor_descriptors` loads through TMA where the tensors allow it (Hopper, contiguous D, 16-byte strides). `overlapped`
    is for the forward: P V of one block is issued before the softmax of the next.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tensor_descriptors: bool = True
    overlapped: bool = False

    def options(self) -> dict[str, int]:
        """What Triton's launcher calls them."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class BackwardTile:
    """The two walks of the backward: over Q for dK and dV, over K/V for dQ.

    `add_dq` leaves the second walk out: the first adds each step's share of dQ into fp32 memory.
    """

    keys_and_values: TritonTile
    queries: TritonTile
    add_dq: bool = False
    tensor_descriptors: bool = True


_T = TritonTile

# Reasons and rejected choices; every rate was measured on an H200 and is kept in NOTES.md beside this file.
FORWARD = {
    # head_dim, mask: m, n, warps, stages
    (64, "full"): _T(128, 128, 4, 3),  # 8 warps lose a fifth: one program per SM, nothing runs under its softmax
    (64, "causal"): _T(64, 128, 4, 3),  # half the rows waste less of the diagonal
    (128, "full"): _T(128, 128, 8, 3, overlapped=True),  # one program per SM, P V under its own softmax
    (128, "causal"): _T(64, 64, 4, 3, overlapped=True),  # two programs per SM; half the rows waste less of the diagonal
    (256, "full"): _T(128, 64, 8, 2),  # O alone is 128 registers at 8 warps; 128 keys leave no second stage
    (256, "causal"): _T(128, 64, 8, 2),  # as full
}

BACKWARD = {
    # head_dim, mask: the walk over Q, then the walk over K/V
    (64, "full"): BackwardTile(_T(64, 64, 4, 2), _T(128, 64, 4, 3)),  # adding dQ in fp32 memory loses 10 %
    (64, "causal"): BackwardTile(_T(64, 64, 4, 2), _T(128, 64, 4, 3)),  # as full
    (128, "full"): BackwardTile(_T(64, 64, 4, 2), _T(128, 64, 8, 3)),  # two programs per SM, as in the forward
    (128, "causal"): BackwardTile(_T(64, 64, 4, 2), _T(128, 64, 8, 3)),  # adding dQ saves two GEMMs and loses 25 %
    (256, "full"): BackwardTile(_T(64, 64, 8, 1), _T(64, 64, 4, 2)),  # dK and dV are 128 registers; one stage fits
    (256, "causal"): BackwardTile(_T(32, 64, 8, 2), _T(64, 64, 4, 2)),  # half the rows waste less of the diagonal
}

FORWARD_BY_POINTERS = FORWARD | {
    # 160 KiB; addresses take registers, and 4 warps then spill
    (128, "full"): _T(128, 128, 8, 2, tensor_descriptors=False),
    (128, "causal"): _T(128, 128, 8, 2, tensor_descriptors=False),
}

SMALL = _T(16, 16, 1, 1, tensor_descriptors=False)
SMALL_BACKWARD = BackwardTile(SMALL, SMALL, tensor_descriptors=False)
"""Under the interpreter speed is no matter: small tiles meet more edges in small tensors."""


def forward_tile(head_dim: int, causal: bool, interpreted: bool, described: bool = True) -> TritonTile:
    """The tile of the FlashAttention-2 forward; `described` where TMA can address the tensors."""
    if interpreted:
        return SMALL
    return (FORWARD if described else FORWARD_BY_POINTERS)[head_dim, _mask(causal)]


def backward_tile(head_dim: int, causal: bool, interpreted: bool) -> BackwardTile:
    """The tiles of the FlashAttention-2 backward."""
    return SMALL_BACKWARD if interpreted else BACKWARD[head_dim, _mask(causal)]


def standard_tile(head_dim: int, interpreted: bool) -> TritonTile:
    """A common GEMM tile, for S = Q K^T and for O = P V: S and P go through memory whatever the tile."""
    if interpreted:
        return SMALL
    return _T(128, 64, 8, 2, tensor_descriptors=False) if head_dim == 256 else _T(128, 128, 8, 2, tensor_descriptors=False)


def fa1_tile(head_dim: int, interpreted: bool) -> TritonTile:
    """O (fp32), Q, S and one K/V block are live at once: half the rows of fa2, and narrower keys at head_dim 256."""
    if interpreted:
        return SMALL
    return _T(64, 32 if head_dim == 256 else 64, 8, 1, tensor_descriptors=False)


def _mask(causal: bool) -> str:
    return "causal" if causal else "full"
