// The problem, and which tiles of keys a CTA works on. The orders are those of simulator/problem/order.py, "columns".
#pragma once
#include "verbs.cuh"

#ifndef DQ_APART
#define DQ_APART 0  // whether a warpgroup of its own forms dQ (apart.cu)
#endif

struct Counters {
  int tile, part;  // next to be worked on; part of dQ next to be finished
};

struct Params {
  float* sums;                // dQ's, zero before: (ring, m_tiles, shares, 64, 64); head h of all has slot h % ring
  float* key_sums;            // dV's and dK's of split tiles, zero before: (split, dV or dK, HEAD_DIM / 64, 2 warpgroups, 64, 64)
  Counters* counters;         // zero before
  int *added, *finished;      // (batch, heads), zero before: shares of blocks added to a head's sums, parts that are out again
  int* key_added;             // (split), zero before: of a split tile, shares of blocks that are in its sums
  int* turns;                 // (batch, heads, m_tiles, adders), zero before: tiles of keys that have added, for deterministic sums; or null
  void *dQ, *dK, *dV;         // (batch, seqlen, heads, HEAD_DIM), contiguous
  u32* trace;                 // see trace.cuh; null unless TRACE
  int batch, heads, kv_heads, sharing, seqlen_q, seqlen_k;  // heads that share a K/V head
  int m_tiles, n_tiles;       // query blocks and key tiles of a head
  int section;                // K/V heads walked together where the mask is causal
  int ring;                   // heads that have sums at a time
  int group;                  // tiles of keys that run at a time for deterministic sums
  int adds;                   // shares of blocks that a head's sums need
  int split;                  // the first tiles of keys, which all CTAs share, so that each has as many blocks
  float scale, scale_log2;    // softmax_scale, and times log2(e)
};

// Deterministic sums with a full mask: `group` tiles of keys begin as far apart in the queries as can be, and go round, so that each
// block's adds come one after another without a wait.
constexpr bool ROTATED = DETERMINISTIC && !CAUSAL && HEAD_DIM <= 128;  // at 256 in ascending order: no registers for more
// Whether the second warpgroup leaves out blocks in which none of its keys is seen: one of each tile.
constexpr bool SKIPS = DQ_APART && CAUSAL && HEAD_DIM == 128;
constexpr bool SPLITS = !DETERMINISTIC && !CAUSAL && HEAD_DIM <= 128;  // whether tiles of keys may be shared

// BLOCK_N keys of one K/V head, against the query blocks from `first` on (to the last, or round) of every query head that shares it.
struct alignas(16) Tile {
  int n, kv_head, batch;
  int first;   // query block
  int blocks;  // of all heads of the group, or as many of them as this CTA has
  int begin;   // those before
  int masked[CONSUMERS];  // of each warpgroup the first query block of a head that needs no mask
  int seen;    // the first query block of a head that sees the second warpgroup's keys
  int split;   // number of a tile that two CTAs share; -2 - number of one among those that was not cut; or -1

  // How many tiles of keys add to query block m before this one.
  __device__ __forceinline__ int turn(int m, const Params& p) const {
    if constexpr (CAUSAL) {  // from the diagonal on: the nearer, the sooner it is there
      const int sees = min(m * BLOCK_M + BLOCK_M, p.seqlen_q) - 1 + p.seqlen_k - p.seqlen_q;
      return sees / BLOCK_N - n;
    } else if constexpr (!ROTATED) {
      return n;
    } else {
      const int group = p.group, apart = p.m_tiles / group, begin = n / group * group, rank = n - begin;
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
    tile.blocks = (p.m_tiles - tile.first) * p.sharing;
    for (int rank = 0; rank < CONSUMERS; ++rank) {
      const int end = tile.n * BLOCK_N + min(BLOCK_N, (rank + 1) * 64);  // past its last key
      tile.masked[rank] = CAUSAL ? (max(0, min(end, p.seqlen_k) - 1 - (p.seqlen_k - p.seqlen_q)) + BLOCK_M - 1) / BLOCK_M : 0;
      if (end > p.seqlen_k) tile.masked[rank] = p.m_tiles;
    }
    tile.begin = 0, tile.split = -1;
    tile.seen = SKIPS ? max(0, tile.n * BLOCK_N + 64 - (p.seqlen_k - p.seqlen_q)) / BLOCK_M : 0;
    if constexpr (ROTATED) tile.first = tile.n % p.group * (p.m_tiles / p.group);
    return tile;
  }
};

// Where a tile's walk has come to: a query head, and a query block of it.
struct Block {
  int head, m;
  __device__ __forceinline__ Block(const Tile& tile, const Params& p)
      : head(tile.batch * p.heads + tile.kv_head * p.sharing), m(tile.first) {
    if constexpr (SPLITS) head += tile.begin / p.m_tiles, m = tile.begin % p.m_tiles;
  }
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
