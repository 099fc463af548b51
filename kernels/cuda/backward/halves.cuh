// A consumer warpgroup at head_dim 256. dK and dV of 64 keys are 256 registers of a thread for one warpgroup, so two share their head
// dim, half each; S^T is formed by one and dP^T by the other, and P and dS go through shared memory. Each warp adds its rows of dQ to
// memory by itself. A schedule (halves.cu) defines `consume` and ends with ATTENTION_BACKWARD.
#pragma once
#include "loads.cuh"

typedef float Scores[BLOCK_M / 2];         // S^T, or dP^T, of one block: 64 keys x 64 queries
typedef float2 Rows[BLOCK_M / 8];          // LSE, or delta, of the queries of a thread's elements
typedef u32 Operand[BLOCK_M / 4];          // P^T, or dS^T, as A of a GEMM
typedef float Queries[SHARE / WARPGROUP];  // a share of dQ: 64 queries x 64 of the head dim
constexpr int QUERY_STEPS = BLOCK_M / 16, KEY_STEPS = BLOCK_N / 16;

struct Consumer {
  Shared& shared;
  const Problem& problem;
  int rank;
  int tiles = 0;             // begun
  int first = 0, last = -1;  // blocks of this tile, numbered over the kernel's life
  int head = 0, m = 0;       // query head and block in work
  int place = 0;             // of the head's sums in the ring
  float dK[HALF / 2], dV[HALF / 2];

  __device__ __forceinline__ Consumer(Shared& shared, const Problem& problem, int rank) : shared(shared), problem(problem), rank(rank) {}

  // Wait for the next tile; false when there is none.
  __device__ __forceinline__ bool begin() {
    const Tile& tile = shared.work.wait(tiles);
    if (tile.blocks < 0) return false;
    rank = uniform(thread_id() / WARPGROUP) - 1;  // anew, as there is no register to keep it in
    first = last + 1;
    last += tile.blocks;
    const Block at(tile, problem.p);
    head = at.head, m = at.m, place = head % problem.p.ring;
#pragma unroll
    for (int e = 0; e < HALF / 2; ++e) dK[e] = dV[e] = 0.0f;
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
  __device__ __forceinline__ void wait_q(int i) { shared.q.wait(i); }
  __device__ __forceinline__ void wait_do(int i) { shared.dO_ring.wait(i); }
  __device__ __forceinline__ void free_q(int i) { shared.q.free<1>(i); }
  __device__ __forceinline__ void free_do(int i) { shared.dO_ring.free<1>(i); }

  // Issue S^T = K Q[i]^T, or dP^T = V dO[i]^T.
  __device__ __forceinline__ void issue_scores(Scores& S, int i) const { issue_product(S, shared.K, shared.Q[i % STAGES]); }
  __device__ __forceinline__ void issue_products(Scores& dP, int i) const { issue_product(dP, shared.V, shared.dO[0]); }
  __device__ __forceinline__ void issue_product(Scores& S, const unsigned char* keys, const unsigned char* queries) const {
    const u64 a = matrix_descriptor(keys, 0, GROUP_BYTES), b = matrix_descriptor(queries, 0, GROUP_BYTES);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; ++k)
      Wgmma<BLOCK_M>::ss(S, a + k / 4 * (BLOCK_N * ROW_BYTES / 16) + k % 4 * 2, b + k / 4 * (BLOCK_M * ROW_BYTES / 16) + k % 4 * 2, k > 0);
    wgmma_commit();
  }
  // This warpgroup's half of the head dim of a block of queries, as B with a row of each query.
  __device__ __forceinline__ u64 half_of(const unsigned char* queries) const {
    return matrix_descriptor(queries + rank * (HALF / PANEL) * BLOCK_M * ROW_BYTES, BLOCK_M * ROW_BYTES, GROUP_BYTES);
  }
  // Issue its half of dV += P^T dO[i], or dK += dS^T Q[i], from this warpgroup's registers.
  __device__ __forceinline__ void issue_values(const Operand& P, int i) { issue_own(dV, P, half_of(shared.dO[0])); }
  __device__ __forceinline__ void issue_keys(const Operand& dS, int i) { issue_own(dK, dS, half_of(shared.Q[i % STAGES])); }
  __device__ __forceinline__ void issue_own(float (&sum)[HALF / 2], const Operand& a, u64 b) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < QUERY_STEPS; ++k) Wgmma<HALF>::rs(sum, a + 4 * k, b + k * (2 * GROUP_BYTES / 16), 1);
    wgmma_commit();
  }
  // The same from what the other has put: P with a row of each key, dS with a row of each query.
  __device__ __forceinline__ void issue_shared_values(int i) {
    const u64 a = matrix_descriptor(shared.P[i % P_STAGES], 0, GROUP_BYTES), b = half_of(shared.dO[0]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < QUERY_STEPS; ++k) WgmmaQ<HALF>::ss(dV, a + k * 2, b + k * (2 * GROUP_BYTES / 16), 1);
    wgmma_commit();
  }
  __device__ __forceinline__ void issue_shared_keys(int i) {
    const u64 a = matrix_descriptor(shared.dS, BLOCK_M * ROW_BYTES, GROUP_BYTES), b = half_of(shared.Q[i % STAGES]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < QUERY_STEPS; ++k) WgmmaQ<HALF>::ts(dK, a + k * (2 * GROUP_BYTES / 16), b + k * (2 * GROUP_BYTES / 16), 1);
    wgmma_commit();
  }
  // Issue one of its two shares of dQ = dS K: 64 of the head dim.
  __device__ __forceinline__ void issue_queries(Queries& dQ, int share) const {
    const u64 a = matrix_descriptor(shared.dS, 0, GROUP_BYTES);
    const u64 b = matrix_descriptor(shared.K + (2 * rank + share) * BLOCK_N * ROW_BYTES, BLOCK_N * ROW_BYTES, GROUP_BYTES);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < KEY_STEPS; ++k) WgmmaQ<SHARE_COLUMNS>::ss(dQ, a + k * 2, b + k * (2 * GROUP_BYTES / 16), k > 0);
    wgmma_commit();
  }
  // Until at most PENDING GEMMs are still running; then the result may be read.
  template <int PENDING, int N> __device__ __forceinline__ void wait_for(float (&x)[N]) {
    wgmma_wait<PENDING>();
    hold(x);
  }

  // Statistics of a block that has arrived, two queries of every 8.
  __device__ __forceinline__ void load_lse(Rows& rows, int i) const { load_rows(rows, shared.lse2[i % STAGES]); }
  __device__ __forceinline__ void load_rows(Rows& rows, const float* from) const {
    const u32 at = smem_address(from) + lane_id() % 4 * 8;
#pragma unroll
    for (int g = 0; g < BLOCK_M / 8; ++g) rows[g] = load_pair(at + g * 32);
  }

  // P = exp2(scale S - LSE) as an operand. A thread holds two keys, r and r + 8, and two queries of every 8.
  __device__ __forceinline__ void probabilities(Scores& S, const Rows& rows, Operand& P) const {
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
    return smem_address(shared.P[i % P_STAGES]) + (warp() * WARP_KEYS + lane % WARP_KEYS) * ROW_BYTES + ((2 * k + lane / 16) ^ lane % 8) * 16;
  }
  __device__ __forceinline__ void put_weights(const Operand& P, int i) const {
#pragma unroll
    for (int k = 0; k < QUERY_STEPS; ++k) store_matrices(weights_row(i, k), P[4 * k], P[4 * k + 1], P[4 * k + 2], P[4 * k + 3]);
    hand_over(&shared.weights[i % P_STAGES]);
  }
  __device__ __forceinline__ void wait_weights(int i) const { mbarrier_wait(&shared.weights[i % P_STAGES], i / P_STAGES & 1); }
  // dS = P (dP - delta) as an operand, with P and delta from shared memory, 16 queries at a time and the next already on their way.
  __device__ __forceinline__ void gradient(const Scores& dP, Operand& dS, int i) const {
    u32 P[2][4];
    float2 rows[2][2];
    const auto load = [&](int k) {
      u32* x = P[k % 2];
      load_matrices(weights_row(i, k), x[0], x[1], x[2], x[3]);
      const u32 at = smem_address(shared.delta[0]) + lane_id() % 4 * 8 + k * 64;
      rows[k % 2][0] = load_pair(at), rows[k % 2][1] = load_pair(at + 32);
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
  }
  // dS^T into shared memory, a row of each query. Whoever is here has seen P of this block, which the other put when it had read dS
  // of the block before.
  __device__ __forceinline__ void put_gradient(const Operand& dS) const {
    const int lane = lane_id();
    const u32 to = smem_address(shared.dS) + (lane / 16 * 8 + lane % 8) * ROW_BYTES + ((2 * warp() + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
    for (int k = 0; k < QUERY_STEPS; ++k)
      store_transposed(to + k * 16 * ROW_BYTES, dS[4 * k], dS[4 * k + 1], dS[4 * k + 2], dS[4 * k + 3]);
    hand_over(&shared.gradient);
  }
  __device__ __forceinline__ void wait_gradient(int i) const { mbarrier_wait(&shared.gradient, i & 1); }
  __device__ __forceinline__ void hand_over(u64* full) const {
    fence_async();
    __syncwarp();
    if (lane_id() == 0) mbarrier_arrive(full);
  }

  // This warp's 16 queries of a share of dQ, of the block in work, to memory by its own shared memory; 32 bytes of a row lie at their
  // number xor the row's.
  __device__ __forceinline__ void put_queries(const Queries& dQ, int share) const {
    const Params& p = problem.p;
    const int lane = lane_id();
    unsigned char* out = shared.out[rank * 4 + warp()];
    const u32 to = smem_address(out) + lane / 4 * (SHARE_COLUMNS * 4) + lane / 4 * 32 + lane % 4 * 8;
    if (lane == 0) tma_wait_read();
    __syncwarp();
#pragma unroll
    for (int g = 0; g < SHARE_COLUMNS / 8; ++g) {
      store_pair(to ^ g * 32, dQ[4 * g], dQ[4 * g + 1]);
      store_pair((to ^ g * 32) + 8 * SHARE_COLUMNS * 4, dQ[4 * g + 2], dQ[4 * g + 3]);
    }
    fence_async();
    __syncwarp();
    if (lane == 0) {
      int at = m, of = head;
      asm volatile("" : "+r"(at), "+r"(of));  // addresses anew each time: there are no registers to keep them in
      int* turn = p.turns + ((u64)(u32)of * (u32)p.m_tiles + (u32)at) * (4 * CONSUMERS) + rank * 4 + warp();
      if (share == 0 && at == tile().first && of >= p.ring) wait_count(p.finished + of - p.ring, p.m_tiles * PARTS);
      if (DETERMINISTIC && share == 0) wait_turn(turn, tile().turn(at, p));
      bulk_add(p.sums + ((u64)(u32)(place * p.m_tiles + at) * SHARES + 2 * rank + share) * SHARE + warp() * (16 * SHARE_COLUMNS), out,
               OUT_BYTES);
      tma_commit();
      if (DETERMINISTIC && share == 1) {
        bulk_wait();
        count(turn, 1);
      }
    }
  }
  // On to the next block; of a head that ends the sums are counted when they are in.
  __device__ __forceinline__ void next(int i) {
    const Params& p = problem.p;
    const int was = head;
    if (++m == p.m_tiles) m = ROTATED ? 0 : tile().first;
    if (m == tile().first) {
      ++head;
      if (++place == p.ring) place = 0;
    }
    if (head == was && i != last) return;
    if (lane_id() == 0) {
      bulk_wait();
      count(p.added + was, tile().blocks / p.sharing);
    }
  }

  // This warp's 16 keys of its half of dV and dK.
  __device__ __forceinline__ void store() {
    send(dV, problem.dV);
#pragma unroll
    for (int e = 0; e < HALF / 2; ++e) dK[e] *= problem.p.scale;
    send(dK, problem.dK);
  }
  __device__ __forceinline__ void send(const float (&x)[HALF / 2], const TensorMap& map) const {
    const int lane = lane_id();
    const u32 from = smem_address(shared.out[rank * 4 + warp()]), to = from + lane % WARP_KEYS * ROW_BYTES;
    if (lane == 0) tma_wait_read();
    __syncwarp();
#pragma unroll
    for (int g = 0; g < HALF / 8; g += 2) {
      const float* y = x + 4 * g;
      store_matrices(to + g / 8 * (WARP_KEYS * ROW_BYTES) + ((g % 8 + lane / 16) ^ lane % 8) * 16, pack<BF16>(y[0], y[1]),
                     pack<BF16>(y[2], y[3]), pack<BF16>(y[4], y[5]), pack<BF16>(y[6], y[7]));
    }
    fence_async();
    __syncwarp();
    const int key = tile().n * BLOCK_N + warp() * WARP_KEYS;
    if (lane == 0 && key < problem.p.seqlen_k) {
#pragma unroll
      for (int c = 0; c < HALF / PANEL; ++c)
        tma_store(map, from + c * WARP_KEYS * ROW_BYTES, rank * HALF + c * PANEL, key, tile().kv_head, tile().batch);
      tma_commit();
    }
  }
  __device__ __forceinline__ int warp() const { return thread_id() % WARPGROUP / 32; }
};

__device__ __forceinline__ void drain(Shared&, const Problem&, int) {}  // each warp adds its own

#include "entry.cuh"
