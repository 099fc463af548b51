// The first warp: loads, and finds the CTA's tiles.
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
  template <int COUNT> __device__ __forceinline__ void load_block(
      Ring<COUNT>& ring, unsigned char (&to)[COUNT][BLOCK_M * HEAD_DIM * 2], const TensorMap& map, float (&to_rows)[COUNT][STATISTICS],
      int statistic, int i, const Tile& tile, const Block& at) {
    ring.wait_free(i);
    u64* full = ring.full_of(i);
    mbarrier_expect(full, BLOCK_M * HEAD_DIM * 2 + BLOCK_M * 4);
#pragma unroll 1
    for (int c = 0; c < PANELS; ++c)
      tma_load(to[i % COUNT] + c * BLOCK_M * ROW_BYTES, map, full, c * PANEL, at.m * BLOCK_M, at.head - tile.batch * problem.p.heads,
               tile.batch);
    tma_load_row(to_rows[i % COUNT], problem.statistics, full, at.m * BLOCK_M, statistic * problem.p.batch * problem.p.heads + at.head);
  }
  __device__ __forceinline__ void load_q(int i, const Tile& tile, const Block& at) {
    load_block(shared.q, shared.Q, problem.q, shared.lse2, 0, i, tile, at);
  }
  __device__ __forceinline__ void load_do(int i, const Tile& tile, const Block& at) {
    load_block(shared.dO_ring, shared.dO, problem.dO, shared.delta, 1, i, tile, at);
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
    if constexpr (SPLITS) {
      const int walk = p.m_tiles * p.sharing;
      const long long shared_blocks = (long long)p.split * walk;
      long long at = shared_blocks * blockIdx.x / gridDim.x;
      const long long end = shared_blocks * (blockIdx.x + 1) / gridDim.x;
#pragma unroll 1
      for (; at < end; ++t) {
        const int number = at / walk;
        Tile tile = Tile::locate(number, p);
        tile.begin = at - (long long)number * walk;
        tile.blocks = min(end - at, (long long)(walk - tile.begin));
        tile.split = tile.blocks < walk ? number : -2 - number;
        shared.work.announce(t, tile);
        load(tile, t);
        at += tile.blocks;
      }
      index += p.split;
    }
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
