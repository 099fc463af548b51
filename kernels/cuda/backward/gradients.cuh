// What the backward's main kernels share: shared memory, the warp roles, and the steps that a schedule puts in order.
// A CTA has a tile of BLOCK_N keys, whose dK and dV its two consumer warpgroups keep in registers, 64 keys each, and walks blocks of
// BLOCK_M queries. Scores are transposed, S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T are register operands as they lie.
// A schedule (fa3.cu ...) defines `consume` and ends with ATTENTION_BACKWARD.
// Chosen at compile time: HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, CAUSAL, BF16, DETERMINISTIC.
#pragma once
#include "drain.cuh"
#include "trace.cuh"

// What a consumer warpgroup stamps of a block in a trace build: GEMMs issued and done, and its own work done.
enum class Stamp : u32 {
  SCORES, SCORES_DONE, PROBABILITIES, PRODUCTS, PRODUCTS_DONE, GRADIENT, PUT_GRADIENT, VALUES, VALUES_DONE,
  QUERIES, QUERIES_DONE, PUT_QUERIES, KEYS, KEYS_DONE, STORE
};

typedef float Scores[BLOCK_M / 2];  // a warpgroup's S^T, or dP^T, of one block, in registers
typedef float2 Rows[BLOCK_M / 8];   // LSE, or delta, of the queries of a thread's elements
typedef u32 Operand[BLOCK_M / 4];   // and P^T, or dS^T, as A of a GEMM
typedef float Queries[SHARE / WARPGROUP];  // its share of dQ

constexpr int OWN_BARRIER = 1;  // named barriers: 0 is __syncthreads, then one of each warpgroup's own

// Keeps the exponentials before the next wait for a WGMMA, past which the compiler would move them: a store that depends on them
// all, and is never made, as no weight is negative. (A branch would cost registers that there are not.)
__device__ __forceinline__ void never_store(u32 signs) {
  asm volatile("{\n\t.reg .pred never;\n\tsetp.ne.u32 never, %0, 0;\n\t@never st.shared.u32 [%1], %0;\n\t}" ::"r"(signs), "r"(0)
               : "memory");
}
__device__ __forceinline__ void pin(const Scores& P) {
  u32 signs = 0;
#pragma unroll
  for (int e = 0; e < BLOCK_M / 2; ++e) signs |= __float_as_uint(P[e]);
  never_store(signs & 0x80000000u);
}
template <int FROM = 0, int TO = BLOCK_M / 4> __device__ __forceinline__ void pin(const Operand& P) {
  u32 signs = 0;
#pragma unroll
  for (int e = FROM; e < TO; ++e) signs |= P[e];
  never_store(signs & 0x80008000u);
}

// A consumer warpgroup: 64 keys.
struct Consumer {
  Shared& shared;
  const Problem& problem;
  const int rank;
  Trace trace;
  int tiles = 0;             // begun
  int first = 0, last = -1;  // blocks of this tile, numbered over the kernel's life
  int m = 0;                 // query block of the scores in work
  float dK[HEAD_DIM / 2], dV[HEAD_DIM / 2];

  __device__ __forceinline__ Consumer(Shared& shared, const Problem& problem, int rank) 
      : shared(shared), problem(problem), rank(rank), trace(problem.p.trace, 1 + rank) {}

  // Wait for the next tile; false when there is none.
  __device__ __forceinline__ bool begin() {
    const Params& p = problem.p;
    const Tile& tile = shared.work.wait(tiles);
    if (tile.blocks < 0) return false;
    first = last + 1;
    last += tile.blocks;
    m = SPLITS ? tile.begin % p.m_tiles : tile.first;
    trace.begin(first, last);
    return true;
  }
  __device__ __forceinline__ void end() {
    __syncwarp();
    shared.work.posted.free<1>(tiles);
    ++tiles;
  }
  __device__ __forceinline__ void stamp(Stamp what, int i) { trace.stamp(static_cast<Label>(what), i); }
  __device__ __forceinline__ const Tile& tile() const { return shared.work.post[tiles % 2]; }

  __device__ __forceinline__ void wait_k() { shared.k.wait(tiles); }
  __device__ __forceinline__ void wait_v() { shared.v.wait(tiles); }
  __device__ __forceinline__ void free_k() { shared.k.free<1>(tiles); }
  __device__ __forceinline__ void free_v() { shared.v.free<1>(tiles); }
  __device__ __forceinline__ void free_v_stored() {  // once dV and dK have left it
    if (lane_id() == 0) tma_wait_read();
    free_v();
  }

  // Whether no query of the block sees any of this warpgroup's keys; then it is left out, and dQ's warpgroup knows.
  __device__ __forceinline__ bool unseen() const { return m < tile().seen; }
  __device__ __forceinline__ void skip(int i) {
    shared.q.wait(i);
    shared.dO_ring.wait(i);
    free_q(i);
    free_do(i);
    claim_gradient(i);
    share_gradient(i);
    if (++m == problem.p.m_tiles) m = tile().first;
  }

  // Issue S^T = K Q[i]^T, or dP^T = V dO[i]^T.
  __device__ __forceinline__ void issue_scores(Scores& S, int i) {
    shared.q.wait(i);
    issue_product(S, shared.K, shared.Q[i % STAGES]);
    stamp(Stamp::SCORES, i);
  }
  __device__ __forceinline__ void issue_products(Scores& dP, int i) {
    shared.dO_ring.wait(i);
    issue_product(dP, shared.V, shared.dO[i % STAGES]);
    stamp(Stamp::PRODUCTS, i);
  }
  template <bool STARTED = false>
  __device__ __forceinline__ void issue_product(Scores& S, const unsigned char* keys, const unsigned char* queries) {
    const u64 a = matrix_descriptor(keys + rank * KEYS * ROW_BYTES, 0, GROUP_BYTES), b = matrix_descriptor(queries, 0, GROUP_BYTES);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; ++k)
      Wgmma<BLOCK_M>::ss(S, a + k / 4 * (BLOCK_N * ROW_BYTES / 16) + k % 4 * 2, b + k / 4 * (BLOCK_M * ROW_BYTES / 16) + k % 4 * 2, STARTED || k > 0);
    wgmma_commit();
  }
  // Issue dV += P^T dO[i], or dK += dS^T Q[i]; or dV and dK begin with it.
  __device__ __forceinline__ void issue_values(const Operand& P, int i, bool started) {
    issue_sum(dV, P, shared.dO[i % STAGES], started);
    stamp(Stamp::VALUES, i);
  }
  __device__ __forceinline__ void issue_keys(const Operand& dS, int i, bool started) {
    issue_sum(dK, dS, shared.Q[i % STAGES], started);
    stamp(Stamp::KEYS, i);
  }
  template <int FROM = 0, int TO = BLOCK_M / 16>
  __device__ __forceinline__ void issue_sum(float (&sum)[HEAD_DIM / 2], const Operand& a, const unsigned char* queries, bool started) {
    const u64 b = matrix_descriptor(queries, BLOCK_M * ROW_BYTES, GROUP_BYTES);
    wgmma_fence();
#pragma unroll
    for (int k = FROM; k < TO; ++k) Wgmma<HEAD_DIM>::rs(sum, a + 4 * k, b + k * (2 * GROUP_BYTES / 16), k > 0 || started);
    wgmma_commit();
  }
#if !DQ_APART
  // Issue this warpgroup's share of dQ = dS[i] K, over both warpgroups' keys.
  __device__ __forceinline__ void issue_queries(Queries& dQ, int i) {
    const u64 a = matrix_descriptor(shared.dS[i % DS_STAGES] + (DQ_BY_QUERIES ? rank * SHARE_ROWS * ROW_BYTES : 0), 0, GROUP_BYTES);
    const u64 b = matrix_descriptor(shared.K + (DQ_BY_QUERIES ? 0 : rank * BLOCK_N * ROW_BYTES), BLOCK_N * ROW_BYTES, GROUP_BYTES);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < BLOCK_N / 16; ++k)
      WgmmaQ<SHARE_COLUMNS>::ss(dQ, a + k / 4 * (BLOCK_M * ROW_BYTES / 16) + k % 4 * 2, b + k * (2 * GROUP_BYTES / 16), k > 0);
    wgmma_commit();
    stamp(Stamp::QUERIES, i);
  }
#endif

  // Until at most PENDING GEMMs are still running; then the result may be read.
  template <int PENDING> __device__ __forceinline__ void wait_scores(Scores& S, int i) { wait_for<PENDING>(S, Stamp::SCORES_DONE, i); }
  template <int PENDING> __device__ __forceinline__ void wait_products(Scores& dP, int i) {
    wait_for<PENDING>(dP, Stamp::PRODUCTS_DONE, i);
  }
  template <int PENDING> __device__ __forceinline__ void wait_values(int i) { wait_for<PENDING>(dV, Stamp::VALUES_DONE, i); }
  template <int PENDING> __device__ __forceinline__ void wait_queries(Queries& dQ, int i) { wait_for<PENDING>(dQ, Stamp::QUERIES_DONE, i); }
  template <int PENDING> __device__ __forceinline__ void wait_keys(int i) { wait_for<PENDING>(dK, Stamp::KEYS_DONE, i); }
  template <int PENDING, int N> __device__ __forceinline__ void wait_for(float (&x)[N], Stamp done, int i) {
    wgmma_wait<PENDING>();
    hold(x);
    stamp(done, i);
  }
  __device__ __forceinline__ void free_q(int i) { shared.q.free<1>(i); }
  __device__ __forceinline__ void free_do(int i) { shared.dO_ring.free<1>(i); }

  // Statistics of a block that has arrived, two queries of every 8, as prepare.cu lays them: read before a wait, as shared memory answers late beside WGMMA.
  __device__ __forceinline__ void load_lse(Rows& rows, int i) const { load_rows(rows, shared.lse2[i % STAGES]); }
  __device__ __forceinline__ void load_delta(Rows& rows, int i) const { load_rows(rows, shared.delta[i % STAGES]); }
  __device__ __forceinline__ void load_rows(Rows& rows, const float* from) const {
    const u32 at = smem_address(from) + lane_id() % 4 * 16;
#pragma unroll
    for (int g = 0; g < BLOCK_M / 8; g += 2) load_pairs(at + g * 32, rows[g], rows[g + 1]);
  }

  // scale S - LSE in the place of S, -inf where it is masked. A thread holds two keys, r and r + 8, and two queries of every 8.
  __device__ __forceinline__ void exponents(Scores& S, const Rows& rows) {
    const Params& p = problem.p;
#pragma unroll
    for (int g = 0; g < BLOCK_M / 8; ++g) {
      const float2 row = rows[g];
      S[4 * g] = __fmaf_rn(S[4 * g], p.scale_log2, -row.x), S[4 * g + 1] = __fmaf_rn(S[4 * g + 1], p.scale_log2, -row.y);
      S[4 * g + 2] = __fmaf_rn(S[4 * g + 2], p.scale_log2, -row.x), S[4 * g + 3] = __fmaf_rn(S[4 * g + 3], p.scale_log2, -row.y);
    }
    if (m < tile().masked[rank]) hide(S);
    if (++m == p.m_tiles) m = ROTATED ? 0 : tile().first;
  }
  // P = exp2(scale S - LSE) in the place of S; or, of half of the queries, as an operand.
  __device__ __forceinline__ void probabilities(Scores& S, const Rows& rows, int i) {
    exponents(S, rows);
#pragma unroll
    for (int e = 0; e < BLOCK_M / 2; ++e) S[e] = exp2_approx(S[e]);
    stamp(Stamp::PROBABILITIES, i);
    trace.seek(i + 1);
  }
  template <int HALF> __device__ __forceinline__ void weights_of_half(const Scores& S, Operand& P, int i) {
    constexpr int FROM = HALF * BLOCK_M / 8, TO = FROM + BLOCK_M / 8;
#pragma unroll
    for (int e = FROM; e < TO; ++e) P[e] = pack<BF16>(exp2_approx(S[2 * e]), exp2_approx(S[2 * e + 1]));
    if constexpr (HALF == 0) {
      pin<FROM, TO>(P);
    } else {
      stamp(Stamp::PROBABILITIES, i);
      trace.seek(i + 1);
    }
  }
  // Query `column` of the block sees key r where column >= r - (seqlen_k - seqlen_q) - the block's first query; here, counted from the
  // thread's first query, where its keys begin to be seen.
  __device__ __forceinline__ void find_seen(int (&begin)[2]) const {
    const Params& p = problem.p;
    const int key = first_key(), column = m * BLOCK_M + 2 * (lane_id() % 4), offset = p.seqlen_k - p.seqlen_q;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      begin[r] = CAUSAL ? key + 8 * r - offset - column : 0;
      if (key + 8 * r >= p.seqlen_k) begin[r] = BLOCK_M;
    }
  }
  __device__ __forceinline__ void hide(Scores& S) const {
    int begin[2];
    find_seen(begin);
#pragma unroll
    for (int e = 0; e < BLOCK_M / 2; ++e)
      if (e / 4 * 8 + (e & 1) < begin[(e >> 1) & 1]) S[e] = NEGATIVE_INFINITY;
  }
  // dS = P (dP - delta), and both as operands.
  __device__ __forceinline__ void gradient(const Scores& P, const Scores& dP, const Rows& rows, Operand& weights, Operand& dS, int i) {
#pragma unroll
    for (int g = 0; g < BLOCK_M / 8; ++g) {
      const float2 row = rows[g];
      const float *x = P + 4 * g, *y = dP + 4 * g;
      weights[2 * g] = pack<BF16>(x[0], x[1]), weights[2 * g + 1] = pack<BF16>(x[2], x[3]);
      dS[2 * g] = pack<BF16>(x[0] * (y[0] - row.x), x[1] * (y[1] - row.y));
      dS[2 * g + 1] = pack<BF16>(x[2] * (y[2] - row.x), x[3] * (y[3] - row.y));
    }
    stamp(Stamp::GRADIENT, i);
  }
  // The same from weights already rounded, which take half the registers. In bf16 dP - delta is rounded too: 48 of 112 instructions less
  // for 32 elements.
  __device__ __forceinline__ void gradient(const Operand& P, const Scores& dP, const Rows& rows, Operand& dS, int i) {
#pragma unroll
    for (int g = 0; g < BLOCK_M / 8; ++g) gradient_of(P + 2 * g, dP + 4 * g, rows[g], dS + 2 * g);
    stamp(Stamp::GRADIENT, i);
  }
  // Of two queries and two keys.
  __device__ __forceinline__ static void gradient_of(const u32* P, const float* dP, float2 row, u32* dS) {
    if constexpr (BF16) {  // fp16 would overflow where dP does
      dS[0] = product(P[0], pack<BF16>(dP[0] - row.x, dP[1] - row.y));
      dS[1] = product(P[1], pack<BF16>(dP[2] - row.x, dP[3] - row.y));
    } else {
      const float2 low = unpack<BF16>(P[0]), high = unpack<BF16>(P[1]);
      dS[0] = pack<BF16>(low.x * (dP[0] - row.x), low.y * (dP[1] - row.y));
      dS[1] = pack<BF16>(high.x * (dP[2] - row.x), high.y * (dP[3] - row.y));
    }
  }
  // P as an operand.
  __device__ __forceinline__ void weights(const Scores& P, Operand& weights) const {
#pragma unroll
    for (int e = 0; e < BLOCK_M / 4; ++e) weights[e] = pack<BF16>(P[2 * e], P[2 * e + 1]);
  }
  // dS^T into shared memory, a row of each query: for dQ of both warpgroups.
  __device__ __forceinline__ void put_gradient(const Operand& dS, int i) {
    const int lane = lane_id();
    const u32 to = smem_address(shared.dS[i % DS_STAGES]) + rank * BLOCK_M * ROW_BYTES + (lane / 16 * 8 + lane % 8) * ROW_BYTES +
                   ((2 * warp() + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
    for (int k = 0; k < BLOCK_M / 16; ++k)
      store_transposed(to + k * 16 * ROW_BYTES, dS[4 * k], dS[4 * k + 1], dS[4 * k + 2], dS[4 * k + 3]);
    fence_async();
    stamp(Stamp::PUT_GRADIENT, i);
  }
  // It may be read, and this warpgroup reads the one before no longer.
  __device__ __forceinline__ void share_gradient(int i) {
    __syncwarp();
    if (lane_id() == 0) mbarrier_arrive(&shared.exchanged[i % DS_STAGES]);
  }
  // Where a warpgroup of its own forms dQ: it reads the dS before in this block's place no longer.
  __device__ __forceinline__ void claim_gradient(int i) const { mbarrier_wait(&shared.multiplied[i % DS_STAGES], i / DS_STAGES & 1 ^ 1); }
  // Both warpgroups' dS of block i.
  __device__ __forceinline__ void wait_gradients(int i) const { mbarrier_wait(&shared.exchanged[i % DS_STAGES], i / DS_STAGES & 1); }
  // This warpgroup's share of dQ into the outbox.
  __device__ __forceinline__ void put_queries(const Queries& dQ, int i) {
    put(dQ, i);
    stamp(Stamp::PUT_QUERIES, i);
  }
  // 64 rows of 64 sums; 32 bytes of a row lie at their number xor the row's.
  __device__ __forceinline__ void put(const float* x, int number) const {
    claim(number);
    const int lane = lane_id();
    const u32 to = smem_address(shared.dQ[rank]) + (warp() * 16 + lane / 4) * (SHARE_COLUMNS * 4) + lane / 4 * 32 + lane % 4 * 8;
#pragma unroll
    for (int g = 0; g < SHARE_COLUMNS / 8; ++g) {
      store_pair(to ^ g * 32, x[4 * g], x[4 * g + 1]);
      store_pair((to ^ g * 32) + 8 * SHARE_COLUMNS * 4, x[4 * g + 2], x[4 * g + 3]);
    }
    fence_async();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&shared.outbox[rank].full);
  }
  // The outbox, once what was put before has left it: blocks are numbered over the kernel's life, and of what else goes through it
  // there is an even number.
  __device__ __forceinline__ void claim(int number) const { mbarrier_wait(&shared.outbox[rank].empty, number & 1 ^ 1); }

  // dV leaves, by the buffer of its own; dK, and dV where it has none, through the outbox once dQ is out of it.
  __device__ __forceinline__ void store_values() {
    if (SPLITS && tile().split >= 0) return;
    if constexpr (BY_V) barrier_sync(OWN_BARRIER + rank, WARPGROUP);  // no warp's GEMM reads V
    if constexpr (DV_APART || BY_V) send(dV, stage(), problem.dV);
  }
  __device__ __forceinline__ unsigned char* stage() const {
    return BY_V ? shared.V + rank * (KEYS * ROW_BYTES) + warp() * (WARP_KEYS * ROW_BYTES) : shared.dV[DV_APART ? rank * 4 + warp() : 0];
  }
  __device__ __forceinline__ void store_keys() {
    if (SPLITS && DQ_APART && tile().split >= 0) {  // by way of sums in memory, from registers: the outbox is another's
#pragma unroll
      for (int c = 0; c < PANELS; ++c) add_sums(dV + c * CHUNK / WARPGROUP, c), add_sums(dK + c * CHUNK / WARPGROUP, PANELS + c);
      __threadfence();
      barrier_sync(OWN_BARRIER + rank, WARPGROUP);
      if (thread_id() % WARPGROUP == 0) count(problem.p.key_added + tile().split, tile().blocks);
      return;
    }
    if (SPLITS && tile().split >= 0) {  // by way of sums in memory, as dQ
#pragma unroll
      for (int c = 0; c < PANELS; ++c) put(dV + c * CHUNK / WARPGROUP, last + 1 + c);
#pragma unroll
      for (int c = 0; c < PANELS; ++c) put(dK + c * CHUNK / WARPGROUP, last + 1 + PANELS + c);
      return;
    }
#pragma unroll
    for (int e = 0; e < HEAD_DIM / 2; ++e) dK[e] *= problem.p.scale;
    if constexpr (DQ_APART) {
      send(dK, stage(), problem.dK);
      stamp(Stamp::STORE, last);
      return;
    }
    claim(last + 1);
    unsigned char* to = reinterpret_cast<unsigned char*>(shared.dQ[rank]) + warp() * STAGED_BYTES;
    if constexpr (!DV_APART) send(dV, to, problem.dV);
    send(dK, to, problem.dK);
    stamp(Stamp::STORE, last);
  }
  // 64 keys of 64 sums of a split tile, each where `put` would lay it.
  __device__ __forceinline__ void add_sums(const float* x, int chunk) const {
    const int lane = lane_id();
    float* sums = problem.p.key_sums + ((u64)(u32)(tile().split * 2 * PANELS + chunk) * CONSUMERS + rank) * CHUNK;
    const u32 to = (warp() * 16 + lane / 4) * SHARE_COLUMNS + lane / 4 * 8 + lane % 4 * 2;
#pragma unroll
    for (int g = 0; g < SHARE_COLUMNS / 8; ++g) {
      add_pair(sums + (to ^ g * 8), x[4 * g], x[4 * g + 1]);
      add_pair(sums + (to ^ g * 8) + 8 * SHARE_COLUMNS, x[4 * g + 2], x[4 * g + 3]);
    }
  }
  // Before dQ of the next tile goes into the outbox: dK is out of it.
  __device__ __forceinline__ void claim_outbox() const {
    if (lane_id() == 0) tma_wait_read();
    barrier_sync(OWN_BARRIER + rank, WARPGROUP);
  }
  // This warp's 16 keys of a gradient in 16 bits, by its own shared memory to memory.
  __device__ __forceinline__ void send(const float (&x)[HEAD_DIM / 2], const unsigned char* stage, const TensorMap& map) const {
    const int lane = lane_id();
    const u32 from = smem_address(stage), to = from + lane % WARP_KEYS * ROW_BYTES;
    if (lane == 0) tma_wait_read();
    __syncwarp();
#pragma unroll
    for (int g = 0; g < HEAD_DIM / 8; g += 2) {
      const float* y = x + 4 * g;
      store_matrices(to + g / 8 * STAGE_PITCH + ((g % 8 + lane / 16) ^ lane % 8) * 16, pack<BF16>(y[0], y[1]),
                     pack<BF16>(y[2], y[3]), pack<BF16>(y[4], y[5]), pack<BF16>(y[6], y[7]));
    }
    fence_async();
    __syncwarp();
    const int key = tile().n * BLOCK_N + rank * KEYS + warp() * WARP_KEYS;
    if (lane == 0 && key < problem.p.seqlen_k) {
#pragma unroll
      for (int c = 0; c < PANELS; ++c)
        tma_store(map, from + c * STAGE_PITCH, c * PANEL, key, tile().kv_head, tile().batch);
      tma_commit();
    }
  }

  __device__ __forceinline__ int warp() const { return thread_id() % WARPGROUP / 32; }
  // Of this thread's two keys the first; the other is 8 further.
  __device__ __forceinline__ int first_key() const { return tile().n * BLOCK_N + rank * KEYS + warp() * WARP_KEYS + lane_id() / 4; }
};

#if !DQ_APART
#include "entry.cuh"
#endif
