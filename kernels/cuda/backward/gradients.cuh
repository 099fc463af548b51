// What the backward's main kernels share: shared memory, the warp roles, and the steps that a schedule puts in order.
// A CTA has a tile of BLOCK_N keys, whose dK and dV its two consumer warpgroups keep in registers, 64 keys each, and walks blocks of
// BLOCK_M queries. Scores are transposed, S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T are register operands as they lie.
// A schedule (fa3.cu ...) defines `consume` and ends with ATTENTION_BACKWARD.
// Chosen at compile time: HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, CAUSAL, BF16, DETERMINISTIC.
#pragma once
#include "narrow.cuh"
#include "problem.cuh"
#include "softmax.cuh"
#include "verbs.cuh"
#include "wgmma.cuh"

constexpr int PANEL = 64;       // columns of one 128-byte swizzled row
constexpr int PANELS = HEAD_DIM / PANEL;
constexpr int ROW_BYTES = 128;  // of a panel
constexpr int GROUP_BYTES = 8 * ROW_BYTES;
constexpr int KEYS = 64;        // of one consumer warpgroup: M of S^T, dP^T, dV and dK
constexpr int WARP_KEYS = 16;
constexpr int THREADS = WARPGROUP * (1 + CONSUMERS);
constexpr int DS_STAGES = 2;    // who writes dS(i + 2) has met the other over dS(i + 1), who had read dS(i)
constexpr bool TRANSPOSED_DQ = HEAD_DIM == 128;  // 64 of the head dim for each warpgroup; else 64 queries
constexpr int DQ_COLUMNS = TRANSPOSED_DQ ? BLOCK_M : HEAD_DIM;
constexpr int SHARE = BLOCK_M * HEAD_DIM / CONSUMERS;  // of a block's dQ, one warpgroup's
constexpr int STATISTICS_BYTES = BLOCK_M * 4;
static_assert(CONSUMERS == 2 && BLOCK_N == KEYS * CONSUMERS, "two consumer warpgroups of 64 keys");
static_assert(TRANSPOSED_DQ ? HEAD_DIM == 64 * CONSUMERS : BLOCK_M == 64 * CONSUMERS, "dQ is shared in halves of 64 rows");

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
  alignas(16) float lse2[STAGES][BLOCK_M], delta[STAGES][BLOCK_M];
  Ring<1> k, v;
  Ring<STAGES> q, dO_ring;
  u64 exchanged[DS_STAGES];  // both warpgroups' dS is there
  Outbox outbox[CONSUMERS];
};

struct Problem {
  const TensorMap &q, &k, &v, &dO, &dK, &dV;
  const Params& p;
};

// Warp 0 of the first warpgroup: every load.
__device__ __forceinline__ void produce(Shared& shared, const Problem& problem, const Tile& tile) {
  const Params& p = problem.p;
  if (!elected()) return;
  const auto once = [&](Ring<1>& ring, unsigned char* to, const TensorMap& map) {
    mbarrier_expect(ring.full_of(0), BLOCK_N * HEAD_DIM * 2);
    for (int c = 0; c < PANELS; ++c)
      tma_load(to + c * BLOCK_N * ROW_BYTES, map, ring.full_of(0), c * PANEL, tile.n * BLOCK_N, tile.kv_head, tile.batch);
  };
  const auto block = [&](Ring<STAGES>& ring, unsigned char* to, const TensorMap& map, float* to_row, const float* rows, int i, const Block& at) {
    ring.wait_free(i);
    u64* full = ring.full_of(i);
    mbarrier_expect(full, BLOCK_M * HEAD_DIM * 2 + STATISTICS_BYTES);
    for (int c = 0; c < PANELS; ++c)
      tma_load(to + c * BLOCK_M * ROW_BYTES, map, full, c * PANEL, at.m * BLOCK_M, at.head, tile.batch);
    bulk_load(to_row, rows + at.index(tile, p) * BLOCK_M, STATISTICS_BYTES, full);
  };
  once(shared.k, shared.K, problem.k);
  once(shared.v, shared.V, problem.v);
  Block at(tile, p);
#pragma unroll 1
  for (int i = 0; i < tile.blocks; ++i, at.next(p, tile)) {
    const int slot = i % STAGES;
    block(shared.q, shared.Q[slot], problem.q, shared.lse2[slot], p.lse2, i, at);
    block(shared.dO_ring, shared.dO[slot], problem.dO, shared.delta[slot], p.delta, i, at);
  }
}

// A warp for each consumer warpgroup: adds what it puts to memory.
__device__ __forceinline__ void drain(Shared& shared, const Problem& problem, const Tile& tile, int rank) {
  const Params& p = problem.p;
  if (!elected()) return;
  Outbox& box = shared.outbox[rank];
  Block at(tile, p);
#pragma unroll 1
  for (int i = 0; i < tile.blocks; ++i, at.next(p, tile)) {
    mbarrier_wait(&box.full, i & 1);
    const u64 share = at.index(tile, p) * CONSUMERS + rank;
    if constexpr (DETERMINISTIC) wait_turn(p.turns + share, tile.n);
    bulk_add(p.sums + share * SHARE, shared.dQ[rank], SHARE * 4);
    tma_commit();
    if constexpr (DETERMINISTIC) {
      bulk_wait();
      pass_turn(p.turns + share, tile.n + 1);
    } else {
      tma_wait_read();
    }
    mbarrier_arrive(&box.empty);
  }
}

typedef float Scores[BLOCK_M / 2];  // a warpgroup's S^T, or dP^T, of one block, in registers
typedef u32 Operand[BLOCK_M / 4];   // and P^T, or dS^T, as A of a GEMM
typedef float Queries[SHARE / WARPGROUP];  // its share of dQ

// A consumer warpgroup: 64 keys.
struct Consumer {
  Shared& shared;
  const Problem& problem;
  const Tile& tile;
  const int rank;
  int masked_until;  // the first query block of a head that needs no mask
  Block at;          // of the scores in work
  float dK[HEAD_DIM / 2], dV[HEAD_DIM / 2];

  __device__ __forceinline__ Consumer(Shared& shared, const Problem& problem, const Tile& tile, int rank)
      : shared(shared), problem(problem), tile(tile), rank(rank), at(tile, problem.p) {
    const Params& p = problem.p;
    const int end = tile.n * BLOCK_N + (rank + 1) * KEYS;  // past this warpgroup's last key
    masked_until = 0;
    if constexpr (CAUSAL) masked_until = (max(0, min(end, p.seqlen_k) - 1 - (p.seqlen_k - p.seqlen_q)) + BLOCK_M - 1) / BLOCK_M;
    if (end > p.seqlen_k) masked_until = p.m_tiles;
  }

  __device__ __forceinline__ void wait_keys_and_values() {
    shared.k.wait(0);
    shared.v.wait(0);
  }

  // Issue S^T = K Q[i]^T, or dP^T = V dO[i]^T.
  __device__ __forceinline__ void issue_scores(Scores& S, int i) {
    shared.q.wait(i);
    issue_product(S, shared.K, shared.Q[i % STAGES]);
  }
  __device__ __forceinline__ void issue_products(Scores& dP, int i) {
    shared.dO_ring.wait(i);
    issue_product(dP, shared.V, shared.dO[i % STAGES]);
  }
  __device__ __forceinline__ void issue_product(Scores& S, const unsigned char* keys, const unsigned char* queries) {
    const u64 a = matrix_descriptor(keys + rank * KEYS * ROW_BYTES, 0, GROUP_BYTES), b = matrix_descriptor(queries, 0, GROUP_BYTES);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; ++k)
      Wgmma<BLOCK_M>::ss(S, a + k / 4 * (BLOCK_N * ROW_BYTES / 16) + k % 4 * 2, b + k / 4 * (BLOCK_M * ROW_BYTES / 16) + k % 4 * 2, k > 0);
    wgmma_commit();
  }
  // Issue dV += P^T dO[i], or dK += dS^T Q[i].
  __device__ __forceinline__ void issue_values(const Operand& P, int i) { issue_sum(dV, P, shared.dO[i % STAGES], i); }
  __device__ __forceinline__ void issue_keys(const Operand& dS, int i) { issue_sum(dK, dS, shared.Q[i % STAGES], i); }
  __device__ __forceinline__ void issue_sum(float (&sum)[HEAD_DIM / 2], const Operand& a, const unsigned char* queries, int i) {
    const u64 b = matrix_descriptor(queries, BLOCK_M * ROW_BYTES, GROUP_BYTES);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < BLOCK_M / 16; ++k) Wgmma<HEAD_DIM>::rs(sum, a + 4 * k, b + k * (2 * GROUP_BYTES / 16), k > 0 || i > 0);
    wgmma_commit();
  }
  // Issue this warpgroup's share of dQ = dS[i] K, or of dQ^T = K^T dS[i]^T, over both warpgroups' keys.
  __device__ __forceinline__ void issue_queries(Queries& dQ, int i) {
    const unsigned char* dS = shared.dS[i % DS_STAGES];
    wgmma_fence();
    if constexpr (TRANSPOSED_DQ) {
      const u64 a = matrix_descriptor(shared.K + rank * BLOCK_N * ROW_BYTES, BLOCK_N * ROW_BYTES, GROUP_BYTES);
      const u64 b = matrix_descriptor(dS, 0, GROUP_BYTES);
#pragma unroll
      for (int k = 0; k < BLOCK_N / 16; ++k)
        WgmmaQ<DQ_COLUMNS>::ta(dQ, a + k * (2 * GROUP_BYTES / 16), b + k / 4 * (BLOCK_M * ROW_BYTES / 16) + k % 4 * 2, k > 0);
    } else {
      const u64 a = matrix_descriptor(dS + rank * 64 * ROW_BYTES, 0, GROUP_BYTES);
      const u64 b = matrix_descriptor(shared.K, BLOCK_N * ROW_BYTES, GROUP_BYTES);
#pragma unroll
      for (int k = 0; k < BLOCK_N / 16; ++k)
        WgmmaQ<DQ_COLUMNS>::tb(dQ, a + k / 4 * (BLOCK_M * ROW_BYTES / 16) + k % 4 * 2, b + k * (2 * GROUP_BYTES / 16), k > 0);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void free_q(int i) { shared.q.free<1>(i); }
  __device__ __forceinline__ void free_do(int i) { shared.dO_ring.free<1>(i); }

  // P = exp2(scale S - LSE) in the place of S. A thread holds two keys, r and r + 8, and two queries of every 8.
  __device__ __forceinline__ void probabilities(Scores& S, int i) {
    const Params& p = problem.p;
    const float2* rows = reinterpret_cast<const float2*>(shared.lse2[i % STAGES] + 2 * (lane_id() % 4));
#pragma unroll
    for (int g = 0; g < BLOCK_M / 8; ++g) {
      const float2 row = rows[4 * g];
      S[4 * g] = __fmaf_rn(S[4 * g], p.scale_log2, -row.x), S[4 * g + 1] = __fmaf_rn(S[4 * g + 1], p.scale_log2, -row.y);
      S[4 * g + 2] = __fmaf_rn(S[4 * g + 2], p.scale_log2, -row.x), S[4 * g + 3] = __fmaf_rn(S[4 * g + 3], p.scale_log2, -row.y);
    }
    if (at.m < masked_until) hide(S);
#pragma unroll
    for (int e = 0; e < BLOCK_M / 2; ++e) S[e] = exp2_approx(S[e]);
    at.next(p, tile);
  }
  // Query `column` of the block sees key r where column >= r - (seqlen_k - seqlen_q) - the block's first query.
  __device__ __forceinline__ void hide(Scores& S) const {
    const Params& p = problem.p;
    const int key = first_key(), column = at.m * BLOCK_M + 2 * (lane_id() % 4), offset = p.seqlen_k - p.seqlen_q;
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
  // dS = P (dP - delta), and both as operands.
  __device__ __forceinline__ void gradient(const Scores& P, const Scores& dP, Operand& weights, Operand& dS, int i) {
    const float2* rows = reinterpret_cast<const float2*>(shared.delta[i % STAGES] + 2 * (lane_id() % 4));
#pragma unroll
    for (int g = 0; g < BLOCK_M / 8; ++g) {
      const float2 row = rows[4 * g];
      const float *x = P + 4 * g, *y = dP + 4 * g;
      weights[2 * g] = pack<BF16>(x[0], x[1]), weights[2 * g + 1] = pack<BF16>(x[2], x[3]);
      dS[2 * g] = pack<BF16>(x[0] * (y[0] - row.x), x[1] * (y[1] - row.y));
      dS[2 * g + 1] = pack<BF16>(x[2] * (y[2] - row.x), x[3] * (y[3] - row.y));
    }
  }
  // The same from weights already rounded, which take half the registers.
  __device__ __forceinline__ void gradient(const Operand& P, const Scores& dP, Operand& dS, int i) {
    const float2* rows = reinterpret_cast<const float2*>(shared.delta[i % STAGES] + 2 * (lane_id() % 4));
#pragma unroll
    for (int g = 0; g < BLOCK_M / 8; ++g) {
      const float2 row = rows[4 * g];
      const float* y = dP + 4 * g;
      const float2 low = unpack<BF16>(P[2 * g]), high = unpack<BF16>(P[2 * g + 1]);
      dS[2 * g] = pack<BF16>(low.x * (y[0] - row.x), low.y * (y[1] - row.y));
      dS[2 * g + 1] = pack<BF16>(high.x * (y[2] - row.x), high.y * (y[3] - row.y));
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
    for (int k = 0; k < BLOCK_M / 16; ++k) store_transposed(to + k * 16 * ROW_BYTES, dS[4 * k], dS[4 * k + 1], dS[4 * k + 2], dS[4 * k + 3]);
    fence_async();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&shared.exchanged[i % DS_STAGES]);
  }
  // Both warpgroups' dS of block i.
  __device__ __forceinline__ void wait_gradients(int i) const { mbarrier_wait(&shared.exchanged[i % DS_STAGES], i / DS_STAGES & 1); }
  __device__ __forceinline__ void meet() const { barrier_sync(TURN_BARRIER, CONSUMERS * WARPGROUP); }

  // This warpgroup's share of dQ into the outbox, in the order of registers: 16 bytes of each thread in turn.
  __device__ __forceinline__ void put_queries(const Queries& dQ, int i) {
    Outbox& box = shared.outbox[rank];
    mbarrier_wait(&box.empty, (i & 1) ^ 1);
    const u32 to = smem_address(shared.dQ[rank]) + thread_id() % WARPGROUP * 16;
#pragma unroll
    for (int g = 0; g < SHARE / WARPGROUP / 4; ++g) store_floats(to + g * WARPGROUP * 16, dQ + 4 * g);
    fence_async();
    __syncwarp();
    if (lane_id() == 0) mbarrier_arrive(&box.full);
  }

  // dV over V, dK over K, each warp its own 16 keys; then memory.
  __device__ __forceinline__ void store() {
#pragma unroll
    for (int e = 0; e < HEAD_DIM / 2; ++e) dK[e] *= problem.p.scale;
    stage(dV, shared.V);
    stage(dK, shared.K);
    fence_async();
    __syncwarp();
    if (lane_id() == 0) {
#pragma unroll
      for (int c = 0; c < PANELS; ++c) {
        const int key = tile.n * BLOCK_N + rank * KEYS + warp() * WARP_KEYS;
        if (key >= problem.p.seqlen_k) break;
        tma_store(problem.dV, staged(shared.V) + c * BLOCK_N * ROW_BYTES, c * PANEL, key, tile.kv_head, tile.batch);
        tma_store(problem.dK, staged(shared.K) + c * BLOCK_N * ROW_BYTES, c * PANEL, key, tile.kv_head, tile.batch);
      }
      tma_commit();
      tma_wait_read();
    }
  }
  __device__ __forceinline__ u32 staged(const unsigned char* rows) const {
    return smem_address(rows) + (rank * KEYS + warp() * WARP_KEYS) * ROW_BYTES;
  }
  __device__ __forceinline__ void stage(const float (&x)[HEAD_DIM / 2], const unsigned char* rows) const {
    const int lane = lane_id();
    const u32 to = staged(rows) + lane % WARP_KEYS * ROW_BYTES;
#pragma unroll
    for (int g = 0; g < HEAD_DIM / 8; g += 2) {
      const float* y = x + 4 * g;
      store_matrices(to + g / 8 * (BLOCK_N * ROW_BYTES) + ((g % 8 + lane / 16) ^ lane % 8) * 16, pack<BF16>(y[0], y[1]), pack<BF16>(y[2], y[3]),
                     pack<BF16>(y[4], y[5]), pack<BF16>(y[6], y[7]));
    }
  }

  __device__ __forceinline__ int warp() const { return thread_id() % WARPGROUP / 32; }
  // Of this thread's two keys the first; the other is 8 further.
  __device__ __forceinline__ int first_key() const { return tile.n * BLOCK_N + rank * KEYS + warp() * WARP_KEYS + lane_id() / 4; }
};

// Keeps the exponentials before the next wait for a WGMMA, past which the compiler would move them: a store that depends on them
// all, and is never made, as no weight is negative. (A branch would cost registers that there are not.)
__device__ __forceinline__ void never_store(u32 signs) {
  asm volatile("{\n\t.reg .pred never;\n\tsetp.ne.u32 never, %0, 0;\n\t@never st.shared.u32 [%1], %0;\n\t}" ::"r"(signs), "r"(0) : "memory");
}
__device__ __forceinline__ void pin(const Scores& P) {
  u32 signs = 0;
#pragma unroll
  for (int e = 0; e < BLOCK_M / 2; ++e) signs |= __float_as_uint(P[e]);
  never_store(signs & 0x80000000u);
}
__device__ __forceinline__ void pin(const Operand& P) {
  u32 signs = 0;
#pragma unroll
  for (int e = 0; e < BLOCK_M / 4; ++e) signs |= P[e];
  never_store(signs & 0x80008000u);
}
template <int PENDING, int N> __device__ __forceinline__ void wait_for(float (&x)[N]) {
  wgmma_wait<PENDING>();
  hold(x);
}

__device__ __forceinline__ void consume(Consumer& wg);

// What the CTA is launched with, 168 x 384 registers, dealt out anew.
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;

__device__ __forceinline__ void attention(const Problem& problem) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int warpgroup = uniform(threadIdx.x / WARPGROUP);
  if (threadIdx.x == 0) {
    tma_prefetch(problem.q), tma_prefetch(problem.k), tma_prefetch(problem.v), tma_prefetch(problem.dO);
    tma_prefetch(problem.dK), tma_prefetch(problem.dV);
    shared.k.init(1), shared.v.init(1);
    shared.q.init(4 * CONSUMERS), shared.dO_ring.init(4 * CONSUMERS);
    for (int i = 0; i < DS_STAGES; ++i) mbarrier_init(&shared.exchanged[i], 4 * CONSUMERS);
    for (int wg = 0; wg < CONSUMERS; ++wg) shared.outbox[wg].init();
    mbarrier_init_fence();
  }
  __syncthreads();
  const Tile tile(blockIdx.x, problem.p);
  if (warpgroup == 0) {
    fewer_registers<PRODUCER_REGISTERS>();
    const int warp = uniform(threadIdx.x / 32);
    if (warp == 0) produce(shared, problem, tile);
    else if (warp <= CONSUMERS) drain(shared, problem, tile, warp - 1);
  } else {
    more_registers<CONSUMER_REGISTERS>();
    Consumer wg(shared, problem, tile, warpgroup - 1);
    consume(wg);
  }
}

extern "C" {
__constant__ int attention_smem_bytes = sizeof(Shared);
}

#define ATTENTION_BACKWARD                                                                                                           \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                                           \
      attention_backward(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, \
                         const __grid_constant__ TensorMap dO, const __grid_constant__ TensorMap dK, const __grid_constant__ TensorMap dV, \
                         const __grid_constant__ Params p) {                                                                         \
    attention(Problem{q, k, v, dO, dK, dV, p});                                                                                      \
  }
