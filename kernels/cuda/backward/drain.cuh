// The first warpgroup's warps beside the producer: one for each outbox, or one for both, adds dQ to memory.
#pragma once
#include "loads.cuh"

constexpr int BOXES = CONSUMERS / DRAINS;  // of a draining warp
constexpr int UNROLLED_BOXES = DQ_ACROSS ? BOXES : 1;  // where few registers are left

// One lane of a warp: adds what is put into its outboxes to memory, a block after the other.
__device__ __forceinline__ void drain(Shared& shared, const Problem& problem, int rank) {
  const Params& p = problem.p;
  int puts = 0;
  const auto add = [&](int box, float* to) {
    bulk_add(to, shared.dQ[box], SHARE * 4);
    tma_commit();
    tma_wait_read();
    mbarrier_arrive(&shared.outbox[box].empty);
  };
#pragma unroll 1
  for (int t = 0;; ++t) {
    const Tile tile = shared.work.wait(t);
    mbarrier_arrive(&shared.work.posted.empty[t % 2]);
    if (tile.blocks < 0) return;
    Block at(tile, p);
    int first = 0;  // of this head
#pragma unroll 1
    for (int i = 0; i < tile.blocks;) {
      const int head = at.head;
#pragma unroll UNROLLED_BOXES
      for (int box = rank; box < rank + BOXES; ++box) {
        mbarrier_wait(&shared.outbox[box].full, puts & 1);
        int* turn = p.turns + at.index(p) * CONSUMERS + box;
        if (box == rank && i == first && head >= p.ring) wait_count(p.finished + head - p.ring, p.m_tiles * PARTS);
        if constexpr (DETERMINISTIC) wait_turn(turn, tile.turn(at.m, p));
        add(box, p.sums + ((u64)(u32)(head % p.ring * p.m_tiles + at.m) * CONSUMERS + box) * SHARE);
        if constexpr (DETERMINISTIC) {
          bulk_wait();
          count(turn, 1);
        }
      }
      ++puts;
      at.next(tile, p);
      ++i;
      if (at.head != head || i == tile.blocks) {
        bulk_wait();
        count(p.added + head, (i - first) * BOXES);
        first = i;
      }
    }
    if (SPLITS && tile.split < -1) count(p.key_added + (-2 - tile.split), WHOLE);
    if (SPLITS && !DQ_APART && tile.split >= 0) {
#pragma unroll 1
      for (int c = 0; c < 2 * PANELS; ++c) {
        mbarrier_wait(&shared.outbox[rank].full, puts & 1);
        add(rank, p.key_sums + ((u64)(u32)(tile.split * 2 * PANELS + c) * CONSUMERS + rank) * SHARE);
        ++puts;
      }
      bulk_wait();
      count(p.key_added + tile.split, tile.blocks);
    }
  }
}
