// Shared memory where the consumer warpgroups share the head dim of a tile's dK, dV and dQ, half of it each: head_dim 256.
#pragma once

constexpr int HALF = HEAD_DIM / CONSUMERS;
constexpr int P_STAGES = 2;     // one warpgroup may write P(i + 1) while the other's dV still reads P(i)
constexpr int OUT_BYTES = 16 * SHARE_COLUMNS * 4;  // a warp's 16 queries of a share of dQ; or its 16 keys of a half of dV or dK
static_assert(CONSUMERS == 2 && BLOCK_N == KEYS && BLOCK_M == SHARE_ROWS, "a tile of 64 queries and 64 keys");
static_assert(OUT_BYTES == WARP_KEYS * HALF * 2, "dV and dK leave the way of dQ");

struct Shared {
  alignas(1024) unsigned char K[BLOCK_N * HEAD_DIM * 2];
  alignas(1024) unsigned char V[BLOCK_N * HEAD_DIM * 2];
  alignas(1024) unsigned char Q[STAGES][BLOCK_M * HEAD_DIM * 2];
  alignas(1024) unsigned char dO[1][BLOCK_M * HEAD_DIM * 2];
  alignas(1024) unsigned char P[P_STAGES][BLOCK_N * BLOCK_M * 2];  // a row of each key
  alignas(1024) unsigned char dS[BLOCK_M * BLOCK_N * 2];           // a row of each query
  alignas(1024) unsigned char out[CONSUMERS * 4][OUT_BYTES];       // of each warp
  alignas(128) float lse2[STAGES][BLOCK_M], delta[1][BLOCK_M];
  Work work;
  Ring<1> k, v, dO_ring;
  Ring<STAGES> q;
  u64 weights[P_STAGES], gradient;  // P is there, dS is there

  __device__ __forceinline__ void init() {
    k.init(4 * CONSUMERS), v.init(4);
    q.init(4 * CONSUMERS), dO_ring.init(4 * CONSUMERS);
    for (int i = 0; i < P_STAGES; ++i) mbarrier_init(&weights[i], 4);
    mbarrier_init(&gradient, 4);
    work.init(4 * CONSUMERS);
    mbarrier_init_fence();
  }
};
