// Shared memory of the backward's main kernel, and the sizes in it.
#pragma once
#include "narrow.cuh"
#include "problem.cuh"
#include "softmax.cuh"
#include "wgmma.cuh"

constexpr int PANEL = 64;       // columns of one 128-byte swizzled row
constexpr int PANELS = HEAD_DIM / PANEL;
constexpr int ROW_BYTES = 128;  // of a panel
constexpr int GROUP_BYTES = 8 * ROW_BYTES;
constexpr int KEYS = 64;        // M of S^T, dP^T, dV and dK
constexpr int WARP_KEYS = 16;
constexpr int THREADS = WARPGROUP * (2 + CONSUMERS);
constexpr bool DQ_ACROSS = BLOCK_M % 64 != 0;  // dQ^T = K^T dS^T, as a GEMM has 64 rows; a share is 64 of the head dim, in the order of registers
constexpr int DRAINS = DQ_APART && !(DETERMINISTIC && HEAD_DIM <= 128) ? 1 : CONSUMERS;  // warps that add dQ to memory
constexpr bool DQ_BY_QUERIES = HEAD_DIM == 64;  // a share of dQ: 64 queries, or else 64 of the head dim
constexpr int SHARE_ROWS = 64, SHARE_COLUMNS = 64, CHUNK = SHARE_ROWS * SHARE_COLUMNS;  // of dV and dK of a split tile too
constexpr int SHARE = DQ_ACROSS ? SHARE_COLUMNS * BLOCK_M : CHUNK;
constexpr int SHARES = BLOCK_M * HEAD_DIM / SHARE;  // of a block's dQ
constexpr int STATISTICS = (BLOCK_M + 31) / 32 * 32;  // of a block: TMA writes to multiples of 128 bytes

struct Problem {
  const TensorMap &q, &k, &v, &dO, &dK, &dV;
  const TensorMap& statistics;  // (LSE or delta of each head, m_tiles * BLOCK_M): LSE in base 2, +inf where a row is not there or sees no key
  const Params& p;
};

#if HEAD_DIM == 256
#include "shared_relay.cuh"
#else
#include "shared_keys.cuh"
#endif
