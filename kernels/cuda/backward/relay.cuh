// Head_dim 256 by three warpgroups: what each does of a block. A schedule (relay.cu) defines `consume` and ends with ATTENTION_BACKWARD.
#pragma once
#include "loads.cuh"

typedef float Scores[BLOCK_M / 2];         // S^T, or dP^T, of one block: 64 keys x 64 queries
typedef float2 Rows[BLOCK_M / 8];          // LSE of the queries of a thread's elements
typedef u32 Operand[BLOCK_M / 4];          // P^T, or dS^T, as A of a GEMM
typedef float Queries[SHARE / WARPGROUP];  // a share of dQ: 64 queries x 64 of the head dim
constexpr int QUERY_STEPS = BLOCK_M / 16, KEY_STEPS = BLOCK_N / 16, HALF = HEAD_DIM / 2;

// What this warp has written is there for whom it is meant.
__device__ __forceinline__ void hand_over(u64* full) {
  fence_async();
  __syncwarp();
  if (lane_id() == 0) mbarrier_arrive(full);
}

// A warpgroup that has dV (rank 0) or dK (rank 1) of 64 keys.
struct Consumer {
  Shared& shared;
  const Problem& problem;
  int rank;
  int tiles = 0;             // begun
  int first = 0, last = -1;  // blocks of this tile, numbered over the kernel's life
  int m = 0;                 // query block in work
  float sum[2][HALF / 2];    // dV, or dK, in halves of the head dim

  __device__ __forceinline__ Consumer(Shared& shared, const Problem& problem, int rank) : shared(shared), problem(problem), rank(rank) {}

  // Wait for the next tile; false when there is none.
  __device__ __forceinline__ bool begin() {
    const Tile& tile = shared.work.wait(tiles);
    if (tile.blocks < 0) return false;
    first = last + 1;
    last += tile.blocks;
    m = tile.first;
    return true;
  }
  __device__ __forceinline__ void end() {
    __syncwarp();
    shared.work.posted.free<1>(tiles);
    ++tiles;
  }
  __device__ __forceinline__ const Tile& tile() const { return shared.work.post[tiles % 2]; }

  __device__ __forceinline__ void wait_k() { shared.k.wait(tiles); }
  __device__ __forceinline__ void wait_v() { shared.v.wait(tiles); }
  __device__ __forceinline__ void free_k() { shared.k.free<1>(tiles); }
  __device__ __forceinline__ void free_v() { shared.v.free<1>(tiles); }
  __device__ __forceinline__ void free_q(int i) { shared.q.free<1>(i); }
  __device__ __forceinline__ void free_do(int i) { shared.dO_ring.free<1>(i); }

  // Issue S^T = K Q[i]^T, or dP^T = V dO[i]^T.
  __device__ __forceinline__ void issue_scores(Scores& S, int i) const {
    shared.q.wait(i);
    issue_product(S, shared.K, shared.Q[i % STAGES]);
  }
  __device__ __forceinline__ void issue_products(Scores& dP, int i) const {
    shared.dO_ring.wait(i);
    issue_product(dP, shared.V, shared.dO[0]);
  }
  __device__ __forceinline__ void issue_product(Scores& S, const unsigned char* keys, const unsigned char* queries) const {
    const u64 a = matrix_descriptor(keys, 0, GROUP_BYTES), b = matrix_descriptor(queries, 0, GROUP_BYTES);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; ++k)
      Wgmma<BLOCK_M>::ss(S, a + k / 4 * (BLOCK_N * ROW_BYTES / 16) + k % 4 * 2, b + k / 4 * (BLOCK_M * ROW_BYTES / 16) + k % 4 * 2, k > 0);
    wgmma_commit();
  }
  // Issue dV += P^T dO[i], or dK += dS^T Q[i]; or they begin with it.
  __device__ __forceinline__ void issue_values(const Operand& P, int i, bool started) {
    shared.dO_ring.wait(i);
    issue_sum(P, shared.dO[0], started);
  }
  __device__ __forceinline__ void issue_keys(const Operand& dS, int i, bool started) {
    shared.q.wait(i);
    issue_sum(dS, shared.Q[i % STAGES], started);
  }
  __device__ __forceinline__ void issue_sum(const Operand& a, const unsigned char* queries, bool started) {
    const u64 b = matrix_descriptor(queries, BLOCK_M * ROW_BYTES, GROUP_BYTES);
    wgmma_fence();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int k = 0; k < QUERY_STEPS; ++k)
        Wgmma<HALF>::rs(sum[half], a + 4 * k, b + half * (HALF / PANEL * BLOCK_M * ROW_BYTES / 16) + k * (2 * GROUP_BYTES / 16), k > 0 || started);
    }
    wgmma_commit();
  }
  // Until at most PENDING GEMMs are still running; then the result may be read.
  template <int PENDING, int N> __device__ __forceinline__ void wait_for(float (&x)[N]) {
    wgmma_wait<PENDING>();
    hold(x);
  }
  template <int PENDING> __device__ __forceinline__ void wait_sum() {
    wait_for<PENDING>(sum[0]);
    hold(sum[1]);
  }

  // Statistics of a block that has arrived, two queries of every 8.
  __device__ __forceinline__ void load_rows(Rows& rows, const float* from) const {
    const u32 at = smem_address(from) + lane_id() % 4 * 16;
#pragma unroll
    for (int g = 0; g < BLOCK_M / 8; g += 2) load_pairs(at + g * 32, rows[g], rows[g + 1]);
  }

  // P = exp2(scale S - LSE) as an operand. A thread holds two keys, r and r + 8, and two queries of every 8.
  __device__ __forceinline__ void probabilities(Scores& S, const Rows& rows, Operand& P) {
    const Params& p = problem.p;
#pragma unroll
    for (int g = 0; g < BLOCK_M / 8; ++g) {
      const float2 row = rows[g];
      S[4 * g] = __fmaf_rn(S[4 * g], p.scale_log2, -row.x), S[4 * g + 1] = __fmaf_rn(S[4 * g + 1], p.scale_log2, -row.y);
      S[4 * g + 2] = __fmaf_rn(S[4 * g + 2], p.scale_log2, -row.x), S[4 * g + 3] = __fmaf_rn(S[4 * g + 3], p.scale_log2, -row.y);
    }
    if (m < tile().masked[0]) hide(S);
#pragma unroll
    for (int e = 0; e < BLOCK_M / 4; ++e) P[e] = pack<BF16>(exp2_approx(S[2 * e]), exp2_approx(S[2 * e + 1]));
    if (++m == p.m_tiles) m = tile().first;
  }
  // Query `column` of the block sees key r where column >= r - (seqlen_k - seqlen_q) - the block's first query.
  __device__ __forceinline__ void hide(Scores& S) const {
    const Params& p = problem.p;
    int longer = p.seqlen_k;
    asm volatile("" : "+r"(longer));  // not kept in a register through the loop
    const int key = tile().n * BLOCK_N + warp() * WARP_KEYS + lane_id() / 4, offset = longer - p.seqlen_q;
    const int column = m * BLOCK_M + 2 * (lane_id() % 4);
    int begin[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      begin[r] = CAUSAL ? key + 8 * r - offset - column : 0;
      if (key + 8 * r >= p.seqlen_k) begin[r] = BLOCK_M;
    }
#pragma unroll
    for (int e = 0; e < BLOCK_M / 2; ++e)
      if (e / 4 * 8 + (e & 1) < begin[(e >> 1) & 1]) S[e] = NEGATIVE_INFINITY;
  }
  // P^T into shared memory, a row of each key; and from there, as the fragments that they were.
  __device__ __forceinline__ u32 weights_row(int i, int k) const {
    const int lane = lane_id();
    return smem_address(shared.P[i % HANDED]) + (warp() * WARP_KEYS + lane % WARP_KEYS) * ROW_BYTES + ((2 * k + lane / 16) ^ lane % 8) * 16;
  }
  // Until what was handed on HANDED blocks before block i has been read.
  __device__ __forceinline__ static void claim(const u64 (&read)[HANDED], int i) {
    mbarrier_wait(const_cast<u64*>(&read[i % HANDED]), i / HANDED & 1 ^ 1);
  }
  __device__ __forceinline__ void put_weights(const Operand& P, int i) const {
    claim(shared.weights_read, i);
#pragma unroll
    for (int k = 0; k < QUERY_STEPS; ++k) store_matrices(weights_row(i, k), P[4 * k], P[4 * k + 1], P[4 * k + 2], P[4 * k + 3]);
    hand_over(&shared.weights[i % HANDED]);
  }
  __device__ __forceinline__ void wait_weights(int i) const { mbarrier_wait(&shared.weights[i % HANDED], i / HANDED & 1); }
  // dS = P (dP - delta) as an operand, with P and delta from shared memory, 16 queries at a time and the next already on their way.
  __device__ __forceinline__ void gradient(const Scores& dP, Operand& dS, int i) const {
    u32 P[2][4];
    float2 rows[2][2];
    const auto load = [&](int k) {
      u32* x = P[k % 2];
      load_matrices(weights_row(i, k), x[0], x[1], x[2], x[3]);
      load_pairs(smem_address(shared.delta[0]) + lane_id() % 4 * 16 + k * 64, rows[k % 2][0], rows[k % 2][1]);
    };
    load(0);
#pragma unroll
    for (int k = 0; k < QUERY_STEPS; ++k) {
      if (k + 1 < QUERY_STEPS) load(k + 1);
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        const float2 row = rows[k % 2][g];
        const float* y = dP + 8 * k + 4 * g;
        const float2 low = unpack<BF16>(P[k % 2][2 * g]), high = unpack<BF16>(P[k % 2][2 * g + 1]);
        dS[4 * k + 2 * g] = pack<BF16>(low.x * (y[0] - row.x), low.y * (y[1] - row.y));
        dS[4 * k + 2 * g + 1] = pack<BF16>(high.x * (y[2] - row.x), high.y * (y[3] - row.y));
      }
    }
    __syncwarp();
    if (lane_id() == 0) mbarrier_arrive(&shared.weights_read[i % HANDED]);
  }
  // dS^T into shared memory, a row of each query.
  __device__ __forceinline__ void put_gradient(const Operand& dS, int i) const {
    claim(shared.multiplied, i);
    const int lane = lane_id();
    const u32 to = smem_address(shared.dS[i % HANDED]) + (lane / 16 * 8 + lane % 8) * ROW_BYTES + ((2 * warp() + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
    for (int k = 0; k < QUERY_STEPS; ++k)
      store_transposed(to + k * 16 * ROW_BYTES, dS[4 * k], dS[4 * k + 1], dS[4 * k + 2], dS[4 * k + 3]);
    hand_over(&shared.gradient[i % HANDED]);
  }

  // This warp's 16 keys of dV leave over P, those of dK over dS, once the last two of these have been read.
  __device__ __forceinline__ void store_values() {
    claim(shared.weights_read, last + 1), claim(shared.weights_read, last + 2);
    send(shared.P, problem.dV);
  }
  __device__ __forceinline__ void store_keys() {
    claim(shared.multiplied, last + 1), claim(shared.multiplied, last + 2);
#pragma unroll
    for (int e = 0; e < HALF / 2; ++e) sum[0][e] *= problem.p.scale, sum[1][e] *= problem.p.scale;
    barrier_sync(1, WARPGROUP);  // dS has rows of every warp
    send(shared.dS, problem.dK);
    barrier_sync(1, WARPGROUP);
  }
  __device__ __forceinline__ void send(const unsigned char (&over)[HANDED][BLOCK_M * BLOCK_N * 2], const TensorMap& map) const {
    const int lane = lane_id(), key = tile().n * BLOCK_N + warp() * WARP_KEYS;
#pragma unroll
    for (int c = 0; c < PANELS; ++c) {
      const u32 from = smem_address(over[c % HANDED]) + warp() * PIECE_BYTES, to = from + lane % WARP_KEYS * ROW_BYTES;
      if (c >= HANDED) {
        if (lane == 0) tma_wait_read();
        __syncwarp();
      }
#pragma unroll
      for (int g = 0; g < 8; g += 2) {
        const float* y = sum[c / 2] + c % 2 * (HALF / 4) + 4 * g;
        store_matrices(to + ((g + lane / 16) ^ lane % 8) * 16, pack<BF16>(y[0], y[1]), pack<BF16>(y[2], y[3]), pack<BF16>(y[4], y[5]),
                       pack<BF16>(y[6], y[7]));
      }
      fence_async();
      __syncwarp();
      if (lane == 0 && key < problem.p.seqlen_k) {
        tma_store(map, from, c * PANEL, key, tile().kv_head, tile().batch);
        tma_commit();
      }
    }
    if (lane == 0) tma_wait_read();
    __syncwarp();
  }
  __device__ __forceinline__ int warp() const { return thread_id() % WARPGROUP / 32; }
};

// A warpgroup of its own forms dQ of every block, a share after the other, and puts it for the draining warps.
struct QueryGradients {
  Shared& shared;
  const Problem& problem;

  __device__ __forceinline__ void run() {
    const int lane = lane_id(), warp = thread_id() % WARPGROUP / 32;
    const u32 to = smem_address(shared.dQ[0]) + (warp * 16 + lane / 4) * (SHARE_COLUMNS * 4) + lane / 4 * 32 + lane % 4 * 8;
    int i = 0;  // block, numbered over the kernel's life
#pragma unroll 1
    for (int tiles = 0;; ++tiles) {
      const int blocks = shared.work.wait(tiles).blocks;
      __syncwarp();
      shared.work.posted.free<1>(tiles);
      if (blocks < 0) break;
      const int end = i + blocks;
      shared.k.wait(tiles);
#pragma unroll 1
      for (; i < end; ++i) {
        mbarrier_wait(&shared.gradient[i % HANDED], i / HANDED & 1);
#pragma unroll
        for (int share = 0; share < SHARES; ++share) {
          Queries dQ;
          const u64 a = matrix_descriptor(shared.dS[i % HANDED], 0, GROUP_BYTES);
          const u64 b = matrix_descriptor(shared.K + share * BLOCK_N * ROW_BYTES, BLOCK_N * ROW_BYTES, GROUP_BYTES);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < KEY_STEPS; ++k) WgmmaQ<SHARE_COLUMNS>::ss(dQ, a + k * 2, b + k * (2 * GROUP_BYTES / 16), k > 0);
          wgmma_commit();
          wgmma_wait<0>();
          hold(dQ);
          if (share == SHARES - 1 && lane == 0) mbarrier_arrive(&shared.multiplied[i % HANDED]);
          mbarrier_wait(&shared.outbox[share % BOXES].empty, share / BOXES & 1 ^ 1);
          const u32 out = to + share % BOXES * SHARE * 4;
#pragma unroll
          for (int g = 0; g < SHARE_COLUMNS / 8; ++g) {
            store_pair(out ^ g * 32, dQ[4 * g], dQ[4 * g + 1]);
            store_pair((out ^ g * 32) + 8 * SHARE_COLUMNS * 4, dQ[4 * g + 2], dQ[4 * g + 3]);
          }
          hand_over(&shared.outbox[share % BOXES].full);
        }
      }
      shared.k.free<1>(tiles);
    }
  }
};

// One lane of a warp: adds what is put into the boxes to memory, a share after the other; a box is free once the next one's add is under
// way and its own has been read.
__device__ __forceinline__ void drain(Shared& shared, const Problem& problem, int) {
  constexpr int TURNS = 8;  // of a block: see prepare.cu
  static_assert(SHARES == 2 * BOXES, "two shares a block through each box: its phase is the share's number over BOXES");
  const Params& p = problem.p;
#pragma unroll 1
  for (int t = 0;; ++t) {
    const Tile tile = shared.work.wait(t);
    mbarrier_arrive(&shared.work.posted.empty[t % 2]);
    if (tile.blocks < 0) return;
    Block at(tile, p);
    int first = 0;  // of this head
#pragma unroll 1
    for (int i = 0; i < tile.blocks;) {
      const int head = at.head;
      int* turn = p.turns + at.index(p) * TURNS;
#pragma unroll 1
      for (int share = 0; share < SHARES; ++share) {
        const int box = share % BOXES;
        mbarrier_wait(&shared.outbox[box].full, share / BOXES);
        if (share == 0 && i == first && head >= p.ring) wait_count(p.finished + head - p.ring, p.m_tiles * PARTS);
        if (DETERMINISTIC && share == 0) wait_turn(turn, tile.turn(at.m, p));
        bulk_add(p.sums + ((u64)(u32)(head % p.ring * p.m_tiles + at.m) * SHARES + share) * SHARE, shared.dQ[box], SHARE * 4);
        tma_commit();
        if (share > 0) {
          bulk_wait_read_but<1>();
          mbarrier_arrive(&shared.outbox[1 - box].empty);
        }
      }
      if constexpr (DETERMINISTIC) {
        bulk_wait();
        count(turn, 1);
      } else {
        tma_wait_read();
      }
      mbarrier_arrive(&shared.outbox[BOXES - 1].empty);
      at.next(tile, p);
      ++i;
      if (at.head != head || i == tile.blocks) {
        bulk_wait();
        count(p.added + head, (i - first) * TURNS);
        first = i;
      }
    }
  }
}
