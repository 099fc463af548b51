// The problem, and which tiles of keys a CTA works on. The orders are those of simulator/problem/order.py, "columns".
#pragma once
#include "verbs.cuh"

struct Counters {
  int tile, part;  // next to be worked on; part of dQ next to be finished
};

struct Params {
  const float *lse2, *delta;  // (batch, heads, m_tiles * BLOCK_M): LSE in base 2, +inf where a row is not there or sees no key; delta
  float* sums;                // dQ's, zero before: (ring, m_tiles, 2 warpgroups, 64, 64); head h of all has slot h % ring
  Counters* counters;         // zero before
  int *added, *finished;      // (batch, heads), zero before: of a head's sums, shares of key tiles that are in and blocks that are out
  int* turns;                 // (batch, heads, m_tiles, 2), zero before: tiles of keys that have added, for deterministic sums; or null
  void* dQ;                   // (batch, seqlen_q, heads, HEAD_DIM), contiguous
  u32* trace;                 // see trace.cuh; null unless TRACE
  int batch, heads, kv_heads, seqlen_q, seqlen_k;
  int m_tiles, n_tiles;       // query blocks and key tiles of a head
  int section;                // K/V heads walked together where the mask is causal
  int ring;                   // heads that have sums at a time
  float scale, scale_log2;    // softmax_scale, and times log2(e)
};

// Deterministic sums with a full mask: so many tiles of keys begin as far apart in the queries as can be, and go round, so that each
// block's adds come one after another without a wait.
constexpr int TOGETHER = 32;
constexpr bool ROTATED = DETERMINISTIC && !CAUSAL;
__device__ __forceinline__ int together(const Params& p) { return min(TOGETHER, min(p.n_tiles, p.m_tiles)); }

// BLOCK_N keys of one K/V head, against the query blocks from `first` on (to the last, or round) of every query head that shares it.
struct alignas(16) Tile {
  int n, kv_head, batch;
  int first;   // query block
  int blocks;  // of all heads of the group

  // How many tiles of keys add to query block m before this one.
  __device__ __forceinline__ int turn(int m, const Params& p) const {
    if constexpr (CAUSAL) {  // from the diagonal on: the nearer, the sooner it is there
      const int sees = min(m * BLOCK_M + BLOCK_M, p.seqlen_q) - 1 + p.seqlen_k - p.seqlen_q;
      return sees / BLOCK_N - n;
    } else {
      const int group = together(p), apart = p.m_tiles / group, begin = n / group * group, rank = n - begin;
      const int size = min(group, p.n_tiles - begin), here = min(m / apart, size - 1);
      return begin + here - rank + (rank <= here ? 0 : size);
    }
  }

  static __device__ __forceinline__ Tile locate(int index, const Params& p) {
    Tile tile;
    int flat;
    if constexpr (CAUSAL) {  // longest first: key tile 0 of every head of the section, and so on
      const int total = p.batch * p.kv_heads;
      const int begin = index / (p.section * p.n_tiles) * p.section;
      const int within = index - begin * p.n_tiles, heads = min(p.section, total - begin);
      tile.n = within / heads;
      if constexpr (DETERMINISTIC) tile.n = p.n_tiles - 1 - tile.n;  // shortest first, as it adds first
      flat = begin + within % heads;
    } else {
      tile.n = index % p.n_tiles;
      flat = index / p.n_tiles;
    }
    tile.kv_head = flat % p.kv_heads;
    tile.batch = flat / p.kv_heads;
    tile.first = CAUSAL ? min(max(0, tile.n * BLOCK_N - (p.seqlen_k - p.seqlen_q)), p.seqlen_q - 1) / BLOCK_M : 0;
    tile.blocks = (p.m_tiles - tile.first) * (p.heads / p.kv_heads);
    if constexpr (ROTATED) tile.first = tile.n % together(p) * (p.m_tiles / together(p));
    return tile;
  }
};

// Where a tile's walk has come to: a query head, and a query block of it.
struct Block {
  int head, m;
  __device__ __forceinline__ Block(const Tile& tile, const Params& p)
      : head(tile.batch * p.heads + tile.kv_head * (p.heads / p.kv_heads)), m(tile.first) {}
  __device__ __forceinline__ void next(const Tile& tile, const Params& p) {
    if (++m == p.m_tiles) m = ROTATED ? 0 : tile.first;
    if (m == tile.first) ++head;
  }
  __device__ __forceinline__ u64 index(const Params& p) const { return (u64)(u32)head * (u32)p.m_tiles + (u32)m; }
};

// The tiles of this CTA in turn. The producer finds each and posts it; the others read the post.
struct Work {
  Tile post[2];
  Ring<2> posted;

  __device__ __forceinline__ void init(int readers) { posted.init(readers); }
  __device__ __forceinline__ void announce(int t, const Tile& tile) {
    posted.wait_free(t);
    post[t % 2] = tile;
    mbarrier_arrive(posted.full_of(t));
  }
  // The t-th tile of this CTA, to be read where it lies until it is freed; blocks < 0 means that there is none.
  __device__ __forceinline__ const Tile& wait(int t) {
    posted.wait(t);
    return post[t % 2];
  }
};
