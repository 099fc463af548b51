// producer.cuh where V lies in memory as rows of keys, one a column of a head (kernels/fp8/keyed.py): the loading warp brings a block of it to
// where the transposing warps would have put it, and these have nothing left to do.
#pragma once
#define Producer ProducerOfRows
#define Transposer TransposerOfRows
#include "transposing_producer.cuh"
#undef Producer
#undef Transposer

struct Producer : ProducerOfRows {
  // A tile's last load: as in ProducerOfRows. The transposing warps' arrivals are made here for them.
  __device__ __forceinline__ void load_v(const Tile& tile, int j) {
    if (Work::QUEUED && j == tile.blocks - 1) ticket = draw(problem.p.queue);
    const int block = base + j;
    shared.vt.wait_free(block);
    if (elected()) {
      u64* full = shared.vt.full_of(block);
      for (int i = 1; i < TRANSPOSERS; ++i) mbarrier_arrive(full);
      mbarrier_expect(full, KEY_PANELS * KEY_PANEL * HEAD_DIM);
#pragma unroll 1
      for (int c = 0; c < KEY_PANELS; ++c)
        tma_load(shared.Vt[block % VT_STAGES] + c * HEAD_DIM * KEY_PANEL, problem.v, full, (tile.blocks - 1 - j) * BLOCK_N + c * KEY_PANEL, 0,
                 kv_head, tile.batch);
    }
    trace.stamp(Label::LOAD_V, block);
  }
};

// A warp beside it: it hands back the tiles' posts, which count on it.
struct Transposer {
  Shared& shared;
  const int rank;

  __device__ __forceinline__ void run() {
    for (int tiles = 0;; ++tiles) {
      shared.work.posted.wait(tiles);
      const int blocks = shared.work.tile(tiles).blocks;
      __syncwarp();
      shared.work.posted.free<1>(tiles);
      if (blocks < 0) return;
    }
  }
};

// A first block that is masked may show a row few keys, whose maximum later blocks would pass again and again, each time with a look at
// its bytes or a second try: so the first block without a mask is taken from its own maximum too.
struct RowStateAfresh : RowStateFp8 {
  bool masked_before = false;

  template <int N> __device__ __forceinline__ bool online(const float (&S)[N], u32 (&P)[N / 4], const Scales& by, bool first, bool masked) {
    const bool afresh = HEAD_DIM == 128 && masked_before && !masked;
    masked_before = masked;
    return RowStateFp8::online(S, P, by, first || afresh, masked);
  }
};
#define RowStateFp8 RowStateAfresh
