// A warpgroup of its own forms dQ of every block from both consumers' dS, a share after the other, and puts it for the draining warps.
#pragma once
#include "gradients.cuh"

struct QueryGradients {
  Shared& shared;
  const Problem& problem;

#if BLOCK_M % 64 == 0
  // Issue a share of dQ = dS[i] K, over all keys, or those of the first warpgroup.
  template <int KEYS_> __device__ __forceinline__ void issue(Queries& dQ, int i, int share) const {
    const u64 a = matrix_descriptor(shared.dS[i % DS_STAGES] + (DQ_BY_QUERIES ? share * SHARE_ROWS * ROW_BYTES : 0), 0, GROUP_BYTES);
    const u64 b = matrix_descriptor(shared.K + (DQ_BY_QUERIES ? 0 : share * BLOCK_N * ROW_BYTES), BLOCK_N * ROW_BYTES, GROUP_BYTES);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < KEYS_ / 16; ++k)
      WgmmaQ<SHARE_COLUMNS>::ss(dQ, a + k / 4 * (BLOCK_M * ROW_BYTES / 16) + k % 4 * 2, b + k * (2 * GROUP_BYTES / 16), k > 0);
    wgmma_commit();
  }
#else
  // A share of dQ^T = K^T dS[i]^T.
  template <int KEYS_> __device__ __forceinline__ void issue(Queries& dQ, int i, int share) const {
    const u64 a = matrix_descriptor(shared.K + share * BLOCK_N * ROW_BYTES, BLOCK_N * ROW_BYTES, GROUP_BYTES);
    const u64 b = matrix_descriptor(shared.dS[i % DS_STAGES], 0, GROUP_BYTES);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < KEYS_ / 16; ++k)
      WgmmaQ<BLOCK_M>::tn(dQ, a + k * (2 * GROUP_BYTES / 16), b + k / 4 * (BLOCK_M * ROW_BYTES / 16) + k % 4 * 2, k > 0);
    wgmma_commit();
  }
#endif

  __device__ __forceinline__ void run() {
    const int lane = lane_id(), warp = thread_id() % WARPGROUP / 32;
    const u32 to = DQ_ACROSS ? smem_address(shared.dQ[0]) + (warp * 32 + lane) * 16 : smem_address(shared.dQ[0]) + (warp * 16 + lane / 4) * (SHARE_COLUMNS * 4) + lane / 4 * 32 + lane % 4 * 8;
    Trace trace(problem.p.trace, 1 + CONSUMERS);
    int i = 0;  // block, numbered over the kernel's life
#pragma unroll 1
    for (int tiles = 0;; ++tiles) {
      const Tile& tile = shared.work.wait(tiles);
      const int blocks = tile.blocks, begin = tile.first, seen = tile.seen;
      int m = begin;
      __syncwarp();
      shared.work.posted.free<1>(tiles);
      if (blocks < 0) break;
      const int end = i + blocks;
      trace.begin(i, end - 1);
      shared.k.wait(tiles);
#pragma unroll 1
      for (; i < end; ++i) {
        mbarrier_wait(&shared.exchanged[i % DS_STAGES], i / DS_STAGES & 1);
#pragma unroll
        for (int share = 0; share < CONSUMERS; ++share) {
          Queries dQ;
          if (SKIPS && m < seen) issue<KEYS>(dQ, i, share);
          else issue<BLOCK_N>(dQ, i, share);
          if (share == 0) trace.stamp(static_cast<Label>(Stamp::QUERIES), i);
          wgmma_wait<0>();
          hold(dQ);
          if (share == 0) trace.stamp(static_cast<Label>(Stamp::QUERIES_DONE), i);
          if (share == CONSUMERS - 1 && lane == 0) mbarrier_arrive(&shared.multiplied[i % DS_STAGES]);
          mbarrier_wait(&shared.outbox[share].empty, i & 1 ^ 1);
          const u32 out = to + share * SHARE * 4;
          if constexpr (DQ_ACROSS) {
#pragma unroll
            for (int g = 0; g < BLOCK_M / 8; ++g) store_four(out + g * (WARPGROUP * 16), dQ + 4 * g);
          } else {
#pragma unroll
            for (int g = 0; g < SHARE_COLUMNS / 8; ++g) {
              store_pair(out ^ g * 32, dQ[4 * g], dQ[4 * g + 1]);
              store_pair((out ^ g * 32) + 8 * SHARE_COLUMNS * 4, dQ[4 * g + 2], dQ[4 * g + 3]);
            }
          }
          fence_async();
          __syncwarp();
          if (lane == 0) mbarrier_arrive(&shared.outbox[share].full);
        }
        trace.stamp(static_cast<Label>(Stamp::PUT_QUERIES), i);
        trace.seek(i + 1);
        if (SKIPS && ++m == problem.p.m_tiles) m = begin;
      }
      shared.k.free<1>(tiles);
    }
  }
};
