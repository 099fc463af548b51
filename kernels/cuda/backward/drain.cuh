// The first warpgroup's warps beside the producer: one for each consumer warpgroup adds its dQ to memory.
#pragma once
#include "loads.cuh"

// One lane of a warp for each consumer warpgroup: adds what it puts to memory.
__device__ __forceinline__ void drain(Shared& shared, const Problem& problem, int rank) {
  const Params& p = problem.p;
  Outbox& box = shared.outbox[rank];
  int puts = 0;
  const auto add = [&](float* to) {
    bulk_add(to, shared.dQ[rank], SHARE * 4);
    tma_commit();
    tma_wait_read();
    mbarrier_arrive(&box.empty);
    ++puts;
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
      mbarrier_wait(&box.full, puts & 1);
      const int head = at.head;
      int* turn = p.turns + at.index(p) * CONSUMERS + rank;
      if (i == first && head >= p.ring) wait_count(p.finished + head - p.ring, p.m_tiles * PARTS);
      if constexpr (DETERMINISTIC) wait_turn(turn, tile.turn(at.m, p));
      add(p.sums + ((u64)(u32)(head % p.ring * p.m_tiles + at.m) * CONSUMERS + rank) * SHARE);
      if constexpr (DETERMINISTIC) {
        bulk_wait();
        count(turn, 1);
      }
      at.next(tile, p);
      ++i;
      if (at.head != head || i == tile.blocks) {
        bulk_wait();
        count(p.added + head, i - first);
        first = i;
      }
    }
    if (SPLITS && tile.split < -1) count(p.key_added + (-2 - tile.split), WHOLE);
    if (SPLITS && tile.split >= 0) {
#pragma unroll 1
      for (int c = 0; c < 2 * PANELS; ++c) {
        mbarrier_wait(&box.full, puts & 1);
        add(p.key_sums + ((u64)(u32)(tile.split * 2 * PANELS + c) * CONSUMERS + rank) * SHARE);
      }
      bulk_wait();
      count(p.key_added + tile.split, tile.blocks);
    }
  }
}
