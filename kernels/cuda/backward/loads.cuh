// The first warpgroup's warps: one loads, one for each consumer warpgroup adds its dQ to memory.
#pragma once
#include "finish.cuh"

// One lane of warp 0: finds the CTA's tiles and issues every load.
struct Producer {
  Shared& shared;
  const Problem& problem;
  int base = 0;  // blocks loaded before this tile

  __device__ __forceinline__ void load_once(Ring<1>& ring, unsigned char* to, const TensorMap& map, const Tile& tile, int t) {
    ring.wait_free(t);
    mbarrier_expect(ring.full_of(t), BLOCK_N * HEAD_DIM * 2);
#pragma unroll 1
    for (int c = 0; c < PANELS; ++c)
      tma_load(to + c * BLOCK_N * ROW_BYTES, map, ring.full_of(t), c * PANEL, tile.n * BLOCK_N, tile.kv_head, tile.batch);
  }
  __device__ __forceinline__ void load_block(
      Ring<STAGES>& ring, unsigned char (&to)[STAGES][BLOCK_M * HEAD_DIM * 2], const TensorMap& map, float (&to_rows)[STAGES][BLOCK_M],
      const float* rows, int i, const Tile& tile, const Block& at) {
    ring.wait_free(i);
    u64* full = ring.full_of(i);
    mbarrier_expect(full, BLOCK_M * HEAD_DIM * 2 + BLOCK_M * 4);
#pragma unroll 1
    for (int c = 0; c < PANELS; ++c)
      tma_load(to[i % STAGES] + c * BLOCK_M * ROW_BYTES, map, full, c * PANEL, at.m * BLOCK_M, at.head - tile.batch * problem.p.heads,
               tile.batch);
    bulk_load(to_rows[i % STAGES], rows + at.index(problem.p) * BLOCK_M, BLOCK_M * 4, full);
  }
  __device__ __forceinline__ void load_q(int i, const Tile& tile, const Block& at) {
    load_block(shared.q, shared.Q, problem.q, shared.lse2, problem.p.lse2, i, tile, at);
  }
  __device__ __forceinline__ void load_do(int i, const Tile& tile, const Block& at) {
    load_block(shared.dO_ring, shared.dO, problem.dO, shared.delta, problem.p.delta, i, tile, at);
  }

  // The queries of the first block before the keys: their buffers are free sooner.
  __device__ __forceinline__ void load(const Tile& tile, int t) {
    Block at(tile, problem.p);
    load_q(base, tile, at);
    load_once(shared.k, shared.K, problem.k, tile, t);
    load_do(base, tile, at);
    load_once(shared.v, shared.V, problem.v, tile, t);
#pragma unroll 1
    for (int i = 1; i < tile.blocks; ++i) {
      at.next(tile, problem.p);
      load_q(base + i, tile, at);
      load_do(base + i, tile, at);
    }
    base += tile.blocks;
  }

  // Every CTA as many tiles (full mask), or from a queue, longest first (causal).
  __device__ __forceinline__ void run() {
    const Params& p = problem.p;
    const int total = p.batch * p.kv_heads * p.n_tiles;
    int index = blockIdx.x, t = 0;
#pragma unroll 1
    for (; index < total; ++t) {
      const Tile tile = Tile::locate(index, p);
      shared.work.announce(t, tile);
      load(tile, t);
      index = gridDim.x + (CAUSAL ? atomicAdd(&p.counters->tile, 1) : index);  // after the last load, or a head's CTAs would fall apart
    }
    shared.work.announce(t, Tile{0, 0, 0, 0, -1});
  }
};

// One lane of a warp for each consumer warpgroup: adds what it puts to memory.
__device__ __forceinline__ void drain(Shared& shared, const Problem& problem, int rank) {
  const Params& p = problem.p;
  Outbox& box = shared.outbox[rank];
  int i = 0;
#pragma unroll 1
  for (int t = 0;; ++t) {
    const Tile tile = shared.work.wait(t);
    mbarrier_arrive(&shared.work.posted.empty[t % 2]);
    if (tile.blocks < 0) return;
    Block at(tile, p);
#pragma unroll 1
    for (const int end = i + tile.blocks; i < end; ++i) {
      mbarrier_wait(&box.full, i & 1);
      const int head = at.head;
      int* turn = p.turns + at.index(p) * CONSUMERS + rank;
      if (at.m == tile.first && head >= p.ring) wait_count(p.finished + head - p.ring, p.m_tiles * PARTS);
      if constexpr (DETERMINISTIC) wait_turn(turn, tile.turn(at.m, p));
      bulk_add(p.sums + ((u64)(u32)(head % p.ring * p.m_tiles + at.m) * CONSUMERS + rank) * SHARE, shared.dQ[rank], SHARE * 4);
      tma_commit();
      tma_wait_read();
      mbarrier_arrive(&box.empty);
      if constexpr (DETERMINISTIC) {
        bulk_wait();
        pass_turn(turn, tile.turn(at.m, p) + 1);
      }
      at.next(tile, p);
      if (at.head != head) {
        bulk_wait();
        count(p.added + head);
      }
    }
  }
}
