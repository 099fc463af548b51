// The problem, and which tile of it a CTA works on next. The orders are those of simulator/order.py.
#pragma once
#include "verbs.cuh"

struct Params {
  float* lse;                 // (batch, heads, seqlen_q)
  int* queue;                 // next tile and CTAs done, both zero before and after a launch
  u32* trace;                 // see trace.cuh; null unless TRACE
  int batch, heads, kv_heads, seqlen_q, seqlen_k;
  int m_tiles;                // query tiles of one head
  int section;                // heads walked together in the order "longest-first"
  float scale_log2;           // softmax_scale * log2(e)
};

// BLOCK_M queries of one head against `blocks` K/V blocks, walked from the last to the first.
struct alignas(16) Tile {
  int m, head, batch, blocks;

  // How many of the walked blocks a warpgroup whose first row is `row` has to mask.
  __device__ __forceinline__ int masked(const Params& p, int row) const {
    int keys = CAUSAL ? row + p.seqlen_k - p.seqlen_q + 1 : p.seqlen_k;
    return max(0, blocks - max(0, min(keys, p.seqlen_k)) / BLOCK_N);
  }
};

// The tiles of this CTA in turn. The producer finds each and posts it; consumers read the post.
struct Work {
  Tile post[2];
  Ring<2> posted;

  // Persistent, every CTA the same number of tiles (full mask), or from a queue, longest tiles first (causal).
  static constexpr bool QUEUED = CAUSAL && CLUSTER == 1;

  static __device__ __forceinline__ int count(const Params& p) { return p.batch * p.heads * ((p.m_tiles + CLUSTER - 1) / CLUSTER); }

  static __device__ __forceinline__ Tile locate(int index, const Params& p) {
    Tile tile;
    int flat;
    if constexpr (QUEUED) {
      const int total = p.batch * p.heads;
      const int first = index / (p.section * p.m_tiles) * p.section;
      const int within = index - first * p.m_tiles, heads = min(p.section, total - first);
      tile.m = p.m_tiles - 1 - within / heads;
      flat = first + within % heads;
    } else {
      const int groups = (p.m_tiles + CLUSTER - 1) / CLUSTER;
      tile.m = index % groups * CLUSTER + (CLUSTER > 1 ? cluster_rank() : 0);
      flat = index / groups;
    }
    tile.head = flat % p.heads;
    tile.batch = flat / p.heads;
    int keys = p.seqlen_k;
    if constexpr (CAUSAL) {
      const int rows_end = min((tile.m + 1) * BLOCK_M, p.seqlen_q);
      keys = max(0, min(keys, rows_end + p.seqlen_k - p.seqlen_q));
    }
    tile.blocks = (keys + BLOCK_N - 1) / BLOCK_N;
    return tile;
  }

  __device__ __forceinline__ void init(int readers) { posted.init(readers); }

  // Producer.
  __device__ __forceinline__ void announce(int i, const Tile& tile) {
    posted.wait_free(i);
    if (elected()) {
      post[i % 2] = tile;
      mbarrier_arrive(posted.full_of(i));
    }
  }
  // Consumer: the i-th tile of this CTA, to be read where it lies until it is freed; blocks < 0 means that there is none.
  __device__ __forceinline__ const Tile& tile(int i) const { return post[i % 2]; }
};
