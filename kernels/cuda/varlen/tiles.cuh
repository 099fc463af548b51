// In place of the fixed-length kernels' header of this name: packed sequences, and which tile of them a CTA works on next.
#pragma once
#include "sequences.cuh"
#include "verbs.cuh"

static_assert(CLUSTER == 1, "the CTAs of a cluster would need tiles of one sequence");

struct Params {
  float* lse;                 // (heads, total_q)
  int* queue;                 // next tile and CTAs done, zeroed by prepare.cu
  u32* trace;                 // see trace.cuh; null unless TRACE
  const TensorMap* maps;      // q's of every sequence, then k's, v's and o's
  const Sequence* sequences;  // in the order of their tiles
  const int* tiles;           // how many there are
  int batch, heads, kv_heads, total_q;
  float scale_log2;           // softmax_scale * log2(e)

  __device__ __forceinline__ Maps maps_of(int operand) const { return {maps + operand * batch}; }
};

// BLOCK_M queries of one head of one sequence against `blocks` K/V blocks, walked from the last to the first.
struct alignas(16) Tile {
  int m, head, batch, blocks;
  int seqlen_q, seqlen_k, start;  // of the sequence

  // How many of the walked blocks a warpgroup whose first row is `row` has to mask.
  __device__ __forceinline__ int masked(const Params&, int row) const {
    int keys = CAUSAL ? row + seqlen_k - seqlen_q + 1 : seqlen_k;
    return max(0, blocks - max(0, min(keys, seqlen_k)) / BLOCK_N);
  }
};

// The tiles of this CTA in turn, from a queue. The producer finds each and posts it; consumers read the post.
struct Work {
  Tile post[2];
  Ring<2> posted;

  static constexpr bool QUEUED = true;

  static __device__ __forceinline__ int count(const Params& p) { return *p.tiles; }

  // The sequence of tile `index`: the last whose first tile is not after it, sought by a warp in steps of 32.
  static __device__ __forceinline__ Sequence sequence_of(int index, const Params& p) {
    int low = 0, high = p.batch;
    while (high - low > 1) {
      const int step = (high - low + 31) / 32, probe = low + lane_id() * step;
      const bool reached = probe < high && p.sequences[probe].first <= index;
      low += (__popc(__ballot_sync(0xffffffffu, reached)) - 1) * step;
      high = min(high, low + step);
    }
    return p.sequences[low];
  }

  static __device__ __forceinline__ Tile locate(int index, const Params& p) {
    const Sequence of = sequence_of(index, p);
    const int within = index - of.first, first = within / (of.section * of.m_tiles) * of.section;
    const int inside = within - first * of.m_tiles, heads = min(of.section, p.heads - first);
    Tile tile{of.m_tiles - 1 - inside / heads, first + inside % heads, of.index, 0, of.queries, of.keys, of.start};
    int keys = of.keys;
    if constexpr (CAUSAL) keys = max(0, min(keys, min((tile.m + 1) * BLOCK_M, of.queries) + of.keys - of.queries));
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

// The wrappers of ptx.cuh on the map of one sequence: `batch` chooses the map and is no coordinate.
__device__ __forceinline__ void tma_prefetch(Maps) {}
__device__ __forceinline__ void tma_load(void* to, Maps maps, u64* full, int column, int row, int head, int batch) {
  tma_load(to, maps.of[batch], full, column, row, head, 0);
}
__device__ __forceinline__ void tma_load_multicast(void*, Maps, u64*, unsigned short, int, int, int, int) {}  // no clusters here
__device__ __forceinline__ void tma_store(Maps maps, u32 from, int column, int row, int head, int batch) {
  tma_store(maps.of[batch], from, column, row, head, 0);
}
// Maps that another kernel wrote: what the unit of TMA still holds of that address is old (PTX ISA, fence.proxy.tensormap).
__device__ __forceinline__ void tma_acquire(const TensorMap* map) {
  asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");
}
__device__ __forceinline__ void acquire_maps(const Params& p, int sequence) {
#pragma unroll
  for (int operand = 0; operand < 4; ++operand) tma_acquire(p.maps_of(operand).of + sequence);
}
