// Shared memory where the consumer warpgroups share the keys of a tile, 64 each: head_dim 64 and 128.
#pragma once
constexpr int DS_STAGES = 2;    // who writes dS(i + 2) has met the other over dS(i + 1), who had read dS(i)
constexpr int STAGED_BYTES = WARP_KEYS * HEAD_DIM * 2;  // a warp's keys of dV, or of dK, on their way out
static_assert(CONSUMERS == 2 && BLOCK_N == KEYS * CONSUMERS, "two consumer warpgroups of 64 keys");
static_assert(SHARE * CONSUMERS == BLOCK_M * HEAD_DIM, "dQ is shared in halves");
static_assert(SHARE * 4 >= 4 * STAGED_BYTES, "dK leaves through the outbox of dQ");

// dV has room of its own where there is some, so that it leaves under the last dQ; else it follows dQ through the outbox, as dK does.
constexpr int BUFFERS_BYTES = 2 * BLOCK_N * HEAD_DIM * 2 + 2 * STAGES * BLOCK_M * (HEAD_DIM * 2 + 4) + DS_STAGES * BLOCK_M * BLOCK_N * 2 +
                              CONSUMERS * SHARE * 4;
constexpr bool DV_APART = BUFFERS_BYTES + CONSUMERS * 4 * STAGED_BYTES + 1024 <= 227 * 1024;
// Where dQ's outbox is another's, both leave by V's place, each warpgroup's keys of which it alone reads.
constexpr bool BY_V = DQ_APART && !DV_APART;
constexpr int STAGE_PITCH = BY_V ? BLOCK_N * ROW_BYTES : WARP_KEYS * ROW_BYTES;  // between the panels of a warp's keys

// What a warpgroup puts for a draining warp to add to memory.
struct Outbox {
  u64 full, empty;
  __device__ __forceinline__ void init() { mbarrier_init(&full, 4), mbarrier_init(&empty, 1); }
};

struct Shared {
  alignas(1024) unsigned char K[BLOCK_N * HEAD_DIM * 2];
  alignas(1024) unsigned char V[BLOCK_N * HEAD_DIM * 2];
  alignas(1024) unsigned char Q[STAGES][BLOCK_M * HEAD_DIM * 2];
  alignas(1024) unsigned char dO[STAGES][BLOCK_M * HEAD_DIM * 2];
  alignas(1024) unsigned char dS[DS_STAGES][BLOCK_M * BLOCK_N * 2];  // a panel of each warpgroup's 64 keys, a row of each query
  alignas(1024) float dQ[CONSUMERS][SHARE];
  alignas(1024) unsigned char dV[DV_APART ? CONSUMERS * 4 : 1][DV_APART ? STAGED_BYTES : 16];
  alignas(128) float lse2[STAGES][STATISTICS], delta[STAGES][STATISTICS];
  Work work;
  Ring<1> k, v;
  Ring<STAGES> q, dO_ring;
  u64 exchanged[DS_STAGES];  // both warpgroups' dS is there
  Outbox outbox[CONSUMERS];
  u64 multiplied[DS_STAGES];  // dQ is formed of dS, where a warpgroup of its own does that

  __device__ __forceinline__ void init() {
    k.init(4 * (CONSUMERS + DQ_APART)), v.init(4 * CONSUMERS);
    q.init(4 * CONSUMERS), dO_ring.init(4 * CONSUMERS);
    for (int i = 0; i < DS_STAGES; ++i) mbarrier_init(&exchanged[i], 4 * CONSUMERS), mbarrier_init(&multiplied[i], 4);
    for (int wg = 0; wg < CONSUMERS; ++wg) outbox[wg].init();
    work.init(4 * (CONSUMERS + DQ_APART) + DRAINS);
    mbarrier_init_fence();
  }
};
