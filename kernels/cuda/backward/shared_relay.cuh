// Shared memory where one consumer warpgroup has all of a tile's dV, the other of its dK, and a third forms dQ: head_dim 256.
#pragma once

constexpr int HANDED = 2;  // stages of what a warpgroup hands to the next: P, dS
constexpr int BOXES = 2;   // on dQ's way out, a share each
constexpr int PIECE_BYTES = WARP_KEYS * ROW_BYTES;  // a warp's 16 keys of a panel of dV or dK, on their way out over P or dS
static_assert(CONSUMERS == 2 && BLOCK_N == KEYS && BLOCK_M == SHARE_ROWS, "a tile of 64 queries and 64 keys");

struct Outbox {
  u64 full, empty;
  __device__ __forceinline__ void init() { mbarrier_init(&full, 4), mbarrier_init(&empty, 1); }
};

struct Shared {
  alignas(1024) unsigned char K[BLOCK_N * HEAD_DIM * 2];
  alignas(1024) unsigned char V[BLOCK_N * HEAD_DIM * 2];
  alignas(1024) unsigned char Q[STAGES][BLOCK_M * HEAD_DIM * 2];
  alignas(1024) unsigned char dO[1][BLOCK_M * HEAD_DIM * 2];
  alignas(1024) unsigned char P[HANDED][BLOCK_N * BLOCK_M * 2];   // a row of each key
  alignas(1024) unsigned char dS[HANDED][BLOCK_M * BLOCK_N * 2];  // a row of each query
  alignas(1024) float dQ[BOXES][SHARE];
  alignas(128) float lse2[STAGES][BLOCK_M], delta[1][BLOCK_M];
  Work work;
  Ring<1> k, v, dO_ring;
  Ring<STAGES> q;
  u64 weights[HANDED], weights_read[HANDED];  // P is there, and has been read
  u64 gradient[HANDED], multiplied[HANDED];   // dS is there, and dQ formed of it
  Outbox outbox[BOXES];

  __device__ __forceinline__ void init() {
    k.init(4 * 2), v.init(4);
    q.init(4 * CONSUMERS), dO_ring.init(4 * CONSUMERS);
    for (int i = 0; i < HANDED; ++i) {
      mbarrier_init(&weights[i], 4), mbarrier_init(&weights_read[i], 4);
      mbarrier_init(&gradient[i], 4), mbarrier_init(&multiplied[i], 4);
      outbox[i].init();
    }
    work.init(4 * (CONSUMERS + 1) + DRAINS);
    mbarrier_init_fence();
  }
};
