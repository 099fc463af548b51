// The problem, and which tile of keys a CTA works on. The orders are those of simulator/problem/order.py, "columns".
#pragma once
#include "ptx.cuh"

struct Params {
  const float *lse2, *delta;  // (batch, heads, m_tiles * BLOCK_M): LSE in base 2, +inf where a row is not there or sees no key; delta
  float* sums;                // dQ: (batch, heads, m_tiles, 2 warpgroups, BLOCK_M * HEAD_DIM / 2) in the order of registers
  int* turns;                 // (batch, heads, m_tiles, 2): tiles of keys that have added, for deterministic sums; or null
  int batch, heads, kv_heads, seqlen_q, seqlen_k;
  int m_tiles, n_tiles;       // query blocks and key tiles of a head
  int section;                // K/V heads walked together where the mask is causal
  float scale, scale_log2;    // softmax_scale, and times log2(e)
};

// BLOCK_N keys of one K/V head, against the query blocks `first` .. m_tiles - 1 of every query head that shares it.
struct Tile {
  int n, kv_head, batch;
  int first;   // query block
  int walked;  // query blocks of one head
  int blocks;  // of all heads of the group

  __device__ __forceinline__ Tile(int index, const Params& p) {
    int flat;
    if constexpr (CAUSAL) {  // longest first: key tile 0 of every head of the section, and so on
      const int total = p.batch * p.kv_heads;
      const int begin = index / (p.section * p.n_tiles) * p.section;
      const int within = index - begin * p.n_tiles, heads = min(p.section, total - begin);
      n = within / heads;
      flat = begin + within % heads;
    } else {
      n = index % p.n_tiles;
      flat = index / p.n_tiles;
    }
    kv_head = flat % p.kv_heads;
    batch = flat / p.kv_heads;
    first = 0;
    if constexpr (CAUSAL) first = min(max(0, n * BLOCK_N - (p.seqlen_k - p.seqlen_q)), p.seqlen_q - 1) / BLOCK_M;
    walked = p.m_tiles - first;
    blocks = walked * (p.heads / p.kv_heads);
  }
};

// Where block i of a tile's walk is: a query head, and a query block of it.
struct Block {
  int head, m;
  __device__ __forceinline__ Block(const Tile& tile, const Params& p) : head(tile.kv_head * (p.heads / p.kv_heads)), m(tile.first) {}
  __device__ __forceinline__ void next(const Params& p, const Tile& tile) {
    if (++m == p.m_tiles) m = tile.first, ++head;
  }
  // Counted over all heads.
  __device__ __forceinline__ u64 index(const Tile& tile, const Params& p) const {
    return (u64)(u32)(tile.batch * p.heads + head) * (u32)p.m_tiles + (u32)m;
  }
};
